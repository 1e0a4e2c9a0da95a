"""How much of a batch the CUDA decoder takes off the JPEG engine, learned from how long batches took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FEWEST", "Balance", "Measured", "cost_of"]

FEWEST = 16  # images; of fewer, the engine has the last one decoded before the CUDA decoder has its first
_FIRST_SHARE, _LEAST_SHARE, _MOST_SHARE = 0.3, 0.05, 0.6
_WORTH = 1.02  # how much faster both together must be
_TRIES = 3  # batches, with which the slower way is tried again
_AGAIN, _LATEST = 64, 1024  # after so many, each time twice as many
_NEWS = 0.25  # weight of the latest batch in a mean


def cost_of(pixels: int) -> int:
    """What an image costs a decoder: its pixels, and as much as 512 x 512 of them for being one more."""
    return pixels + (1 << 18)


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one batch: costs, how long each decoder took for them, and how long the batch took, all in milliseconds.

    A batch takes longer than its decoders, which files have to be opened for, and threads to be woken; or less, if it
    is the next in a stream of batches: then it has taken as long as it came after the one before.
    """

    engine_cost: float
    engine_ms: float
    cuda_cost: float
    cuda_ms: float
    batch_ms: float


@dataclass(slots=True)
class _Class:
    """Batches of about one number of images of about one size."""

    share: float = _FIRST_SHARE
    alone_ms: float = 0.0  # a unit of cost; 0 before any is known
    together_ms: float = 0.0
    is_shared: bool = False
    batches: int = 0  # since that was found, or the other way was tried
    again: int = _AGAIN

    def shares_next(self) -> bool:
        """Whether to share the next batch: as was found to be better, and now and then the other way."""
        better = self.together_ms * _WORTH < self.alone_ms
        if better != self.is_shared:
            self.is_shared, self.batches, self.again = better, 0, _AGAIN
        self.batches += 1
        if self.batches <= self.again:
            return better
        if self.batches == self.again + _TRIES:
            self.batches, self.again = 0, min(2 * self.again, _LATEST)
        return not better


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
        if not known.alone_ms:
            return 0.0
        return known.share if not known.together_ms or known.shares_next() else 0.0

    def learn(self, costs: Sequence[int], measured: Measured) -> None:
        """Take note of how long a batch of these costs took."""
        if len(costs) < FEWEST:
            return
        both = measured.cuda_cost > 0
        if both not in self._warm:  # the first batch of a decoder pays for its memory
            self._warm.add(both)
            return
        known = self._class_of(costs)
        # Of times, not of rates: in a stream two batches may end at once, and the next one after twice the time.
        per_cost_ms = measured.batch_ms / (measured.engine_cost + measured.cuda_cost)
        if not both:
            known.alone_ms = _mean(known.alone_ms, per_cost_ms)
            return
        known.together_ms = _mean(known.together_ms, per_cost_ms)
        engine_rate = measured.engine_cost / measured.engine_ms
        cuda_rate = measured.cuda_cost / measured.cuda_ms
        fair = cuda_rate / (engine_rate + cuda_rate)
        known.share = min(max(_mean(known.share, fair), _LEAST_SHARE), _MOST_SHARE)

    def _class_of(self, costs: Sequence[int]) -> _Class:
        key = (len(costs).bit_length(), (sum(costs) // len(costs)).bit_length())
        return self._classes.setdefault(key, _Class())


def _mean(known: float, news: float) -> float:
    return known + _NEWS * (news - known) if known else news
