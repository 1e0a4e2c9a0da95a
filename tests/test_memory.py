"""The memory manager: reuse, limits, leases, stream order."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import threading
import time
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import on, to_host

import nbvision as nbv
from nbvision.errors import FrozenMemoryError, InputError, MemoryLimitError
from nbvision.runtime import memory
from nbvision.runtime._rings import Manager, Source


def encoded(height, width, seed, format):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, format)
    return file.getvalue()


def photograph(height, width, seed):
    return encoded(height, width, seed, "JPEG")


def png(height, width, seed):
    return encoded(height, width, seed, "PNG")


@pytest.fixture
def ring():
    """A source name of this test's own."""
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def no_limit(device):
    yield
    memory.set_limit(None, device=device)
    memory.clear(device=device)


@given(st.integers(0, 1 << 40))
def test_size_classes_waste_little(size):
    rounded = memory.size_class(size)
    assert rounded >= size
    assert rounded <= max(4096, size * 1.26)
    assert memory.size_class(rounded) == rounded


def test_dropped_buffer_is_reused(device, ring):
    with memory.source(ring):
        first = memory.acquire(100_000, device=device)
        address = first.address
        before = memory.stats(device=device).allocations
        del first
        second = memory.acquire(99_000, device=device)
    assert second.address == address
    assert memory.stats(device=device).allocations == before


def test_view_keeps_the_lease(device, ring):
    with memory.source(ring):
        view = memory.acquire(50_000, device=device).view((10, 10), dtype=np.float32, offset_bytes=256)[2:4]
        gc.collect()
        other = memory.acquire(50_000, device=device)
        view[...] = 7
        assert not other.address <= (view.ctypes.data if device == "cpu" else view.data.ptr) < other.address + 50_000
    assert (to_host(view) == 7).all()


def test_sources_do_not_share_buffers(device, ring):
    with memory.source(ring + "a"):
        address = memory.acquire(10_000, device=device).address
    with memory.source(ring + "b"):
        assert memory.acquire(10_000, device=device).address != address
    with memory.source(ring + "a"):
        assert memory.acquire(10_000, device=device).address == address
    assert memory.stats(device=device).sources[ring + "a"].held_bytes >= 10_000


def test_a_large_idle_buffer_is_not_taken_for_a_small_need(device, ring):
    with memory.source(ring):
        large = memory.acquire(10_000_000, device=device)
        address = large.address
        del large
        assert memory.acquire(5_000, device=device).address != address


def test_limit_frees_idle_buffers_first_then_refuses(device, ring, no_limit):
    memory.clear(device=device)
    held = memory.stats(device=device).held_bytes
    memory.set_limit(held + 3_200_000, device=device)
    with memory.source(ring):
        idle = memory.acquire(2_000_000, device=device)
        del idle
        kept = memory.acquire(900_000, device=device)  # a third of the idle one: not reused, still within the limit
        larger = memory.acquire(2_000_000 + 40_000, device=device)  # fits only once the idle one is gone
        with pytest.raises(MemoryLimitError, match=rf"(?s)the limit is .*{ring}"):
            memory.acquire(2_000_000, device=device)
    assert memory.stats(device=device).held_bytes <= held + 3_200_000
    assert kept.size_bytes + larger.size_bytes <= 3_200_000


def test_a_budget_is_of_one_source(device, ring):
    with memory.source(ring, budget_bytes=3_200_000):
        idle = memory.acquire(2_000_000, device=device)
        del idle
        kept = memory.acquire(900_000, device=device)
        larger = memory.acquire(2_040_000, device=device)  # fits only once the idle one is gone
        with pytest.raises(MemoryLimitError, match=rf"(?s){ring}.*its budget is 3.2 MB.*memory.source\(\)"):
            memory.acquire(900_000, device=device)
        with memory.source(ring + "-other"):
            memory.acquire(2_000_000, device=device)
    held = memory.stats(device=device).sources[ring]
    assert held.held_bytes == kept.size_bytes + larger.size_bytes <= held.budget_bytes == 3_200_000


def test_waiting_for_room(device, ring):
    """Until somebody lets go; or, when nobody does, an error after that time."""
    with memory.source(ring, budget_bytes=1_200_000, wait_ms=20_000):
        held = [memory.acquire(1_000_000, device=device)]
        timer = threading.Timer(0.1, held.clear)
        timer.start()
        started = time.monotonic()
        again = memory.acquire(1_000_000, device=device)
        assert 0.05 < time.monotonic() - started < 10
        assert memory.stats(device=device).sources[ring].waits > 0
        timer.join()
    started = time.monotonic()
    with (
        memory.source(ring, budget_bytes=1_200_000, wait_ms=60),
        pytest.raises(MemoryLimitError, match="after 60 ms"),
    ):
        memory.acquire(1_000_000, device=device)
    assert time.monotonic() - started >= 0.06
    assert again.size_bytes >= 1_000_000


def test_a_source_that_has_its_share_does_not_starve_one_that_waits(device, ring, no_limit):
    """Fails if who holds most is served first, because its buffers come back to its own ring."""
    memory.clear(device=device)
    memory.set_limit(memory.stats(device=device).held_bytes + 4 * 1_048_576, device=device)
    got = []

    def wait_for_one() -> None:
        with memory.source(ring + "-small", wait_ms=20_000):
            got.append(memory.acquire(1_048_576, device=device))

    with memory.source(ring + "-large"):
        held = [memory.acquire(1_048_576, device=device) for _ in range(4)]
        thread = threading.Thread(target=wait_for_one)
        thread.start()
        while f"{ring}-small" not in memory.stats(device=device).sources:
            time.sleep(0.001)
        time.sleep(0.05)
        held.pop()
        with contextlib.suppress(MemoryLimitError):
            held.append(memory.acquire(1_048_576, device=device))
        thread.join(10)
    assert got
    assert len(held) == 3


def test_frozen_memory_does_not_grow(device, ring):
    with memory.source(ring):
        memory.acquire(1_000_000, device=device)
        with memory.frozen(device=device):
            memory.acquire(1_000_000, device=device)
            with pytest.raises(FrozenMemoryError, match=rf"{ring}.*test_memory.py:\d+ in test_frozen_memory_does_not"):
                memory.acquire(3_000_000, device=device)
            memory.acquire(1_000_000, device=device)
        memory.acquire(3_000_000, device=device)


def test_a_warm_plan_runs_in_frozen_memory(device, ring):
    """Decode, then preprocess: whatever is larger than the warm-up is refused, and the next batch is right again."""
    batch, larger = [photograph(90, 120, seed) for seed in range(4)], [photograph(400, 700, 9)] * 4
    plan = nbv.Preprocess((64, 64), scale=1 / 255)

    def run(files):
        return plan(nbv.decode(files, device=device))[0]

    with memory.source(ring):
        expected = to_host(run(batch)).copy()
        run(batch)
        with memory.frozen(device=device):
            for _ in range(3):
                np.testing.assert_array_equal(to_host(run(batch)), expected)
            with pytest.raises(FrozenMemoryError):
                run(larger)
            np.testing.assert_array_equal(to_host(run(batch)), expected)


def test_in_frozen_memory_nobody_takes_what_is_needed_later():
    """The smaller buffer is still being read: elsewhere the larger one serves in its place, and the ring grows."""
    manager, source = Manager("cpu"), Source("test")

    def warm_up():
        small, large = manager.acquire(128 << 10, source), manager.acquire(192 << 10, source)
        being_read = SimpleNamespace(done=False, synchronize=lambda: None)
        small._lease[1].events[7] = None, being_read
        return small.size_bytes, large.size_bytes

    sizes = warm_up()
    manager.frozen += 1
    small = manager.acquire(128 << 10, source)
    large = manager.acquire(192 << 10, source)
    assert (small.size_bytes, large.size_bytes) == sizes
    del small, large
    manager.frozen -= 1
    assert manager.acquire(128 << 10, source).size_bytes == sizes[1]
    assert manager.stats().allocations == 2


@pytest.mark.needs_cuda
def test_frozen_memory_of_cupys_pool(ring):
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    kept = cupy.empty(10_000_000, np.uint8)
    del kept
    with memory.frozen(device="cuda"):
        cupy.empty(10_000_000, np.uint8)  # from the pool
        with pytest.raises(FrozenMemoryError, match=r"test_memory.py:\d+"):
            cupy.empty(300_000_000, np.uint8)
    cupy.empty(300_000_000, np.uint8)


@pytest.mark.parametrize(
    ("device", "place"),
    [("cpu", "cpu"), *(pytest.param("cuda", place, marks=pytest.mark.needs_cuda) for place in ("cuda", "pinned"))],
)
def test_no_allocation_may_break_what_follows(device, place, ring, monkeypatch):
    """Memory that runs out at each place where it is asked for: the right result or a typed error, then all is well."""
    files = [photograph(90, 120, 1), png(70, 50, 2), photograph(333, 100, 3)]
    plan = nbv.Preprocess((64, 64), parity="pil", scale=1 / 255)

    def run():
        return to_host(plan(nbv.decode(files, device=device))[0])

    expected = run().copy()
    allocate = Manager._allocate
    failures = 0
    for fatal in range(12):
        left = [fatal]

        def failing(self, size_bytes, left=left):
            if self.device == place:
                left[0] -= 1
                if left[0] < 0:
                    raise MemoryLimitError("injected")
            return allocate(self, size_bytes)

        with memory.source(f"{ring}-{fatal}"):
            with monkeypatch.context() as patched:
                patched.setattr(Manager, "_allocate", failing)
                try:
                    np.testing.assert_array_equal(run(), expected)
                except MemoryLimitError as error:
                    failures += "injected" in str(error)
            np.testing.assert_array_equal(run(), expected)
    assert failures > 0


def test_idle_buffers_are_given_back(device, ring, monkeypatch):
    def held():
        return memory.stats(device=device).sources[ring].held_bytes

    with memory.source(ring):
        memory.acquire(1_000_000, device=device)
        memory.trim(device=device, idle_s=3600)
        assert held() >= 1_000_000
        memory.acquire(5_000_000, device=device)
        assert held() >= 6_000_000
        monkeypatch.setattr("nbvision.runtime._rings._IDLE_S", 0.0)
        kept = memory.acquire(20_000_000, device=device)  # which lets the ring grow
        assert held() == kept.size_bytes
        memory.trim(device=device, idle_s=0)
        assert held() == kept.size_bytes


def test_a_timeline_shows_who_used_what_when(device, ring, tmp_path):
    kept = memory.acquire(100_000, device=device)
    with memory.timeline(device=device) as timeline:
        with memory.source(ring + "-a"):
            first = memory.acquire(1_000_000, device=device)
        time.sleep(0.02)
        with memory.source(ring + "-b"):
            second = memory.acquire(3_000_000, device=device)
        sizes = first.size_bytes, second.size_bytes
        del first
    del second  # not noted any more
    mine = [row for row in zip(timeline.sources, timeline.used_bytes, strict=True) if row[0].startswith(ring)]
    assert mine == [(ring + "-a", sizes[0]), (ring + "-b", sizes[1]), (ring + "-a", 0)]
    assert timeline.seconds == sorted(timeline.seconds)
    assert timeline.seconds[-1] >= 0.02
    assert timeline.peak_bytes() >= sum(sizes) + kept.size_bytes
    timeline.save(tmp_path / "memory.png", size=(400, 200))
    picture = Image.open(tmp_path / "memory.png")
    assert picture.size == (400, 200)
    assert picture.getpixel((200, 145)) != (255, 255, 255)  # in the middle, near the bottom
    assert picture.getpixel((60, 15)) == (255, 255, 255)  # the first, near the peak


def test_statistics_as_a_table(device, ring):
    with memory.source(ring, budget_bytes=5_000_000):
        kept = memory.acquire(1_000_001, device=device)
        table = str(memory.stats(device=device))
    line = next(line for line in table.splitlines() if line.startswith(ring))
    megabytes = f"{kept.size_bytes / 1e6:.1f}"
    assert line.split()[1:] == [megabytes, megabytes, megabytes, "5.0", "1"]
    assert table.splitlines()[-1].startswith("all ")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3_000_000), st.booleans()), max_size=40))
def test_what_the_statistics_say_is_true(steps):
    """Of any sequence of takes and drops: sums, limits and budgets hold, and no two buffers overlap."""
    name = f"test-{uuid.uuid4()}"
    memory.clear(device="cpu")
    before = memory.stats(device="cpu")
    memory.set_limit(before.held_bytes + 9_000_000, device="cpu")
    leases = []
    try:
        for source, size, drop in steps:
            if drop and leases:
                leases.pop(size % len(leases))
            with memory.source(name + source, budget_bytes=4_000_000), contextlib.suppress(MemoryLimitError):
                leases.append(memory.acquire(size, device="cpu"))
            stats = memory.stats(device="cpu")
            rings = {key: ring for key, ring in stats.sources.items() if key.startswith(name)}
            assert stats.held_bytes <= stats.limit_bytes
            assert sum(ring.used_bytes for ring in rings.values()) == sum(lease.size_bytes for lease in leases)
            assert all(ring.used_bytes <= ring.held_bytes <= ring.budget_bytes for ring in rings.values())
            spans = sorted((lease.address, lease.address + lease.size_bytes) for lease in leases)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    finally:
        memory.set_limit(None, device="cpu")
        del leases
        memory.clear(device="cpu")
    assert memory.stats(device="cpu").used_bytes == before.used_bytes


@pytest.mark.parametrize("limit", [0, -5])
def test_limit_must_be_positive(device, limit):
    with pytest.raises(InputError, match="expected a positive number"):
        memory.set_limit(limit, device=device)


def test_view_past_the_end_is_refused(device):
    buffer = memory.acquire(4096, device=device)
    with pytest.raises(InputError, match="ends past a buffer"):
        buffer.view((buffer.size_bytes + 1,))
    with pytest.raises(InputError, match="ends past a buffer"):
        buffer.view((1,), offset_bytes=-1)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4), np.array([40_000, 60_000], np.int32)])
def test_views_have_the_shape_asked_for(device, shape):
    size = int(np.prod(shape, dtype=np.int64))
    buffer = memory.acquire(min(size, 5000), device=device)
    if size > buffer.size_bytes:  # 2.4e9: more than an int32 holds
        with pytest.raises(InputError, match="ends past a buffer"):
            buffer.view(tuple(shape))
    else:
        assert buffer.view(tuple(shape)).shape == tuple(shape)


def test_use_of_arrays_without_a_lease_may_be_recorded(device):
    memory.record_use(on(device, np.zeros((2, 3), np.uint8)))
    memory.record_use(memory.acquire(100, device=device).view((100,))[10:])


def test_threads_never_share_a_held_buffer(device, ring):
    """Many threads take, mark and drop buffers of one source; nobody sees another's mark."""
    clashes = []

    def work(mark: int) -> None:
        with memory.source(ring):
            for _ in range(50):
                view = memory.acquire(8_192, device=device).view((64,), dtype=np.int64)
                view[...] = mark
                if (to_host(view) != mark).any():
                    clashes.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


@pytest.mark.needs_cuda
def test_reuse_waits_for_the_stream_that_used_it_last(ring):
    """Fails if the release forgets a stream: the next owner would overwrite what a slow copy still reads."""
    import cupy

    reader, writer = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    size = 256 << 20
    for _ in range(5):
        with memory.source(ring):
            with reader:
                view = memory.acquire(size, device="cuda").view((size,), dtype=np.uint8)
                view.fill(1)
                copies = [view.copy() for _ in range(4)]
                address = view.data.ptr
                del view
            with writer:
                again = memory.acquire(size, device="cuda")
                assert again.address == address
                again.view((size,), dtype=np.uint8).fill(2)
        reader.synchronize()
        writer.synchronize()
        assert all(bool((copy == 1).all()) for copy in copies)


@pytest.mark.needs_cuda
def test_host_wait_is_counted_and_waits(ring):
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with memory.source(ring), stream:
        view = memory.acquire(64 << 20, device="cuda").view((64 << 20,), dtype=np.uint8)
        for _ in range(50):
            view.fill(3)
        del view
        before = memory.stats(device="cuda").waits
        memory.acquire(64 << 20, device="cuda", wait_on_host=True)
        assert stream.done
    assert memory.stats(device="cuda").waits in (before, before + 1)


@pytest.mark.needs_cuda
def test_a_new_buffer_waits_for_the_stream_it_is_made_on(ring):
    """CuPy's pool hands out a block that queued work still uses: a writer that ignores streams must not have it yet."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    for _ in range(3):
        with memory.source(ring), stream:
            block = cupy.empty(memory.size_class(64 << 20), np.uint8)
            for value in range(50):
                block.fill(value)
            del block  # its memory is the next to be handed out
            grown = memory.stats(device="cuda").allocations
            buffer = memory.acquire(64 << 20, device="cuda", wait_on_host=True)
            assert stream.done
            assert memory.stats(device="cuda").allocations == grown + 1
            del buffer
        memory.clear(device="cuda")


@pytest.mark.needs_cuda
def test_recorded_use_is_waited_for(ring):
    """Fails if record_use misses the lease behind a slice: the buffer would be free while another stream reads it."""
    import cupy

    owner, user = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with memory.source(ring), owner:
        view = memory.acquire(64 << 20, device="cuda").view((64 << 20,))
        address = view.data.ptr
        part = view[1024:]
        del view
        with user:
            for value in range(50):
                part.fill(value)
        memory.record_use(part, user)
        del part
        assert memory.acquire(64 << 20, device="cuda", wait_on_host=True).address == address
        assert user.done


def overwritten_while_read(ring, record_use):
    """How many of 5 slow copies on one stream got what another stream wrote into the same memory afterwards."""
    import cupy

    owner, user = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    filler, size, wrong = cupy.ones((2048, 2048), np.float32), 16 << 20, 0
    cupy.cuda.Device().synchronize()
    for _ in range(5):
        with memory.source(ring), owner:
            view = memory.acquire(size, device="cuda").view((size,))
            view.fill(1)
            address = view.data.ptr
            user.wait_event(owner.record())
            with user:
                busy = filler
                for _ in range(60):
                    busy = cupy.sin(busy)
                copy = view.copy()
            record_use(view, user)
            del view
            again = memory.acquire(size, device="cuda").view((size,))
            assert again.data.ptr == address
            again.fill(2)
            user.synchronize()
            owner.synchronize()
            wrong += bool((copy != 1).any())
            del again
    return wrong


@pytest.mark.needs_cuda
def test_memory_that_crosses_streams_is_safe_by_the_record_alone(ring):
    assert overwritten_while_read(ring, memory.record_use) == 0
    assert overwritten_while_read(ring, lambda view, stream: None) > 0  # not always all: the card may be busy otherwise


@pytest.mark.needs_cuda
def test_pinned_memory_is_not_reused_before_it_is_copied(ring):
    """Fails if the host does not wait: it would write the next values while the copy of the last ones is queued."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    size = 32 << 20
    addresses, copies = set(), []
    with memory.source(ring), stream:
        for value in range(5):
            staging = memory.acquire(size, device="pinned").view((size,))
            assert isinstance(staging, np.ndarray)
            staging.fill(value)
            addresses.add(staging.ctypes.data)
            copies.append(cupy.empty(size, np.uint8))
            copies[-1].set(staging, stream=stream)
            del staging
        stream.synchronize()
        assert len(addresses) == 1
        assert all(bool((copy == value).all()) for value, copy in enumerate(copies))
        assert memory.stats(device="pinned").sources[ring].held_bytes >= size
        memory.clear(device="pinned")
        assert ring not in memory.stats(device="pinned").sources


def test_a_stream_outlives_its_buffers_in_a_cycle_that_is_collected(monkeypatch):
    """Python finalizes the objects of a cycle in any order; an event of a stream that is gone crashes the process."""
    noted = []

    class Stream:
        def __init__(self, ptr):
            self.ptr = ptr
            self.cycle = self

        def __del__(self):
            noted.append(f"{self.ptr} destroyed")

        def record(self, event):
            noted.append(f"{self.ptr} recorded")
            return event

    current = [Stream(7)]
    cuda = SimpleNamespace(
        get_current_stream=lambda: current[0],
        Event=lambda **options: SimpleNamespace(done=True, synchronize=lambda: None),
        alloc_pinned_memory=lambda size_bytes: SimpleNamespace(ptr=4096),
        runtime=SimpleNamespace(getDevice=lambda: 0),
    )
    monkeypatch.setattr("nbvision.runtime._rings.require_cupy", lambda what: SimpleNamespace(cuda=cuda))
    manager = Manager("pinned")
    buffer = manager.acquire(1000, Source())
    newer = Stream(8)
    buffer.record_stream(newer)
    cycle = [*current, newer, buffer]
    cycle.append(cycle)
    current.clear()
    del buffer, cycle, newer
    gc.collect()
    assert noted == ["7 recorded", "8 recorded"]
    assert manager.stats().used_bytes == 0
    gc.collect()
    assert len(noted) == 2  # a new stream at the address of one that is gone would count as that one
    manager.trim(idle_s=0)
    gc.collect()
    assert sorted(noted[2:]) == ["7 destroyed", "8 destroyed"]


def test_unknown_place_and_limits_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match=r"device is 'tpu'; expected one of"):
        memory.acquire(1, device="tpu")
    with pytest.raises(InputError, match="expected a positive number"):
        memory.set_limit("1 GB", device="cpu")
    with (
        pytest.raises(InputError, match="budget_bytes is 0; expected a positive number"),
        memory.source("a", budget_bytes=0),
    ):
        pass
    with pytest.raises(InputError, match="wait_ms is -1; expected 0 or more"), memory.source("a", wait_ms=-1):
        pass


def test_a_buffer_may_be_let_go_while_another_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event belongs to the device that was current when it was made, and only that one's streams take it."""
    current, recorded = [1], []

    class Device(contextlib.AbstractContextManager):
        def __init__(self, device_id):
            self.device_id = device_id

        def __enter__(self):
            current.append(self.device_id)

        def __exit__(self, *exception):
            current.pop()

    def record(event):
        recorded.append((event.device_id, stream.device_id))
        return event

    stream = SimpleNamespace(ptr=7, device_id=1, record=record, wait_event=lambda event: None)
    cuda = SimpleNamespace(
        get_current_stream=lambda: stream,
        Event=lambda **options: SimpleNamespace(done=True, synchronize=lambda: None, device_id=current[-1]),
        alloc_pinned_memory=lambda size_bytes: SimpleNamespace(ptr=4096),
        runtime=SimpleNamespace(getDevice=lambda: current[-1]),
        Device=Device,
    )
    monkeypatch.setattr("nbvision.runtime._rings.require_cupy", lambda what: SimpleNamespace(cuda=cuda))
    manager = Manager("pinned")
    buffer = manager.acquire(1000, Source())
    current.append(0)
    del buffer
    current.pop()
    stream.device_id = current[0] = 2  # pinned memory is for all of them
    buffer = manager.acquire(1000, Source())
    current.append(0)
    del buffer
    assert recorded == [(1, 1), (2, 2)]
    assert manager.stats().allocations == 1
