"""An ImageBatch or arrays in, compressed images out.

Every encoder here lets go of the GIL, so the images of a batch are encoded side by side in threads.  Pillow writes
WebP with the library, at the speed and with the bytes of imagecodecs; of PNG it needs several times as long.
"""

from __future__ import annotations

import contextlib
import functools
import io
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, features

from nbvision.codecs._threads import map_all
from nbvision.codecs.gpu_encode import encode_jpegs
from nbvision.codecs.host import imagecodecs_module
from nbvision.errors import InputError
from nbvision.image import CHANNELS, Color, ImageBatch, as_batch, image_offsets, interleaved_color
from nbvision.runtime import memory
from nbvision.runtime.device import Device, array_module, available_cores, device_of

__all__ = ["Format", "Subsampling", "encode"]

Format = Literal["jpeg", "png", "webp", "avif"]
Subsampling = Literal["420", "422", "444", "gray"]
Pixels: TypeAlias = "npt.NDArray[np.uint8]"


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a format, or the library that everybody writes it with, can hold."""

    longest: int  # pixels of a side; of PNG what libpng's readers take unless told otherwise
    least_quality: int = 0
    default_quality: int | None = None  # None: there is no such thing


_LIMITS: dict[str, _Limits] = {
    "jpeg": _Limits(65_500, least_quality=1, default_quality=85),
    "png": _Limits(1_000_000),
    "webp": _Limits(16_383, default_quality=80),
    "avif": _Limits(65_536, default_quality=75),
}


@dataclass(frozen=True, slots=True)
class _Options:
    quality: int
    subsampling: Subsampling
    optimize: bool
    progressive: bool
    lossless: bool


def encode(
    images: Any,
    format: Format = "jpeg",
    *,
    color: Color | None = None,
    quality: int | None = None,
    subsampling: Subsampling = "420",
    optimize: bool = False,
    progressive: bool = False,
    lossless: bool = False,
    device: Device = "cpu",
    threads: int | None = None,
) -> Any:
    """Encode images of any sizes as JPEG, PNG, WebP or AVIF, each to the bytes of one file.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W) or (H, W, C) uint8 array, one (N, H, W, C) array, several arrays, or a batch; NumPy, CuPy, torch,
        anything with DLPack.
    format : {"jpeg", "png", "webp", "avif"}
        JPEG holds no alpha. WebP and AVIF hold no gray: such images get three equal channels.
    color : {"rgb", "bgr", "rgba", "bgra", "gray"}, optional
        What arrays hold; default: gray, RGB or RGBA by their number of channels. A batch knows.
    quality : int, optional
        JPEG 1..100, default 85; WebP 0..100, default 80; AVIF 0..100, default 75. PNG and lossless WebP have none.
    subsampling : {"420", "422", "444", "gray"}
        JPEG only: pixels that share a colour, 2 x 2, 1 x 2, or none; ``"gray"`` keeps the luma alone. Gray images have
        no colours to share.
    optimize : bool
        Fewer bytes in more time. JPEG: Huffman tables of this image instead of the standard ones. PNG: zlib's longest
        search instead of run lengths. AVIF: the encoder's speed 6, Pillow's own, instead of 9, OpenCV's.
    progressive : bool
        JPEG only: in several scans, from coarse to fine. Decoders need two to three times as long for it, and hardware
        ones often refuse.
    lossless : bool
        WebP: every pixel as it is, also under an alpha of 0. PNG always is.
    device : {"cpu", "cuda"}
        Where it is done. ``"cuda"`` is for JPEGs from images on a CUDA device: nvJPEG's encoder, which leaves the
        cores and the way to the host alone, but is slower for small images. Its files are not the host's, and show
        the same pictures within what the quality costs.
    threads : int, optional
        Host threads to use at most; default: one for each core of this process. An image is encoded by one.

    Returns
    -------
    bytes, or list of (bytes or None)
        Bytes for one (H, W) or (H, W, C) array, else a list in order. An image that is missing in a batch is None, as
        ``batch.errors`` is not None there.

    Raises
    ------
    InputError
        For images that the format cannot hold, with what to do; for an option that it does not have, or one out of
        range; for dtypes and layouts other than uint8 channels side by side; for ``device="cuda"`` with images or a
        format that it does not take. Nothing has been encoded then.
    MemoryLimitError
        If no pinned memory is left.
    DeviceError, MissingExtraError
        If ``device="cuda"`` cannot be used.

    Notes
    -----
    On the host, images of a GPU are all brought to pinned memory first, behind what is queued on CuPy's current stream,
    and the call waits for that. What the GPU's encoder refuses, the host encodes.

    JPEG is written by simplejpeg, or by Pillow where it shall be optimised or progressive; PNG by imagecodecs where it
    is installed (the extra ``codecs``) and need not be optimised; the rest by Pillow.  The pixels of a PNG do not
    depend on who writes it, its bytes do.  Below a quality of 96 simplejpeg transforms the quick way, at a cost of 0.1
    to 0.5 dB; an optimised JPEG has the exact transform, the one of Pillow and OpenCV.

    Examples
    --------
    >>> import numpy as np
    >>> import nbvision as nbv
    >>> image = np.zeros((4, 6, 3), np.uint8)
    >>> nbv.encode(image, "png")[1:4]
    b'PNG'
    >>> small, large = nbv.encode([image, np.zeros((40, 60, 3), np.uint8)], quality=90, subsampling="444")
    >>> nbv.decode(large, device="cpu")[0].shape
    (40, 60, 3)
    """
    options = _checked_options(format, quality, subsampling, optimize, progressive, lossless)
    if threads is not None and (not isinstance(threads, int) or threads <= 0):
        raise InputError(f"threads is {threads!r}; expected a positive integer, or None for one per core")
    one, batch = _collected(images, color)
    pixel_color = interleaved_color(batch)
    indices = [int(index) for index in np.flatnonzero(batch.ok)]
    _check_images(batch, indices, format, pixel_color)
    encoded: dict[int, bytes] = {}
    if _checked_device(device, batch, format, options) == "cuda":
        encoded = _on_gpu(batch, indices, pixel_color, options)
        indices = [index for index in indices if index not in encoded]
    write = functools.partial(_writer(format, options), color=pixel_color, options=options)
    pixels = _on_host(batch, indices)
    files = map_all(
        lambda item: _written(write, *item, format),
        list(zip(indices, pixels, strict=True)),
        threads or available_cores(),
    )
    encoded |= zip(indices, files, strict=True)
    return encoded[0] if one else [encoded.get(index) for index in range(len(batch))]


# --- arguments -------------------------------------------------------------------------------------------------------


def _checked_options(
    format: Any, quality: Any, subsampling: Any, optimize: bool, progressive: bool, lossless: bool
) -> _Options:
    if format not in get_args(Format):
        raise InputError(f"format is {format!r}; expected one of {get_args(Format)}")
    if subsampling not in get_args(Subsampling):
        raise InputError(f"subsampling is {subsampling!r}; expected one of {get_args(Subsampling)}")
    for name, given, formats in (
        ("subsampling", subsampling != "420", ("jpeg",)),
        ("optimize", optimize, ("jpeg", "png", "avif")),
        ("progressive", progressive, ("jpeg",)),
        ("lossless", lossless, ("webp", "png")),
    ):
        if given and format not in formats:
            held = " and ".join([", ".join(formats[:-1]), formats[-1]] if formats[1:] else formats)
            raise InputError(f"{name} is an option of {held}, not of {format}; leave it out")
    return _Options(_checked_quality(format, quality, lossless), subsampling, optimize, progressive, lossless)


def _checked_quality(format: Format, quality: Any, lossless: bool) -> int:
    limits = _LIMITS[format]
    if quality is None:
        return limits.default_quality or 0
    if limits.default_quality is None or lossless:
        what = f"lossless {format}" if limits.default_quality else format
        raise InputError(f"quality is {quality!r}, but {what} has none: it keeps every pixel; leave quality out")
    try:
        value = operator.index(quality)
    except TypeError:
        value = -1
    if not limits.least_quality <= value <= 100:
        raise InputError(f"quality is {quality!r}; expected an integer from {limits.least_quality} to 100 for {format}")
    return value


def _checked_device(device: Any, batch: ImageBatch, format: Format, options: _Options) -> Device:
    if device not in get_args(Device):
        raise InputError(f"device is {device!r}; expected one of {get_args(Device)}")
    if device == "cuda":
        if format != "jpeg":
            raise InputError(f"device='cuda' encodes jpeg, not {format}; leave device out")
        if batch.device != "cuda" and len(batch):
            raise InputError("device='cuda' encodes images that are on a CUDA device, these are on the host")
        if options.subsampling == "gray" and batch.color != "gray":
            raise InputError(
                "device='cuda' keeps the colours; make the images gray with nbvision.cvt_color(images, 'gray')"
            )
    checked: Device = device
    return checked


def _collected(images: Any, color: Color | None) -> tuple[bool, ImageBatch]:
    """Whether it is one image, and the batch. Without a colour, arrays are what their channels say."""
    if isinstance(images, ImageBatch):
        return False, images
    stacked = hasattr(images, "shape")
    if not stacked:
        try:
            images = list(images)
        except TypeError:
            raise InputError(f"images are a {type(images).__name__}; expected an array, or several of them") from None
        if not images:
            return False, as_batch(images, color=color or "rgb")
    first = images if stacked else images[0]
    shape = tuple(getattr(first, "shape", ()))
    if color is None:
        color = _color_of(
            shape, f"image{'s have' if stacked else ' 0 has'} shape", ranks=(2, 3, 4) if stacked else (2, 3)
        )
    one = stacked and (len(shape) == 2 or (len(shape) == 3 and shape[2] == CHANNELS.get(color)))
    return one, as_batch(images, color=color, device=device_of(first))


def _color_of(shape: tuple[int, ...], what: str, *, ranks: tuple[int, ...]) -> Color:
    channels = 1 if len(shape) == 2 else shape[-1] if len(shape) in ranks else 0
    colors: dict[int, Color] = {1: "gray", 3: "rgb", 4: "rgba"}
    if channels not in colors:
        raise InputError(
            f"{what} {shape}; expected (height, width), or (height, width, channels) with 1, 3 or 4 channels, "
            "or several of them"
        )
    return colors[channels]


def _check_images(batch: ImageBatch, indices: list[int], format: Format, color: Color) -> None:
    if format == "jpeg" and CHANNELS[color] == 4:
        raise InputError(
            f"the images are {color}, and JPEG holds no alpha; drop it with nbvision.cvt_color(images, 'rgb'), "
            "or choose format 'png', 'webp' or 'avif'"
        )
    longest = _LIMITS[format].longest
    for index in indices:
        height, width = batch.sizes[index].tolist()
        if max(height, width) > longest:
            raise InputError(
                f"image {index} has {height} x {width} pixels; {format} takes at most {longest} a side: "
                "resize or cut it, or choose another format"
            )
    if format in ("webp", "avif") and not features.check(format):
        raise InputError(
            f"this Pillow was built without {format}; install one that has it (pip install --upgrade pillow), "
            "or choose another format"
        )


# --- pixels ----------------------------------------------------------------------------------------------------------


def _on_gpu(batch: ImageBatch, indices: list[int], color: Color, options: _Options) -> dict[int, bytes]:
    """The files that the GPU's encoder makes."""
    files = encode_jpegs(
        [batch[index] for index in indices],
        color=color,
        quality=options.quality,
        subsampling=options.subsampling,
        optimize=options.optimize,
        progressive=options.progressive,
    )
    return {index: file for index, file in zip(indices, files, strict=True) if file is not None}


def _on_host(batch: ImageBatch, indices: list[int]) -> list[Pixels]:
    """The (H, W, C) pixels in host memory, each line dense; waits for the GPU if they are there."""
    arrays = [batch[index] for index in indices]
    if batch.device == "cpu" or not arrays:
        return arrays
    shapes = [array.shape for array in arrays]
    offsets, total_bytes = image_offsets([shape[:2] for shape in shapes], batch.channels)
    buffer = memory.acquire(total_bytes, device="pinned")
    pixels = [buffer.view(shape, offset_bytes=offset) for shape, offset in zip(shapes, offsets, strict=True)]
    stream = array_module("cuda").cuda.get_current_stream()
    for array, target in zip(arrays, pixels, strict=True):
        array.get(stream=stream, out=target, blocking=False)
    stream.synchronize()
    return pixels


def _red_first(pixels: Pixels, color: Color) -> Pixels:
    """Dense pixels, (H, W) if gray, without a copy where they are that already."""
    if color == "gray":
        return np.ascontiguousarray(pixels[:, :, 0])
    if color in ("rgb", "rgba"):
        return np.ascontiguousarray(pixels)
    turned = np.empty(pixels.shape, np.uint8)
    for channel, origin in enumerate((2, 1, 0, 3)[: pixels.shape[2]]):  # faster than whole pixels
        turned[:, :, channel] = pixels[:, :, origin]
    return turned


# --- encoders --------------------------------------------------------------------------------------------------------

_Writer: TypeAlias = Callable[..., bytes]


def _writer(format: Format, options: _Options) -> _Writer:
    if format == "jpeg":
        return _jpeg_by_pillow if options.optimize or options.progressive else _jpeg_by_simplejpeg
    if format == "png":
        return _png_by_pillow if options.optimize or imagecodecs_module() is None else _png_by_imagecodecs
    return _webp if format == "webp" else _avif


def _written(write: _Writer, index: int, pixels: Pixels, format: Format) -> bytes:
    try:
        return write(pixels)
    except (OSError, RuntimeError, ValueError) as error:  # what the encoders raise for images that they cannot take
        raise InputError(f"image {index}: the {format} encoder says: {error}") from error


def _jpeg_by_simplejpeg(pixels: Pixels, *, color: Color, options: _Options) -> bytes:
    gray = color == "gray" or options.subsampling == "gray"
    encoded: bytes = simplejpeg.encode_jpeg(
        pixels, options.quality, color.upper(), "Gray" if gray else options.subsampling
    )
    return encoded


def _jpeg_by_pillow(pixels: Pixels, *, color: Color, options: _Options) -> bytes:
    image = Image.fromarray(_red_first(pixels, color))
    if options.subsampling == "gray":
        image = image.convert("L")
    height, width = (-(-length // 16) * 16 for length in pixels.shape[:2])
    with _pillow_writes_at_once(4 * height * width + 65_536):
        return _saved(
            image,
            "JPEG",
            quality=options.quality,
            optimize=options.optimize,
            progressive=options.progressive,
            **({} if image.mode == "L" else {"subsampling": ":".join(options.subsampling)}),
        )


def _png_by_imagecodecs(pixels: Pixels, *, color: Color, options: _Options) -> bytes:
    # Run lengths of differences: of photographs as small as zlib's level 6 makes them, in a tenth of its time.
    codec: Any = imagecodecs_module()
    strategy, filtered = codec.PNG.STRATEGY.RLE, codec.PNG.FILTER.SUB
    return bytes(codec.png_encode(_red_first(pixels, color), level=1, strategy=strategy, filter=filtered))


def _png_by_pillow(pixels: Pixels, *, color: Color, options: _Options) -> bytes:
    quick = {"compress_level": 1, "compress_type": 3}  # run lengths, here too
    return _saved(
        Image.fromarray(_red_first(pixels, color)), "PNG", **({"optimize": True} if options.optimize else quick)
    )


def _webp(pixels: Pixels, *, color: Color, options: _Options) -> bytes:
    how = {"lossless": True, "exact": True} if options.lossless else {"quality": options.quality}
    return _saved(Image.fromarray(_red_first(pixels, color)), "WEBP", **how)


def _avif(pixels: Pixels, *, color: Color, options: _Options) -> bytes:
    # One thread: the bytes shall not depend on the machine. Speed 9 takes a tenth of the time of 6.
    how = {"speed": 6 if options.optimize else 9, "max_threads": 1}
    return _saved(Image.fromarray(_red_first(pixels, color)), "AVIF", quality=options.quality, **how)


def _saved(image: Any, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


_block_lock = threading.Lock()
_blocks: list[int] = []  # the first is Pillow's own


@contextlib.contextmanager
def _pillow_writes_at_once(size_bytes: int) -> Iterator[None]:
    """Within this context Pillow has a buffer of at least that size for a file.

    An optimised or progressive JPEG must fit into it, and Pillow takes one or two bytes a pixel, in which an image of
    much detail at a high quality does not fit. The size belongs to the whole process; a larger one harms nobody.
    """

    def change(call: Callable[[int], None]) -> None:
        with _block_lock:
            if not _blocks:
                _blocks.append(ImageFile.MAXBLOCK)
            call(size_bytes)
            ImageFile.MAXBLOCK = max(_blocks)
            if len(_blocks) == 1:
                _blocks.clear()

    change(_blocks.append)
    try:
        yield
    finally:
        change(_blocks.remove)
