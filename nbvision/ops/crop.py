"""Parts of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbvision.errors import InputError
from nbvision.image import ImageBatch, as_batch, interleaved_color
from nbvision.ops._regions import checked_host_boxes
from nbvision.ops.arguments import collected, image_size
from nbvision.ops.pad import pad
from nbvision.runtime.device import device_of

__all__ = ["center_crop", "crop"]


def crop(images: Any, boxes: Any, *, box_images: Any = None) -> ImageBatch:
    """The parts of images that boxes cover, without a copy.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        See :func:`nbvision.image.as_batch`; channels side by side.
    boxes : (M, 4) array, on the host
        x1, y1, x2, y2 in pixels, half-open; each is grown to whole pixels and clipped to its image, as
        :class:`nbvision.Preprocess` does it.
    box_images : (M,) integer array, optional
        The image of each box; may be left out for a single image.

    Returns
    -------
    ImageBatch
        Of M images that share the memory of ``images``.

    Raises
    ------
    InputError
        For a box that is NaN, of no area or outside its image, and for boxes on a GPU, whose crops'
        sizes only the GPU knows: ``Preprocess(...)(images, boxes=boxes)`` cuts those out.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.crop(np.zeros((40, 60, 3), np.uint8), [[10.5, 5, 30, 90]])[0].shape
    (35, 20, 3)
    """
    batch = as_batch(images)
    interleaved_color(batch)
    if device_of(boxes) == "cuda":
        raise InputError(
            "boxes are on cuda; expected them on the host: Preprocess(size)(images, boxes=boxes) crops without a copy"
        )
    boxes, owners = checked_host_boxes(boxes, box_images, batch.sizes)
    far = batch.sizes[owners][:, ::-1]
    first = np.floor(np.maximum(boxes[:, :2], 0)).astype(int)
    last = np.ceil(np.minimum(boxes[:, 2:], far)).astype(int)
    parts = [batch[int(owner)][y1:y2, x1:x2] for owner, (x1, y1), (x2, y2) in zip(owners, first, last, strict=True)]
    return batch.with_views(parts)


def center_crop(images: Any, size: tuple[int, int]) -> Any:
    """The middle of images, as torchvision's ``CenterCrop`` takes it; what is missing of a smaller image is 0.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W) or (H, W, C) uint8 array, one (N, H, W, C) array, several arrays, or a batch. C is 1, 3 or 4.
    size : (int, int)
        Height and width.

    Returns
    -------
    ImageBatch, array or list of arrays
        A batch for a batch, one array for one, a list for several. What is large enough shares its memory.

    Raises
    ------
    InputError
        For shapes and sizes that do not fit.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.center_crop(np.zeros((40, 60, 3), np.uint8), (50, 20)).shape
    (50, 20, 3)
    """
    images, batch = collected(images)
    size = image_size(size)
    interleaved_color(batch)
    if isinstance(images, ImageBatch):
        parts = [_centered(batch[index], size) if present else None for index, present in enumerate(batch.ok)]
        return batch.with_views(parts, batch.errors)
    if hasattr(images, "shape") and len(images.shape) < 4:
        return _centered(images, size)
    return [_centered(image, size) for image in images]


def _centered(image: Any, size: tuple[int, int]) -> Any:
    height, width = image.shape[:2]
    lines, columns = max(size[0] - height, 0), max(size[1] - width, 0)
    if lines or columns:
        image = pad(image, (lines // 2, (lines + 1) // 2, columns // 2, (columns + 1) // 2))
        height, width = image.shape[:2]
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]
