"""Compressed images in, an ImageBatch out."""

from __future__ import annotations

import contextlib
import operator
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, get_args

from nbvision.codecs import gpu_decode, host
from nbvision.codecs._processes import Processes
from nbvision.codecs._threads import in_background, map_all, run_all
from nbvision.codecs.headers import read_headers
from nbvision.codecs.open import CompressedImage, File, How, OpenImage, decode_on_host, open_file, read_file
from nbvision.errors import DecodeError, InputError
from nbvision.image import CHANNELS, Color, ImageBatch, image_offsets
from nbvision.runtime import memory
from nbvision.runtime.device import Device, array_module, available_cores, resolve_device

__all__ = ["LIMIT_PIXELS", "Source", "as_items", "check_options", "decode", "decode_items", "how_to_decode"]

LIMIT_PIXELS = 178_956_970  # Pillow's
_FILE_S, _WAIT_S = 150e-6, 1e-3  # what a file in memory takes at most, and what may be lost before threads help

Source: TypeAlias = "bytes | bytearray | memoryview | str | os.PathLike[str] | OpenImage"


def decode(
    sources: Source | Iterable[Source],
    *,
    color: Color = "rgb",
    background: tuple[int, int, int] | None = None,
    srgb: bool = False,
    device: Device | None = None,
    limit_pixels: int = LIMIT_PIXELS,
    recover: bool = False,
    strict: bool = False,
    deterministic: bool = False,
    reduce: int = 1,
    threads: int | None = None,
) -> ImageBatch:
    """Decode images of any formats and sizes: JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF, JPEG 2000.

    Images stand upright (EXIF orientation is applied), with 8 bits a channel.  Of an animation the first frame is
    taken.  On CUDA, JPEGs that are not progressive are decoded by the GPU and the rest by the host's threads at the
    same time; the work is ordered on CuPy's current stream.

    Parameters
    ----------
    sources : bytes-like, str, os.PathLike, OpenImage, or an iterable of them
        Compressed bytes, paths of files, or what :meth:`Decoder.open` gave for the same options. A single one gives a
        batch of one.
    color : {"rgb", "bgr", "rgba", "bgra", "gray"}
        ``"rgba"`` and ``"bgra"`` are decoded on the host.
    background : (int, int, int), optional
        Red, green, blue of 0..255 over which images with alpha are blended, where ``color`` has none; default: alpha is
        dropped, and what it hid is seen.
    srgb : bool
        Whether images with an ICC profile are converted to sRGB, on the host; default: the numbers stay as they are.
    device : {"cpu", "cuda"}, optional
        Where the images shall be; default: CUDA where there is one.
    limit_pixels : int
        Images of more pixels are refused before any memory is allocated for them. The default is Pillow's.
    recover : bool
        Whether damaged JPEG, PNG and WebP files are decoded as far as they go, on the host, instead of being errors.
        ``batch.damage[i]`` then tells what is wrong with image ``i``; rows that are lost are gray, black or noise.
    strict : bool
        Whether the host looks through the JPEGs that the GPU decodes, at the same time, for damage that the GPU shows
        as wrong pixels without a word. Without a GPU such damage is always found.
    deterministic : bool
        Whether the GPU gives a file the same pixels every time. By default it decodes large baseline JPEGs with the
        JPEG engine and the CUDA decoder side by side, as shares them best, and those two differ: by up to 3 levels, in
        2 % of the values. Batches of fewer than 16 images, and the CPU, are always deterministic.
    reduce : {1, 2, 4, 8}
        How many times smaller the images shall be, both ways, rounded up. libjpeg makes so much fewer pixels of a JPEG
        on the host, in 0.4 to 0.75 of the time, also for a GPU, whose decoders have no such thing; other images are
        averaged. For pictures that are far larger than they are wanted, where no GPU decodes them.
    threads : int, optional
        Host threads to use at most; default: one for each core of this process. The GPU's CUDA decoder has threads of
        its own, three for every four cores.

    Returns
    -------
    ImageBatch
        One item for each source, in order.  ``batch.errors[i]`` is the :class:`~nbvision.errors.DecodeError` of an
        image that could not be decoded, or None; its ``kind`` sorts it, its ``source`` is the path.  The other images
        of the batch do not notice.

    Raises
    ------
    InputError
        For arguments of a wrong type or range, never for what is in a file.
    DeviceError, MissingExtraError
        If the device cannot be used.

    Notes
    -----
    A JPEG that is damaged inside is an error of kind ``"corrupt"`` on the CPU, and with ``strict`` on the GPU.  The
    GPU's own decoder shows such damage as wrong pixels and says nothing; files that end too early, and damage to a
    file's structure, are found without ``strict``, too.
    """
    items = as_items(sources)
    check_options(color, background, limit_pixels, recover, reduce, threads)
    how = how_to_decode(color, background, srgb, reduce, device, recover)
    return decode_items(items, how, limit_pixels, strict=strict, deterministic=deterministic, threads=threads)


def decode_items(
    items: Sequence[Any],
    how: How,
    limit_pixels: int,
    *,
    strict: bool,
    deterministic: bool,
    threads: int | None,
    by: Processes | None = None,
) -> ImageBatch:
    """What :func:`decode` does once its arguments are checked; ``by``: who decodes what is the host's, in its place."""
    threads = threads or available_cores()
    opened = _open_all(items, how, limit_pixels, threads, by)
    sizes = [how.wanted.size(item.header) if isinstance(item, CompressedImage) else (0, 0) for item in opened]
    color, target = how.wanted.color, how.device
    offsets, total_bytes = image_offsets(sizes, CHANNELS[color])
    buffer = memory.acquire(total_bytes, device=target, wait_on_host=True)  # as gpu_decode.decode_into wants it
    images = []
    for item, offset in zip(opened, offsets, strict=True):
        if isinstance(item, CompressedImage):
            item.offset_bytes = offset
            images.append(item)
    if target == "cuda":
        _decode_on_cuda(images, buffer, how, strict, deterministic, threads)
    else:
        _decode_on_cpu(images, buffer, how, threads)
    errors = [item.error if isinstance(item, CompressedImage) else item for item in opened]
    damage = [item.damage if isinstance(item, CompressedImage) and item.error is None else None for item in opened]
    return ImageBatch.in_buffer(buffer, sizes, offsets, color=color, device=target, errors=errors, damage=damage)


def how_to_decode(
    color: Color,
    background: Sequence[int] | None,
    srgb: bool,
    reduce: int,
    device: Device | None,
    recover: bool,
) -> How:
    """Checked options, put together."""
    blended = None if background is None else (background[0], background[1], background[2])
    return How(host.Wanted(color, blended, srgb, reduce), resolve_device(device), recover)


# --- arguments -------------------------------------------------------------------------------------------------------


def as_items(sources: Any) -> list[Any]:
    """What to decode, one by one: bytes or paths; a single one needs no list."""
    if _is_source(sources):
        return [sources]
    try:
        items = list(sources)
    except TypeError:
        raise InputError(f"sources is a {type(sources).__name__}; expected bytes, a path, or several of them") from None
    for index, item in enumerate(items):
        if not _is_source(item):
            raise InputError(f"sources[{index}] is a {type(item).__name__}; expected bytes or a path")
    return items


def _is_source(item: Any) -> bool:
    if type(item) in (bytes, str):  # most are; to ask for a protocol takes longer
        return True
    if type(item) in (list, tuple):
        return False
    if isinstance(item, (bytes, str, os.PathLike, OpenImage)):
        return True
    try:
        view = memoryview(item)
    except TypeError:
        return False
    return view.ndim == 1 and view.itemsize == 1


def check_options(color: Any, background: Any, limit_pixels: Any, recover: Any, reduce: Any, threads: Any) -> None:
    if color not in CHANNELS:
        raise InputError(f"color is {color!r}; expected one of {get_args(Color)}")
    if background is not None:
        try:
            fits = len(background) == 3 and all(0 <= operator.index(value) <= 255 for value in background)
        except TypeError:
            fits = False
        if not fits:
            raise InputError(f"background is {background!r}; expected three integers of 0 to 255: red, green, blue")
        if CHANNELS[color] == 4:
            raise InputError(f"background is given with color {color!r}, which keeps the alpha; leave one of them out")
    if not isinstance(limit_pixels, int) or limit_pixels <= 0:
        raise InputError(f"limit_pixels is {limit_pixels!r}; expected a positive integer")
    if reduce not in (1, 2, 4, 8):
        raise InputError(f"reduce is {reduce!r}; expected 1, 2, 4 or 8")
    if recover and reduce != 1:
        raise InputError(f"recover is given with reduce={reduce}; which rows are whole is known at full size only")
    if threads is not None and (not isinstance(threads, int) or threads <= 0):
        raise InputError(f"threads is {threads!r}; expected a positive integer, or None for one per core")


# --- bytes and headers -----------------------------------------------------------------------------------------------


def _open_all(
    sources: Sequence[Any], how: How, limit_pixels: int, threads: int, by: Processes | None
) -> list[CompressedImage | DecodeError]:
    """Read the files, and then their headers, those of plain JPEGs all at once."""
    files = _read_all(sources, threads)
    headers = iter(read_headers([file.data for file in files if isinstance(file, File)]))
    opened = []
    for file in files:
        if isinstance(file, File):
            image = open_file(file, next(headers), limit_pixels, how.recover)
            if by is not None and isinstance(image, CompressedImage) and not how.is_for_gpu(image):
                image.job = by.begin(image, how)
        elif isinstance(file, OpenImage):
            if file.how != how:
                raise InputError(f"{file!r} was opened for {file.how}; expected what is asked for now, {how}")
            image = file.for_batch(limit_pixels)
        else:
            image = file
        opened.append(image)
    return opened


def _read_all(sources: Sequence[Any], threads: int) -> list[File | OpenImage | DecodeError]:
    """Read the files. Threads help to wait for them, but not while the system has them in memory."""

    def one(source: Any) -> File | OpenImage | DecodeError:
        return source if isinstance(source, OpenImage) else read_file(source)

    started_s = time.perf_counter()
    files: list[File | OpenImage | DecodeError] = []
    for source in sources:
        # For bytes there is nothing to wait for.
        if type(source) is not bytes and time.perf_counter() - started_s > _WAIT_S + _FILE_S * len(files):
            break
        files.append(one(source))
    return files + map_all(one, sources[len(files) :], threads)


# --- pixels ----------------------------------------------------------------------------------------------------------


def _decode_on_cpu(images: Sequence[CompressedImage], buffer: memory.Buffer, how: How, threads: int) -> None:
    def one(image: CompressedImage) -> None:
        view = buffer.view(how.shape(image), offset_bytes=image.offset_bytes)
        if image.job is None or not image.job.wait():
            decode_on_host(image, view, how)
        elif (pixels := image.job.give(image)) is not None:
            view[:] = pixels

    run_all(one, _largest_first(images), threads)


def _largest_first(images: Sequence[CompressedImage]) -> list[CompressedImage]:
    """So that no thread begins with a large image when the others are about to end, or waits while it could decode."""
    return sorted(images, key=lambda image: (image.job is None, image.header.pixels), reverse=True)


def _decode_on_cuda(
    images: Sequence[CompressedImage],
    buffer: memory.Buffer,
    how: How,
    strict: bool,
    deterministic: bool,
    threads: int,
) -> None:
    for_gpu: list[CompressedImage] = []
    for_host: list[CompressedImage] = []
    for image in images:
        if image.job is None:
            (for_gpu if how.is_for_gpu(image) else for_host).append(image)
    staged = _staging_for(for_host, how)
    doubtful: set[CompressedImage] = set()

    def stage(image: CompressedImage) -> None:
        decode_on_host(image, staged[image], how)

    def stage_or_look_through(image: CompressedImage) -> None:
        if image in staged:
            stage(image)
            return
        try:
            host.check_jpeg(image.data, image.header)
        except DecodeError:
            doubtful.add(image)

    beside = _largest_first([*for_host, *(for_gpu if strict else ())])
    with in_background(stage_or_look_through, beside, threads) if beside else contextlib.nullcontext():
        decoded = gpu_decode.decode_into(
            [buffer.address + image.offset_bytes for image in for_gpu],
            [image.data for image in for_gpu],
            [image.header for image in for_gpu],
            color=how.wanted.color,
            deterministic=deterministic,
        )
    # What the GPU refused, or made up, the host decodes, or it says what is wrong; and what no process could.
    jobs = {image: image.job for image in images if image.job is not None}
    refused = [image for image, done in zip(for_gpu, decoded, strict=True) if not done or image in doubtful]
    refused += [image for image, job in jobs.items() if not job.wait()]
    staged |= _staging_for(refused, how)
    run_all(stage, refused, threads)
    staged |= {image: job.give(image) for image, job in jobs.items() if image not in staged}
    cuda = array_module("cuda").cuda
    stream = cuda.get_current_stream()
    try:
        for image, pixels in staged.items():
            if image.error is None:
                # The memory manager gives the pinned memory out after the copy.
                buffer.view(how.shape(image), offset_bytes=image.offset_bytes).set(pixels, stream=stream)
    finally:
        if jobs:
            copied = stream.record(cuda.Event(disable_timing=True))
            for job in jobs.values():
                job.keep_until(copied, stream)


def _staging_for(images: Sequence[CompressedImage], how: How) -> dict[CompressedImage, Any]:
    """Pinned memory for the pixels of each image, from which they are copied to the GPU."""
    if not images:
        return {}
    offsets, total_bytes = image_offsets(
        [how.wanted.size(image.header) for image in images], CHANNELS[how.wanted.color]
    )
    buffer = memory.acquire(total_bytes, device="pinned")
    views = [buffer.view(how.shape(image), offset_bytes=at) for image, at in zip(images, offsets, strict=True)]
    return dict(zip(images, views, strict=True))
