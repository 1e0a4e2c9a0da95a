"""What follows a mask head: centroids, masks of crops in their sources, and objects with their masks as alpha."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .common import copied_bytes_per_us, gpu_us, launch_us, need, need_cuda, noise, wall_us

WHAT = ["centroids of 96 x 96", "28 x 28 into 1080p", "objects with alpha"]
HEIGHT, WIDTH = 1080, 1920


def masks_and_boxes(count: int, side: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and boxes of 5 % to 30 % of an image's sides."""
    rng = np.random.default_rng(6)
    size = rng.uniform(0.05, 0.3, (count, 2)) * [width, height]
    corner = rng.uniform(0, 1, (count, 2)) * ([width, height] - size)
    boxes = np.concatenate([corner, corner + size], axis=1).round().astype(np.float32)
    return rng.normal(0, 1, (count, side, side)).astype(np.float32), boxes


def calls(
    what: str, peer: Callable[..., Any] | None, image: Any, masks: Any, boxes: Any, size: tuple[int, int]
) -> Callable[[], Any]:
    """What is measured, by nbvision or by a peer; ``image``, ``masks`` and ``boxes`` lie where it works."""
    import nbvision as nbv

    if peer is not None:
        return lambda: peer(what, image, masks, boxes, size)
    if what == WHAT[0]:
        return lambda: nbv.mask_centroids(masks)
    if what == WHAT[1]:
        return lambda: nbv.paste_masks(masks, boxes, size)
    return lambda: nbv.cut_out_rgba(image, boxes, masks)


def opencv(what: str, image: np.ndarray, masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> Any:
    """Mask by mask on the host."""
    cv2 = need("cv2")
    places = [tuple(map(int, box)) for box in boxes]
    if what == WHAT[0]:
        moments = [cv2.moments((mask > 0).astype(np.uint8), binaryImage=True) for mask in masks]
        return np.array([[one["m10"], one["m01"]] for one in moments]) / [[one["m00"]] for one in moments] + 0.5
    if what == WHAT[1]:
        out = np.zeros((len(masks), *size), bool)
        for whole, mask, (x1, y1, x2, y2) in zip(out, masks, places, strict=True):
            whole[y1:y2, x1:x2] = cv2.resize(mask, (x2 - x1, y2 - y1)) > 0
        return out
    objects = []
    for mask, (x1, y1, x2, y2) in zip(masks, places, strict=True):
        rgba = cv2.cvtColor(image[y1:y2, x1:x2], cv2.COLOR_RGB2RGBA)
        stretched = cv2.resize((mask > 0).astype(np.float32), (x2 - x1, y2 - y1))
        rgba[..., 3] = np.where(stretched >= 0.5, 255, 0)
        objects.append(rgba)
    return objects


def torch_way(what: str, image: Any, masks: Any, boxes: Any, size: tuple[int, int]) -> Any:
    """All masks together where torch can, into whole sources as Detectron2 does; objects one by one."""
    torch = need("torch")
    if what == WHAT[0]:
        inside = masks > 0
        area = inside.sum((1, 2))
        x = (inside.sum(1) * torch.arange(masks.shape[2], device=masks.device)).sum(1)
        y = (inside.sum(2) * torch.arange(masks.shape[1], device=masks.device)).sum(1)
        return torch.stack([x / area, y / area], 1) + 0.5
    if what == WHAT[1]:
        y, x = (torch.arange(length, device=masks.device) + 0.5 for length in size)
        x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
        y = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
        shape = (len(masks), size[0], size[1])
        grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], 3)
        return torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] > 0
    objects = []
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        options = {"size": (y2 - y1, x2 - x1), "mode": "bilinear", "align_corners": False}
        stretched = torch.nn.functional.interpolate((mask > 0).float()[None, None], **options)[0, 0]
        alpha = (stretched >= 0.5).to(torch.uint8) * 255
        objects.append(torch.cat([image[y1:y2, x1:x2], alpha[:, :, None]], 2))
    return objects


class MasksOnGPU:
    """200 masks and one 1080p frame in device memory."""

    params = (WHAT, ["nbvision", "torch"])
    param_names = ("what", "how")
    count = 200

    def setup(self, what: str, how: str) -> None:
        need_cuda()
        import cupy

        masks, boxes = masks_and_boxes(self.count, 96 if what == WHAT[0] else 28, HEIGHT, WIDTH)
        arrays = [cupy.asarray(array) for array in (noise(HEIGHT, WIDTH, 3), masks, boxes)]
        peer = None
        if how == "torch":
            arrays, peer = [need("torch").from_dlpack(array) for array in arrays], torch_way
        self.call = calls(what, peer, *arrays, (HEIGHT, WIDTH))
        pixels = int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())
        self.moved_bytes = dict(
            zip(
                WHAT, [masks.nbytes, masks.nbytes + self.count * HEIGHT * WIDTH, masks.nbytes + 7 * pixels], strict=True
            )
        )[what]

    def track_us(self, what: str, how: str) -> float:
        """The GPU's time, with the host's where it waits."""
        return gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, what: str, how: str) -> float:
        """The same, as a multiple of a copy of the bytes that must be read and written."""
        return gpu_us(self.call) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"

    def track_host_us(self, what: str, how: str) -> float:
        """What one call costs the Python thread, while the GPU is behind."""
        return launch_us(self.call)

    track_host_us.unit = "us"


class MasksOnCPU:
    """20 masks and one frame on the host."""

    params = (WHAT, ["nbvision", "OpenCV"])
    param_names = ("what", "how")
    size = (HEIGHT, WIDTH)
    count = 20

    def setup(self, what: str, how: str) -> None:
        masks, boxes = masks_and_boxes(self.count, 96 if what == WHAT[0] else 28, *self.size)
        if how == "OpenCV":
            need("cv2")
        self.call = calls(what, opencv if how == "OpenCV" else None, noise(*self.size, 3), masks, boxes, self.size)

    def track_us(self, what: str, how: str) -> float:
        """Time of one call, on all cores."""
        return wall_us(self.call)

    track_us.unit = "us"
