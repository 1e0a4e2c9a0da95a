"""The memory manager: reuse, limits, leases, stream order."""

from __future__ import annotations

import gc
import threading
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import on, to_host

from nbvision.errors import InputError, MemoryLimitError
from nbvision.runtime import memory


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
    assert memory.stats(device=device).by_source[ring + "a"] >= 10_000


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
        with pytest.raises(MemoryLimitError, match=rf"the limit is .* {ring}"):
            memory.acquire(2_000_000, device=device)
    assert memory.stats(device=device).held_bytes <= held + 3_200_000
    assert kept.size_bytes + larger.size_bytes <= 3_200_000


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
        assert memory.stats(device="pinned").by_source[ring] >= size
        memory.clear(device="pinned")
        assert ring not in memory.stats(device="pinned").by_source


def test_unknown_place_and_limits_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match=r"device is 'tpu'; expected one of"):
        memory.acquire(1, device="tpu")
    with pytest.raises(InputError, match="expected a positive number"):
        memory.set_limit("1 GB", device="cpu")
