"""How much of a batch the CUDA decoder takes off the JPEG engine, learned from how long batches took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FEWEST", "Balance", "Measured", "cost_of"]

FEWEST = 16  # images; of fewer, the engine has the last one decoded before the CUDA decoder has its first
_FIRST_SHARE, _LEAST_SHARE, _MOST_SHARE = 0.3, 0.05, 0.6
_WORTH = 1.02  # how much faster both together must be
_AGAIN = 64  # batches after which the slower way is tried again
_NEWS = 0.25  # weight of the latest batch in a mean


def cost_of(pixels: int) -> int:
    """What an image costs a decoder: its pixels, and as much as 512 x 512 of them for being one more."""
    return pixels + (1 << 18)


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one batch: costs, how long each decoder took for them, and how long the batch took, all in milliseconds.

    A batch takes longer than its decoders, which files have to be opened for, and threads to be woken.
    """

    engine_cost: float
    engine_ms: float
    cuda_cost: float
    cuda_ms: float
    batch_ms: float

    @property
    def rate(self) -> float:
        """Cost a millisecond, both decoders together."""
        return (self.engine_cost + self.cuda_cost) / self.batch_ms


@dataclass(slots=True)
class _Class:
    """Batches of about one number of images of about one size."""

    share: float = _FIRST_SHARE
    alone: float = 0.0  # rates; 0 before any is known
    together: float = 0.0
    batches: int = 0


class Balance:
    """Divides batches between the engine and the CUDA decoder.

    Large images are decoded up to a quarter faster by both; of small ones the CUDA decoder's many calls hold up the
    engine.  Where one turns into the other depends on the card, its driver and the host, so both ways are tried for
    each class of batches, the better one is kept, and the other is tried again now and then.  Of the two together each
    gets as much as it decodes in the time of the other.
    """

    def __init__(self) -> None:
        self._classes: dict[tuple[int, int], _Class] = {}
        self._warm: set[bool] = set()

    def share(self, costs: Sequence[int]) -> float:
        """The part of a batch's cost that the CUDA decoder shall take."""
        if len(costs) < FEWEST:
            return 0.0
        known = self._class_of(costs)
        known.batches += 1
        if not known.alone:
            return 0.0
        if not known.together:
            return known.share
        both = known.together > _WORTH * known.alone
        if known.batches % _AGAIN == 0:
            both = not both
        return known.share if both else 0.0

    def learn(self, costs: Sequence[int], measured: Measured) -> None:
        """Take note of how long a batch of these costs took."""
        if len(costs) < FEWEST:
            return
        both = measured.cuda_cost > 0
        if both not in self._warm:  # the first batch of a decoder pays for its memory
            self._warm.add(both)
            return
        known = self._class_of(costs)
        if not both:
            known.alone = _mean(known.alone, measured.rate)
            return
        known.together = _mean(known.together, measured.rate)
        engine_rate = measured.engine_cost / measured.engine_ms
        cuda_rate = measured.cuda_cost / measured.cuda_ms
        fair = cuda_rate / (engine_rate + cuda_rate)
        known.share = min(max(_mean(known.share, fair), _LEAST_SHARE), _MOST_SHARE)

    def _class_of(self, costs: Sequence[int]) -> _Class:
        key = (len(costs).bit_length(), (sum(costs) // len(costs)).bit_length())
        return self._classes.setdefault(key, _Class())


def _mean(known: float, news: float) -> float:
    return known + _NEWS * (news - known) if known else news
