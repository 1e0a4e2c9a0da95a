"""Encode JPEGs on the GPU with nvImageCodec's CUDA encoder, from memory that the GPU has them in."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

from nbvision.codecs._nvimgcodec import SAMPLES, Pixels, nvimgcodec
from nbvision.codecs._threads import Turns
from nbvision.errors import DeviceError
from nbvision.image import Color
from nbvision.runtime.device import CUDA_EXTRA, array_module, available_cores

__all__ = ["encode_jpegs"]


def encode_jpegs(
    images: Sequence[Any], *, color: Color, quality: int, subsampling: str, optimize: bool, progressive: bool
) -> list[bytes | None]:
    """The file of each image, after the work that is queued on CuPy's current stream; waits for it.

    Parameters
    ----------
    images : sequence of (H, W, C) CuPy arrays, uint8
    color : {"rgb", "bgr", "gray"}
    quality : int
        1..100.
    subsampling : {"420", "422", "444"}
        Of gray images without a meaning.
    optimize, progressive : bool

    Returns
    -------
    list of (bytes or None)
        None for an image that the encoder refuses, without a reason: ask the host.

    Raises
    ------
    MissingExtraError
        Without nvImageCodec.
    DeviceError
        If nvImageCodec fails as a whole.
    """
    if not images:
        return []
    with images[0].device:
        return _encoder_of(images[0].device.id).encode(
            images, color, _params(quality, subsampling, optimize, progressive)
        )


class _Encoder:
    """nvImageCodec's encoder of one device, for all threads of the process, who take turns."""

    def __init__(self, device_id: int) -> None:
        codec = nvimgcodec()
        backends = [codec.Backend(codec.BackendKind.HYBRID_CPU_GPU)]
        threads = max(1, available_cores() * 3 // 4)
        try:
            self._encoder = codec.Encoder(device_id=device_id, max_num_cpu_threads=threads, backends=backends)
        except RuntimeError as error:
            raise DeviceError(
                f"nvImageCodec makes no JPEG encoder on device {device_id}: {error}; is nvJPEG installed? "
                f"pip install 'nbvision[{CUDA_EXTRA}]'"
            ) from error
        self._turns = Turns()
        self._stream = array_module("cuda").cuda.Stream(non_blocking=True)

    def encode(self, images: Sequence[Any], color: Color, params: Any) -> list[bytes | None]:
        codec, xp = nvimgcodec(), array_module("cuda")
        samples, space = SAMPLES[color]
        dense = [xp.ascontiguousarray(image) for image in images]
        described = codec.as_images(
            [Pixels(image.data.ptr, image.shape) for image in dense],
            self._stream.ptr,
            sample_format=getattr(codec.SampleFormat, samples),
            color_spec=getattr(codec.ColorSpec, space),
        )
        queued = xp.cuda.get_current_stream().record()
        with self._turns:
            self._stream.wait_event(queued)
            try:
                files = self._encoder.encode(described, "jpeg", params=params, cuda_stream=self._stream.ptr)
            except (RuntimeError, ValueError) as error:
                raise DeviceError(f"nvImageCodec failed on {len(images)} images as a whole: {error}") from error
        return [None if file is None else bytes(file) for file in files]


_making = threading.Lock()
_by_device: dict[int, _Encoder] = {}


def _encoder_of(device_id: int) -> _Encoder:
    with _making:
        if device_id not in _by_device:
            _by_device[device_id] = _Encoder(device_id)
        return _by_device[device_id]


@functools.lru_cache(maxsize=64)
def _params(quality: int, subsampling: str, optimize: bool, progressive: bool) -> Any:
    codec = nvimgcodec()
    return codec.EncodeParams(
        quality_type=codec.QualityType.QUALITY,
        quality_value=quality,
        chroma_subsampling=getattr(codec.ChromaSubsampling, f"CSS_{subsampling}"),
        jpeg_encode_params=codec.JpegEncodeParams(progressive=progressive, optimized_huffman=optimize),
    )
