"""Masks as COCO keeps them: run lengths, column after column, zeros first, as text of 5 bits a character; polygons."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError, MissingExtraError
from nbvision.image import to_device
from nbvision.runtime.device import Device, array_module, device_of

__all__ = ["mask_to_polygons", "mask_to_rle", "rle_to_mask"]

_CHARACTERS = 7  # of 5 bits: enough for a difference of two 32-bit counts


def mask_to_rle(masks: Any) -> list[dict[str, Any]]:
    """Run lengths of masks, as ``pycocotools.mask.encode`` gives them.

    Parameters
    ----------
    masks : (M, H, W) bool or integer array
        Not 0 is inside. The runs are found where the masks are; on CUDA this waits on the host for them.

    Returns
    -------
    list of dict
        ``{"size": [H, W], "counts": bytes}`` per mask.

    Raises
    ------
    InputError
        For another shape, or floats: compare logits with a threshold first.
    """
    device = device_of(masks)
    masks = _checked(masks, device)
    xp = array_module(device)
    count, height, width = masks.shape
    pixels = height * width
    if not masks.size:
        return [{"size": [height, width], "counts": _text(np.array([0]))} for _ in range(count)]
    # A run ends where a pixel differs from the one before it; a mask begins with a run of zeros, maybe an empty one.
    inside = xp.zeros((count, pixels + 1), bool)
    inside[:, 1:] = (masks != 0).transpose(0, 2, 1).reshape(count, pixels)
    which, where = (to_device(found, "cpu") for found in xp.nonzero(inside[:, 1:] != inside[:, :-1]))
    ends = np.searchsorted(which, np.arange(count + 1))
    return [
        {"size": [height, width], "counts": _text(np.diff(where[first:last], prepend=0, append=pixels))}
        for first, last in itertools.pairwise(ends)
    ]


def rle_to_mask(runs: Iterable[Mapping[str, Any]]) -> npt.NDArray[np.uint8]:
    """Masks of COCO's run lengths, as ``pycocotools.mask.decode`` gives them; on the host.

    Parameters
    ----------
    runs : iterable of mappings
        ``{"size": [H, W], "counts": bytes or str or list of int}``, all of one size.

    Returns
    -------
    (M, H, W) uint8 array of 0 and 1

    Raises
    ------
    InputError
        If one is no run-length code, does not fill its size, or sizes differ.
    """
    masks = [_decoded(run, index) for index, run in enumerate(runs)]
    if len({mask.shape for mask in masks}) > 1:
        raise InputError(f"sizes are {[list(mask.shape) for mask in masks]}; expected one size")
    return np.stack(masks) if masks else np.zeros((0, 0, 0), np.uint8)


def mask_to_polygons(masks: Any) -> list[list[list[float]]]:
    """Outlines of masks, as COCO's annotations hold them; on the host, by OpenCV.

    An outline goes from corner to corner of the pixels, not from centre to centre, so that
    ``pycocotools.mask.frPyObjects`` makes the very mask of it again, but for holes, which such polygons cannot have.

    Parameters
    ----------
    masks : (M, H, W) bool or integer array
        Not 0 is inside. Copied to the host; on CUDA this waits for it.

    Returns
    -------
    list of M lists of polygons
        A polygon ``[x1, y1, x2, y2, ...]`` for each part whose pixels touch, corners included; none for an empty mask.

    Raises
    ------
    InputError
        For another shape, or floats: compare logits with a threshold first.
    MissingExtraError
        If OpenCV is not installed.
    """
    masks = _checked(masks, "cpu")
    return [_outlines(mask) for mask in masks != 0]


def _checked(masks: Any, device: Device) -> Any:
    masks = to_device(masks, device)
    if masks.ndim != 3 or masks.dtype.kind not in "biu":
        raise InputError(f"masks have shape {masks.shape} and dtype {masks.dtype}; expected (M, H, W) bool or integers")
    return masks


def _outlines(mask: npt.NDArray[np.bool_]) -> list[list[float]]:
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("cv2", extra="polygons", needed_for="outlines of masks") from error

    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    if not len(rows):
        return []
    corner = np.array([columns[0], rows[0]])
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    # OpenCV goes from centre to centre. With every pixel doubled those lie on either side of a corner, and half of
    # them, rounded up, is the corner.
    contours, _ = cv2.findContours(part.repeat(2, 0).repeat(2, 1), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        points = (contour[:, 0] + 1) // 2
        distinct = (points != np.roll(points, 1, axis=0)).any(axis=1)  # at an inner corner two become one
        polygons.append((points[distinct] + corner).astype(float).ravel().tolist())
    return polygons


def _decoded(run: Mapping[str, Any], index: int) -> npt.NDArray[np.uint8]:
    try:
        height, width = (int(length) for length in run["size"])
        counts = run["counts"]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"runs[{index}] is {run!r:.80}; expected a mapping with 'size' and 'counts'") from None
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    counts = _counts(counts) if isinstance(counts, bytes) else np.asarray(counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 0).any() or counts.sum() != height * width:
        raise InputError(
            f"the counts of runs[{index}] do not fill its size {height} x {width}; expected COCO's run lengths"
        )
    values = np.arange(len(counts), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(width, height).T)


def _text(counts: npt.NDArray[np.int64]) -> bytes:
    """Counts as text: from the fourth on the difference to the last but one; low bits first, 32 if more follow."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    shifts = 5 * np.arange(_CHARACTERS)
    groups = (values[:, None] >> shifts) & 31
    rest = values[:, None] >> (shifts + 5)
    more = np.where(groups & 16, rest != -1, rest != 0)
    used = np.logical_and.accumulate(np.concatenate([np.ones((len(values), 1), bool), more[:, :-1]], axis=1), axis=1)
    text: bytes = ((groups | 32 * more) + 48)[used].astype(np.uint8).tobytes()
    return text


def _counts(text: bytes) -> npt.NDArray[np.int64]:
    """The inverse of :func:`_text`; counts that cannot be are left to the caller to find."""
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = (characters & 32) == 0
    if len(characters) == 0 or not last[-1] or characters.min() < 0 or characters.max() > 63:
        return np.array([-1])
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(characters)) - np.repeat(starts, ends - starts + 1)
    if place.max() >= _CHARACTERS:
        return np.array([-1])
    values = np.add.reduceat((characters & 31) << (5 * place), starts)
    values -= np.where(characters[ends] & 16, np.int64(1) << (5 * (place[ends] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
