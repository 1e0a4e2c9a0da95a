"""ImageBatch: whatever holds images becomes one, without copies where none are needed."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from reference import on, random_image, to_host

from nbvision.errors import DecodeError, InputError
from nbvision.image import CHANNELS, ImageBatch, as_batch
from nbvision.ops.preprocess import Preprocess


def address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def test_arrays_are_shared_not_copied(device, rng):
    arrays = [on(device, random_image(rng, 5, 7)), on(device, random_image(rng, 9, 4))]
    batch = ImageBatch.from_arrays(arrays)
    assert batch.device == device
    assert [address(image) for image in batch] == [address(array) for array in arrays]
    assert batch.sizes.tolist() == [[5, 7], [9, 4]]
    table = to_host(batch.table)
    assert table.tolist() == [[address(a), a.strides[0], *a.shape[:2]] for a in arrays]


@pytest.mark.parametrize("color", list(CHANNELS))
def test_as_batch_takes_single_stacked_and_listed(device, rng, color):
    channels = CHANNELS[color]
    stack = on(device, np.stack([random_image(rng, 6, 8, channels) for _ in range(3)]))
    for given, count in [(stack, 3), (stack[0], 1), (list(stack), 3), ((image for image in stack), 3)]:
        batch = as_batch(given, color=color)
        assert len(batch) == count
        np.testing.assert_array_equal(to_host(batch[0]), to_host(stack[0]))
    if color == "gray":
        np.testing.assert_array_equal(to_host(as_batch(stack[0, :, :, 0], color="gray")[0]), to_host(stack[0]))


def test_moving_there_and_back_keeps_pixels(device, rng):
    images = [random_image(rng, 3, 5), random_image(rng, 8, 2)]
    there = ImageBatch.from_arrays(images).to(device)
    assert there.device == device
    for image, back in zip(images, there.to("cpu"), strict=True):
        np.testing.assert_array_equal(image, back)


def test_allocated_images_do_not_overlap(device):
    batch = ImageBatch.allocate([(3, 5), (1, 1), (64, 3)], device=device)
    for index, image in enumerate(batch):
        image[...] = index + 1
    for index, image in enumerate(batch):
        assert (to_host(image) == index + 1).all()


def test_missing_image_raises_its_error_and_select_keeps_it(device):
    error = DecodeError("cut off", kind="truncated", source="a.jpg")
    pixels = on(device, np.ones((2, 2, 3), np.uint8))
    batch = ImageBatch([pixels, None], color="rgb", device=device, errors=[None, error])
    assert batch.ok.tolist() == [True, False]
    with pytest.raises(DecodeError, match=r"a\.jpg: cut off"):
        batch[1]
    again = batch.select([1, 0, 0])
    assert again.errors == (error, None, None)
    assert again.sizes.tolist() == [[0, 0], [2, 2], [2, 2]]
    assert address(again[1]) == address(pixels)


def test_a_raised_error_does_not_keep_the_batch(device):
    error = DecodeError("cut off", kind="truncated", source="a")
    batch = ImageBatch([None], color="rgb", device=device, errors=[error])
    batch_is_alive = weakref.ref(batch)
    with pytest.raises(DecodeError) as caught:
        batch[0]
    assert (str(caught.value), caught.value.kind, caught.value.source) == ("a: cut off", "truncated", "a")
    del batch, caught
    assert batch_is_alive() is None
    assert error.__traceback__ is None


def test_allocate_takes_sizes_of_another_batch_and_leaves_out_missing_images(device):
    first = ImageBatch.allocate([(3, 5), (0, 0), (7, 2)], color="gray", device=device)
    again = ImageBatch.allocate(first.sizes, color="rgba", device=device)
    assert again.sizes.tolist() == [[3, 5], [0, 0], [7, 2]]
    assert again[1] is None
    assert [again[index].shape for index in (0, 2)] == [(3, 5, 4), (7, 2, 4)]
    table = to_host(again.table)
    assert table.tolist() == [[address(again[0]), 20, 3, 5], [0, 0, 0, 0], [address(again[2]), 8, 7, 2]]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("is_asked_for", [False, True])
def test_a_table_is_uploaded_once_and_each_stream_waits_for_it_once(rng, is_asked_for):
    """A graph cannot be captured of work that waits for another stream."""
    import cupy

    batch = ImageBatch.from_arrays([random_image(rng, 5, 7), random_image(rng, 3, 2)], device="cuda")
    if is_asked_for:  # as that of a decoded one
        batch._uploaded = None
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    tables = []
    for stream in streams * 2:
        with stream:
            tables.append(batch.table)
            assert batch.table.get()[:, 2:].tolist() == [[5, 7], [3, 2]]
    assert all(table is tables[0] for table in tables)
    for stream in streams:
        with stream:
            stream.begin_capture()
            assert batch.table is tables[0]
            stream.end_capture()


def test_an_empty_batch_has_tables_too(device):
    batch = ImageBatch([], color="rgb", device=device)
    assert batch.sizes.shape == (0, 2)
    assert batch.table.shape == (0, 4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float64), "uint8, float16 or float32"),
        (np.zeros((4, 4, 2), np.uint8), r"expected \(height, width, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros(4, np.uint8), "expected"),
    ],
)
def test_what_is_no_image_is_refused(device, array, message):
    with pytest.raises(InputError, match=message):
        ImageBatch.from_arrays([on(device, array)])


@pytest.mark.parametrize(
    ("sizes", "color", "message"),
    [
        ([(-1, 3)], "rgb", "expected lengths of 0 or more"),
        ([3], "rgb", "expected .height, width. of each image"),
        ([(2, 2.5)], "rgb", "expected .height, width. of each image"),
        ([(2, 2)], "cmyk", "color is 'cmyk'; expected one of"),
    ],
)
def test_sizes_that_are_none_are_not_allocated(device, sizes, color, message):
    with pytest.raises(InputError, match=message):
        ImageBatch.allocate(sizes, color=color, device=device)


@pytest.mark.needs_cuda
def test_another_stream_waits_for_the_pixels(rng):
    """Fails if use_on_current_stream does not order the streams: the copy would read before the fill."""
    import cupy

    producer, consumer = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    for _ in range(5):
        with producer:
            batch = ImageBatch.allocate([(8192, 8192)], device="cuda")
            for value in range(20):
                batch[0].fill(value)
        with consumer:
            batch.use_on_current_stream()
            copy = batch[0].copy()
        consumer.synchronize()
        assert bool((copy == 19).all())


def test_shared_memory_is_found_to_the_byte(device, rng):
    """Against NumPy's exact answer, of views of one canvas, one beside or below the other."""
    canvas = on(device, random_image(rng, 40, 50))
    view = canvas[10:20, 10:30]
    batch = ImageBatch.from_arrays([view, on(device, random_image(rng, 3, 3))], device=device)
    host, base = to_host(canvas), address(canvas)
    start, stop = 10 * 150 + 30, 19 * 150 + 90
    for y, x in [(0, 0), (10, 0), (10, 30), (10, 29), (9, 10), (20, 10), (19, 29), (5, 5), (0, 10), (12, 12)]:
        other = canvas[y : y + 10, x : x + 10]
        twin = host[y : y + 10, x : x + 10]
        for _ in range(2):  # the second time it is known
            assert batch.shares_memory(other) == np.shares_memory(twin, host[10:20, 10:30]), (y, x)
    flat = canvas.reshape(-1)
    for first, last in [(0, start), (0, start + 1), (stop - 1, stop + 9), (stop, stop + 9), (start + 90, start + 91)]:
        between_the_lines = first == start + 90
        assert batch.shares_memory(flat[first:last]) == (first < stop and last > start), (first, last, base)
        assert between_the_lines or batch.shares_memory(flat[first:last]) == np.shares_memory(
            host.reshape(-1)[first:last], host[10:20, 10:30]
        )
    assert not ImageBatch.from_arrays([], device=device).shares_memory(flat)


@pytest.mark.parametrize(("options", "size"), [({"color": "nv12"}, 24 * 16), ({"layout": "CHW"}, 3 * 24 * 16)])
def test_shared_memory_of_planes_and_nv12(device, options, size):
    """The last byte counts, the one behind it does not."""
    memory = on(device, np.zeros(size * 3 // 2 + 4 if "color" in options else size + 4, np.uint8))
    used = len(memory) - 4
    image = memory[:used].reshape((36, 16) if "color" in options else (3, 24, 16))
    batch = ImageBatch.from_arrays([image], device=device, **options)
    assert batch.shares_memory(memory[used - 1 :])
    assert not batch.shares_memory(memory[used:])


def test_channels_apart_in_a_single_column(device, rng):
    """An image one pixel wide whose channels lie in planes: its strides look dense."""
    image = rng.integers(0, 256, (3, 7, 1), dtype=np.uint8)
    batch = ImageBatch.from_arrays([np.moveaxis(on(device, image), 0, -1)], device=device)
    pre = Preprocess((7, 1), fit="stretch", dtype="uint8")
    np.testing.assert_array_equal(to_host(pre(batch)[0])[0], image)
