"""The CPU loops of plans, one for each type, compiled once per process and kept on disk.

The layout is no type of theirs but four numbers: a loop takes seconds to compile, and the strides cost it nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from nbvision.runtime.compile import cpu_loop

if TYPE_CHECKING:
    from nbvision_kernels.chain import Chain

__all__ = ["plan_loop", "warp_loop", "windows_loop"]


@functools.cache
def plan_loop(sampler: int, store: int, chain: Chain | None, source_type: int) -> Any:
    """Samplers of one or two taps an axis."""
    from nbvision_kernels.preprocess import make_cpu_loop

    name = f"preprocess-{sampler}-{store}-{source_type}" + (f"-{chain.digest}" if chain else "")
    return cpu_loop(name, make_cpu_loop(sampler, store, chain, source_type))


@functools.cache
def windows_loop(module: str, kind: int, store: int, chain: Chain | None) -> Any:
    """The families that read tap tables."""
    from nbvision_kernels import resample, window

    name = f"{store}" + (f"-{chain.digest}" if chain else "")
    if module == "resample":
        return cpu_loop(f"resample-{name}", resample.make_cpu_loop(store, chain))
    return cpu_loop(f"window-{kind}-{name}", window.make_cpu_loop(kind, store, chain))


@functools.cache
def warp_loop(kind: int, channels: int, store: int, chain: Chain | None) -> Any:
    """The plan through matrices."""
    from nbvision_kernels.warp_plan import make_cpu_loop

    name = f"warp-plan-{kind}-{channels}-{store}" + (f"-{chain.digest}" if chain else "")
    return cpu_loop(name, make_cpu_loop(kind, channels, store, chain))
