"""From a detector's head to boxes and instance masks, device to device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .common import gpu_us, need, need_cuda

IMAGES, CLASSES, ANCHORS, CANVAS = 64, 80, 8400, 640
SCORE, OVERLAP, KEPT, CANDIDATES = 0.25, 0.45, 100, 1024
MASKS, CHANNELS, CELLS = IMAGES * 50, 32, 160


def yolo_head() -> np.ndarray:
    """Boxes in clusters; about one anchor in twenty over the score threshold."""
    rng = np.random.default_rng(3)
    head = rng.uniform(0, 0.2, (IMAGES, 4 + CLASSES, ANCHORS)).astype(np.float32)
    centers = rng.uniform(60, 580, (IMAGES, 2, 40)).repeat(ANCHORS // 40, 2)
    head[:, :2] = centers + rng.normal(0, 5, centers.shape)
    head[:, 2:4] = rng.uniform(30, 120, (IMAGES, 2, ANCHORS))
    found = rng.random((IMAGES, ANCHORS)) < 0.05
    head[:, 4] = np.where(found, rng.uniform(0.25, 1, (IMAGES, ANCHORS)), head[:, 4])
    return head


class SuppressionOnGPU:
    """64 images, 8,400 anchors, 80 classes, to at most 100 boxes each."""

    params = (["nbvision", "torchvision batched_nms, image by image"],)
    param_names = ("how",)

    def setup(self, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import ImageBatch, Preprocess, nms

        head = cupy.asarray(yolo_head())
        if how == "nbvision":
            batch = ImageBatch.allocate([(CANVAS, CANVAS)] * IMAGES, device="cuda")
            _, geometry = Preprocess((CANVAS, CANVAS))(batch)
            limits: Any = {"max_detections": KEPT, "max_candidates": CANDIDATES}
            self.call: Callable[[], Any] = lambda: nms(
                head, geometry, score_threshold=SCORE, iou_threshold=OVERLAP, **limits
            )
        else:
            torch, ops = need("torch"), need("torchvision").ops
            tensor = torch.from_dlpack(head)
            self.call = lambda: [_torch_nms(torch, ops, one) for one in tensor]

    def track_us(self, how: str) -> float:
        """The GPU's time, with the host's where the peer waits for it."""
        return gpu_us(self.call)

    track_us.unit = "us"


def _torch_nms(torch: Any, ops: Any, head: Any) -> Any:
    scores, labels = head[4:].max(0)
    chosen = torch.nonzero(scores > SCORE)[:, 0]
    scores, order = scores[chosen].topk(min(CANDIDATES, len(chosen)))
    chosen = chosen[order]
    boxes = ops.box_convert(head[:4, chosen].T, "cxcywh", "xyxy").clamp(0, CANVAS)
    kept = ops.batched_nms(boxes, scores, labels[chosen], OVERLAP)[:KEPT]
    return boxes[kept], scores[kept], labels[chosen][kept]


class InstanceMasksOnGPU:
    """64 images with 50 objects each, 32 prototypes of 160x160, to masks on a 640x640 canvas."""

    params = (["nbvision", "torch, image by image"],)
    param_names = ("how",)

    def setup(self, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import instance_masks

        rng = np.random.default_rng(4)
        corner = rng.uniform(0, 500, (MASKS, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 140, (MASKS, 2))], axis=1).astype(np.float32)
        arrays = [
            cupy.asarray(rng.normal(0, 1, (MASKS, CHANNELS)).astype(np.float32)),
            cupy.asarray(rng.normal(0, 1, (IMAGES, CHANNELS, CELLS, CELLS)).astype(np.float32)),
            cupy.asarray(boxes),
        ]
        if how == "nbvision":
            images = cupy.arange(MASKS) // (MASKS // IMAGES)
            limit = MASKS * 160 * 160
            self.call: Callable[[], Any] = lambda: instance_masks(
                *arrays, images, size=(CANVAS, CANVAS), limit_bytes=limit
            )
        else:
            torch = need("torch")
            coefficients, prototypes, places = (torch.from_dlpack(array) for array in arrays)
            parts = list(zip(coefficients.chunk(IMAGES), prototypes, places.chunk(IMAGES), strict=True))
            self.call = lambda: [_torch_masks(torch, *part) for part in parts]

    def track_us(self, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"


def _torch_masks(torch: Any, coefficients: Any, prototypes: Any, boxes: Any) -> Any:
    logits = torch.einsum("mk,khw->mhw", coefficients, prototypes)
    options = {"size": (CANVAS, CANVAS), "mode": "bilinear", "align_corners": False}
    logits = torch.nn.functional.interpolate(logits[None], **options)[0]
    at = torch.arange(CANVAS, device=boxes.device)
    across = (at >= boxes[:, 0, None]) & (at < boxes[:, 2, None])
    down = (at >= boxes[:, 1, None]) & (at < boxes[:, 3, None])
    return (logits > 0) & down[:, :, None] & across[:, None, :]
