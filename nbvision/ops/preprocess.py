"""``Preprocess``: one launch between the decoder and the model."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from nbvision.errors import InputError, MissingExtraError
from nbvision.image import ImageBatch, as_batch, interleaved_color, to_device
from nbvision.ops._loops import plan_loop, warp_loop, windows_loop
from nbvision.ops._regions import Regions, flat_tables, tables_of
from nbvision.ops._taps import TapTables, windows_of
from nbvision.ops.arguments import finite, image_size, one_of, three_numbers
from nbvision.ops.geometry import Geometry
from nbvision.ops.pixel import PixelFunction, as_pixel_functions, chain_of
from nbvision.ops.warp import BORDERS, INTERPOLATIONS, Border, coefficients_of, packed_fill
from nbvision.runtime import memory
from nbvision.runtime.compile import begin_to_compile, by_value, compile_without_spills, load_kernel
from nbvision.runtime.device import (
    Device,
    array_module,
    compute_capability,
    cuda_unavailable_because,
    device_of,
    on_stream,
)

if TYPE_CHECKING:
    from nbvision_kernels.chain import Chain

__all__ = ["DType", "Fit", "Interpolation", "Layout", "Parity", "Preprocess", "affine"]

Fit = Literal["cover", "letterbox", "stretch"]
Interpolation = Literal["area", "box", "cubic", "hamming", "lanczos", "linear", "nearest"]
Layout = Literal["NCHW", "NHWC", "NHWC4"]
DType = Literal["uint8", "int8", "float16", "bfloat16", "float32"]
Parity = Literal["cv2", "fast", "pil", "pil-11", "torch"]

_INTERPOLATIONS: dict[str, tuple[str, ...]] = {
    "cv2": ("linear", "nearest", "area", "cubic"),
    "fast": ("linear", "nearest"),
    "pil": ("box", "linear", "hamming", "cubic", "lanczos"),
    "pil-11": ("box", "linear", "hamming", "cubic", "lanczos"),
    "torch": ("linear", "cubic"),
}
_MAX_GRID_Z = 65535
# A kernel, the blocks of a canvas, their threads, and the numbers of a launch.
_Frame: TypeAlias = tuple[Any, tuple[int, int], tuple[int, int, int], tuple[Any, ...]]
_MANY_BLOCKS = 4096  # several times as many as a card works on at once
_FRAME_LINES, _FRAME_PIXELS = 4, 4  # lines of threads of a block, and pixels of a line that a thread has


class Preprocess:
    """Crop, resize, letterbox, reorder and normalise images of any sizes into one tensor, in one launch.

    The dtypes, the layout, the sampler and the fit make the compiled kernel; every number is an argument of its
    launch, so a new mean, box or image size never compiles again.

    Parameters
    ----------
    size : (int, int)
        Height and width of the output.
    fit : {"letterbox", "stretch", "cover"}
        ``"letterbox"`` keeps the aspect ratio and fills the rest, with Ultralytics' rounding; ``"stretch"`` fills
        the whole output; ``"cover"`` keeps the aspect ratio and cuts off what is too much, with the rounding of
        torchvision's ``Resize`` and ``CenterCrop``.
    color : {"rgb", "bgr", "gray"}
        Channels of the output; gray images fill all three channels, alpha is dropped, NV12 frames are converted by the
        matrix that their batch names. ``"gray"`` is one channel, made of the sampled red, green and blue, after
        ``pixel``: as ``cv2.cvtColor`` rounds it, with ``parity="pil"`` as Pillow's ``convert("L")`` does, with
        ``"fast"`` and of floats not rounded.
    scale : float
        Factor on the 0..255 values, such as 1/255.
    mean, std : float or three floats, optional
        Output channel ``c`` is ``(value * scale - mean[c]) / std[c]``, computed in float32 as
        ``value * (scale / std[c]) + (-mean[c] / std[c])``.
    fill : float or three floats
        Value of 0..255 outside the image, normalised like a pixel. Ultralytics' 114 by default.
    pixel : pixel function or sequence of them, optional
        Python functions of red, green and blue, made with :func:`nbvision.pixel`, that are compiled into the kernel.
        They are called in order on the sampled values of 0..255, before ``scale``, ``mean`` and ``std``; fill goes
        through them too. Another value bound to one never compiles again; another function does.
    dtype : {"uint8", "int8", "float16", "bfloat16", "float32"}
        Integers are rounded half to even and saturated. bfloat16 arrays have the dtype of the package ``ml_dtypes``.
    layout : {"NCHW", "NHWC", "NHWC4"}
        ``"NHWC4"`` has a fourth channel of zeros, as TensorRT's vectorized formats and tensor cores want it.
    interpolation : {"linear", "nearest", "area", "cubic", "box", "hamming", "lanczos"}
        With ``parity="cv2"`` the first four, which are OpenCV's ``INTER_LINEAR``, ``INTER_NEAREST``, ``INTER_AREA`` and
        ``INTER_CUBIC``; with ``"fast"`` the first two; with ``"pil"`` any but ``"nearest"`` and ``"area"``, and with
        ``"torch"`` linear and cubic, antialiased.
    parity : {"cv2", "fast", "pil", "pil-11", "torch"}
        ``"cv2"`` gives the very uint8 values of ``cv2.resize`` before normalising; ``"fast"`` samples in float32 and
        does not round in between (at most one level away). Nearest is always OpenCV's. ``"pil"`` gives the very
        values of Pillow 13's ``Image.resize``, which antialiases, ``"pil-11"`` those of Pillow 11 to 12.1. ``"torch"``
        is within one level of torchvision's ``resize(antialias=True)``, whose order of float additions depends on the
        device. OpenCV's cubic is that of its own code; builds with Intel's IPP, such as the wheels for x86, use IPP's,
        which differs in one value of twenty by one level. NV12 pixels are converted as
        ``cv2.cvtColor`` does and then resized; ``"fast"`` blends Y, U and V and converts once, which differs by more
        than a level where a colour saturates. Floats are always sampled as ``"fast"`` does it, which is within
        rounding of what OpenCV makes of floats.
    scaleup : bool
        Whether a letterboxed image may be enlarged.
    center : bool
        Whether a letterboxed image stands in the middle, else in the top left corner.
    crop_pct : float
        Of ``fit="cover"``: the share of the resized image's shorter side that is kept, as timm calls it. ImageNet's
        ``Resize(256)`` and ``CenterCrop(224)`` are ``size=(224, 224), crop_pct=0.875``.
    quantize : (float, int), optional
        Scale and zero point of an int8 or uint8 output: a value ``v`` is stored as ``v / scale + zero_point``.
    box_margin : float
        Each box is enlarged on every side by this share of its width and height before it is cropped.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> pre = nbv.Preprocess((64, 64), scale=1 / 255)
    >>> x, geometry = pre([np.zeros((48, 80, 3), np.uint8)])
    >>> x.shape
    (1, 3, 64, 64)
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        fit: Fit = "letterbox",
        color: Literal["rgb", "bgr", "gray"] = "rgb",
        scale: float = 1.0,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        fill: float | Sequence[float] = 114.0,
        pixel: PixelFunction | Sequence[PixelFunction] = (),
        dtype: DType = "float32",
        layout: Layout = "NCHW",
        interpolation: Interpolation = "linear",
        parity: Parity = "cv2",
        scaleup: bool = True,
        center: bool = True,
        crop_pct: float = 1.0,
        quantize: tuple[float, int] | None = None,
        box_margin: float = 0.0,
    ) -> None:
        self.size = image_size(size)
        self.fit = one_of("fit", fit, Fit)
        self.color = one_of("color", color, Literal["rgb", "bgr", "gray"])
        self.dtype = _dtype_of(one_of("dtype", _dtype_name(dtype), DType))
        self.layout = one_of("layout", layout, Layout)
        self.interpolation = one_of("interpolation", interpolation, Interpolation)
        self.parity = one_of("parity", parity, Parity)
        if self.interpolation not in _INTERPOLATIONS[self.parity]:
            others = [name for name, known in _INTERPOLATIONS.items() if self.interpolation in known]
            raise InputError(
                f"interpolation is {interpolation!r} with parity {parity!r}, which has "
                f"{', '.join(_INTERPOLATIONS[self.parity])}; parity {' or '.join(map(repr, others))} has it"
            )
        self._windows = windows_of(self.parity, self.interpolation)
        self.scaleup = bool(scaleup)
        self.center = bool(center)
        if finite("box_margin", box_margin) < 0:
            raise InputError(f"box_margin is {box_margin}; expected a share of the box, 0 or more")
        self.box_margin = np.float32(box_margin)
        self.pixel = as_pixel_functions(pixel)
        self._chain, self._numbers = chain_of(self.pixel)
        if self.color == "gray":
            if self.layout == "NHWC4":
                raise InputError("layout is 'NHWC4' with color 'gray', which is one channel; give 'NHWC' or 'NCHW'")
            for name, value in (("mean", mean), ("std", std), ("fill", fill)):
                if np.size(np.asarray(value)) > 1:
                    raise InputError(f"{name} is {value}; expected one number for color 'gray'")
        self.crop_pct = finite("crop_pct", crop_pct)
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct is {crop_pct}; expected a share above 0 and up to 1")
        height, width = self.size
        self._regions = Regions(
            self.size,
            self.fit,
            (math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)),
            self.scaleup,
            self.center,
            self.interpolation == "linear",
            self.box_margin,
            self._windows,
        )
        self._gain, self._bias = affine(
            finite("scale", scale),
            three_numbers("mean", 0.0 if mean is None else mean),
            three_numbers("std", 1.0 if std is None else std),
            *_checked_quantize(quantize, self.dtype),
        )
        self._fill = tuple(np.float32(value) for value in three_numbers("fill", fill))
        self._int_size = (np.int32(self.size[0]), np.int32(self.size[1]))
        self._frames: dict[tuple[Any, ...], _Frame] = {}

    def __call__(
        self,
        images: Any,
        *,
        boxes: Any = None,
        box_images: Any = None,
        out: Any = None,
        stream: Any = None,
    ) -> tuple[Any, Geometry]:
        """Preprocess whole images, or one crop per box.

        Parameters
        ----------
        images : ImageBatch, array or iterable of arrays
            See :func:`nbvision.image.as_batch`; also NV12, planes, float16 and float32, whose values count as what
            they are, be it 0..1 or 0..255. A missing image gives a canvas of fill.
        boxes : (M, 4) array, optional
            x1, y1, x2, y2 in source pixels, half-open, on the host or on the images' device. Each is enlarged by
            ``box_margin``, grown to whole pixels and clipped to its image. Boxes on a CUDA device never come to the
            host: one that is NaN, outside its image or of no area gives a canvas of fill, and ``geometry.valid`` is
            False there.
        box_images : (M,) integer array, optional
            The image of each box, where ``boxes`` are; may be left out for a single image.
        out : array, optional
            Where to write: contiguous, of the right shape and dtype, on the images' device, and in other memory.
        stream : CUDA stream, optional
            Default: CuPy's current stream. Nothing waits on the host.

        Returns
        -------
        tensor : (N or M, 3, H, W), (N or M, H, W, 3) or (N or M, H, W, 4) array of ``dtype``; of gray with 1 channel
            ``out``, or a new array in a buffer of the memory manager.
        geometry : Geometry
            Maps boxes of the output back to the sources.

        Raises
        ------
        InputError
            For a box on the host that is outside its image, of no area or NaN; for ``out`` that does not fit; for
            arrays that are no images.
        """
        batch = images if isinstance(images, ImageBatch) else as_batch(images)
        if self._windows is not None:
            interleaved_color(batch)  # raises for what windows are not made of
        if batch.device == "cpu":
            return self._run_cpu(batch, boxes, box_images, out)
        with stream if stream is not None else contextlib.nullcontext():
            return self._run_cuda(batch, boxes, box_images, out)

    def warp(
        self,
        images: Any,
        matrices: Any,
        *,
        matrix_images: Any = None,
        inverse: bool = False,
        border: Border = "constant",
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        """Preprocess images through matrices, in one launch: aligned faces, turned boxes, corrected documents.

        What :func:`nbvision.warp_affine` and :func:`nbvision.warp_perspective` make of uint8 images, then ``pixel``,
        ``scale``, ``mean`` and ``std``, stored as every tensor of this plan; ``fit`` and ``box_margin`` have no part
        in it.

        Parameters
        ----------
        images : ImageBatch, array or iterable of arrays
            uint8 with channels side by side.
        matrices : (M, 2, 3) or (M, 3, 3) array
            Source to canvas, in pixels, the centre of the first being 0, on the host or the images' device. On a CUDA
            device they never come to the host; one that cannot be inverted gives a canvas of fill there.
        matrix_images : (M,) integer array, optional
            The image of each matrix; default: one matrix for each image, or one (2, 3) or (3, 3) for all. On a CUDA
            device, one that is none gives a canvas of fill.
        inverse : bool
            Whether matrices map canvas to source.
        border : {"constant", "replicate", "reflect"}
            What lies outside the image: ``fill``, rounded to whole levels, the border's pixel, or the image mirrored.
        out, stream : optional
            As in a call.

        Returns
        -------
        tensor : array, as a call returns it

        Raises
        ------
        InputError
            For matrices and images that do not fit, and for a plan whose interpolation is not ``"linear"``,
            ``"nearest"`` or ``"cubic"`` with parity ``"cv2"`` or ``"fast"``.
        """
        if self.parity not in ("cv2", "fast") or self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"the plan has interpolation {self.interpolation!r} and parity {self.parity!r}; warps have 'linear', "
                "'nearest' and 'cubic' of parity 'cv2'"
            )
        batch = images if isinstance(images, ImageBatch) else as_batch(images)
        interleaved_color(batch)
        edge = np.int32(BORDERS[one_of("border", border, Border)])
        with on_stream(stream, batch.device):
            owners = self._matrix_images(matrix_images, matrices, batch)
            coefficients, perspective = coefficients_of(matrices, len(owners), bool(inverse), batch.device)
            tensor, flat = self._output(batch, len(owners), out)
            if len(owners):
                self._warp(batch, owners, coefficients, flat, (perspective, edge))
        return tensor

    def output_shape(self, count: int) -> tuple[int, int, int, int]:
        """Shape of the tensor for ``count`` canvases."""
        height, width = self.size
        channels = 1 if self.color == "gray" else 4 if self.layout == "NHWC4" else 3
        return (count, channels, height, width) if self.layout == "NCHW" else (count, height, width, channels)

    def warmup(self, *, device: Device) -> None:
        """Compile, or load from the disk cache, everything a first call would."""
        self(ImageBatch.from_arrays([np.zeros((2, 2, 3), np.uint8)], device=device))

    def explain(self, images: Any = None, *, cc: tuple[int, int] | None = None) -> str:
        """What a call does, for people to read: stages, kernel, generated source, and bytes moved.

        Compiles the kernel, but needs no GPU.

        Parameters
        ----------
        images : optional
            As a call takes them; without them the kernel is that of a colour image, and no bytes are counted.
        cc : (int, int), optional
            Compute capability to compile for; default: the current device's, without one 9.0.

        Raises
        ------
        CompileError, MissingExtraError
            If the kernel does not compile, or there is no compiler.
        """
        batch = as_batch(np.zeros((1, 1, 3), np.uint8) if images is None else images)
        cc = cc or (compute_capability() if cuda_unavailable_because() is None else (9, 0))
        nv12 = batch.color == "nv12"
        spec = self._spec(batch)
        compiled = compile_without_spills(spec, cc)
        lines = [
            f"region   {self.fit} to {self.size[0]} x {self.size[1]}, fill {[float(value) for value in self._fill]}",
            f"sample   {self.interpolation}, parity {self.parity}, from "
            + (f"NV12 {batch.yuv}" if nv12 else f"{batch.channels} channels, {batch.layout} {batch.dtype}"),
            *(f"pixel    {function}" for function in self.pixel),
            f"affine   value * {[float(gain) for gain in self._gain]} + {[float(bias) for bias in self._bias]}",
            f"store    {self.dtype.name} {self.layout}, {self.color}",
            f"kernel   {compiled.name}: {compiled.registers} registers, {compiled.spill_bytes} bytes spilled "
            f"on sm_{cc[0]}{cc[1]}",
        ]
        if images is not None:
            read, written = self._bytes_moved(batch)
            lines.append(f"bytes    {read / 1e6:.1f} MB read, {written / 1e6:.1f} MB written, {len(batch)} images")
        chain = self._chain_for(batch)
        if chain is not None:
            lines += ["", chain.source()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"Preprocess({self.size}, fit={self.fit!r}, color={self.color!r}, dtype={self.dtype.name!r}, "
            f"layout={self.layout!r}, interpolation={self.interpolation!r}, parity={self.parity!r})"
        )

    def _bytes_moved(self, batch: ImageBatch) -> tuple[int, int]:
        """At least: each source line that a sampler touches once, each output value once."""
        regions = self._regions.of(batch.sizes).regions.astype(np.int64)
        taps = 1 if self.interpolation == "nearest" else 2
        if self._windows is not None:
            taps = 2**31  # every line
        lines = np.minimum(regions[:, 4], taps * np.minimum(regions[:, 8], self.size[0]))
        read = int((lines * regions[:, 3]).sum()) * batch.channels * batch.dtype.itemsize
        if batch.color == "nv12":  # half a byte of chroma a pixel, but each line of it serves two
            chroma_lines = np.minimum(regions[:, 4] // 2, taps * np.minimum(regions[:, 8], self.size[0]))
            read += int((chroma_lines * regions[:, 3]).sum())
        return read, math.prod(self.output_shape(len(batch))) * self.dtype.itemsize

    # -- CPU ---------------------------------------------------------------------------------------------------

    def _run_cpu(self, batch: ImageBatch, boxes: Any, box_images: Any, out: Any) -> tuple[Any, Geometry]:
        geometry, taps = self._regions.on_host(batch, boxes, box_images)
        tensor, flat = self._output(batch, len(geometry), out)
        if not len(geometry):
            return tensor, geometry
        images = (np.int64(0), batch.table.reshape(-1))
        values = (self._gain, self._bias, self._fill, self._blue_first(batch))
        chain = self._chain_for(batch)
        numbers = self._numbers or (np.float32(0),)  # Numba types no empty tuple
        canvases = (flat, len(geometry), *self._int_size, *self._channels(batch))
        if self._windows is not None and taps is not None:
            tables = (geometry.regions.reshape(-1), taps.x.reshape(-1), taps.y.reshape(-1), *taps.numbers)
            loop = windows_loop(self._windows.module, self._windows.kind, self._store("cpu"), chain)
            loop(*images, *tables, *canvases, *values, numbers, self._strides)
        else:
            loop = plan_loop(self._sampler(batch), self._store("cpu"), chain, _source_type(batch))
            tables = flat_tables(geometry)
            loop(*images, *tables, *canvases, *values, numbers, self._matrix(batch), self._strides)
        return tensor, geometry

    # -- CUDA --------------------------------------------------------------------------------------------------

    def _run_cuda(self, batch: ImageBatch, boxes: Any, box_images: Any, out: Any) -> tuple[Any, Geometry]:
        stream = batch.use_on_current_stream()
        table = batch.table
        key = (table.device.id, batch.color, batch.yuv, batch.layout, batch.dtype)
        if len(batch) and key not in self._frames:
            begin_to_compile(self._spec(batch), table.device.id)  # while those of regions and tap tables compile
        geometry, taps = self._regions.on_device(batch, boxes, box_images, stream.ptr)
        count = len(geometry)
        tensor, flat = self._output(batch, count, out)
        if count:
            self._launch(self._frame(key, batch), table, geometry, taps, flat)
        return tensor, geometry

    def _launch(self, frame: _Frame, table: Any, geometry: Geometry, taps: TapTables | None, flat: Any) -> None:
        kernel, grid, block, numbers = frame
        count = len(geometry)
        tables = tables_of(geometry) if taps is None else (geometry.regions, taps.x, taps.y)
        tap_numbers = () if taps is None else taps.numbers
        columns, lines = grid
        if self._windows is not None and self._windows.module == "resample" and columns * lines * count >= _MANY_BLOCKS:
            lines = -(-lines // 2)  # a block goes on to further lines, and so takes its first steps once for both
        for first in range(0, count, _MAX_GRID_Z):
            part = slice(first, first + _MAX_GRID_Z)
            parts = tables if count <= _MAX_GRID_Z else [each[part] for each in tables]
            target = flat if count <= _MAX_GRID_Z else flat[part]
            kernel((columns, lines, len(target)), block, (0, table, *parts, *tap_numbers, target, *numbers))

    def _frame(self, key: tuple[Any, ...], batch: ImageBatch) -> _Frame:
        """For images like these, of which ``key`` says all that counts; kept."""
        if key not in self._frames:
            _, _, swap = self._channels(batch)
            spec = self._spec(batch)
            height, width = self.size
            in_source_order = slice(None, None, -1 if swap else 1)
            numbers = [number for group in (self._gain, self._bias, self._fill) for number in group[in_source_order]]
            launch_numbers = (*self._int_size, swap, *numbers)
            if batch.color == "nv12":
                launch_numbers += self._matrix(batch)
            if self._chain_for(batch) is not None:
                launch_numbers += (np.int32(self._blue_first(batch) != bool(swap)), *self._numbers)
            if self._windows is not None:
                warps = int(spec.defines.get("WARPS", 8))
                block, tile = (32, warps, 1), (32, int(spec.defines.get("LINES", 8)))
            else:
                block = (int(spec.defines["LINE_THREADS"]), _FRAME_LINES, 1)
                tile = (block[0] * _FRAME_PIXELS, block[1] * int(spec.defines["LINES"]))
            grid = (-(-width // tile[0]), -(-height // tile[1]))
            self._frames[key] = load_kernel(spec, batch.table.device.id), grid, block, by_value(launch_numbers)
        return self._frames[key]

    def _spec(self, batch: ImageBatch) -> Any:
        """The kernel for images like these, in the catalogue's words."""
        from nbvision_kernels.catalog import preprocess_kernel, resample_kernel, window_kernel

        chain = self._chain_for(batch)
        if self._windows is not None:
            types = (self._layout, self._store("cuda"))
            if self._windows.module == "resample":
                return resample_kernel(*types, pixel_bytes=batch.channels, chain=chain)
            return window_kernel(self._windows.kind, *types, pixel_bytes=batch.channels, chain=chain)
        source_type = _source_type(batch)
        threads = _line_threads(self.size[1])
        return preprocess_kernel(
            *self._types(batch), channels=batch.channels, source_type=source_type, chain=chain, line_threads=threads
        )

    # -- matrices ----------------------------------------------------------------------------------------------

    def _matrix_images(self, given: Any, matrices: Any, batch: ImageBatch) -> Any:
        """(M,) int64 on the batch's device: the image of each canvas."""
        xp = array_module(batch.device)
        if given is None:
            return xp.arange(len(batch), dtype=np.int64)
        owners = xp.ascontiguousarray(to_device(given, batch.device))
        if owners.ndim != 1 or owners.dtype.kind not in "iu":
            raise InputError(
                f"matrix_images have shape {owners.shape} and dtype {owners.dtype}; expected (M,) integers"
            )
        if device_of(given) == "cpu" and len(owners):
            low, high = int(owners.min()), int(owners.max())
            if low < 0 or high >= len(batch):
                raise InputError(f"matrix_images go from {low} to {high}; the batch has {len(batch)} images")
        return owners.astype(np.int64, copy=False)

    def _warp(self, batch: ImageBatch, owners: Any, coefficients: Any, flat: Any, how: tuple[Any, ...]) -> None:
        _, _, swap = self._channels(batch)
        chain = self._chain_for(batch)
        in_source_order = slice(None, None, -1 if swap else 1)
        fill = self._fill[in_source_order]
        limited = [min(max(float(value), 0.0), 255.0) for value in fill]
        packed = packed_fill([*limited, 255.0][: batch.channels], batch.channels)
        kind = INTERPOLATIONS[self.interpolation]
        store = self._store(batch.device)
        if batch.device == "cpu":
            sizes = (len(owners), *self._int_size)
            tables = (batch.table.reshape(-1), owners, coefficients.reshape(-1))
            values = (swap, self._gain, self._bias, *how, packed, self._blue_first(batch))
            last = (self._numbers or (np.float32(0),), self._strides)
            warp_loop(kind, batch.channels, store, chain)(np.int64(0), *tables, flat, *sizes, *values, *last)
            return
        from nbvision_kernels.catalog import warp_plan_kernel

        batch.use_on_current_stream()
        numbers = [number for group in (self._gain, self._bias) for number in group[in_source_order]]
        launch = (*self._int_size, swap, *numbers, *how, packed, np.int32(len(batch)))
        if chain is not None:
            launch += (np.int32(self._blue_first(batch) != bool(swap)), *self._numbers)
        kernel = load_kernel(warp_plan_kernel(kind, batch.channels, self._layout, store, chain=chain), flat.device.id)
        height, width = self.size
        for first in range(0, len(owners), _MAX_GRID_Z):
            part = slice(first, first + _MAX_GRID_Z)
            grid = (-(-width // 32), -(-height // 8), len(owners[part]))
            kernel(grid, (32, 8), (0, 0, batch.table, owners[part], coefficients[part], flat[part], *launch))

    # -- types and numbers of the kernel -----------------------------------------------------------------------

    def _types(self, batch: ImageBatch) -> tuple[int, int, int]:
        """Sampler, layout and store of the CUDA kernel."""
        return self._sampler(batch), self._layout, self._store("cuda")

    def _sampler(self, batch: ImageBatch) -> int:
        from nbvision_kernels import codes

        if self.interpolation == "nearest":
            return codes.NEAREST
        return codes.LINEAR_EXACT if self.parity == "cv2" and batch.dtype == np.uint8 else codes.LINEAR_FAST

    def _chain_for(self, batch: ImageBatch) -> Chain | None:
        """The pixel functions, and the gray made of what they give."""
        if self.color != "gray":
            return self._chain
        from nbvision_kernels import gray
        from nbvision_kernels.chain import extended

        unrounded = self.parity == "fast" or batch.dtype != np.uint8
        link = gray.GRAY_UNROUNDED if unrounded else gray.GRAY_PIL if self.parity.startswith("pil") else gray.GRAY_CV2
        return extended(self._chain, link)

    def _blue_first(self, batch: ImageBatch) -> bool:
        """Whether the chain's first channel is blue once channels are in the order of the output; gray has none."""
        return batch.color.startswith("bgr") if self.color == "gray" else self.color == "bgr"

    @property
    def _strides(self) -> tuple[np.int64, np.int64, np.int64, np.int64]:
        """What CPU loops know of the layout."""
        from nbvision_kernels.codes import canvas_strides

        strides: tuple[np.int64, np.int64, np.int64, np.int64] = canvas_strides(self._layout, *self.size)
        return strides

    @property
    def _layout(self) -> int:
        from nbvision_kernels import codes

        if self.color == "gray":
            return codes.GRAY
        return {"NCHW": codes.NCHW, "NHWC": codes.NHWC, "NHWC4": codes.NHWC4}[self.layout]

    def _store(self, device: Device) -> int:
        from nbvision_kernels import codes

        half = codes.STORE_HALF_BITS if device == "cpu" else codes.STORE_F16
        stores = {"uint8": codes.STORE_U8, "int8": codes.STORE_I8, "float16": half, "float32": codes.STORE_F32}
        return (stores | {"bfloat16": codes.STORE_BF16})[self.dtype.name]

    def _channels(self, batch: ImageBatch) -> tuple[np.int32, np.int32, np.int32]:
        """Bytes of a source pixel, whether it is gray, whether first and third channel change places."""
        from nbvision_kernels.codes import pixel_bytes_of

        order = "rgb" if batch.color == "nv12" else batch.color[:3]
        swap = batch.color != "gray" and self.color != "gray" and order != self.color
        pixel_bytes = pixel_bytes_of(_source_type(batch), batch.channels)
        return np.int32(pixel_bytes), np.int32(batch.color == "gray"), np.int32(swap)

    def _matrix(self, batch: ImageBatch) -> tuple[Any, ...]:
        """Six numbers from NV12 to RGB, of the type that the sampler computes in; of other images they are not read."""
        from nbvision_kernels.codes import LINEAR_FAST, matrix_numbers

        numbers: tuple[Any, ...] = matrix_numbers(batch.yuv or "bt601", exact=self._sampler(batch) != LINEAR_FAST)
        return numbers

    def _output(self, batch: ImageBatch, count: int, out: Any) -> tuple[Any, Any]:
        """What the caller gets, and the array over the same bytes that the kernel writes."""
        shape, device = self.output_shape(count), batch.device
        if out is None:
            size_bytes = math.prod(shape) * self.dtype.itemsize
            bits = np.dtype(np.uint16) if self.dtype.name == "bfloat16" else self.dtype
            out = memory.acquire(size_bytes, device=device).view(shape, dtype=bits)
            out = array = out if bits == self.dtype else out.view(self.dtype)
        else:
            array = _checked_out(out, shape, self.dtype, device)
            if batch.shares_memory(array):
                raise InputError("out shares memory with the images; expected other memory")
        if device == "cuda":
            return out, array
        flat = array.reshape(-1)
        return out, flat.view(np.uint16) if self.dtype.name in ("float16", "bfloat16") else flat


def _line_threads(width: int) -> int:
    """Threads for a line of the frame's blocks, such that the fewest stand idle at a canvas' right edge."""
    from nbvision_kernels.codes import LINE_THREADS

    return min(LINE_THREADS, key=lambda threads: -(-width // (threads * _FRAME_PIXELS)) * threads)


def _source_type(batch: ImageBatch) -> int:
    """How the batch's images lie in memory, in the kernels' words."""
    from nbvision_kernels import codes

    if batch.color == "nv12":
        return codes.SOURCE_NV12
    if batch.layout == "CHW":
        return codes.SOURCE_CHW
    return {"uint8": codes.SOURCE_U8, "float16": codes.SOURCE_F16, "float32": codes.SOURCE_F32}[batch.dtype.name]


def _checked_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> Any:
    """``out`` as an array of this device, or an error that says what does not fit."""
    where = device_of(out)
    if where != device:
        raise InputError(f"out is on {where}, the images are on {device}; give an array on {device}")
    if dtype.kind == "V" and str(getattr(out, "dtype", "")) == "torch.bfloat16":  # "V" is what NumPy does not know
        import torch  # NumPy has no bfloat16 to exchange

        array = to_device(out.view(torch.int16), device).view(dtype)
    else:
        array = to_device(out, device)
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise InputError(
            f"out has shape {array.shape}, dtype {array.dtype}, contiguous={array.flags.c_contiguous}; "
            f"expected a contiguous {dtype} array of shape {shape}"
        )
    if device == "cpu" and not array.flags.writeable:
        raise InputError("out is read-only; expected an array that can be written")
    return array


def _dtype_name(dtype: Any) -> str:
    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        return str(dtype)


def _dtype_of(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingExtraError("ml_dtypes", extra="bfloat16", needed_for="dtype 'bfloat16'") from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _checked_quantize(quantize: tuple[float, int] | None, dtype: np.dtype[Any]) -> tuple[float, int]:
    """Scale and zero point; 1 and 0 for none."""
    if quantize is None:
        return 1.0, 0
    if dtype.kind not in "iu":
        raise InputError(f"quantize is for int8 and uint8; dtype is {dtype}")
    try:
        scale, zero_point = quantize
        scale, zero_point = finite("the scale of quantize", scale), operator.index(zero_point)
    except (TypeError, ValueError):
        scale = 0.0
    if scale <= 0:
        raise InputError(f"quantize is {quantize!r}; expected (scale, zero point), a number above 0 and an integer")
    return scale, zero_point


def affine(
    scale: float, mean: Sequence[float], std: Sequence[float], quantum: float = 1.0, zero_point: int = 0
) -> tuple[tuple[np.float32, ...], tuple[np.float32, ...]]:
    """Gain and bias per channel, so that ``value * gain + bias`` is ``(value * scale - mean) / std``, and that
    ``/ quantum + zero_point`` if it is quantized."""
    if not all(std):
        raise InputError(f"std is {tuple(std)}; expected numbers other than 0")
    gain = tuple(np.float32(scale / deviation / quantum) for deviation in std)
    bias = tuple(
        np.float32(-center / deviation / quantum + zero_point) for center, deviation in zip(mean, std, strict=True)
    )
    return gain, bias
