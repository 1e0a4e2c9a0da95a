"""ICC profiles: what an image's colours mean, and the same in sRGB."""

from __future__ import annotations

import io
import threading
from typing import Any

from PIL import Image, ImageCms

__all__ = ["as_srgb"]

_KEPT_TRANSFORMS = 8  # of a thread: a transform in use by two of them is not promised to work
_INPUT_MODES = ("RGB", "RGBA", "CMYK", "L")

_of_thread = threading.local()


def as_srgb(image: Image.Image) -> Image.Image:
    """The image with its colours converted to sRGB, perceptually.

    As it is if it has no profile, one that says sRGB, or one that is broken or does not fit its pixels, which every
    viewer ignores.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode not in _INPUT_MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    converted: Image.Image | None = ImageCms.applyTransform(image, transform)
    return image if converted is None else converted


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From colours of a profile to sRGB."""
    kept: dict[tuple[bytes, str], Any] = _of_thread.__dict__.setdefault("kept", {})
    key = profile, mode
    if key not in kept:
        if len(kept) == _KEPT_TRANSFORMS:
            del kept[next(iter(kept))]
        kept[key] = _built(profile, mode)
    transform: ImageCms.ImageCmsTransform | None = kept[key]
    return transform


def _built(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode in ("RGB", "RGBA") and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return None
        return ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB"
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
