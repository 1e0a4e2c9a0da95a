"""What a batcher did lately, batch by batch, as numbers and as a picture."""

from __future__ import annotations

import os
from dataclasses import dataclass

from PIL import Image, ImageDraw

from nbvision.batching.policy import Reason

__all__ = ["BatchRecord", "BatcherTimeline"]

_COLORS: dict[Reason, str] = {"drained": "#4477aa", "full": "#228833", "deadline": "#ccbb44"}  # Paul Tol's "bright"
_LOST = "#ee6677"
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 64, 10, 8, 40, 12  # pixels around and between the parts


@dataclass(frozen=True)
class BatchRecord:
    """One batch.

    Attributes
    ----------
    began_s : float
        On the clock of ``time.monotonic``.
    seconds : float
        How long it ran.
    thread : int
        In which of the batcher's threads.
    size : int
        Requests.
    reason : {"drained", "full", "deadline"}
        Why they were no more.
    waited_s : float
        How long the one of them had waited that had waited longest.
    missed, failed : int
        Requests that were answered too late, or not.
    """

    began_s: float
    seconds: float
    thread: int
    size: int
    reason: Reason
    waited_s: float
    missed: int
    failed: int


@dataclass(frozen=True)
class BatcherTimeline:
    """The last while of a :class:`nbvision.Batcher`, from its ``timeline()``.

    Attributes
    ----------
    batches : list of BatchRecord
        In the order in which they ended.
    given_up : list of (float, int)
        When requests were given up because they could not be in time, and how many.
    until_s : float
        Its end, on the clock of ``time.monotonic``.
    seconds : float
        How much of the time before that it shows.
    max_batch : int
    threads : int
    """

    batches: list[BatchRecord]
    given_up: list[tuple[float, int]]
    until_s: float
    seconds: float
    max_batch: int
    threads: int

    def save(self, path: str | os.PathLike[str], *, size: tuple[int, int] = (900, 320)) -> None:
        """Write the picture that :meth:`draw` makes, in a format that Pillow writes."""
        self.draw(size=size).save(path)

    def draw(self, *, size: tuple[int, int] = (900, 320)) -> Image.Image:
        """A picture, time to the right: what each thread ran, how long requests waited, and what was lost.

        A batch is as wide as it took and as high as it was large, in the color of its reason.
        """
        width, height = size
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        from_s, right = self.until_s - self.seconds, width - _RIGHT

        def at(moment_s: float) -> float:
            return _LEFT + (right - _LEFT) * min(max((moment_s - from_s) / self.seconds, 0.0), 1.0)

        lane = (height - _TOP - _BOTTOM - _GAP * (self.threads + 1)) / (self.threads + 1.3)
        for thread in range(self.threads):
            bottom = _TOP + lane * (thread + 1) + _GAP * thread
            for batch in self.batches:
                if batch.thread == thread:
                    began, ended = at(batch.began_s), at(batch.began_s + batch.seconds)
                    top = bottom - max(lane * batch.size / self.max_batch, 1)
                    draw.rectangle((began, top, max(began, ended - 1), bottom), fill=_COLORS[batch.reason])
            draw.line((_LEFT, bottom, right, bottom), fill="black")
            draw.text((4, bottom - lane), f"thread {thread}\n{self.max_batch} items", fill="black")

        bottom = _TOP + (lane + _GAP) * self.threads + lane
        most_s = max((batch.waited_s for batch in self.batches), default=0.0) or 1e-3
        for batch in self.batches:
            x, y = at(batch.began_s), bottom - (lane - 2) * batch.waited_s / most_s
            draw.rectangle((x - 1, y - 1, x + 1, y + 1), fill="black")
        draw.line((_LEFT, bottom, right, bottom), fill="black")
        draw.text((4, bottom - lane), f"waited\n{most_s * 1e3:,.1f} ms", fill="black")

        bottom += _GAP + lane * 0.3
        lost = [(batch.began_s + batch.seconds, batch.missed + batch.failed) for batch in self.batches]
        for moment_s, count in [*lost, *self.given_up]:
            if count:
                draw.line((at(moment_s), bottom - lane * 0.3, at(moment_s), bottom), fill=_LOST)
        draw.text((4, bottom - lane * 0.3), "lost", fill="black")

        draw.text((_LEFT, bottom + 4), f"-{self.seconds:.3g} s", fill="black")
        draw.text((right - 24, bottom + 4), "now", fill="black")
        x, y = _LEFT, bottom + 18
        for name, color in (*_COLORS.items(), ("too late, given up or failed", _LOST)):
            draw.rectangle((x, y + 2, x + 10, y + 12), fill=color)
            draw.text((x + 14, y), name, fill="black")
            x += 34 + int(draw.textlength(name))
        return picture
