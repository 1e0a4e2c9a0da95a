"""Frames through matrices, flipped and turned: uint8 in, uint8 out, beside what else does it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .common import copied_bytes_per_us, gpu_us, launch_us, need, need_cuda, scenery, wait_for_gpu, wall_us

HEIGHT, WIDTH = 1080, 1920
IMAGES = 16
AFFINE, PERSPECTIVE, TURN, FLIP = "affine, 10 degrees", "perspective", "quarter turn", "flip"
WHAT = [AFFINE, f"{AFFINE}, nearest", f"{AFFINE}, cubic", PERSPECTIVE, TURN, FLIP]


@functools.lru_cache(maxsize=1)
def frames(count: int, height: int, width: int) -> list[np.ndarray]:
    return [scenery(height, width, seed) for seed in range(count)]


def matrix_of(what: str, height: int, width: int) -> np.ndarray:
    from nbvision import rotation_matrix

    turned = rotation_matrix((width / 2, height / 2), 10)
    return np.vstack([turned, [0.1 / width, 0.1 / height, 1]]) if what == PERSPECTIVE else turned


def interpolation_of(what: str) -> str:
    return what.rpartition(", ")[2] if what.count(",") == 2 else "linear"


def nbvision_call(images: Any, out: Any, what: str, height: int, width: int) -> Callable[[], Any]:
    """Of an array, or of a batch on the GPU, with a matrix that is there too."""
    import nbvision as nbv

    if what == TURN:
        return lambda: nbv.rotate(images, 1, out=out)
    if what == FLIP:
        return lambda: nbv.flip(images, horizontal=True, out=out)
    warp = nbv.warp_perspective if what == PERSPECTIVE else nbv.warp_affine
    matrix: Any = matrix_of(what, height, width)
    if isinstance(images, nbv.ImageBatch):
        import cupy

        matrix = cupy.asarray(matrix)
    options: Any = {"interpolation": interpolation_of(what)}
    return lambda: warp(images, matrix, (height, width), out=out, **options)


def opencv(image: np.ndarray, what: str) -> np.ndarray:
    cv2 = need("cv2")
    if what == TURN:
        return cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)
    if what == FLIP:
        return cv2.flip(image, 1)
    height, width = image.shape[:2]
    warp = cv2.warpPerspective if what == PERSPECTIVE else cv2.warpAffine
    kinds = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
    return warp(image, matrix_of(what, height, width), (width, height), flags=kinds[interpolation_of(what)])


class WarpOnGPU:
    """Frames in device memory to frames in device memory."""

    params = (WHAT, ["nbvision", "torch", "CV-CUDA", "OpenCV, copied down and up"])
    param_names = ("what", "how")

    def setup(self, what: str, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import as_batch

        images = cupy.asarray(np.stack(frames(IMAGES, HEIGHT, WIDTH)))
        self.on_host = how.startswith("OpenCV")
        shape = (IMAGES, WIDTH, HEIGHT, 3) if what == TURN else images.shape
        expected = cupy.empty(shape, np.uint8)
        ours = nbvision_call(as_batch(images), as_batch(expected), what, HEIGHT, WIDTH)
        ours()
        if how == "nbvision":
            self.call: Callable[[], Any] = ours
        else:
            self.call = {"torch": _torch, "CV-CUDA": _cvcuda}.get(how, _round_trip)(images, what)
            got = cupy.asarray(self.call())
            assert got.shape == expected.shape
            assert float(abs(got.astype(np.float32) - expected).mean()) < 2, "a peer that computes something else"
        self.moved_bytes = 2 * images.nbytes

    def track_us(self, what: str, how: str) -> float:
        """The GPU's time; of OpenCV the host's."""
        return wall_us(self.call, finish=wait_for_gpu) if self.on_host else gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, what: str, how: str) -> float:
        """The same, as a multiple of a copy of all frames."""
        return self.track_us(what, how) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"

    def track_host_us(self, what: str, how: str) -> float:
        """What one call costs the Python thread, while the GPU is behind."""
        return float("nan") if self.on_host else launch_us(self.call)

    track_host_us.unit = "us"


class WarpOnCPU:
    """One frame on the host."""

    params = (WHAT, ["nbvision", "OpenCV"])
    param_names = ("what", "how")
    size = (HEIGHT, WIDTH)

    def setup(self, what: str, how: str) -> None:
        (image,) = frames(1, *self.size)
        if how == "OpenCV":
            need("cv2")
            self.call: Callable[[], Any] = lambda: opencv(image, what)
        else:
            out = np.empty_like(image.transpose(1, 0, 2) if what == TURN else image, order="C")
            self.call = nbvision_call(image, out, what, *self.size)

    def track_us(self, what: str, how: str) -> float:
        """Time of one call, on all cores."""
        return wall_us(self.call)

    track_us.unit = "us"


# --- peers ---------------------------------------------------------------------------------------------------------


def _torch(images: Any, what: str) -> Callable[[], Any]:
    torch = need("torch")
    batch = torch.from_dlpack(images)
    if what == TURN:
        return lambda: torch.rot90(batch, 1, (1, 2)).contiguous()
    if what == FLIP:
        return lambda: torch.flip(batch, (2,))
    height, width = images.shape[1:3]
    matrix = np.vstack([matrix_of(what, height, width), [0, 0, 1]])[:3]
    # From output to source in units where -1 and 1 are the outer edges of the first and the last pixel.
    units = np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])
    lines = torch.as_tensor((units @ np.linalg.inv(matrix)).astype(np.float32), device=batch.device)
    y, x = torch.meshgrid(*(torch.arange(side, device=batch.device) for side in (height, width)), indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1).float() @ lines.T
    grid = (places[..., :2] / places[..., 2:]).expand(len(batch), height, width, 2)
    mode = {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}[interpolation_of(what)]

    def call() -> Any:
        planes = batch.permute(0, 3, 1, 2).float()
        warped = torch.nn.functional.grid_sample(planes, grid, mode=mode, align_corners=False)
        return warped.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()

    return call


def _cvcuda(images: Any, what: str) -> Callable[[], Any]:
    cvcuda = need("cvcuda")
    batch = cvcuda.as_tensor(images, "NHWC")
    if what == TURN:
        raise NotImplementedError("it keeps the size, a turned frame does not")
    if what == FLIP:
        return lambda: cvcuda.flip(batch, 1).cuda()
    flags = getattr(cvcuda.Interp, interpolation_of(what).upper())
    matrix = matrix_of(what, *images.shape[1:3]).astype(np.float32)
    warp = cvcuda.warp_perspective if what == PERSPECTIVE else cvcuda.warp_affine
    options = {"border_mode": cvcuda.Border.CONSTANT, "border_value": np.zeros(4, np.float32)}
    return lambda: warp(batch, matrix, flags, **options).cuda()


def _round_trip(images: Any, what: str) -> Callable[[], Any]:
    import cupy

    need("cv2")
    return lambda: cupy.asarray(np.stack([opencv(image, what) for image in images.get()]))
