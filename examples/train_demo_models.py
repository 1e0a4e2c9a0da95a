"""Trains the three small networks of ``nbvision demo`` on drawn garments, and exports them to ONNX.

    python3 examples/train_demo_models.py --out /tmp/models --device cuda --workers 16

On one H200 with 16 cores this takes about six minutes; on two CPU cores, add ``--scenes 3000 --minutes 10`` for a
first impression. What it writes into ``--out``:

============== ========================================== =====================================================
detector.onnx  images (batch, 3, 320, 320), letterboxed    predictions (batch, 4 + classes, 2100), YOLOv8's layout
masker.onnx    crops (batch, 3, 96, 96)                    mask_logits (batch, 1, 96, 96), above 0 is garment
embedder.onnx  crops (batch, 3, 96, 96), cut out           embedding (batch, 128), of unit length
metrics.json   what the exported files score on products and photographs that the training never saw
============== ========================================== =====================================================

Every input is float32 RGB in [0, 1]; the embedder's is cut out (background at 0.5) and then normalised with
ImageNet's mean and standard deviation. A crop is a detection box, enlarged by 10 % on each side, clipped to the
image and stretched to 96 x 96 with plain bilinear sampling.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import mmap
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from nbvision.demo.garments import CLASSES, Product, Scene, backgrounds, draw_scene, make_products

IMAGE = 320  # the detector's input side, pixels
CROP = 96  # the masker's and embedder's input side, pixels
ENLARGE = 0.10  # of a box's side, added on each side of a crop
MOST = 3  # garments in a scene
VIEWS = 2  # crops taken of each garment, from differently inexact boxes
STRIDES = (8, 16, 32)
DIMENSIONS = 128  # of an embedding
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCENE_SIZES = ((480, 640), (640, 480), (512, 512), (400, 600), (360, 480), (600, 450))

Rng = np.random.Generator


def log(started: float, message: str) -> None:
    print(f"[{time.monotonic() - started:6.1f} s] {message}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry, as the demo does it at run time


def letterbox(image: np.ndarray) -> tuple[np.ndarray, float, int, int]:
    """Fit an (H, W, 3) image into the detector's square; returns it with the scale and the left and top margins."""
    height, width = image.shape[:2]
    scale = min(IMAGE / height, IMAGE / width)
    new_width, new_height = round(width * scale), round(height * scale)
    left, top = round((IMAGE - new_width) / 2 - 0.1), round((IMAGE - new_height) / 2 - 0.1)
    square = np.full((IMAGE, IMAGE, 3), 114, dtype=np.uint8)
    square[top : top + new_height, left : left + new_width] = sample(
        image, (0, 0, width, height), (new_width, new_height)
    )
    return square, scale, left, top


def sample(image: np.ndarray, region: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """Stretch a region (x1, y1, x2, y2) to `size` (width, height), bilinear, pixel centres at .5, no antialiasing."""
    picture = Image.fromarray(image)
    return np.asarray(picture.transform(size, Image.Transform.EXTENT, region, Image.Resampling.BILINEAR))


def crop_region(box: np.ndarray, height: int, width: int) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(v) for v in box)
    dx, dy = ENLARGE * (x2 - x1), ENLARGE * (y2 - y1)
    return max(x1 - dx, 0.0), max(y1 - dy, 0.0), min(x2 + dx, float(width)), min(y2 + dy, float(height))


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of (N, 4) and (M, 4) boxes, (N, M)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=2)
    area_a, area_b = np.prod(a[:, 2:] - a[:, :2], axis=1), np.prod(b[:, 2:] - b[:, :2], axis=1)
    return overlap / np.maximum(area_a[:, None] + area_b[None] - overlap, 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Data: worker processes draw scenes straight into shared memory


class Data(NamedTuple):
    """N training scenes. Unused garment slots have class and product -1.

    images (N, 320, 320, 3) uint8; boxes (N, 3, 4) float32, x1 y1 x2 y2 in letterboxed pixels; classes and products
    (N, 3) int64; crops (N, 3, VIEWS, 96, 96, 4) uint8, RGB and the mask (0 or 255).
    """

    images: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    products: np.ndarray
    crops: np.ndarray


def shared_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that forked processes write and the parent reads."""
    memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def allocate(count: int) -> Data:
    data = Data(
        images=shared_array((count, IMAGE, IMAGE, 3), np.uint8),
        boxes=shared_array((count, MOST, 4), np.float32),
        classes=shared_array((count, MOST), np.int64),
        products=shared_array((count, MOST), np.int64),
        crops=shared_array((count, MOST, VIEWS, CROP, CROP, 4), np.uint8),
    )
    data.classes[:] = -1
    data.products[:] = -1
    return data


def clutter(photo: np.ndarray, photos: list[np.ndarray], rng: Rng) -> np.ndarray:
    """Lay scraps of other photographs over one: with few photographs, this keeps a net from learning them by heart.

    Some scraps are plain or striped, so that a patch of one colour with a clean edge is not yet a garment.
    """
    picture = Image.fromarray(photo)
    for _ in range(int(rng.integers(1, 6))):
        side = int(rng.uniform(0.1, 0.5) * min(picture.size))
        other = Image.fromarray(photos[rng.integers(len(photos))])
        x, y = (int(rng.integers(0, max(1, extent - side))) for extent in other.size)
        scrap = other.crop((x, y, x + side, y + side))
        if rng.random() < 0.4:
            scrap.paste(tuple(int(v) for v in rng.integers(0, 256, 3)), (0, 0, side, side))
            for at in range(0, side, int(rng.integers(8, 60))):
                ImageDraw.Draw(scrap).line((0, at, side, at), tuple(int(v) for v in rng.integers(0, 256, 3)), 4)
            scrap = scrap.rotate(float(rng.uniform(0, 90)))
        shape = Image.new("L", (side, side))
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
        radii = side / 2 * rng.uniform(0.4, 1.0, len(angles))
        corners = [(side / 2 + r * math.cos(a), side / 2 + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]
        if rng.random() < 0.6:
            ImageDraw.Draw(shape).polygon(corners, fill=255)
        else:
            ImageDraw.Draw(shape).ellipse((0, rng.uniform(0, side / 2), side, side), fill=255)
        picture.paste(
            scrap, (int(rng.integers(0, picture.width - side)), int(rng.integers(0, picture.height - side))), shape
        )
    return np.asarray(picture)


def recompress(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


_shared: Data | None = None  # what the forked workers write to: they inherit it, for it could not be pickled


def draw_chunk(job: tuple[int, int, list[tuple[int, Product]], int]) -> int:
    """Fill the scenes start..stop with garments out of a small pool of (index, product); returns how many."""
    start, stop, pool, seed = job
    data = _shared
    assert data is not None
    rng = np.random.default_rng((seed, start))
    photos = backgrounds("train")
    index_of = {product.id: index for index, product in pool}
    deck: list[Product] = []  # each product in turn, so that all are seen about equally often
    for at in range(start, stop):
        if len(deck) < MOST:
            deck = [pool[i][1] for i in rng.permutation(len(pool))]
        chosen = [deck.pop() for _ in range(int(rng.integers(1, MOST + 1)))]
        photo = photos[rng.integers(len(photos))]
        if rng.random() < 0.6:
            photo = clutter(photo, photos, rng)
        size = SCENE_SIZES[rng.integers(len(SCENE_SIZES))]
        scene = draw_scene(chosen, background=photo, size=size, rng=rng)
        image = recompress(scene.image, int(rng.integers(60, 96))) if rng.random() < 0.3 else scene.image
        store_scene(data, at, scene, image, index_of, rng)
    return stop - start


def store_scene(data: Data, at: int, scene: Scene, image: np.ndarray, index_of: dict[str, int], rng: Rng) -> None:
    height, width = image.shape[:2]
    data.images[at], scale, left, top = letterbox(image)
    for slot, box in enumerate(scene.boxes):
        data.boxes[at, slot] = box * scale + np.array([left, top, left, top])
        data.classes[at, slot] = scene.class_indices[slot]
        data.products[at, slot] = index_of[scene.product_ids[slot]]
        mask = scene.masks[slot].astype(np.uint8) * 255
        sides = np.tile(box[2:] - box[:2], 2)
        for view, inexact in zip(range(VIEWS), (0.02, 0.05), strict=True):
            region = crop_region(box + rng.normal(0, inexact, 4) * sides, height, width)
            data.crops[at, slot, view, ..., :3] = sample(image, region, (CROP, CROP))
            data.crops[at, slot, view, ..., 3] = np.where(sample(mask, region, (CROP, CROP)) > 127, 255, 0)


def generate(count: int, products: list[Product], workers: int, seed: int, started: float) -> Data:
    """Draw `count` training scenes in `workers` processes."""
    global _shared
    _shared = data = allocate(count)
    rng = np.random.default_rng(seed)
    chunk, pool_size = min(256, -(-count // workers)), min(120, len(products))
    order: list[int] = []
    jobs = []
    for start in range(0, count, chunk):
        if len(order) < pool_size:
            order += [int(i) for i in rng.permutation(len(products))]
        pool = [(i, products[i]) for i in order[:pool_size]]
        order = order[pool_size:]
        jobs.append((start, min(start + chunk, count), pool, seed))
    done = 0
    with multiprocessing.get_context("fork").Pool(workers) as team:
        for i, finished in enumerate(team.imap_unordered(draw_chunk, jobs)):
            done += finished
            if i % max(1, len(jobs) // 6) == 0:
                log(started, f"drawn {done} of {count} scenes")
    _shared = None
    return data


def draw_test_scene(job: tuple[list[Product], int]) -> Scene:
    """One held-out scene: products and photographs that no training scene shows."""
    products, seed = job
    rng = np.random.default_rng(seed)
    photos = backgrounds("test")
    size = SCENE_SIZES[rng.integers(len(SCENE_SIZES))]
    return draw_scene(products, background=photos[rng.integers(len(photos))], size=size, rng=rng)


def generate_test(products: list[Product], scenes: int, workers: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Three catalogue photographs of each product, and query scenes of one to three products."""
    rng = np.random.default_rng(seed)
    catalogue = [([product], seed + 7919 * i + k) for i, product in enumerate(products) for k in range(3)]
    queries = []
    for i in range(scenes):
        chosen = rng.choice(len(products), int(rng.integers(1, MOST + 1)), replace=False)
        queries.append(([products[j] for j in chosen], seed + 10_000_019 + i))
    with multiprocessing.get_context("fork").Pool(workers) as team:
        drawn = team.map(draw_test_scene, catalogue + queries, chunksize=8)
    return drawn[: len(catalogue)], drawn[len(catalogue) :]


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm (folded away at export), SiLU (Mul and Sigmoid in ONNX)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(True)
    )


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a narrower middle, added to the input."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.path = nn.Sequential(conv(channels, middle), conv(middle, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x)


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Detector(nn.Module):
    """A small anchor-free detector: a feature pyramid at strides 8, 16 and 32, one box and one score set per cell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2), Residual(32, 16))
        self.to8 = nn.Sequential(conv(32, 64, 3, 2), Residual(64, 32))
        self.to16 = nn.Sequential(conv(64, 96, 3, 2), Residual(96, 32), Residual(96, 32))
        self.to32 = nn.Sequential(conv(96, 80, 3, 2), Residual(80, 32), Residual(80, 32))
        self.lateral = nn.ModuleList([conv(64, 64, 1), conv(96, 64, 1), conv(80, 64, 1)])
        self.merge = nn.ModuleList([Residual(64, 32) for _ in STRIDES])
        self.box_head = nn.ModuleList([nn.Sequential(conv(64, 32), nn.Conv2d(32, 4, 1)) for _ in STRIDES])
        self.class_head = nn.ModuleList([nn.Sequential(conv(64, 32), nn.Conv2d(32, len(CLASSES), 1)) for _ in STRIDES])
        for boxes, classes in zip(self.box_head, self.class_head, strict=True):
            nn.init.constant_(boxes[-1].bias, 2.0)
            nn.init.constant_(classes[-1].bias, math.log(0.01 / 0.99))  # at first, garments are rare
        centres, strides = [], []
        for stride in STRIDES:
            cells = IMAGE // stride
            y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
            centres.append((torch.stack([x, y]).reshape(2, -1) + 0.5) * stride)
            strides.append(torch.full((1, cells * cells), float(stride)))
        self.register_buffer("centres", torch.cat(centres, 1)[None])  # (1, 2, A)
        self.register_buffer("strides", torch.cat(strides, 1)[None])  # (1, 1, A)

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distances to the four sides in strides, before softplus, (B, 4, A), and class logits (B, C, A)."""
        c8 = self.to8(self.stem(images))
        c16 = self.to16(c8)
        c32 = self.to32(c16)
        p32 = self.merge[2](self.lateral[2](c32))
        p16 = self.merge[1](self.lateral[1](c16) + up(p32))
        p8 = self.merge[0](self.lateral[0](c8) + up(p16))
        distances, logits = [], []
        for i, (stride, level) in enumerate(zip(STRIDES, (p8, p16, p32), strict=True)):
            cells = (IMAGE // stride) ** 2
            distances.append(self.box_head[i](level).reshape(-1, 4, cells))
            logits.append(self.class_head[i](level).reshape(-1, len(CLASSES), cells))
        return torch.cat(distances, 2), torch.cat(logits, 2)

    def corners(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """The top left and bottom right corners, (B, 2, A) each, in pixels."""
        reach = F.softplus(distances) * self.strides
        return self.centres - reach[:, :2], self.centres + reach[:, 2:]

    def forward(self, images: Tensor) -> Tensor:
        distances, logits = self.raw(images)
        low, high = self.corners(distances)
        return torch.cat([(low + high) * 0.5, high - low, logits.sigmoid()], 1)


class Masker(nn.Module):
    """A small U-Net: which pixels of a crop belong to its main garment."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv(3, 16)
        self.down2 = nn.Sequential(conv(16, 32, 3, 2), conv(32, 32))
        self.down4 = nn.Sequential(conv(32, 48, 3, 2), conv(48, 48))
        self.down8 = nn.Sequential(conv(48, 64, 3, 2), Residual(64, 32), Residual(64, 32))
        self.narrow4, self.up4 = conv(64, 48, 1), conv(96, 48)
        self.narrow2, self.up2 = conv(48, 32, 1), conv(64, 32)
        self.narrow1, self.up1 = conv(32, 16, 1), conv(32, 16)
        self.logit = nn.Conv2d(16, 1, 3, 1, 1)

    def forward(self, crops: Tensor) -> Tensor:
        at1 = self.down1(crops)
        at2 = self.down2(at1)
        at4 = self.down4(at2)
        x = self.down8(at4)
        x = self.up4(torch.cat([up(self.narrow4(x)), at4], 1))
        x = self.up2(torch.cat([up(self.narrow2(x)), at2], 1))
        x = self.up1(torch.cat([up(self.narrow1(x)), at1], 1))
        return self.logit(x)


class Embedder(nn.Module):
    """Turns a cut-out into a unit vector that lies close to those of other photographs of the same product."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 32, 3, 2), Residual(32, 32),
            conv(32, 48, 3, 2), Residual(48, 32),
            conv(48, 96, 3, 2), Residual(96, 48),
            conv(96, 112, 3, 2), nn.AvgPool2d(2),
        )  # fmt: skip
        # A convolution over all of the remaining 3 x 3 cells: where on the garment a colour sits tells products apart.
        self.project = nn.Sequential(nn.Conv2d(112, DIMENSIONS, 3, bias=False), nn.BatchNorm2d(DIMENSIONS))

    def forward(self, crops: Tensor) -> Tensor:
        x = self.project(self.features(crops)).reshape(-1, DIMENSIONS)
        return x / (x * x).sum(1, keepdim=True).sqrt().clamp(min=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def complete_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and CIoU of matching boxes (..., 4), x1 y1 x2 y2."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    iou = overlap / (size_a.prod(-1) + size_b.prod(-1) - overlap + 1e-7)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    between = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    angle = torch.atan(size_b[..., 0] / (size_b[..., 1] + 1e-7)) - torch.atan(size_a[..., 0] / (size_a[..., 1] + 1e-7))
    shape = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        weight = shape / (1 - iou + shape + 1e-7)
    return iou, iou - between.square().sum(-1) / (hull.square().sum(-1) + 1e-7) - weight * shape


@torch.no_grad()
def assign(
    scores: Tensor, boxes: Tensor, centres: Tensor, true_boxes: Tensor, true_classes: Tensor, top: int = 10
) -> tuple[Tensor, Tensor]:
    """Task-aligned assignment: a garment's cells are those that already do best on its class and its box together.

    scores (B, A, C), boxes (B, A, 4), centres (A, 2), true_boxes (B, G, 4), true_classes (B, G), -1 for none.
    Returns the garment of each cell, (B, A), -1 for none, and the score it should give that garment's class, (B, A).
    """
    low, high = true_boxes[:, :, None, :2], true_boxes[:, :, None, 2:]
    inside = ((centres > low) & (centres < high)).all(-1) & (true_classes >= 0)[..., None]  # (B, G, A)
    iou = complete_iou(boxes[:, None], true_boxes[:, :, None])[0] * inside
    index = true_classes.clamp(min=0)[:, None, :].expand(-1, scores.shape[1], -1)
    quality = scores.gather(2, index).transpose(1, 2).sqrt() * iou.pow(6) * inside
    # Before the first boxes fit, every quality is near 0: prefer the cells closest to the centre then.
    distance = (centres - (low + high) / 2).square().sum(-1).sqrt() / (high - low).amax(-1).clamp(min=1)
    ranked = (quality + 1e-6 * (1 - distance) * inside).topk(top, 2)
    chosen = torch.zeros_like(quality, dtype=torch.bool).scatter_(2, ranked.indices, True) & inside
    best_iou, garment = torch.where(chosen, iou, -1.0).max(1)
    one_garment = chosen & (torch.arange(chosen.shape[1], device=chosen.device)[None, :, None] == garment[:, None])
    quality, iou = quality * one_garment, iou * one_garment
    target = quality / quality.amax(2, keepdim=True).clamp(min=1e-9) * iou.amax(2, keepdim=True)
    return torch.where(best_iou >= 0, garment, -1), target.amax(1)


def detector_loss(model: Detector, images: Tensor, true_boxes: Tensor, true_classes: Tensor) -> Tensor:
    distances, logits = (x.float() for x in model.raw(images))
    boxes = torch.cat(model.corners(distances), 1).transpose(1, 2)
    logits = logits.transpose(1, 2)
    garment, target = assign(logits.sigmoid(), boxes, model.centres[0].T, true_boxes, true_classes)
    positive = garment >= 0
    index = garment.clamp(min=0)
    classes = true_classes.gather(1, index).clamp(min=0)
    wanted = F.one_hot(classes, len(CLASSES)) * (target * positive)[..., None]
    total = target.sum().clamp(min=1.0)
    score_loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / total
    matched = true_boxes.gather(1, index[..., None].expand(-1, -1, 4))
    # The small constant lets boxes learn in the first steps, while all targets are still near 0.
    weight = torch.where(positive, target + 0.05, 0.0)
    box_loss = ((1 - complete_iou(boxes, matched)[1]) * weight).sum() / weight.sum().clamp(min=1.0)
    return score_loss + 5.0 * box_loss


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy and soft Dice."""
    logits = logits.float()
    shown = logits.sigmoid()
    dice = 1 - (2 * (shown * mask).sum((1, 2, 3)) + 1) / ((shown + mask).sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + dice.mean()


class Proxies(nn.Module):
    """Cosine softmax with a margin (CosFace): each training product has a proxy vector that its views are drawn to."""

    def __init__(self, products: int, scale: float = 28.0, margin: float = 0.2) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(products, DIMENSIONS))
        self.scale, self.margin = scale, margin

    def forward(self, embedding: Tensor, product: Tensor) -> Tensor:
        cosine = embedding.float() @ F.normalize(self.vectors, dim=1).T
        return F.cross_entropy(self.scale * (cosine - self.margin * F.one_hot(product, cosine.shape[1])), product)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation on the device


def unit_images(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def uniform(like: Tensor, low: float, high: float, *shape: int) -> Tensor:
    return torch.empty(len(like), *shape, device=like.device).uniform_(low, high)


def jitter_light(images: Tensor, strength: float) -> Tensor:
    """Exposure, contrast and colour of light, each image its own."""
    gain = 1 + strength * uniform(images, -1, 1, 1, 1, 1) + 0.5 * strength * uniform(images, -1, 1, 3, 1, 1)
    contrast = 1 + strength * uniform(images, -1, 1, 1, 1, 1)
    return ((images * gain - 0.5) * contrast + 0.5).clamp(0, 1)


def shuffle_colours(images: Tensor) -> Tensor:
    """Exchange colour channels: other colours on the same shapes, which is all that detector and masker look for."""
    orders = torch.rand(len(images), 3, device=images.device).argsort(1)
    orders[torch.rand(len(images), device=images.device) < 0.5] = torch.arange(3, device=images.device)
    return images.gather(1, orders[:, :, None, None].expand_as(images))


def mirror_some(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    flip = torch.rand(len(images), device=images.device) < 0.5
    mirrored = torch.stack([IMAGE - boxes[..., 2], boxes[..., 1], IMAGE - boxes[..., 0], boxes[..., 3]], -1)
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    return images, torch.where(flip[:, None, None], mirrored, boxes)


def shift_edges(mask: Tensor) -> Tensor:
    """Grow some masks by a pixel and shrink others: predicted masks are off by about as much."""
    grown, shrunk = F.max_pool2d(mask, 3, 1, 1), -F.max_pool2d(-mask, 3, 1, 1)
    choice = torch.rand(len(mask), 1, 1, 1, device=mask.device)
    return torch.where(choice < 0.15, grown, torch.where(choice > 0.85, shrunk, mask))


def cut_out(crops: Tensor, mask: Tensor) -> Tensor:
    """The embedder's input: background at 0.5, then ImageNet's normalisation."""
    mean, std = (torch.tensor(v, device=crops.device)[:, None, None] for v in (MEAN, STD))
    return (torch.where(mask > 0.5, crops, 0.5) - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# Training


def memory_format(device: torch.device) -> torch.memory_format:
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class Average:
    """A running average of a model's weights, which scores better than the last step's."""

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = self.model.state_dict()
        floating = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.state[n] for n in floating], [current[n] for n in floating], 1 - decay)

    def apply(self) -> None:
        self.model.load_state_dict(self.state)


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    batch: int,
    seconds: float,
    started: float,
    *,
    rate: float,
    extra: nn.Module | None = None,
) -> int:
    """Train for `seconds`, with random batches of indices below `count`; the learning rate follows the clock.

    Returns the number of steps.
    """  # fmt: skip
    device = next(model.parameters()).device
    groups = [{"params": list(model.parameters()), "weight_decay": 0.02}]
    if extra is not None:
        groups.append({"params": list(extra.parameters()), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=device.type == "cuda")
    average = Average(model)
    model.train()
    begin, step, report = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - begin) < seconds:
        done = elapsed / seconds
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done) + 0.005)
        index = torch.randint(count, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        average.update()
        step += 1
        if done >= report:
            log(started, f"{name}: step {step}, loss {loss.item():.4f}")  # also keeps the clock honest on a GPU
            report += 0.1
        elif step % 20 == 0:
            loss.item()  # wait for the device now and then, or the clock would measure the queue only
    average.apply()
    model.eval()
    log(started, f"{name}: {step} steps of {batch}, {step * batch / count:.1f} epochs")
    return step


@torch.no_grad()
def predict_masks(masker: nn.Module, crops: Tensor, batch: int = 2048) -> Tensor:
    """(N, 96, 96, 4) uint8 crops to (N, 96, 96) bool masks."""
    out = torch.empty(crops.shape[:3], dtype=torch.bool, device=crops.device)
    for at in range(0, len(crops), batch):
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=crops.device.type == "cuda"):
            out[at : at + batch] = masker(unit_images(crops[at : at + batch, ..., :3]))[:, 0] > 0
    return out


def train_masker(crops: Tensor, args: argparse.Namespace, started: float) -> Masker:
    """`crops` are (N, 96, 96, 4) uint8, RGB and mask."""
    masker = Masker().to(crops.device, memory_format=memory_format(crops.device))

    def loss(index: Tensor) -> Tensor:
        both = unit_images(crops[index])
        return mask_loss(masker(shuffle_colours(jitter_light(both[:, :3], 0.2))), both[:, 3:])

    train("masker", masker, loss, len(crops), 4 * args.batch, 0.2 * 60 * args.minutes, started, rate=4e-3)
    return masker


def train_embedder(
    crops: Tensor, predicted: Tensor, labels: Tensor, args: argparse.Namespace, started: float
) -> Embedder:
    """`predicted` are the masker's masks of `crops`, (N, 96, 96) bool; `labels` the products, (N,)."""
    embedder = Embedder().to(crops.device, memory_format=memory_format(crops.device))
    proxies = Proxies(args.products).to(crops.device)

    def loss(index: Tensor) -> Tensor:
        both = unit_images(crops[index])
        exact = torch.rand(len(index), 1, 1, 1, device=crops.device) < 0.25
        mask = shift_edges(torch.where(exact, both[:, 3:], predicted[index][:, None].float()))
        return proxies(embedder(cut_out(jitter_light(both[:, :3], 0.06), mask)), labels[index])

    seconds = 0.4 * 60 * args.minutes
    train("embedder", embedder, loss, len(crops), 4 * args.batch, seconds, started, rate=3e-3, extra=proxies)
    return embedder


def train_detector(data: Data, args: argparse.Namespace, started: float) -> Detector:
    device = torch.device(args.device)
    images, boxes, classes = (torch.from_numpy(part).to(device) for part in (data.images, data.boxes, data.classes))
    detector = Detector().to(device, memory_format=memory_format(device))

    def loss(index: Tensor) -> Tensor:
        pixels, true_boxes = mirror_some(unit_images(images[index]), boxes[index])
        return detector_loss(detector, shuffle_colours(jitter_light(pixels, 0.2)), true_boxes, classes[index])

    train("detector", detector, loss, len(images), args.batch, 0.4 * 60 * args.minutes, started, rate=3e-3)
    return detector


def train_all(data: Data, args: argparse.Namespace, started: float) -> tuple[Masker, Embedder, Detector]:
    """Masker first, because the embedder learns on its masks."""
    device = torch.device(args.device)
    products = torch.from_numpy(data.products).to(device)
    crops = torch.from_numpy(data.crops).to(device)[products >= 0].reshape(-1, CROP, CROP, 4)
    labels = products[products >= 0].repeat_interleave(VIEWS)
    log(started, f"{len(crops)} crops on {device}")
    masker = train_masker(crops, args, started)
    embedder = train_embedder(crops, predict_masks(masker, crops), labels, args, started)
    del crops
    return masker, embedder, train_detector(data, args, started)


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export(model: nn.Module, path: Path, side: int, names: tuple[str, str], task: str) -> None:
    """Write an ONNX file with a free batch axis and the facts that a user of the file needs."""
    model = model.cpu().float().to(memory_format=torch.contiguous_format).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter without dynamo is the one that writes plain opset 13
        torch.onnx.export(
            model, (torch.zeros(2, 3, side, side),), str(path), input_names=[names[0]], output_names=[names[1]],
            dynamic_axes={names[0]: {0: "batch"}, names[1]: {0: "batch"}}, opset_version=13, dynamo=False,
        )  # fmt: skip
    proto = onnx.load(str(path))
    proto.ir_version = min(proto.ir_version, 8)
    facts = {
        "nbvision.classes": json.dumps(list(CLASSES)),
        "nbvision.task": task,
        "nbvision.input": f"float32 RGB, {side} x {side}",
    }
    onnx.helper.set_model_props(proto, facts)
    onnx.checker.check_model(proto)
    unfolded = [node.op_type for node in proto.graph.node if node.op_type == "BatchNormalization"]
    assert not unfolded, f"{path.name} still has {len(unfolded)} batch norms"
    onnx.save(proto, str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, on the exported files, as the demo runs them


class Detections(NamedTuple):
    """D boxes (D, 4) in image pixels, their scores (D,) and classes (D,), best first."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


class Pipeline:
    """Detect, crop, mask, embed: the three exported networks under ONNX Runtime."""

    def __init__(self, folder: Path) -> None:
        self.sessions = {
            name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            for name in ("detector", "masker", "embedder")
        }

    def run(self, name: str, images: np.ndarray) -> np.ndarray:
        session = self.sessions[name]
        return session.run(None, {session.get_inputs()[0].name: images.astype(np.float32)})[0]

    def detect(self, image: np.ndarray, floor: float = 0.01) -> Detections:
        square, scale, left, top = letterbox(image)
        rows = self.run("detector", square.transpose(2, 0, 1)[None] / 255)[0].T
        rows = rows[rows[:, 4:].max(1) > floor]
        centre, half = rows[:, :2], rows[:, 2:4] / 2
        boxes = (np.concatenate([centre - half, centre + half], 1) - [left, top, left, top]) / scale
        limits = np.array([image.shape[1], image.shape[0]] * 2)
        found = Detections(np.clip(boxes, 0, limits), rows[:, 4:].max(1), rows[:, 4:].argmax(1))
        return suppress(found)

    def crops(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        regions = [crop_region(box, *image.shape[:2]) for box in boxes]
        pixels = np.stack([sample(image, region, (CROP, CROP)) for region in regions])
        return pixels.transpose(0, 3, 1, 2) / np.float32(255)

    def embed(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks (N, 96, 96) bool on the crops' grid, and embeddings (N, 128)."""
        crops = self.crops(image, boxes)
        masks = self.run("masker", crops) > 0
        mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (MEAN, STD))
        return masks[:, 0], self.run("embedder", (np.where(masks, crops, np.float32(0.5)) - mean) / std)


def suppress(found: Detections, limit: float = 0.6, most: int = 50) -> Detections:
    """Greedy suppression of overlapping boxes of one class."""
    order = np.argsort(-found.scores)
    iou = iou_matrix(found.boxes, found.boxes) > limit
    same = found.classes[:, None] == found.classes[None]
    kept: list[int] = []
    for i in order:
        if not any(iou[i, j] and same[i, j] for j in kept):
            kept.append(int(i))
        if len(kept) == most:
            break
    return Detections(found.boxes[kept], found.scores[kept], found.classes[kept])


def mean_average_precision(found: list[Detections], scenes: list[Scene], threshold: float = 0.5) -> float:
    """The mean over classes of the area under the precision-recall curve."""
    areas = []
    for c in range(len(CLASSES)):
        hits: list[tuple[float, bool]] = []
        truths = 0
        for result, scene in zip(found, scenes, strict=True):
            truth = scene.boxes[scene.class_indices == c]
            truths += len(truth)
            iou = iou_matrix(result.boxes[result.classes == c], truth)
            free = np.ones(len(truth), dtype=bool)
            for score, row in zip(result.scores[result.classes == c], iou, strict=True):
                best = int(np.argmax(row * free)) if len(truth) else -1
                hit = best >= 0 and bool(free[best]) and row[best] >= threshold
                if hit:
                    free[best] = False
                hits.append((float(score), hit))
        if not truths:
            continue
        hits.sort(key=lambda pair: -pair[0])
        right = np.cumsum([hit for _, hit in hits]) if hits else np.zeros(1)
        precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
        areas.append(float(np.sum(precision * np.diff(right / truths, prepend=0.0))))
    return float(np.mean(areas))


def mask_on_crop(scene: Scene, garment: int, box: np.ndarray) -> np.ndarray:
    region = crop_region(box, *scene.image.shape[:2])
    return sample(scene.masks[garment].astype(np.uint8) * 255, region, (CROP, CROP)) > 127


def build_index(pipeline: Pipeline, catalogue: list[Scene]) -> tuple[np.ndarray, list[str]]:
    """One vector per catalogue photograph, of its best detection."""
    vectors, ids = [], []
    for scene in catalogue:
        found = pipeline.detect(scene.image)
        if len(found.boxes):
            vectors.append(pipeline.embed(scene.image, found.boxes[:1])[1][0])
            ids.append(scene.product_ids[0])
    return np.stack(vectors), ids


def matches(found: Detections, scene: Scene) -> Iterator[tuple[int, np.ndarray]]:
    """For each garment of a scene that was found: its index and the best box on it."""
    iou = iou_matrix(scene.boxes, found.boxes) * (found.scores > 0.1)
    for garment, row in enumerate(iou):
        if len(row) and row.max() >= 0.5:
            yield garment, found.boxes[row.argmax()]


def evaluate(pipeline: Pipeline, catalogue: list[Scene], queries: list[Scene]) -> dict[str, float]:
    index, ids = build_index(pipeline, catalogue)
    found = [pipeline.detect(scene.image) for scene in queries]
    ranks, mask_ious, garments = [], [], 0
    for result, scene in zip(found, queries, strict=True):
        garments += len(scene.boxes)
        pairs = list(matches(result, scene))
        if not pairs:
            continue
        masks, vectors = pipeline.embed(scene.image, np.stack([box for _, box in pairs]))
        for (garment, box), mask, vector in zip(pairs, masks, vectors, strict=True):
            truth = mask_on_crop(scene, garment, box)
            mask_ious.append((mask & truth).sum() / max((mask | truth).sum(), 1))
            nearest = list(dict.fromkeys(ids[i] for i in np.argsort(-(index @ vector))))
            product = scene.product_ids[garment]
            ranks.append(nearest.index(product) if product in nearest else len(ids))
    return {
        "detector_map50": mean_average_precision(found, queries),
        "detector_map75": mean_average_precision(found, queries, 0.75),
        "mask_iou": float(np.mean(mask_ious)) if mask_ious else 0.0,
        "found": len(ranks) / garments,
        "recall_at_1": float(np.sum(np.array(ranks) < 1) / garments),
        "recall_at_5": float(np.sum(np.array(ranks) < 5) / garments),
        "catalogue_products": len({scene.product_ids[0] for scene in catalogue}),
        "query_garments": garments,
    }


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the ONNX files and metrics.json")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time of the three networks together")
    parser.add_argument("--scenes", type=int, default=48_000, help="training scenes to draw")
    parser.add_argument("--products", type=int, default=5_000, help="products in the training scenes")
    parser.add_argument("--batch", type=int, default=256, help="scenes a step; crops a step are four times as many")
    parser.add_argument("--test-products", type=int, default=120)
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    # Draw before anything touches CUDA: a forked process must not inherit it.
    products = make_products(args.products, seed=args.seed)
    data = generate(args.scenes, products, args.workers, args.seed, started)
    held_out = make_products(args.test_products, seed=args.seed + 1)
    catalogue, queries = generate_test(held_out, args.test_scenes, args.workers, args.seed + 1)
    log(started, f"drew {args.scenes} training scenes, {len(catalogue)} catalogue photographs, {len(queries)} queries")

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    masker, embedder, detector = train_all(data, args, started)

    export(detector, args.out / "detector.onnx", IMAGE, ("images", "predictions"), "detect")
    export(masker, args.out / "masker.onnx", CROP, ("crops", "mask_logits"), "mask")
    export(embedder, args.out / "embedder.onnx", CROP, ("crops", "embedding"), "embed")
    log(started, "exported; evaluating the exported files")
    metrics = evaluate(Pipeline(args.out), catalogue, queries)
    metrics["megabytes"] = sum(path.stat().st_size for path in args.out.glob("*.onnx")) / 1e6
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    log(started, json.dumps(metrics))


if __name__ == "__main__":
    main()
