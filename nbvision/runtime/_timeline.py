"""What each source held over time, as numbers and as a picture."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

__all__ = ["Timeline"]

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Paul Tol's "bright"
_MARGIN, _LINE = 50, 16  # pixels


@dataclass
class Timeline:
    """Bytes in use by source, at each change.

    Attributes
    ----------
    seconds : list of float
        Of each change, since the beginning.
    sources : list of str
        Whose bytes changed.
    used_bytes : list of int
        What that source used from then on.
    """

    seconds: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    used_bytes: list[int] = field(default_factory=list)
    _began_s: float = field(default_factory=time.perf_counter, repr=False)

    def note(self, source: str, used_bytes: int) -> None:
        """Add a change, now."""
        self.seconds.append(time.perf_counter() - self._began_s)
        self.sources.append(source)
        self.used_bytes.append(used_bytes)

    def peak_bytes(self) -> int:
        """The most that all sources used together."""
        return max((sum(levels.values()) for _, levels in self._levels()), default=0)

    def save(self, path: str | os.PathLike[str], *, size: tuple[int, int] = (900, 360)) -> None:
        """Write a picture: time to the right, the sources' bytes on top of each other.

        Parameters
        ----------
        path : str or os.PathLike
            Of a format that Pillow writes.
        size : (int, int)
            Width and height in pixels.
        """
        width, height = size
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        names = sorted(set(self.sources))
        colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
        peak, last_s = max(self.peak_bytes(), 1), max(self.seconds[-1] if self.seconds else 0.0, 1e-9)
        left, right, top, bottom = _MARGIN, width - 10, 10, height - _MARGIN
        levels = list(self._levels())
        for (since_s, level), until_s in zip(levels, [*self.seconds[1:], last_s], strict=True):
            span = [left + (right - left) * moment / last_s for moment in (since_s, until_s)]
            low = 0
            for name in names:
                high = low + level.get(name, 0)
                lines = [bottom - (bottom - top) * value / peak for value in (high, low)]
                if high > low:
                    draw.rectangle((span[0], lines[0], max(span), lines[1]), fill=colors[name])
                low = high
        draw.line((left, top, left, bottom, right, bottom), fill="black")
        draw.text((2, top), f"{peak / 1e6:,.1f}\nMB", fill="black")
        draw.text((right - 60, bottom + 4), f"{last_s:.3g} s", fill="black")
        x = left
        for name in names:
            draw.rectangle((x, bottom + _LINE + 6, x + 10, bottom + _LINE + 16), fill=colors[name])
            draw.text((x + 14, bottom + _LINE + 4), name, fill="black")
            x += 30 + int(draw.textlength(name))
        picture.save(path)

    def _levels(self) -> list[tuple[float, dict[str, int]]]:
        """After each change, the bytes of every source."""
        level: dict[str, int] = {}
        found = []
        for moment_s, source, used in zip(self.seconds, self.sources, self.used_bytes, strict=True):
            level = level | {source: used}
            found.append((moment_s, level))
        return found
