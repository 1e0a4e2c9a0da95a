"""Eager operations on frames, byte by byte: uint8 in, uint8 out, beside what else does them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .common import copied_bytes_per_us, gpu_us, launch_us, need, need_cuda, noise, wall_us

HEIGHT, WIDTH = 1080, 1920
IMAGES = 16
PAD, GRAY, WEIGHTED, BLEND, LUT = "pad by 16, reflect", "RGB to gray", "add_weighted", "blend", "lut"
WHAT = [PAD, GRAY, WEIGHTED, BLEND, LUT]
BORDER = 16
TABLE = np.random.default_rng(3).integers(0, 256, 256, dtype=np.uint8)


@functools.lru_cache(maxsize=1)
def frames(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames, others, and masks of 0..1 in float32."""
    both = np.stack([noise(height, width, seed) for seed in range(2 * count)])
    masks = np.random.default_rng(5).random((count, height, width), np.float32)
    return both[:count], both[count:], masks


def nbvision_call(what: str, first: Any, second: Any, masks: Any) -> Callable[[], Any]:
    """Of arrays of one shape, or of batches."""
    import nbvision as nbv

    return {
        PAD: lambda: nbv.pad(first, BORDER, mode="reflect"),
        GRAY: lambda: nbv.cvt_color(first, "gray"),
        WEIGHTED: lambda: nbv.add_weighted(first, 0.7, second, 0.3),
        BLEND: lambda: nbv.blend(first, second, masks),
        LUT: lambda: nbv.lut(first, TABLE),
    }[what]


class EagerOnGPU:
    """Frames in device memory to frames in device memory, new each time."""

    params = (WHAT, ["nbvision", "torch", "CV-CUDA"])
    param_names = ("what", "how")

    def setup(self, what: str, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import as_batch

        first, second, masks = (cupy.asarray(array) for array in frames(IMAGES, HEIGHT, WIDTH))
        ours = nbvision_call(what, as_batch(first), as_batch(second), as_batch(masks, color="gray"))
        expected = cupy.stack(list(ours()))
        self.moved_bytes = first.nbytes + expected.nbytes
        if what in (WEIGHTED, BLEND):
            self.moved_bytes += second.nbytes + (masks.nbytes if what == BLEND else 0)
        if how == "nbvision":
            self.call: Callable[[], Any] = ours
        else:
            self.call = {"torch": _torch, "CV-CUDA": _cvcuda}[how](what, first, second, masks)
            got = cupy.asarray(self.call()).reshape(expected.shape)
            assert float(abs(got.astype(np.float32) - expected).mean()) < 1, "a peer that computes something else"

    def track_us(self, what: str, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, what: str, how: str) -> float:
        """The same, as a multiple of a copy of all that is read and written."""
        return gpu_us(self.call) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"

    def track_host_us(self, what: str, how: str) -> float:
        """What one call costs the Python thread, while the GPU is behind."""
        return launch_us(self.call)

    track_host_us.unit = "us"


class EagerOnCPU:
    """One frame on the host."""

    params = (WHAT, ["nbvision", "OpenCV"])
    param_names = ("what", "how")
    size = (HEIGHT, WIDTH)

    def setup(self, what: str, how: str) -> None:
        first, second, masks = (array[0] for array in frames(1, *self.size))
        make = nbvision_call if how == "nbvision" else _opencv
        self.call: Callable[[], Any] = make(what, first, second, masks)

    def track_us(self, what: str, how: str) -> float:
        """Time of one call, on all cores."""
        return wall_us(self.call)

    track_us.unit = "us"


# --- peers ---------------------------------------------------------------------------------------------------------


def _opencv(what: str, first: Any, second: Any, mask: Any) -> Callable[[], Any]:
    cv2 = need("cv2")
    rest = 1 - mask
    return {
        PAD: lambda: cv2.copyMakeBorder(first, *(BORDER,) * 4, cv2.BORDER_REFLECT_101),
        GRAY: lambda: cv2.cvtColor(first, cv2.COLOR_RGB2GRAY),
        WEIGHTED: lambda: cv2.addWeighted(first, 0.7, second, 0.3, 0),
        BLEND: lambda: cv2.blendLinear(first, second, mask, rest),
        LUT: lambda: cv2.LUT(first, TABLE),
    }[what]


def _torch(what: str, first: Any, second: Any, masks: Any) -> Callable[[], Any]:
    torch = need("torch")
    one, other, share = (torch.from_dlpack(array) for array in (first, second, masks))
    share = share[..., None]
    shares = torch.tensor([0.299, 0.587, 0.114], device=one.device)
    table = torch.from_numpy(TABLE).to(one.device)

    def padded() -> Any:
        planes = one.permute(0, 3, 1, 2).half()  # torch reflects no uint8
        found = torch.nn.functional.pad(planes, (BORDER,) * 4, mode="reflect")
        return found.byte().permute(0, 2, 3, 1).contiguous()

    return {
        PAD: padded,
        GRAY: lambda: (one.float() @ shares).round_().byte(),
        WEIGHTED: lambda: (one.float() * 0.7).add_(other, alpha=0.3).round_().clamp_(0, 255).byte(),
        BLEND: lambda: torch.lerp(other.float(), one.float(), share).round_().byte(),
        LUT: lambda: table[one.int()],
    }[what]


def _cvcuda(what: str, first: Any, second: Any, masks: Any) -> Callable[[], Any]:
    cvcuda = need("cvcuda")
    batch = cvcuda.as_tensor(first, "NHWC")
    if what == PAD:
        options = {"border_mode": cvcuda.Border.REFLECT101, "border_value": np.zeros(4, np.float32)}
        sides = {"top": BORDER, "bottom": BORDER, "left": BORDER, "right": BORDER}
        return lambda: cvcuda.copymakeborder(batch, **options, **sides).cuda()
    if what == GRAY:
        return lambda: cvcuda.cvtcolor(batch, cvcuda.ColorConversion.RGB2GRAY).cuda()
    raise NotImplementedError(f"it has no {what}")
