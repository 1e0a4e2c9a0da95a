"""nvImageCodec, and how images are told to it."""

from __future__ import annotations

import functools
import os
from types import ModuleType

from nbvision.errors import MissingExtraError
from nbvision.image import Color
from nbvision.runtime.device import CUDA_EXTRA

__all__ = ["SAMPLES", "Pixels", "nvimgcodec"]

# nvImageCodec's names of the sample format and the colour space, by ours. It cannot add an alpha channel.
SAMPLES: dict[Color, tuple[str, str]] = {
    "rgb": ("I_RGB", "SRGB"),
    "bgr": ("I_BGR", "SRGB"),
    "gray": ("I_Y", "GRAY"),
}


class Pixels:
    """Device memory as nvImageCodec wants it described; an array of CuPy's takes four times as long to make."""

    __slots__ = ("__cuda_array_interface__",)

    def __init__(self, address: int, shape: tuple[int, int, int]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (address, False), "version": 3}


@functools.cache
def nvimgcodec() -> ModuleType:
    """The package, which is imported when it is needed."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # read at import; it would log every refused image
    try:
        from nvidia import nvimgcodec as module
    except ImportError as error:
        raise MissingExtraError("nvidia.nvimgcodec", extra=CUDA_EXTRA, needed_for="JPEGs on the GPU") from error
    found: ModuleType = module
    return found
