"""From a video decoder's NV12 frames to the detector's input: convert, letterbox, scale, NCHW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .common import copied_bytes_per_us, gpu_us, need, need_cuda, straightforward, wall_us
from .preprocess import FILL, _check_close, _padding

FRAMES = 64
NBVISION = ["nbvision, parity cv2", "nbvision, parity fast"]


def frame_of(height: int, width: int, seed: int) -> np.ndarray:
    """Noise of medium levels, (H * 3 / 2, W)."""
    return np.random.default_rng(seed).integers(64, 193, (height * 3 // 2, width), dtype=np.uint8)


class NV12OnGPU:
    """64 frames in device memory to float16 NCHW of 640 x 640 in 0..1; RGB is the same pictures, converted before."""

    params = (
        ["1080x1920", "1078x1918"],
        [*NBVISION, "nbvision, RGB, parity cv2", "nbvision, RGB, parity fast", "CV-CUDA", "torch"],
    )
    param_names = ("size", "how")
    side = 640

    def setup(self, size: str, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import Preprocess, as_batch

        height, width = map(int, size.split("x"))
        frames = cupy.asarray(np.stack([frame_of(height, width, seed) for seed in range(FRAMES)]))
        batch = as_batch(frames, color="nv12")
        parity: Any = "fast" if how.endswith("fast") else "cv2"
        pre = Preprocess((self.side, self.side), scale=1 / 255, dtype="float16", fill=FILL, parity=parity)
        expected, geometry = pre(batch)
        place = geometry.regions[0, 5:9].get().tolist()  # left, top, width, height on the canvas
        luma_lines, chroma_lines = min(2 * place[3], height), min(2 * place[3], height // 2)
        self.moved_bytes = expected.nbytes + FRAMES * width * (luma_lines + chroma_lines)
        if how in NBVISION:
            self.call: Callable[[], Any] = lambda: pre(batch, out=expected)
        elif how.startswith("nbvision, RGB"):
            whole = Preprocess((height, width), fit="stretch", dtype="uint8", layout="NHWC")
            rgb = as_batch(whole(batch)[0])
            self.moved_bytes = expected.nbytes + FRAMES * width * luma_lines * 3
            self.call = lambda: pre(rgb, out=expected)
        else:
            self.call = (_cvcuda if how == "CV-CUDA" else _torch)(frames, self.side, place)
            _check_close(self.call(), expected)

    def track_us(self, size: str, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, size: str, how: str) -> float:
        """The same, as a multiple of the time that a copy of the bytes takes which must be read and written."""
        return gpu_us(self.call) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"


class NV12OnCPU:
    """One frame to float32 NCHW in 0..1; RGB is the same picture, converted before."""

    params = (["1080x1920", "1078x1918"], [*NBVISION, "nbvision, RGB, parity cv2", "OpenCV and NumPy"])
    param_names = ("size", "how")
    side = 640

    def setup(self, size: str, how: str) -> None:
        from nbvision import Preprocess, as_batch

        cv2, baseline = need("cv2"), straightforward()
        height, width = map(int, size.split("x"))
        frame = frame_of(height, width, 1)
        parity: Any = "fast" if how.endswith("fast") else "cv2"
        pre = Preprocess((self.side, self.side), scale=1 / 255, fill=FILL, parity=parity)
        batch = as_batch(frame, color="nv12")
        expected, _ = pre(batch)
        canvas_size = (self.side, self.side)
        if how in NBVISION:
            self.call: Callable[[], Any] = lambda: pre(batch, out=expected)
        elif how.startswith("nbvision, RGB"):
            rgb = as_batch(cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_NV12))
            self.call = lambda: pre(rgb, out=expected)
        else:

            def call() -> Any:
                picture = cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_NV12)
                return baseline.tensor_of([baseline.letterbox(picture, canvas_size)[0]], canvas_size)

            self.call = call
            _check_close(self.call(), expected)

    def track_us(self, size: str, how: str) -> float:
        """Time of one call, on all cores."""
        return wall_us(self.call)

    track_us.unit = "us"


# --- peers ---------------------------------------------------------------------------------------------------------


def _cvcuda(frames: Any, side: int, place: list[int]) -> Callable[[], Any]:
    cvcuda = need("cvcuda")
    tensor = cvcuda.as_tensor(frames[..., None], "NHWC")
    left, top, right, bottom = _padding(side, place)
    shape = (FRAMES, place[3], place[2], 3)

    def call() -> Any:
        images = cvcuda.cvtcolor(tensor, cvcuda.ColorConversion.YUV2RGB_NV12)
        images = cvcuda.resize(images, shape, cvcuda.Interp.LINEAR)
        images = cvcuda.copymakeborder(
            images,
            border_mode=cvcuda.Border.CONSTANT,
            border_value=[FILL] * 3,
            top=top,
            bottom=bottom,
            left=left,
            right=right,
        )
        return cvcuda.reformat(cvcuda.convertto(images, np.float32, scale=1 / 255), "NCHW").cuda()

    return call  # it has no float16 here, so it writes twice the bytes


def _torch(frames: Any, side: int, place: list[int]) -> Callable[[], Any]:
    torch = need("torch")
    functional = torch.nn.functional
    tensor = torch.from_dlpack(frames)
    height, width = tensor.shape[1] * 2 // 3, tensor.shape[2]
    left, top, right, bottom = _padding(side, place)

    def call() -> Any:
        luma = (tensor[:, :height].half() - 16).clamp_(0) * 1.164
        chroma = tensor[:, height:].reshape(FRAMES, height // 2, width // 2, 2).permute(0, 3, 1, 2).half() - 128
        u, v = functional.interpolate(chroma, scale_factor=2, mode="nearest").unbind(1)
        rgb = torch.stack([luma + 1.596 * v, luma - 0.391 * u - 0.813 * v, luma + 2.018 * u], 1).clamp_(0, 255)
        rgb = functional.interpolate(rgb, (place[3], place[2]), mode="bilinear", align_corners=False)
        return functional.pad(rgb, (left, right, top, bottom), value=FILL).div_(255)

    return call
