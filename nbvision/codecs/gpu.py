"""Decode JPEGs on the GPU with nvImageCodec, into memory the caller owns.

Only what the GPU is good at goes here.  PNG and its like are unpacked on the host even by nvImageCodec, so they take
:mod:`nbvision.codecs.host` and give the same pixels and the same errors on every device.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from itertools import compress
from types import ModuleType
from typing import Any

from nbvision.codecs._threads import available_cores
from nbvision.codecs.headers import Header
from nbvision.errors import DeviceError, MissingExtraError
from nbvision.image import Color
from nbvision.runtime.device import CUDA_EXTRA, array_module, stream_pointer

__all__ = ["decode_into", "takes"]

# nvImageCodec's names of the sample format and the colour space, by ours. It cannot add an alpha channel.
_SAMPLES: dict[Color, tuple[str, str]] = {
    "rgb": ("I_RGB", "SRGB"),
    "bgr": ("I_BGR", "SRGB"),
    "gray": ("I_Y", "GRAY"),
}

# nvJPEG always interpolates subsampled colours. libjpeg repeats them where a row has two or fewer (4:2:2 and 4:2:0),
# that is up to a width of 4; there the two would differ by whole colours, so the host decodes such slivers.
_SMOOTHED_FROM_WIDTH = 5

_decoders = threading.local()  # a Decoder shared by threads loses images, or the process


def takes(header: Header, color: Color) -> bool:
    """Whether the GPU shall try this image."""
    return (
        header.format == "jpeg"
        and header.bits == 8
        and header.variant in ("baseline", "extended", "progressive")
        and header.colorspace in ("gray", "ycbcr")
        and header.width >= _SMOOTHED_FROM_WIDTH
        and color in _SAMPLES
    )


def decode_into(outs: Sequence[Any], datas: Sequence[bytes], headers: Sequence[Header], *, color: Color) -> list[bool]:
    """Decode JPEGs, upright, into the caller's device memory, on CuPy's current stream.

    Parameters
    ----------
    outs : sequence of (H, W, C) uint8 CuPy arrays
        ``header.oriented_size`` pixels each, in memory acquired with ``wait_on_host=True``: the hardware engine does
        not wait for work that is queued on the stream.
    datas : sequence of bytes
    headers : sequence of Header
        All of them complete, and taken by :func:`takes`.
    color : {"rgb", "bgr", "gray"}

    Returns
    -------
    list of bool
        Which images the GPU decoded. The others it refused, without a reason: ask the host, which gives one.

    Raises
    ------
    MissingExtraError
        Without nvImageCodec.
    DeviceError
        If nvImageCodec fails as a whole.
    """
    decoded = [False] * len(outs)
    # Upright ones apart: for them nvImageCodec shall not look into the EXIF, where it might read another orientation.
    for upright in (True, False):
        group = [index for index, header in enumerate(headers) if (header.orientation == 1) is upright]
        if not group:
            continue  # nvImageCodec is imported, and asked whether it knows the colour, only for images
        done = _decode_group(
            [outs[index] for index in group],
            [datas[index] for index in group],
            [headers[index] for index in group],
            _params(color, apply_orientation=not upright),
        )
        for index, ok in zip(group, done, strict=True):
            decoded[index] = ok
    return decoded


def _decode_group(outs: Sequence[Any], datas: Sequence[bytes], headers: Sequence[Header], params: Any) -> list[bool]:
    """Decode images that share their parameters; which ones succeeded."""
    codec = _nvimgcodec()
    streams = [codec.CodeStream(data) for data in datas]
    agree = [_agrees(stream, header) for stream, header in zip(streams, headers, strict=True)]
    if not any(agree):
        return agree  # nvImageCodec takes no empty list either
    cuda_stream = stream_pointer()
    try:
        images = codec.as_images(list(compress(outs, agree)), cuda_stream)
        results = _decoder().decode(
            list(compress(streams, agree)), images=images, params=params, cuda_stream=cuda_stream
        )
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"nvImageCodec failed on {len(outs)} images as a whole: {error}") from error
    answers = iter(results)
    return [
        ok and (result := next(answers)) is not None and tuple(result.shape) == tuple(out.shape)
        for ok, out in zip(agree, outs, strict=True)
    ]


def _params(color: Color, *, apply_orientation: bool) -> Any:
    codec = _nvimgcodec()
    samples, space = _SAMPLES[color]
    return codec.DecodeParams(
        apply_exif_orientation=apply_orientation,
        color_spec=getattr(codec.ColorSpec, space),
        sample_format=getattr(codec.SampleFormat, samples),
    )


def _agrees(stream: Any, header: Header) -> bool:
    """Whether nvImageCodec reads the size that our header pass read: one wrong buffer would fail the whole batch."""
    try:
        return bool((stream.height, stream.width) == (header.height, header.width))
    except RuntimeError:  # it cannot parse the file
        return False


def _decoder() -> Any:
    """This thread's decoder for the current device.

    The hardware engine takes what it can and the CUDA decoder the rest.  Without a CPU backend here, refusals come
    back to us, and our own host decoder judges them.
    """
    device_id = array_module("cuda").cuda.Device().id
    by_device: dict[int, Any] = _decoders.__dict__.setdefault("by_device", {})
    if device_id not in by_device:
        codec = _nvimgcodec()
        kind, ignore_hint = codec.BackendKind, codec.LoadHintPolicy.IGNORE
        backends = [
            # A fixed share of the batch would be latched from the first batch seen, be it of one image.
            codec.Backend(kind.HW_GPU_ONLY, 1.0, ignore_hint),
            codec.Backend(kind.HYBRID_CPU_GPU),
        ]
        try:
            by_device[device_id] = codec.Decoder(
                device_id=device_id, max_num_cpu_threads=max(1, available_cores() - 1), backends=backends
            )
        except RuntimeError as error:
            raise DeviceError(
                f"nvImageCodec makes no JPEG decoder on device {device_id}: {error}; is nvJPEG installed? "
                f"pip install 'nbvision[{CUDA_EXTRA}]'"
            ) from error
    return by_device[device_id]


@functools.cache
def _nvimgcodec() -> ModuleType:
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # read at import; it would log every refused image
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise MissingExtraError("nvidia.nvimgcodec", extra=CUDA_EXTRA, needed_for="decoding on the GPU") from error
    module: ModuleType = nvimgcodec
    return module
