"""JPEGs in memory to RGB pixels, a batch of 64 at a time."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from .common import jpeg, need, need_cuda, scenery, wait_for_gpu, wall_us

SIZES = {"500x375": (375, 500), "1920x1080": (1080, 1920)}
BATCH = 64
DIFFERENT = 8  # images; the batch repeats them


@functools.lru_cache(maxsize=2)
def files(size: str) -> list[bytes]:
    height, width = SIZES[size]
    scene = scenery(height, width, 1)
    offsets = [(height * index // DIFFERENT, width * index // DIFFERENT) for index in range(DIFFERENT)]
    encoded = [jpeg(np.roll(scene, offset, (0, 1))) for offset in offsets]
    return [encoded[index % DIFFERENT] for index in range(BATCH)]


class JpegOnGPU:
    """Into device memory, the wait for the GPU included; OpenCV stays on the host, on one thread."""

    params = (list(SIZES), ["nbvision", "nvImageCodec", "torchvision", "OpenCV, 1 thread"])
    param_names = ("size", "how")

    def setup(self, size: str, how: str) -> None:
        need_cuda()
        self.call = _GPU_DECODERS[how](files(size))
        _check(self.call(), size)

    def track_us_per_image(self, size: str, how: str) -> float:
        return wall_us(self.call, finish=wait_for_gpu) / BATCH

    track_us_per_image.unit = "us/image"


class JpegOnCPU:
    """Into host memory; all but nbvision in a plain loop, as they come."""

    params = (list(SIZES), ["nbvision", "nbvision, 1 thread", "simplejpeg", "OpenCV, 1 thread", "Pillow"])
    param_names = ("size", "how")

    def setup(self, size: str, how: str) -> None:
        self.call = _CPU_DECODERS[how](files(size))
        _check(self.call(), size)

    def track_us_per_image(self, size: str, how: str) -> float:
        return wall_us(self.call) / BATCH

    track_us_per_image.unit = "us/image"


def _check(images: Any, size: str) -> None:
    assert len(images) == BATCH
    shape = tuple(images[0].shape)
    assert shape in ((*SIZES[size], 3), (3, *SIZES[size])), f"decoded to {shape}"


# --- decoders ------------------------------------------------------------------------------------------------------


def _nbvision(device: Any, threads: int | None = None) -> Callable[[list[bytes]], Callable[[], Any]]:
    def prepare(batch: list[bytes]) -> Callable[[], Any]:
        from nbvision import decode

        return lambda: decode(batch, device=device, threads=threads)

    return prepare


def _nvimgcodec(batch: list[bytes]) -> Callable[[], Any]:
    codec = need("nvidia.nvimgcodec")
    decoder = codec.Decoder()
    return lambda: decoder.decode(batch)


def _torchvision(batch: list[bytes]) -> Callable[[], Any]:
    torch, io_of = need("torch"), need("torchvision.io")
    tensors = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in batch]
    return lambda: io_of.decode_jpeg(tensors, mode=io_of.ImageReadMode.RGB, device="cuda")


def _opencv(batch: list[bytes]) -> Callable[[], Any]:
    cv2 = need("cv2")

    def one(data: bytes) -> Any:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def call() -> Any:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            return [one(data) for data in batch]
        finally:
            cv2.setNumThreads(threads)

    return call


def _simplejpeg(batch: list[bytes]) -> Callable[[], Any]:
    simplejpeg = need("simplejpeg")
    return lambda: [simplejpeg.decode_jpeg(data) for data in batch]


def _pillow(batch: list[bytes]) -> Callable[[], Any]:
    return lambda: [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch]


_GPU_DECODERS = {
    "nbvision": _nbvision("cuda"),
    "nvImageCodec": _nvimgcodec,
    "torchvision": _torchvision,
    "OpenCV, 1 thread": _opencv,
}
_CPU_DECODERS = {
    "nbvision": _nbvision("cpu"),
    "nbvision, 1 thread": _nbvision("cpu", 1),
    "simplejpeg": _simplejpeg,
    "OpenCV, 1 thread": _opencv,
    "Pillow": _pillow,
}
