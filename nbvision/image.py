"""The noun every room shares: a ragged batch of images.

Images are height x width x channels ("HWC"), 8 bits a channel, channels interleaved, rows at any pitch; or NV12, as
video decoders give it.  Sizes are (height, width).  Boxes are ``x1, y1, x2, y2`` in pixels, half-open: a box covers
columns ``x1 <= x < x2``.
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

__all__ = ["CHANNELS", "Color", "ImageBatch", "SourceColor", "Yuv", "as_batch", "interleaved_color", "to_device"]

Color = Literal["rgb", "bgr", "rgba", "bgra", "gray"]
SourceColor = Literal["rgb", "bgr", "rgba", "bgra", "gray", "nv12"]
Yuv = Literal["bt601", "bt601-full", "bt709", "bt709-full"]

CHANNELS: dict[str, int] = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "gray": 1}

_IMAGE_ALIGNMENT_BYTES = 256


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
    device : {"cpu", "cuda"}
    sizes : (N, 2) int32 array, on the host
        Height and width of each picture; 0, 0 where an image is missing.
    errors : tuple of (DecodeError or None)
        Why an image is missing, item by item.
    table : (N, 4) int64 array, on ``device``
        What kernels read: address of the first pixel, pitch in bytes, height, width.

    Notes
    -----
    Of a CUDA batch, images taken out of it and all operations wait on the GPU for the stream that writes its pixels.
    """

    def __init__(
        self,
        arrays: Sequence[Any | None],
        *,
        color: SourceColor,
        yuv: Yuv | None = None,
        device: Device,
        errors: Sequence[DecodeError | None] | None = None,
        buffer: memory.Buffer | None = None,
        complete: bool = False,
    ) -> None:
        self.color: SourceColor = color
        self.yuv: Yuv | None = yuv
        self.device: Device = device
        self.errors: tuple[DecodeError | None, ...] = tuple(errors or (None,) * len(arrays))
        self._arrays = list(arrays)
        self._buffer = buffer
        rows = np.array([_table_row(array, color) for array in arrays], np.int64).reshape(-1, 4)
        self.sizes: npt.NDArray[np.int32] = rows[:, 2:].astype(np.int32)
        self.table: Any = rows
        if device == "cuda":
            self.table = memory.acquire(rows.nbytes, device=device).view(rows.shape, dtype=rows.dtype)
            self._stream = array_module(device).cuda.get_current_stream()
            self.table.set(rows, stream=self._stream)
            # Of a complete batch the stream may be given other work, for which readers of this one need not wait.
            self._written = self._stream.record() if complete else None

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
    def from_arrays(
        cls, arrays: Iterable[Any], *, color: SourceColor = "rgb", yuv: Yuv = "bt601", device: Device | None = None
    ) -> ImageBatch:
        """Wrap uint8 arrays of shape (H, W, C), or (H, W) for gray: NumPy, CuPy, torch, anything with DLPack.

        NV12 frames have OpenCV's shape (H * 3 / 2, W), with H and W even.

        Nothing is copied when an array is on ``device`` already and its pixels are dense within each row; of NV12 the
        address and the pitch must be even, too.

        Parameters
        ----------
        arrays : iterable of arrays
        color : {"rgb", "bgr", "rgba", "bgra", "gray", "nv12"}
        yuv : {"bt601", "bt601-full", "bt709", "bt709-full"}
            What NV12 frames mean, which the stream they come from says: high definition is mostly ``"bt709"``. Not
            read for other colours.
        device : {"cpu", "cuda"}, optional
            Default: where the first array is.

        Raises
        ------
        InputError
            For a dtype other than uint8, a shape that does not fit ``color``, or an unknown ``yuv``.
        """
        if not isinstance(arrays, Iterable):
            raise InputError(f"images are a {type(arrays).__name__}; expected an array, or several of them")
        arrays = list(arrays)
        _checked_color(color, SourceColor)
        if color == "nv12" and yuv not in get_args(Yuv):
            raise InputError(f"yuv is {yuv!r}; expected one of {get_args(Yuv)}")
        as_image = _as_nv12 if color == "nv12" else functools.partial(_as_hwc, color=color)
        target = resolve_device(device) if device else device_of(arrays[0]) if arrays else "cpu"
        return cls(
            [as_image(to_device(array, target), index) for index, array in enumerate(arrays)],
            color=color,
            yuv=yuv if color == "nv12" else None,
            device=target,
        )

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Any:
        """The image as an (H, W, C) uint8 array, of NV12 (H * 3 / 2, W), that shares the batch's memory; raises its
        error if it is missing."""
        error = self.errors[index]
        if error is not None:
            raise _twin(error)  # raised itself, it would keep this frame, and so the batch's memory
        if self.device == "cuda":
            self.use_on_current_stream()
        return self._arrays[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        missing = sum(error is not None for error in self.errors)
        color = f"{self.color} {self.yuv}" if self.yuv else self.color
        return f"ImageBatch({len(self)} images, {color}, {self.device}, {missing} missing)"

    @property
    def channels(self) -> int:
        """Interleaved channels of each pixel; of NV12 that of its luma, 1."""
        return CHANNELS.get(self.color, 1)

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """(N,) bool on the host: which images are there."""
        return np.array([error is None for error in self.errors], bool)

    def select(self, indices: Iterable[int]) -> ImageBatch:
        """The batch of the images at ``indices``, sharing memory; an index may come more than once."""
        chosen = [int(index) for index in indices]
        if self.device == "cuda":
            self.use_on_current_stream()  # the new batch counts as written there
        return ImageBatch(
            [self._arrays[index] for index in chosen],
            color=self.color,
            yuv=self.yuv,
            device=self.device,
            errors=[self.errors[index] for index in chosen],
            buffer=self._buffer,
        )

    def to(self, device: Device) -> ImageBatch:
        """The batch on ``device``; itself if it is there already."""
        if device == self.device:
            return self
        device = resolve_device(device)
        if self.device == "cuda":
            self.use_on_current_stream()
        arrays = [None if array is None else to_device(array, device) for array in self._arrays]
        return ImageBatch(arrays, color=self.color, yuv=self.yuv, device=device, errors=self.errors)

    def use_on_current_stream(self) -> Any:
        """Make CuPy's current stream wait for the pixels, and the pixels' memory wait for that stream.

        Free when the batch was made on that stream. Returns the stream. CUDA batches only.
        """
        stream = array_module("cuda").cuda.get_current_stream()
        if stream.ptr != self._stream.ptr:
            stream.wait_event(self._written or self._stream.record())
            memory.record_use(self.table, stream)
            if self._buffer is not None:
                self._buffer.record_stream(stream)
        return stream


def as_batch(
    images: Any, *, color: SourceColor = "rgb", yuv: Yuv = "bt601", device: Device | None = None
) -> ImageBatch:
    """An ImageBatch from whatever holds images.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W, C) or (H, W) uint8 array, one (N, H, W, C) array, or an iterable of arrays of any sizes. NV12 frames
        are (H * 3 / 2, W) and (N, H * 3 / 2, W).
    color : {"rgb", "bgr", "rgba", "bgra", "gray", "nv12"}
        What the arrays hold; ignored for an ImageBatch, which knows.
    yuv : {"bt601", "bt601-full", "bt709", "bt709-full"}
        What NV12 frames mean; see :meth:`ImageBatch.from_arrays`.
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
        single = len(shape) == 2 or (len(shape) == 3 and shape[-1] == CHANNELS.get(color))
        images = [images] if single else [images[index] for index in range(shape[0])] if shape else images
    return ImageBatch.from_arrays(images, color=color, yuv=yuv, device=device)


def interleaved_color(batch: ImageBatch) -> Color:
    """The batch's colour, for operations that take whole pixels only; raises InputError for NV12."""
    if batch.color == "nv12":
        raise InputError(
            "the images are NV12; expected channels side by side: convert them with Preprocess(dtype='uint8', "
            "layout='NHWC')"
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


def _table_row(array: Any, color: SourceColor) -> tuple[int, int, int, int]:
    """The image's row of :attr:`ImageBatch.table`."""
    if array is None:
        return 0, 0, 0, 0
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    height = array.shape[0] * 2 // 3 if color == "nv12" else array.shape[0]
    return address, array.strides[0], height, array.shape[1]


def _twin(error: DecodeError) -> DecodeError:
    twin = DecodeError(str(error), kind=error.kind)
    twin.source = error.source  # afterwards: the text has it already
    return twin


def _as_hwc(array: Any, index: int, color: Color) -> Any:
    """The array as (H, W, C) with dense rows."""
    channels = CHANNELS[color]
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels:
        raise InputError(
            f"image {index} has shape {tuple(array.shape)} and dtype {array.dtype}; "
            f"expected (height, width, {channels}) uint8 for color={color!r}"
        )
    if 0 in array.shape:
        raise InputError(f"image {index} has shape {tuple(array.shape)}; an image has at least one pixel")
    dense_pixels = array.strides[1:] == (channels, 1) or array.shape[1] == 1
    if not dense_pixels or array.strides[0] < array.shape[1] * channels:
        array = array_module(device_of(array)).ascontiguousarray(array)
    return array


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
        array = array_module(device_of(array)).ascontiguousarray(array)
    return array
