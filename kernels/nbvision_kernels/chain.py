"""A chain of pixel functions: what happens to a pixel's red, green and blue between the sampler and the gain.

The chain is one function, generated as Python source, that calls its links in turn; the CPU loop calls it and the CUDA
C frame calls the same through LTO.  The numbers of the links are arguments, so a new one never compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Chain", "Link", "extended", "make_shade", "make_shade_export"]


@dataclass(frozen=True)
class Link:
    """One function of a chain: ``function(r, g, b)``, then ``x, y`` if it wants them, then its numbers.

    ``function`` is compiled by Numba already.
    """

    name: str
    function: Callable[..., Any]
    wants_position: bool
    number_count: int


@dataclass(frozen=True)
class Chain:
    """Links in order. Two chains of one ``digest`` are the same code."""

    digest: str
    links: tuple[Link, ...] = field(hash=False, compare=False)

    @property
    def number_count(self) -> int:
        """Numbers of all links."""
        return sum(link.number_count for link in self.links)

    def source(self) -> str:
        """The chain as Python."""
        lines = ["def chain(r, g, b, x, y, numbers):"]
        used = 0
        for index, link in enumerate(self.links):
            arguments = ["r", "g", "b", *(["x", "y"] if link.wants_position else [])]
            arguments += [f"numbers[{number}]" for number in range(used, used + link.number_count)]
            used += link.number_count
            lines += [f"    # {link.name}", f"    r, g, b = link_{index}({', '.join(arguments)})"]
            # A constant or an integer among the results would change the type of what follows.
            lines += ["    r, g, b = float32(r), float32(g), float32(b)"]
        return "\n".join([*lines, "    return r, g, b", ""])

    def make(self) -> Callable[..., Any]:
        """The compiled-on-demand function of :meth:`source`."""
        from nbvision_kernels.pixel import pixel_function

        names: dict[str, Any] = {f"link_{index}": link.function for index, link in enumerate(self.links)}
        names["float32"] = np.float32
        exec(compile(self.source(), "<chain of pixel functions>", "exec"), names)
        function: Callable[..., Any] = pixel_function(names["chain"])
        return function


def extended(chain: Chain | None, link: Link) -> Chain:
    """The chain, or none, and behind it a link of this package, whose name says what it does."""
    if chain is None:
        return Chain(link.name, (link,))
    return Chain(f"{chain.digest}-{link.name}", (*chain.links, link))


def make_shade(chain):
    """``shade(first, second, third, x, y, bgr, numbers)``: the chain on three channels in the order of the output."""
    from nbvision_kernels.pixel import pixel_function

    if chain is None:

        @pixel_function
        def keep(first, second, third, x, y, bgr, numbers):
            return first, second, third

        return keep
    apply = chain.make()

    @pixel_function
    def shade(first, second, third, x, y, bgr, numbers):
        if bgr:
            first, third = third, first
        first, second, third = apply(first, second, third, np.float32(x), np.float32(y), numbers)
        if bgr:
            first, third = third, first
        return first, second, third

    return shade


@functools.cache
def make_shade_export(chain):
    """The chain for C: ``rgb[0:3]`` is changed in place."""
    from nbvision_kernels.pixel import pixel_function

    apply = chain.make()

    @pixel_function
    def shade_export(rgb, x, y, numbers):
        r, g, b = apply(rgb[0], rgb[1], rgb[2], x, y, numbers)
        rgb[0] = r
        rgb[1] = g
        rgb[2] = b

    return shade_export
