"""RGB pixels in memory to files in host memory, a batch at a time."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from .common import need, need_cuda, scenery, wall_us

HEIGHT, WIDTH = 375, 500
IMAGES = 8
# Format and nbvision's options. The qualities are the same for all; of the rest, AVIF's speed is told to all too.
WHAT: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG 85": ("jpeg", {"quality": 85}),
    "JPEG 85, progressive": ("jpeg", {"quality": 85, "progressive": True}),
    "PNG": ("png", {}),
    "WebP 80": ("webp", {"quality": 80}),
    "WebP, lossless": ("webp", {"lossless": True}),
    "AVIF 75": ("avif", {"quality": 75}),
    "AVIF 75, optimised": ("avif", {"quality": 75, "optimize": True}),
}


@functools.lru_cache(maxsize=1)
def frames(count: int, height: int, width: int) -> list[np.ndarray]:
    return [scenery(height, width, seed) for seed in range(count)]


class EncodeOnCPU:
    """From host memory; the peers in a plain loop, as they come."""

    params = (list(WHAT), ["nbvision", "nbvision, 1 thread", "Pillow", "OpenCV, 1 thread"])
    param_names = ("what", "how")
    size = (HEIGHT, WIDTH)

    def setup(self, what: str, how: str) -> None:
        self.call = _ENCODERS[how](frames(IMAGES, *self.size), *WHAT[what])
        self.files = self.call()
        assert len(self.files) == IMAGES
        assert Image.open(io.BytesIO(self.files[0])).size == self.size[::-1]

    def track_us_per_image(self, what: str, how: str) -> float:
        return wall_us(self.call) / IMAGES

    track_us_per_image.unit = "us/image"

    def track_bytes_per_image(self, what: str, how: str) -> float:
        return sum(map(len, self.files)) / IMAGES

    track_bytes_per_image.unit = "bytes/image"


class EncodeJpegOnGPU:
    """From memory of the GPU, quality 85, colours shared by 2 x 2 pixels."""

    params = (["500x375", "1920x1080"], ["nbvision, the GPU's", "nbvision, the host's", "torchvision"])
    param_names = ("size", "how")
    images = 64

    def setup(self, size: str, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import encode

        width, height = map(int, size.split("x"))
        different = [cupy.asarray(frame) for frame in frames(IMAGES, height, width)]
        images = [different[index % IMAGES] for index in range(self.images)]
        if how == "torchvision":
            torch, io_of = need("torch"), need("torchvision.io")
            tensors = [torch.from_dlpack(image).permute(2, 0, 1).contiguous() for image in images]
            self.call = lambda: [file.cpu() for file in io_of.encode_jpeg(tensors, quality=85)]
        else:
            self.call = lambda: encode(images, quality=85, device="cuda" if how.endswith("GPU's") else "cpu")
        files = self.call()
        assert len(files) == self.images
        first = files[0].numpy() if how == "torchvision" else files[0]
        assert Image.open(io.BytesIO(bytes(first))).size == (width, height)

    def track_us_per_image(self, size: str, how: str) -> float:
        return wall_us(self.call) / self.images

    track_us_per_image.unit = "us/image"


# --- encoders ------------------------------------------------------------------------------------------------------


def _nbvision(threads: int | None = None) -> Callable[..., Callable[[], Any]]:
    def prepare(images: list[np.ndarray], format: str, options: dict[str, Any]) -> Callable[[], Any]:
        from nbvision import encode

        return lambda: encode(images, format, threads=threads, **options)

    return prepare


def _pillow(images: list[np.ndarray], format: str, options: dict[str, Any]) -> Callable[[], Any]:
    if format == "avif":
        options = {"quality": options["quality"], "speed": 6 if "optimize" in options else 9}

    def one(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format, **options)
        return file.getvalue()

    return lambda: [one(pixels) for pixels in images]


def _opencv(images: list[np.ndarray], format: str, options: dict[str, Any]) -> Callable[[], Any]:
    cv2 = need("cv2")
    suffix = f".{format}"
    if not cv2.haveImageWriter(f"a{suffix}"):
        raise NotImplementedError(f"this OpenCV writes no {format}")
    quality = 101 if "lossless" in options else options.get("quality", 0)  # OpenCV's way to say lossless
    flags = {
        "jpeg": [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, int("progressive" in options)],
        "png": [],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, quality],
        "avif": [cv2.IMWRITE_AVIF_QUALITY, quality, cv2.IMWRITE_AVIF_SPEED, 6 if "optimize" in options else 9],
    }[format]

    def call() -> Any:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            return [bytes(cv2.imencode(suffix, pixels[:, :, ::-1], flags)[1]) for pixels in images]
        finally:
            cv2.setNumThreads(threads)

    return call


_ENCODERS = {
    "nbvision": _nbvision(),
    "nbvision, 1 thread": _nbvision(1),
    "Pillow": _pillow,
    "OpenCV, 1 thread": _opencv,
}
