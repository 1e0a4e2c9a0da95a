"""How batches are divided between the JPEG engine and the CUDA decoder, against simulated cards."""

from __future__ import annotations

import itertools
import types

import pytest

from nbvision.codecs import gpu_decode
from nbvision.codecs._balance import Balance, Measured, cost_of


class Card:
    """Decodes by the clock: rates in images a millisecond, alone and while the other decoder is busy, which is asked
    so many milliseconds after the batch began."""

    def __init__(self, alone: float, engine_beside: float, cuda_beside: float, asking_ms: float = 0.0) -> None:
        self.alone, self.engine_beside, self.cuda_beside = alone, engine_beside, cuda_beside
        self.asking_ms = asking_ms
        self.calls: list[tuple[float, float]] = []  # share, images a millisecond

    def run(self, balance: Balance, count: int, pixels: int = 1920 * 1080) -> None:
        costs = [cost_of(pixels)] * count
        moved = round(balance.share(costs) * count)
        if moved:
            engine_ms, cuda_ms = (count - moved) / self.engine_beside, moved / self.cuda_beside
            batch_ms = max(engine_ms, cuda_ms + self.asking_ms)
            measured = Measured((count - moved) * costs[0], engine_ms, moved * costs[0], cuda_ms, batch_ms)
        else:
            measured = Measured(count * costs[0], count / self.alone, 0.0, 0.0, count / self.alone)
        balance.learn(costs, measured)
        self.calls.append((moved / count, count / measured.batch_ms))


def test_both_work_where_that_is_faster() -> None:
    card, balance = Card(5.0, 4.4, 2.0), Balance()
    for _ in range(60):
        card.run(balance, 64)
    shares, rates = zip(*card.calls[-10:], strict=True)
    assert sum(shares) / 10 == pytest.approx(2.0 / 6.4, abs=0.02)  # both done at the same time
    assert min(rates) > 1.2 * 5.0


def test_the_engine_works_alone_where_both_are_slower() -> None:
    card, balance = Card(28.0, 13.0, 6.0), Balance()
    for _ in range(1000):
        card.run(balance, 256, 500 * 375)
    shared = [share for share, _ in card.calls if share]
    assert 1 <= len(shared) <= 16  # now and then, to see whether it still holds
    assert 1000 / sum(1 / rate for _, rate in card.calls) > 0.97 * 28.0


def test_who_is_asked_late_is_no_help() -> None:
    """Two decoders that are faster together, by less than what it takes to have two."""
    card, balance = Card(28.0, 24.0, 8.0, asking_ms=1.0), Balance()
    for _ in range(200):
        card.run(balance, 64, 500 * 375)
    assert sum(share > 0 for share, _ in card.calls) <= 8


def test_a_change_is_noticed() -> None:
    card, balance = Card(5.0, 2.5, 1.0), Balance()
    for _ in range(200):
        card.run(balance, 64)
    assert sum(share > 0 for share, _ in card.calls) <= 10
    card.engine_beside, card.cuda_beside = 4.4, 2.0  # other work on the machine has ended
    for _ in range(600):
        card.run(balance, 64)
    assert card.calls[-1][0] > 0.2


def test_classes_of_batches_learn_apart() -> None:
    large, small, balance = Card(5.0, 4.4, 2.0), Card(28.0, 13.0, 6.0), Balance()
    for _ in range(40):
        large.run(balance, 64)
        small.run(balance, 64, 500 * 375)
    assert large.calls[-1][0] > 0.2
    assert small.calls[-1][0] == 0


@pytest.mark.parametrize("count", [0, 1, 8, 15])
def test_small_batches_stay_with_the_engine(count: int) -> None:
    balance = Balance()
    costs = [cost_of(1920 * 1080)] * count
    for _ in range(50):
        assert balance.share(costs) == 0
        balance.learn(costs, Measured(1.0, 1.0, 0.0, 0.0, 1.0))


def test_a_decoder_that_hardly_helps_gets_little() -> None:
    card, balance = Card(5.0, 5.0, 0.2), Balance()
    for _ in range(100):
        card.run(balance, 128)
    assert card.calls[-1][1] >= 0.97 * 5.0


def test_in_a_stream_only_the_rate_of_batches_counts() -> None:
    """Two that are decoded side by side end at once, and the next two after twice the time."""
    balance, costs = Balance(), [cost_of(500 * 375)] * 256
    cost = sum(costs)
    shares = []
    for number in range(400):
        share = balance.share(costs)
        shares.append(share)
        batch_ms = (0.0, 22.0 if share else 20.0)[number % 2]
        balance.learn(costs, Measured(cost * (1 - share), 9.0, cost * share, 9.0 if share else 0.0, batch_ms))
    assert sum(share > 0 for share in shares[100:]) <= 100


def test_what_is_found_again_and_again_is_tried_ever_less() -> None:
    card, balance = Card(28.0, 13.0, 6.0), Balance()
    for _ in range(8000):
        card.run(balance, 256, 500 * 375)
    tried = [index for index, (share, _) in enumerate(card.calls) if share]
    assert 10 < len(tried) < 40
    assert max(after - before for before, after in itertools.pairwise(tried)) > 1000


def test_a_batch_took_until_its_last_part_was_done_and_from_when_it_was_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of events alone would leave out threads that are woken and waited for, which is all there is to small
    batches."""
    cuda = types.SimpleNamespace(get_elapsed_time=lambda begin, end: end - begin)
    monkeypatch.setattr(gpu_decode, "array_module", lambda device: types.SimpleNamespace(cuda=cuda))
    engine, other = gpu_decode._Turn(0.0, 4.0, 10, 1.002), gpu_decode._Turn(0.0, 7.0, 20, 1.001)

    def batch_ms(ended_ms: float, *, before_ms: float = 0.0) -> float:
        batch = gpu_decode._Batch([1], [engine], [other], 1.0, 1 + ended_ms / 1e3)
        measured = batch.measured(1 + before_ms / 1e3)
        assert (measured.engine_cost, measured.engine_ms, measured.cuda_cost, measured.cuda_ms) == (10, 4.0, 20, 7.0)
        return measured.batch_ms

    assert batch_ms(5.0) == pytest.approx(8.0)  # the GPU had the second part for 7 ms, from the first millisecond on
    assert batch_ms(11.0) == pytest.approx(11.0)
    assert batch_ms(11.0, before_ms=-5.0) == pytest.approx(11.0)
    assert batch_ms(11.0, before_ms=9.0) == pytest.approx(2.0)
    assert batch_ms(11.0, before_ms=12.0) == 0.0
