"""Every mode that promises a library's bits: 2,000 random images and regions of each, and no value differs."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
import pytest
import test_resample
import test_window
from reference import on, to_host

import nbvision as nbv

BATCHES, IMAGES = 100, 10  # each image whole, and a region of it
LONGEST = 3000
MOST_CANVAS_PIXELS = 1_000_000  # twenty of them go into one tensor
FLAGS = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, **test_window.FLAGS}
MODES = [("cv2", name) for name in FLAGS] + [(test_resample.PARITY, name) for name in test_resample.FILTERS]

opencvs_own_code = test_window.opencvs_own_code


@functools.cache
def noise() -> Any:
    return np.random.default_rng(5).integers(0, 256, (LONGEST, LONGEST, 3), np.uint8)


def sides(rng: np.random.Generator, most_pixels: int) -> tuple[int, int]:
    """Of all orders of magnitude."""
    while True:
        height, width = np.exp(rng.uniform(0, np.log(LONGEST + 1), 2)).astype(int).tolist()
        if height * width <= most_pixels:
            return height, width


def image_and_region(rng: np.random.Generator) -> tuple[Any, list[int]]:
    height, width = sides(rng, LONGEST**2)
    top, left = rng.integers(0, (LONGEST - height + 1, LONGEST - width + 1)).tolist()
    image = np.ascontiguousarray(noise()[top : top + height, left : left + width])
    y1, x1 = rng.integers(0, (height, width)).tolist()
    y2, x2 = rng.integers((y1 + 1, x1 + 1), (height + 1, width + 1)).tolist()
    return image, [x1, y1, x2, y2]


def by_library(image: Any, size: tuple[int, int], parity: str, interpolation: str) -> Any:
    if parity == "cv2":
        return cv2.resize(image, size[::-1], interpolation=FLAGS[interpolation])
    return test_resample.by_pillow(image, *size, interpolation)


@pytest.mark.parametrize(("parity", "interpolation"), MODES)
def test_no_value_differs(device: Any, rng: np.random.Generator, parity: Any, interpolation: Any) -> None:
    differing = 0
    for _ in range(BATCHES):
        size = sides(rng, MOST_CANVAS_PIXELS)
        images, regions = zip(*[image_and_region(rng) for _ in range(IMAGES)], strict=True)
        plan = nbv.Preprocess(
            size, fit="stretch", interpolation=interpolation, parity=parity, dtype="uint8", layout="NHWC"
        )
        batch = nbv.ImageBatch.from_arrays(list(images), device=device)
        boxes, owners = on(device, np.array(regions, np.float32)), on(device, np.arange(IMAGES))
        whole, _ = plan(batch)
        cut, _ = plan(batch, boxes=boxes, box_images=owners)
        parts = [image[y1:y2, x1:x2] for image, (x1, y1, x2, y2) in zip(images, regions, strict=True)]
        for source, got in zip([*images, *parts], [*to_host(whole), *to_host(cut)], strict=True):
            differing += int((got != by_library(source, size, parity, interpolation)).sum())
    assert differing == 0
