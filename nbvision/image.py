"""The noun every room shares: a ragged batch of images.

Images are height x width x channels ("HWC"), 8 bits a channel, channels interleaved, rows at any pitch. Decoders and
models elsewhere give others, which :class:`nbvision.Preprocess` reads as they are: NV12, planes ("CHW"), and floats.
Sizes are (height, width).  Boxes are ``x1, y1, x2, y2`` in pixels, half-open: a box covers columns ``x1 <= x < x2``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from nbvision.errors import DecodeError, InputError
from nbvision.runtime import memory
from nbvision.runtime.device import Device, array_module, device_of, resolve_device

__all__ = [
    "CHANNELS",
    "Color",
    "ImageBatch",
    "SourceColor",
    "SourceLayout",
    "Yuv",
    "address_of",
    "as_batch",
    "interleaved_color",
    "to_device",
]

Color = Literal["rgb", "bgr", "rgba", "bgra", "gray"]
SourceColor = Literal["rgb", "bgr", "rgba", "bgra", "gray", "nv12"]
SourceLayout = Literal["CHW", "HWC"]
Yuv = Literal["bt601", "bt601-full", "bt709", "bt709-full"]

CHANNELS: dict[str, int] = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "gray": 1}

_IMAGE_ALIGNMENT_BYTES = 256
_BYTE = np.dtype(np.uint8)
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))


class ImageBatch:
    """N images of any sizes on one device, each with its pixels or the error that stands in their place.

    Make one with :func:`nbvision.decode`, :meth:`from_arrays` or :func:`as_batch`.

    Attributes
    ----------
    color : {"rgb", "bgr", "rgba", "bgra", "gray", "nv12"}
        Order of the channels in memory. NV12 is a plane of luma and, below it at the same pitch, half as many lines of
        interleaved U, V.
    yuv : {"bt601", "bt601-full", "bt709", "bt709-full"} or None
        Of NV12 images: the matrix, of luma 16..235 and chroma 16..240 or of the full range 0..255.
    layout : {"HWC", "CHW"}
        Whether a pixel's channels lie side by side, or each channel is a plane, one right below the other.
    dtype : numpy.dtype
        uint8, or float16 or float32 of the caller's own range.
    device : {"cpu", "cuda"}
    sizes : (N, 2) int32 array, on the host
        Height and width of each picture; 0, 0 where an image is missing.
    errors : tuple of (DecodeError or None)
        Why an image is missing, item by item.
    damage : tuple of (DecodeError or None)
        What is wrong with an image that ``decode(..., recover=True)`` has decoded as far as it goes, item by item.
        Kept by :meth:`select` and :meth:`to`; what operations make of a batch does not have it.
    table : (N, 4) int64 array, on ``device``
        What kernels read: address of the first pixel, pitch in bytes, height, width.

    Notes
    -----
    Only :class:`nbvision.Preprocess` takes NV12, planes and floats; other operations want uint8 HWC and say so.

    Of a CUDA batch, images taken out of it and all operations wait on the GPU for the stream that writes its pixels.
    """

    def __init__(
        self,
        arrays: Sequence[Any | None],
        *,
        color: SourceColor,
        yuv: Yuv | None = None,
        layout: SourceLayout = "HWC",
        device: Device,
        errors: Sequence[DecodeError | None] | None = None,
        damage: Sequence[DecodeError | None] | None = None,
        buffer: memory.Buffer | None = None,
        rows: npt.NDArray[np.int64] | None = None,
        complete: bool = False,
    ) -> None:
        self.color: SourceColor = color
        self.yuv: Yuv | None = yuv
        self.layout: SourceLayout = layout
        self.dtype: np.dtype[Any] = next((np.dtype(array.dtype) for array in arrays if array is not None), _BYTE)
        self.device: Device = device
        self.errors: tuple[DecodeError | None, ...] = tuple(errors or (None,) * len(arrays))
        self.damage: tuple[DecodeError | None, ...] = tuple(damage or (None,) * len(arrays))
        self._known_arrays = list(arrays)
        self._buffer = buffer
        self._apart_from: tuple[int, int, int, int] | None = None  # the last array that lies between the images
        if rows is None:
            rows = np.array([_table_row(array, color, layout) for array in arrays], np.int64).reshape(-1, 4)
        self._rows = rows
        self.sizes: npt.NDArray[np.int32] = rows[:, 2:].astype(np.int32)
        # The table, when it was written, and the streams that know, by address.
        self._uploaded: tuple[Any, Any, dict[int, Any]] | None = None
        if device == "cuda":
            self._stream = array_module(device).cuda.get_current_stream()
            # Of a complete batch the stream may be given other work, for which readers of this one need not wait.
            self._written = _mark(self._stream) if complete else None
            if not complete:
                self._uploaded = self._upload()

    @classmethod
    def allocate(cls, sizes: Iterable[tuple[int, int]], *, color: Color = "rgb", device: Device) -> ImageBatch:
        """A batch of uninitialised images in one buffer of the memory manager; (0, 0) makes a missing image.

        Raises
        ------
        InputError
            For sizes that are none, or an unknown ``color``.
        """
        try:
            sizes = [(operator.index(height), operator.index(width)) for height, width in sizes]
        except (TypeError, ValueError):
            raise InputError(f"sizes are {sizes!r}; expected (height, width) of each image, in integers") from None
        if any(length < 0 for size in sizes for length in size):
            raise InputError(f"sizes are {sizes}; expected lengths of 0 or more")
        channels = CHANNELS[_checked_color(color, Color)]
        offsets, total = image_offsets(sizes, channels)
        buffer = memory.acquire(total, device=device)
        arrays = [
            None if 0 in size else buffer.view((*size, channels), offset_bytes=offset)
            for size, offset in zip(sizes, offsets, strict=True)
        ]
        return cls(arrays, color=color, device=device, buffer=buffer)

    @classmethod
    def in_buffer(
        cls,
        buffer: memory.Buffer,
        sizes: Sequence[tuple[int, int]],
        offsets: Sequence[int],
        *,
        color: Color,
        device: Device,
        errors: Sequence[DecodeError | None],
        damage: Sequence[DecodeError | None],
    ) -> ImageBatch:
        """Images that lie in a buffer without gaps between their lines, all their pixels written or under way.

        Arrays of them are made when they are asked for: plans read the table only, and CuPy takes 5 us for an array.
        """
        rows = np.zeros((len(sizes), 4), np.int64)
        if sizes:
            rows[:, 2:] = sizes
            rows[:, 0] = offsets
            rows[:, 0] += buffer.address
            rows[:, 1] = rows[:, 3] * CHANNELS[color]
            if any(errors):
                rows[[error is not None for error in errors]] = 0
        return cls(
            [None] * len(sizes),
            color=color,
            device=device,
            errors=errors,
            damage=damage,
            buffer=buffer,
            rows=rows,
            complete=True,
        )

    @classmethod
    def from_arrays(
        cls,
        arrays: Iterable[Any],
        *,
        color: SourceColor = "rgb",
        yuv: Yuv = "bt601",
        layout: SourceLayout = "HWC",
        device: Device | None = None,
    ) -> ImageBatch:
        """Wrap uint8, float16 or float32 arrays of shape (H, W, C), or (H, W) for gray: NumPy, CuPy, torch, anything
        with DLPack.

        NV12 frames have OpenCV's shape (H * 3 / 2, W), with H and W even.

        Nothing is copied when an array is on ``device`` already and its pixels are dense within each row; planes must
        lie one right below the other, and of NV12 the address and the pitch must be even, too.

        Parameters
        ----------
        arrays : iterable of arrays
        color : {"rgb", "bgr", "rgba", "bgra", "gray", "nv12"}
        yuv : {"bt601", "bt601-full", "bt709", "bt709-full"}
            What NV12 frames mean, which the stream they come from says: high definition is mostly ``"bt709"``. Not
            read for other colours.
        layout : {"HWC", "CHW"}
            ``"CHW"`` takes uint8 arrays of shape (C, H, W), as torchvision's decoders give them.
        device : {"cpu", "cuda"}, optional
            Default: where the first array is.

        Raises
        ------
        InputError
            For another dtype, or several of them; for a shape that does not fit ``color`` and ``layout``, or an unknown
            ``yuv``.
        """
        if not isinstance(arrays, Iterable):
            raise InputError(f"images are a {type(arrays).__name__}; expected an array, or several of them")
        arrays = list(arrays)
        _checked_color(color, SourceColor)
        if color == "nv12" and yuv not in get_args(Yuv):
            raise InputError(f"yuv is {yuv!r}; expected one of {get_args(Yuv)}")
        if layout not in get_args(SourceLayout):
            raise InputError(f"layout is {layout!r}; expected one of {get_args(SourceLayout)}")
        if layout == "CHW" and color == "nv12":
            raise InputError("layout is 'CHW' with color 'nv12', whose planes are its own; leave layout out")
        if color == "nv12":
            as_image = _as_nv12
        else:
            as_image = functools.partial(_as_chw if layout == "CHW" else _as_hwc, color=color)
        target = resolve_device(device) if device else device_of(arrays[0]) if arrays else "cpu"
        images = [as_image(to_device(array, target), index) for index, array in enumerate(arrays)]
        dtypes = {str(image.dtype) for image in images}
        if len(dtypes) > 1:
            raise InputError(f"images have dtypes {sorted(dtypes)}; expected one dtype, make a batch of each")
        return cls(
            [image[0][:, :, None] for image in images] if layout == "CHW" and color == "gray" else images,
            color=color,
            yuv=yuv if color == "nv12" else None,
            layout="HWC" if color == "gray" else layout,
            device=target,
        )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels, as NumPy's ``nbytes``."""
        pixels = int(self.sizes.astype(np.int64).prod(axis=1).sum())
        return (pixels * 3 // 2 if self.color == "nv12" else pixels * CHANNELS[self.color]) * self.dtype.itemsize

    def __getitem__(self, index: int) -> Any:
        """The image as an (H, W, C) array, of planes (C, H, W), of NV12 (H * 3 / 2, W), that shares the batch's memory;
        raises its error if it is missing."""
        error = self.errors[index]
        if error is not None:
            raise _twin(error)  # raised itself, it would keep this frame, and so the batch's memory
        if self.device == "cuda":
            self.use_on_current_stream()
        return self._array(operator.index(index))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        missing = sum(error is not None for error in self.errors)
        color = f"{self.color} {self.yuv}" if self.yuv else self.color
        color += f" {self.layout}" if self.layout != "HWC" else ""
        color += f" {self.dtype.name}" if self.dtype != _BYTE else ""
        return f"ImageBatch({len(self)} images, {color}, {self.device}, {missing} missing)"

    def _array(self, index: int) -> Any | None:
        array = self._known_arrays[index]
        if array is None and self._buffer is not None and self._rows[index, 0]:
            address, _, height, width = self._rows[index].tolist()
            shape = (height, width, self.channels)
            array = self._buffer.view(shape, offset_bytes=address - self._buffer.address)
            self._known_arrays[index] = array
        return array

    @property
    def channels(self) -> int:
        """Channels of each pixel; of NV12 that of its luma, 1."""
        return CHANNELS.get(self.color, 1)

    @property
    def dense(self) -> bool:
        """Whether no image has a gap between its lines."""
        _, _, line_bytes, pitch = self._extents
        return bool((line_bytes == pitch).all())

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """(N,) bool on the host: which images are there."""
        return np.array([error is None for error in self.errors], bool)

    def shares_memory(self, array: Any) -> bool:
        """Whether an array of the batch's device, contiguous or one image, has a byte that is also an image's."""
        if not array.size:
            return False
        own_width = array.nbytes // array.shape[0]
        start = address_of(array)
        stop = start + (array.shape[0] - 1) * array.strides[0] + own_width
        low, high = self._span
        if stop <= low or high <= start:
            return False
        place = (start, stop, array.strides[0], own_width)
        if self._apart_from == place:  # an output is used again and again, and to look takes 8 us
            return False
        first, last, width, pitch = self._extents
        # Lines of one pitch may lie beside each other: two pictures on one canvas.
        offset = (start - first) % pitch
        beside = (array.strides[0] == pitch) & (offset >= width) & (offset + own_width <= pitch)
        shares = bool(((first < stop) & (start < last) & ~beside).any())
        if not shares:
            self._apart_from = place
        return shares

    @functools.cached_property
    def _span(self) -> tuple[int, int]:
        """Where the first of the images begins and the last ends; 0, 0 for none."""
        first, last, _, _ = self._extents
        return (int(first.min()), int(last.max())) if len(first) else (0, 0)

    @functools.cached_property
    def _extents(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Of each image that is there: addresses of its first byte and behind its last; bytes of a line; pitch."""
        first, pitch, height, width = self._rows[self._rows[:, 0] != 0].T
        lines, line_bytes = height, width
        if self.color == "nv12":
            lines = height * 3 // 2
        elif self.layout == "CHW":
            lines = height * self.channels
        else:
            line_bytes = width * self.channels * self.dtype.itemsize
        return first, first + pitch * (lines - 1) + line_bytes, line_bytes, np.maximum(pitch, 1)

    def select(self, indices: Iterable[int]) -> ImageBatch:
        """The batch of the images at ``indices``, sharing memory; an index may come more than once."""
        chosen = [int(index) for index in indices]
        if self.device == "cuda":
            self.use_on_current_stream()  # the new batch counts as written there
        batch = self.with_views([self._array(index) for index in chosen], [self.errors[index] for index in chosen])
        batch.damage = tuple(self.damage[index] for index in chosen)
        return batch

    def with_views(
        self, arrays: Sequence[Any | None], errors: Sequence[DecodeError | None] | None = None
    ) -> ImageBatch:
        """A batch of parts of this one's images, which keeps their memory."""
        return ImageBatch(
            arrays,
            color=self.color,
            yuv=self.yuv,
            layout=self.layout,
            device=self.device,
            errors=errors,
            buffer=self._buffer,
        )

    def to(self, device: Device) -> ImageBatch:
        """The batch on ``device``; itself if it is there already."""
        if device == self.device:
            return self
        device = resolve_device(device)
        if self.device == "cuda":
            self.use_on_current_stream()
        arrays = [self._array(index) for index in range(len(self))]
        arrays = [None if array is None else to_device(array, device) for array in arrays]
        return ImageBatch(
            arrays,
            color=self.color,
            yuv=self.yuv,
            layout=self.layout,
            device=device,
            errors=self.errors,
            damage=self.damage,
        )

    @property
    def table(self) -> Any:
        """What kernels on CuPy's current stream read; of a decoded batch uploaded when it is first asked for."""
        if self.device == "cpu":
            return self._rows
        stream = array_module("cuda").cuda.get_current_stream()
        if self._uploaded is None:
            self._uploaded = self._upload()
        table, written, readers = self._uploaded
        if stream.ptr not in readers:
            stream.wait_event(written)
            memory.record_use(table, stream)
            readers[stream.ptr] = stream
        return table

    def _upload(self) -> tuple[Any, Any, dict[int, Any]]:
        stream = array_module("cuda").cuda.get_current_stream()
        table = memory.acquire(self._rows.nbytes, device="cuda").view(self._rows.shape, dtype=self._rows.dtype)
        table.set(self._rows, stream=stream)
        return table, _mark(stream), {stream.ptr: stream}

    def use_on_current_stream(self) -> Any:
        """Make CuPy's current stream wait for the pixels, and the pixels' memory wait for that stream.

        Free when the batch was made on that stream. Returns the stream. CUDA batches only.
        """
        stream = array_module("cuda").cuda.get_current_stream()
        if stream.ptr != self._stream.ptr:
            stream.wait_event(self._written or self._stream.record())
            if self._buffer is not None:
                self._buffer.record_stream(stream)
        return stream


def as_batch(
    images: Any,
    *,
    color: SourceColor = "rgb",
    yuv: Yuv = "bt601",
    layout: SourceLayout = "HWC",
    device: Device | None = None,
) -> ImageBatch:
    """An ImageBatch from whatever holds images.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W, C) or (H, W) array, one (N, H, W, C) array, or an iterable of arrays of any sizes: uint8, float16 or
        float32. NV12 frames are (H * 3 / 2, W) and (N, H * 3 / 2, W), planes (C, H, W) and (N, C, H, W).
    color : {"rgb", "bgr", "rgba", "bgra", "gray", "nv12"}
        What the arrays hold; ignored for an ImageBatch, which knows.
    yuv : {"bt601", "bt601-full", "bt709", "bt709-full"}
        What NV12 frames mean; see :meth:`ImageBatch.from_arrays`.
    layout : {"HWC", "CHW"}
        ``"CHW"`` if each channel is a plane; uint8 only.
    device : {"cpu", "cuda"}, optional
        Where the batch shall be; default: where the images are.

    Raises
    ------
    InputError
        For shapes and dtypes that are no images.
    """
    if isinstance(images, ImageBatch):
        return images if device is None else images.to(device)
    if hasattr(images, "shape"):
        shape = tuple(images.shape)
        channels_at = 0 if layout == "CHW" else -1
        single = len(shape) == 2 or (len(shape) == 3 and shape[channels_at] == CHANNELS.get(color))
        images = [images] if single else [images[index] for index in range(shape[0])] if shape else images
    return ImageBatch.from_arrays(images, color=color, yuv=yuv, layout=layout, device=device)


def interleaved_color(batch: ImageBatch) -> Color:
    """The batch's colour, for operations that take uint8 channels side by side only; raises InputError for others."""
    if batch.color == "nv12" or batch.layout != "HWC" or batch.dtype != _BYTE:
        held = "NV12" if batch.color == "nv12" else f"{batch.layout} {batch.dtype}"
        raise InputError(
            f"the images are {held}; expected uint8 channels side by side: convert them with "
            "Preprocess(dtype='uint8', layout='NHWC')"
        )
    return batch.color


def to_device(array: Any, device: Device) -> Any:
    """``array`` as a NumPy or CuPy array on ``device``; shared where it is there already, copied otherwise."""
    here = device_of(array)
    if device == "cpu":
        if here == "cpu":
            return np.asarray(array)
        return _as_cupy(array).get()
    return _as_cupy(array) if here == "cuda" else array_module("cuda").asarray(np.asarray(array))


def _checked_color(color: SourceColor, allowed: Any) -> SourceColor:
    if color not in get_args(allowed):
        raise InputError(f"color is {color!r}; expected one of {get_args(allowed)}")
    return color


def image_offsets(sizes: Sequence[tuple[int, int]], channels: int) -> tuple[list[int], int]:
    """Where dense images of these sizes start in one buffer, in bytes, and the buffer's size."""
    offsets, position = [], 0
    for height, width in sizes:
        offsets.append(position)
        position += -(-height * width * channels // _IMAGE_ALIGNMENT_BYTES) * _IMAGE_ALIGNMENT_BYTES
    return offsets, position


def _as_cupy(array: Any) -> Any:
    cupy = array_module("cuda")
    if isinstance(array, cupy.ndarray):
        return array
    return cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)


def _table_row(array: Any, color: SourceColor, layout: SourceLayout = "HWC") -> tuple[int, int, int, int]:
    """The image's row of :attr:`ImageBatch.table`."""
    if array is None:
        return 0, 0, 0, 0
    address = address_of(array)
    if layout == "CHW":
        return address, array.strides[1], array.shape[1], array.shape[2]
    height = array.shape[0] * 2 // 3 if color == "nv12" else array.shape[0]
    return address, array.strides[0], height, array.shape[1]


def _mark(stream: Any) -> Any:
    """An event of what the stream has been given up to now."""
    return stream.record(array_module("cuda").cuda.Event(disable_timing=True))


def address_of(array: Any) -> int:
    """Of a NumPy or CuPy array's first element."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def _twin(error: DecodeError) -> DecodeError:
    twin = DecodeError(str(error), kind=error.kind)
    twin.source = error.source  # afterwards: the text has it already
    return twin


def _as_hwc(array: Any, index: int, color: Color) -> Any:
    """The array as (H, W, C) with dense rows."""
    channels = CHANNELS[color]
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    if (array.dtype != _BYTE and array.dtype not in _FLOATS) or array.ndim != 3 or array.shape[2] != channels:
        raise InputError(
            f"image {index} has shape {tuple(array.shape)} and dtype {array.dtype}; "
            f"expected (height, width, {channels}) uint8, float16 or float32 for color={color!r}"
        )
    if 0 in array.shape:
        raise InputError(f"image {index} has shape {tuple(array.shape)}; an image has at least one pixel")
    item = array.dtype.itemsize
    pitch, to_pixel, to_channel = array.strides
    # NumPy's strides of an axis of length 1 mean nothing.
    dense_pixels = (to_channel == item or channels == 1) and (to_pixel == channels * item or array.shape[1] == 1)
    aligned = item == 1 or (_table_row(array, color)[0] % item == 0 and pitch % item == 0)
    if not dense_pixels or not aligned or pitch < array.shape[1] * channels * item:
        array = _dense(array)
    return array


def _as_chw(array: Any, index: int, color: Color) -> Any:
    """The array as (C, H, W) with dense rows and each plane right below the one before."""
    channels, shape = CHANNELS[color], tuple(array.shape)
    if array.dtype != _BYTE or len(shape) != 3 or shape[0] != channels:
        raise InputError(
            f"image {index} has shape {shape} and dtype {array.dtype}; expected ({channels}, height, width) uint8 for "
            f"color={color!r} and layout='CHW'"
        )
    if 0 in shape:
        raise InputError(f"image {index} has shape {shape}; an image has at least one pixel")
    plane, pitch, step = array.strides
    if (step != 1 and shape[2] > 1) or pitch < shape[2] or plane != pitch * shape[1]:
        array = _dense(array)
    return array


def _dense(array: Any) -> Any:
    """The array with the strides that its shape has without gaps, also where an axis has length 1."""
    return array_module(device_of(array)).ascontiguousarray(array).reshape(-1).reshape(array.shape)


def _as_nv12(array: Any, index: int) -> Any:
    """The array as (H * 3 / 2, W) with dense rows, address and pitch even, so that a chroma is one load."""
    shape = tuple(array.shape)
    if array.dtype != np.uint8 or len(shape) != 2 or shape[0] % 3 or shape[1] % 2 or 0 in shape:
        raise InputError(
            f"image {index} has shape {shape} and dtype {array.dtype}; expected (height * 3 / 2, width) uint8 with an "
            f"even height and an even width for color='nv12'"
        )
    address, pitch, _, _ = _table_row(array, "nv12")
    if array.strides[1] != 1 or pitch < shape[1] or address % 2 or pitch % 2:
        array = _dense(array)
    return array
