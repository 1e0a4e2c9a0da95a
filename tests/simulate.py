"""What test_simulator.py runs under Numba's simulator: each kernel against its CPU twin, on arrays just long enough."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
from nbvision_kernels import (
    boxes,
    boxes_cuda,
    codes,
    draw,
    draw_cuda,
    instances,
    instances_cuda,
    masks,
    masks_cuda,
    pointwise,
    pointwise_cuda,
    preprocess,
    preprocess_cuda,
    regions,
    regions_cuda,
    resample,
    resample_cuda,
    warp,
    warp_cuda,
    window,
)
from numba import cuda

SIZES = [(5, 7), (1, 1), (9, 4)]


def launch(kernel: Callable[..., None], grid: object, block: object, *arguments: object) -> None:
    cuda.jit(kernel)[grid, block](*arguments)


def pixels_and_sources(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images back to back in one array; addresses are offsets into it."""
    sources, start = [], 0
    for height, width in SIZES:
        sources.append([start, width * 3, height, width])
        start += height * width * 3
    return rng.integers(0, 256, start, dtype=np.uint8), np.array(sources, np.int64).reshape(-1)


def empty_tables(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table, steps = np.zeros(count * codes.FIELDS, np.int32), np.zeros(count * codes.STEPS, np.int64)
    return table, steps, np.zeros(count * codes.SCALES, np.float32)


def image_regions(
    sources: np.ndarray, height: int, width: int, linear: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tables = empty_tables(len(SIZES))
    regions.fill_regions_cpu(sources, *tables, height, width, codes.FIT_LETTERBOX, 0, 0, True, True, linear)
    return tables


def run_preprocess(rng: np.random.Generator) -> None:
    pixels, sources = pixels_and_sources(rng)
    height, width = 6, 9
    for sampler in (codes.NEAREST, codes.LINEAR_EXACT, codes.LINEAR_FAST):
        for layout in (codes.NCHW, codes.NHWC):
            tables = image_regions(sources, height, width, sampler != codes.NEAREST)
            out = np.full(len(SIZES) * 3 * height * width, np.nan, np.float32)
            kernel = preprocess_cuda.make_kernel(sampler, layout, codes.STORE_F32)
            numbers = [np.float32(value) for value in (1, 1, 1, 0, 0, 0, 114, 114, 114)]
            arguments = (pixels, sources, *tables, out, height, width, 3, 0, 0, *numbers, *(0,) * 6)
            launch(kernel, (2, 1, len(SIZES)), (8, 8), *arguments)
            assert np.isfinite(out).all()
            assert out.min() >= 0
            assert out.max() <= 255


def run_nv12(rng: np.random.Generator) -> None:
    """Frames back to back, the last one's chroma last of all; crops that end at the right and at the bottom."""
    sources, start = [], 0
    for frame_height, frame_width in [(4, 6), (2, 2), (8, 4)]:
        sources.append([start, frame_width, frame_height, frame_width])
        start += frame_height * 3 // 2 * frame_width
    pixels, sources = rng.integers(0, 256, start, dtype=np.uint8), np.array(sources, np.int64).reshape(-1)
    given = np.array([[0, 0, 6, 4], [5, 3, 6, 4], [0, 0, 2, 2], [1, 1, 2, 2], [1, 0, 4, 7], [3, 7, 4, 8]], np.float32)
    images, height, width = np.array([0, 0, 1, 1, 2, 2], np.int64), 5, 9
    for sampler in (codes.NEAREST, codes.LINEAR_EXACT, codes.LINEAR_FAST):
        tables = empty_tables(len(given))
        fit = (height, width, codes.FIT_LETTERBOX, 0, 0, True, True, sampler != codes.NEAREST)
        regions.fill_box_regions_cpu(sources, images, given.reshape(-1), np.float32(0), *tables, *fit)
        matrix = codes.matrix_numbers("bt709", exact=sampler != codes.LINEAR_FAST)
        gain, bias, fill = ([np.float32(value)] * 3 for value in (1, 0, 114))
        results = [np.full(len(given) * 3 * height * width, np.nan, np.float32) for _ in range(2)]
        types = (sampler, codes.NCHW, codes.STORE_F32)
        preprocess.pointer_from_address = lambda _: pixels
        loop = preprocess.make_cpu_loop(sampler, codes.STORE_F32, source_type=codes.SOURCE_NV12)
        strides = codes.canvas_strides(codes.NCHW, height, width)
        numbers = (len(given), height, width, 1, 0, 0, gain, bias, fill, False, [], matrix, strides)
        loop(0, sources, *tables, results[0], *numbers)
        kernel = preprocess_cuda.make_kernel(*types, codes.SOURCE_NV12)
        arguments = (pixels, sources, *tables, results[1], height, width, 1, 0, 0, *gain, *bias, *fill, *matrix)
        launch(kernel, (2, 1, len(given)), (8, 8), *arguments)
        assert np.isfinite(results[0]).all()
        np.testing.assert_array_equal(*results)


def run_planes(rng: np.random.Generator) -> None:
    """The last plane of the last image ends where the memory ends; interleaved twins give the same values."""
    pixels, sources = pixels_and_sources(rng)
    planar, planar_sources = np.empty_like(pixels), sources.copy()
    for start, pitch, lines, width in planar_sources.reshape(-1, 4):
        image = pixels[start : start + lines * pitch].reshape(lines, width, 3)
        planar[start : start + lines * pitch] = np.moveaxis(image, -1, 0).reshape(-1)
    planar_sources.reshape(-1, 4)[:, 1] //= 3
    height, width, results = 6, 9, []
    for sampler in (codes.NEAREST, codes.LINEAR_EXACT, codes.LINEAR_FAST):
        tables = image_regions(sources, height, width, sampler != codes.NEAREST)
        numbers = [np.float32(value) for value in (1, 1, 1, 0, 0, 0, 114, 114, 114)]
        results = [np.full(len(SIZES) * 3 * height * width, np.nan, np.float32) for _ in range(2)]
        for out, memory, table, pixel_bytes, source_type in [
            (results[0], pixels, sources, 3, codes.SOURCE_U8),
            (results[1], planar, planar_sources, 1, codes.SOURCE_CHW),
        ]:
            kernel = preprocess_cuda.make_kernel(sampler, codes.NCHW, codes.STORE_F32, source_type)
            arguments = (memory, table, *tables, out, height, width, pixel_bytes, 0, 0, *numbers, *(0,) * 6)
            launch(kernel, (2, 1, len(SIZES)), (8, 8), *arguments)
        np.testing.assert_array_equal(*results)


def run_taps(rng: np.random.Generator) -> None:
    """Tables of both families: the same on both devices, and of every window no tap outside the source."""
    window.float_to_bits = lambda value: value.view(np.int32)
    _, sources = pixels_and_sources(rng)
    given = np.array([[0, 0, 7, 5], [1, 2, 3, 4], [0, 0, 1, 1], [0, 0, 4, 9], [3, 0, 4, 9]], np.float32)
    images, height, width, limit = np.array([0, 0, 1, 2, 2], np.int64), 4, 3, 24
    tables = empty_tables(len(given))
    fit = (height, width, codes.FIT_STRETCH, 0, 0, True, True, True)
    regions.fill_box_regions_cpu(sources, images, given.reshape(-1), np.float32(0), *tables, *fit)
    rows = tables[0].reshape(len(given), -1)
    for (fill, twin, kinds), vertical in itertools.product(
        [
            (resample.fill_taps_cpu, resample_cuda.fill_taps, range(5)),
            (window.fill_windows_cpu, resample_cuda.fill_windows, range(4)),
        ],
        (False, True),
    ):
        length = height if vertical else width
        for kind in kinds:
            on_host, on_device = (np.full(len(given) * length * (limit + 4), -1, np.int32) for _ in range(2))
            fill(on_host, tables[0], length, limit, vertical, kind)
            if fill is resample.fill_taps_cpu:
                for entry in range(0, len(on_host), limit + 4):
                    resample.pack_taps(on_host, entry, limit)
            launch(twin, (1, len(given)), 8, on_device, tables[0], length, limit, vertical, kind)
            np.testing.assert_array_equal(on_host, on_device)
            entries = on_host.reshape(len(given), length, -1)
            field = codes.HEIGHT if vertical else codes.WIDTH
            if (kind != codes.CV2_CUBIC and kind != codes.CV2_AREA) or fill is resample.fill_taps_cpu:
                assert (entries[..., 0] + entries[..., 1] <= rows[:, field, None]).all()
            assert (entries[..., 1] > 0).all()


def run_pointwise(rng: np.random.Generator) -> None:
    """Every operation on ragged images that end where the memory ends, dense ones also as one line; words and bytes."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    pointwise.fma32 = lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    for channels, out_channels in [(1, 1), (3, 3), (4, 4), (3, 1), (1, 4), (4, 3)]:
        operations = [codes.COLOR] if channels != out_channels else list(codes.OPERATIONS)
        for operation, start in itertools.product(operations, (0, 3)):
            firsts, first = image_table(rng, SIZES, 0, channels)
            seconds, second = image_table(rng, SIZES, len(first), channels)
            masks, mask = image_table(rng, SIZES, len(first) + len(second), 4)
            targets, _ = image_table(rng, SIZES, 0, out_channels)
            inputs = np.concatenate([first, second, mask])
            inputs[len(first) + len(second) :].view(np.float32)[:] = rng.random(len(mask) // 4, np.float32)
            if operation == codes.LUT:
                seconds.reshape(-1, 4)[:, :2] = [len(inputs) - 256 * channels, 0]
                inputs = np.concatenate([inputs, rng.integers(0, 256, 256 * channels, dtype=np.uint8)])
                seconds.reshape(-1, 4)[:, 0] = len(inputs) - 256 * channels
            masks.reshape(-1, 4)[:, 1] //= 1 if operation == codes.BLEND_FLOATS else 4
            targets.reshape(-1, 4)[:, 0] += -(-len(inputs) // 4) * 4 + start
            size = -(-int(targets[-4] + targets[-3] * targets[-2]) // 4) * 4
            memory = np.zeros(size, np.uint8)
            memory[: len(inputs)] = inputs
            numbers = [np.float32(number) for number in (channels if operation == codes.LUT else 1, 0.5, 2)]
            host = memory.copy()
            pointwise.pointer_from_address = lambda _, memory=host: memory
            pointwise.floats_from_address = lambda _, memory=host: memory.view(np.float32)
            loop = pointwise.make_pointwise_cpu(operation, channels, out_channels)
            loop(0, firsts, seconds, masks, targets, len(SIZES), 9, *numbers)
            assert (host != memory).any()
            for flat in (0, 1):
                device = memory.copy()
                views = [FakeCUDAArray(view) for view in (device, device.view(np.uint32), device.view(np.float32))]
                kernel = pointwise_cuda.make_pointwise(operation, channels, out_channels)
                launch(kernel, (2, 3, len(SIZES)), 32, *views, firsts, seconds, masks, targets, flat, *numbers)
                np.testing.assert_array_equal(device, host)


def run_image_regions(rng: np.random.Generator) -> None:
    _, sources = pixels_and_sources(rng)
    count = sources.size // 4
    for fit in (codes.FIT_STRETCH, codes.FIT_LETTERBOX, codes.FIT_COVER):
        host, device = empty_tables(count), empty_tables(count)
        numbers = (8, 8, fit, 9, 9, True, True, True)
        regions.fill_regions_cpu(sources, *host, *numbers)
        launch(regions_cuda.fill_image_regions, 1, 8, sources, count, *device, *numbers)
        for by_host, by_device in zip(host, device, strict=True):
            np.testing.assert_array_equal(by_host, by_device)


def run_box_regions(rng: np.random.Generator) -> None:
    _, sources = pixels_and_sources(rng)
    given = np.array([[0, 0, 5, 5], [-3, -3, 90, 90], [2, 2, 2, 4], [np.nan, 0, 1, 1], [0.5, 0.5, 3.5, 8]], np.float32)
    images = np.array([0, 1, 2, 0, 2], np.int64)
    results = []
    for fill in ("host", "device"):
        tables = empty_tables(5)
        fit = (8, 8, codes.FIT_COVER, 9, 9, True, True, True)
        if fill == "host":
            regions.fill_box_regions_cpu(sources, images, given.reshape(-1), np.float32(0.1), *tables, *fit)
        else:
            numbers = (given.reshape(-1), 5, np.float32(0.1))
            launch(regions_cuda.fill_box_regions, 1, 8, sources, images, *numbers, *tables, *fit)
        results.append(tables)
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    empty = results[0][0].reshape(5, -1)[:, codes.WIDTH] == 0
    assert empty.tolist() == [False, False, True, True, False]


def run_nms(rng: np.random.Generator) -> None:
    _, sources = pixels_and_sources(rng)
    table, _, scales = image_regions(sources, 16, 16, True)
    images, rows, classes, anchors, kept = 3, 7, 2, 21, 4
    head = rng.uniform(0, 16, (images, rows, anchors)).astype(np.float32)
    head[:, 4:] = np.round(rng.uniform(0, 1, (images, rows - 4, anchors)), 1)
    flat = head.reshape(-1)
    bits = flat.view(np.uint32)
    plain_boxes = np.sort(rng.uniform(0, 16, (images, anchors, 2, 2)), axis=2).astype(np.float32).reshape(-1)
    plain_scores = head[:, 4].reshape(-1).copy()
    plain_bits, plain_counts = plain_scores.view(np.uint32), np.array([anchors, 0, 7], np.int32)
    plain_labels = rng.integers(0, 2, images * anchors, dtype=np.int32)
    score, overlap = np.float32(0.3), np.float32(0.4)
    for plain, most, sigma in [(False, 9, 0), (False, anchors, 0), (False, 9, 0.3), (True, 9, 0), (True, anchors, 0.3)]:
        limits = (score, overlap, np.float32(sigma), 1, most, kept)
        host, device = _detections(images, kept), _detections(images, kept)
        keys = np.zeros(images * anchors, np.uint64)
        grid, block = (2, images), 16
        if plain:
            given = (plain_boxes, plain_scores, plain_bits, plain_labels, plain_counts)
            boxes.nms_boxes_cpu(*given, images, anchors, *limits, *host)
            found = (plain_boxes, plain_scores, plain_labels)
            launch(boxes_cuda.box_candidates, grid, block, plain_scores, plain_bits, plain_counts, anchors, score, keys)
        else:
            boxes.nms_cpu(flat, bits, images, rows, classes, anchors, table, scales, *limits, *host)
            found = _detections(images, anchors)[:3]
            given = (flat, bits, rows, classes, anchors, table, scales, score)
            launch(boxes_cuda.head_candidates, grid, block, *given, keys, *found)
        padded = 1 << (most - 1).bit_length()
        candidates = _detections(images, most)
        scratch = np.zeros(images * padded, np.uint64)
        launch(boxes_cuda.rank_candidates, images, 32, keys, anchors, most, padded, *found, scratch, *candidates)
        if sigma:
            boxes_cuda.SOFT_THREADS = 8
            numbers = (most, score, np.float32(sigma), 1, kept)
            launch(boxes_cuda.soft_suppress, images, 8, *candidates, *numbers, *device)
        else:
            launch(boxes_cuda.suppress, images, 32, *candidates, most, overlap, 1, kept, *device)
        for expected, got in zip(host, device, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert host[4].max() > 0
    run_box_iou(rng)


def _detections(images: int, most: int) -> list[np.ndarray]:
    kinds = [(4, np.float32), (1, np.float32), (1, np.int32), (1, np.int32)]
    return [np.zeros(images * most * n, dtype) for n, dtype in kinds] + [np.zeros(images, np.int32)]


def run_box_iou(rng: np.random.Generator) -> None:
    first, second = (np.sort(rng.uniform(0, 9, (n, 2, 2)), axis=1).astype(np.float32).reshape(-1) for n in (5, 7))
    host, device = np.zeros(35, np.float32), np.zeros(35, np.float32)
    boxes.box_iou_cpu(first, second, 5, 7, host)
    launch(boxes_cuda.box_iou, (2, 3), 4, first, second, 5, 7, device)
    np.testing.assert_array_equal(host, device)
    assert host.max() > 0


def run_masks(rng: np.random.Generator) -> None:
    count, height, width = 3, 5, 7
    logits = rng.normal(0, 1, (count, height, width)).astype(np.float32)
    logits[1] = -1
    scales = rng.uniform(0.5, 2, count * codes.SCALES).astype(np.float32)
    crops = rng.uniform(0, 1, (count, 3, height, width)).astype(np.float32)
    gain, bias = (np.float32(2), np.float32(3), np.float32(4)), (np.float32(0.1), np.float32(0.2), np.float32(0.3))
    results = []
    for target in ("host", "device"):
        found, areas, out = np.zeros(count * 4, np.float32), np.zeros(count, np.int32), np.zeros_like(crops)
        flat, threshold, fill = logits.reshape(-1), np.float32(0), np.float32(0.5)
        plane = height * width
        if target == "host":
            masks.mask_boxes_cpu(flat, count, height, width, threshold, scales, found, areas)
            masks.cut_out_cpu(crops.reshape(-1), flat, count, plane, threshold, fill, gain, bias, out.reshape(-1))
        else:
            launch(masks_cuda.mask_boxes, count, 16, flat, height, width, threshold, scales, found, areas)
            arguments = (crops.reshape(-1), flat, plane, threshold, fill, *gain, *bias, out.reshape(-1))
            launch(masks_cuda.cut_out, (3, count), 16, *arguments)
        results.append((found, areas, out))
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    assert results[0][1].tolist()[1] == 0
    host, device = np.zeros(2 * 35, np.int32), np.full(2 * 35, -1, np.int32)
    several = np.round(rng.normal(0, 1, 2 * 4 * 35), 1).astype(np.float32)
    masks.argmax_map_cpu(several, 2, 4, 35, host)
    launch(masks_cuda.argmax_map, (3, 2), 16, several, 4, 35, device)
    np.testing.assert_array_equal(host, device)


def run_mask_extras(rng: np.random.Generator) -> None:
    """Centroids, objects with alpha, pasted masks: sizes that no block divides."""
    count, rows, columns = 3, 11, 37
    logits = rng.normal(0, 1, (count, rows, columns)).astype(np.float32)
    logits[1] = -1
    flat, zero = logits.reshape(-1), np.float32(0)
    scales = rng.uniform(0.5, 2, count * codes.SCALES).astype(np.float32)
    pixels, sources = pixels_and_sources(rng)
    records = np.array([[0, 1, 1, 1, 0, 7, 5], [1, 0, 0, -3, -2, 1, 1], [2, 0, 2, 1, 3, 1, 9]], np.int32)
    sizes, start = [(4, 6), (1, 1), (7, 4)], -(-len(pixels) // 4) * 4
    targets = []
    for height, width in sizes:
        targets.append([start, width * 4, height, width])
        start += height * width * 4
    targets_flat = np.array(targets, np.int64).reshape(-1)
    places = np.array([[1, 2, 30, 20, 3, 1, 30, 9], [0, 0, 0, 0, 0, 0, 0, 0], [4, 0, 3, 40, 0, 0, 99, 99]], np.float32)
    table = np.array([[0, 20, 30, 1, 2], [600, 0, 0, 0, 0], [600, 40, 3, 4, 0]], np.int64)
    results = []
    for target in ("host", "device"):
        centroids, memory = np.zeros(count * 2, np.float32), np.zeros(start, np.uint8)
        memory[: len(pixels)] = pixels
        ragged, dense = np.full(720, 9, np.uint8), np.zeros(count * 41 * 35, np.uint8)
        images = (sources, targets_flat, records.reshape(-1))
        numbers = (3, 1, flat, rows, columns, zero)
        given = (flat, places.reshape(-1), table.reshape(-1), count, rows, columns, zero)
        block = (masks_cuda.BLOCK_WIDTH, masks_cuda.BLOCK_LINES)
        if target == "host":
            masks.mask_centroids_cpu(flat, count, rows, columns, zero, scales, 1, centroids)
            masks.pointer_from_address = lambda address, memory=memory: memory
            masks.cut_out_rgba_cpu(0, *images, count, 7, *numbers)
            masks.paste_masks_cpu(*given, 41, 0, 0, ragged)
            masks.paste_masks_cpu(*given, 41, 41 * 35, 35, dense)
        else:
            launch(masks_cuda.mask_centroids, count, block, flat, rows, columns, zero, scales, 1, centroids)
            launch(masks_cuda.cut_out_rgba, (1, 1, 1), block, memory, memory.view(np.uint32), *images, *numbers, 0)
            launch(masks_cuda.cut_out_rgba, (1, 1, 2), block, memory, memory.view(np.uint32), *images, *numbers, 1)
            launch(masks_cuda.paste_masks, (2, 2), block, *given, 0, 0, ragged)
            launch(masks_cuda.paste_masks, (2, 2), block, *given, 41 * 35, 35, dense)
        results.append((centroids, memory, ragged, dense))
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    assert (results[0][0].reshape(-1, 2) == 0).all(axis=1).tolist() == [False, True, False]
    assert set(results[0][1][targets[0][0] + 3 :: 4].tolist()) == {0, 255}
    assert set(results[0][2].tolist()) == {0, 1}


def run_instances(rng: np.random.Generator) -> None:
    masks, images, channels, rows, columns, height, width, capacity = 5, 2, 3, 18, 20, 21, 40, 1500
    coefficients = rng.normal(0, 1, masks * channels).astype(np.float32)
    prototypes = rng.normal(0, 1, images * channels * rows * columns).astype(np.float32)
    given = np.array([[0, 0, 40, 21], [-3, 2.5, 9, 30], [4, 4, 4, 9], [1, 1, 38, 19], [39, 20, 40, 21]], np.float32)
    which = np.array([0, 1, 1, 0, 1], np.int64)
    scales = np.zeros(images * codes.SCALES, np.float32)
    results = []
    for target in ("host", "device"):
        table, needed = np.zeros(masks * instances.ROW, np.int64), np.zeros(1, np.int64)
        pixels, dense = np.zeros(capacity, np.uint8), np.zeros(masks * height * width, np.uint8)
        extents = (given.reshape(-1), which, images, scales, 0, masks, height, width, capacity, table, needed)
        numbers = (masks, channels, rows, columns, height, width, np.float32(0))
        if target == "host":
            instances.mask_table_cpu(*extents)
            instances.instance_masks_cpu(coefficients, prototypes, which, table, *numbers, pixels)
            instances.dense_masks_cpu(pixels, table, masks, height, width, dense)
        else:
            instances_cuda.TABLE_THREADS = 4
            launch(instances_cuda.mask_table, 1, 4, *extents)
            tiles = (13 * height // rows, 13 * width // columns)
            arguments = (coefficients, prototypes, which, table, *numbers, *tiles, pixels)
            launch(instances_cuda.instance_masks, (2, 3), 16, *arguments)
            launch(instances_cuda.dense_masks, (53, 2), 16, pixels, table, masks, height, width, dense)
        results.append((table, needed, pixels, dense))
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    assert results[0][1][0] > capacity
    assert results[0][3].max() == 1


def run_draw(rng: np.random.Generator) -> None:
    """Masks, boxes and texts on images that are copied, more of them than a block looks at in one go."""
    pixels, sources = pixels_and_sources(rng)
    size, count, mask_height, mask_width = len(pixels), 270, 2, 3
    targets = sources.copy()
    targets[::4] += size
    given = rng.uniform(-4, 12, (count, 2)).astype(np.float32)
    given = np.concatenate([given, given + rng.uniform(0, 5, (count, 2)).astype(np.float32)], axis=1)
    given[::50] = np.nan
    images = rng.integers(-1, len(SIZES) + 1, count).astype(np.int32)
    images[:260] = 0
    rows = np.argsort(images, kind="stable").astype(np.int32)
    edges = np.searchsorted(images[rows], np.arange(len(SIZES) + 1)).astype(np.int32)
    starts, counts = edges[:-1], np.diff(edges)
    labels, scores = rng.integers(-2, 4, count).astype(np.int32), rng.uniform(-0.1, 1.1, count).astype(np.float32)
    scores[3] = np.nan
    names, text_height, padding, colors, channels = 2, 3, 1, 3, 3
    widths = rng.integers(0, 4, names + draw.SCORE_STRIPS)
    strips = np.stack([np.cumsum(widths * text_height) - widths * text_height, widths], axis=1).astype(np.int32)
    atlas = rng.integers(0, 256, int(widths.sum()) * text_height, dtype=np.uint8)
    palette = rng.integers(0, 256, colors * draw.PALETTE_BYTES, dtype=np.uint8)
    masks_given = rng.normal(0, 1, count * mask_height * mask_width).astype(np.float32)
    results = []
    for target in ("host", "device"):
        records = np.full(count * codes.DRAW_FIELDS, -9, np.int32)
        both = np.concatenate([pixels, np.zeros(size, np.uint8)])
        found = (given.reshape(-1), given.reshape(-1), labels, scores, 1, names, strips.reshape(-1))
        lay_out = (count, sources, images, len(SIZES), *found, text_height, padding, colors, records)
        lists = (channels, rows, starts, counts, records, palette, 1, masks_given, mask_height, mask_width)
        last = (np.float32(0), 100, atlas, strips.reshape(-1), text_height, padding)
        if target == "host":
            draw.pointer_from_address = lambda address, memory=both: memory
            draw.lay_out_cpu(*lay_out)
            draw.paint_cpu(0, sources, targets, len(SIZES), 9, *lists, *last)
        else:
            launch(draw_cuda.lay_out, 9, 32, *lay_out)
            block = (draw_cuda.TILE_WIDTH, draw_cuda.TILE_HEIGHT)
            launch(draw_cuda.paint, (1, 2, len(SIZES)), block, both, sources, targets, *lists, *last)
        results.append((records, both))
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    np.testing.assert_array_equal(results[0][1][:size], pixels)
    assert (results[0][1][size:] != pixels).any()


def run_warp(rng: np.random.Generator) -> None:
    """Every interpolation and number of channels over every border, with a matrix that is NaN; lines that fill words
    and lines that do not."""
    warp.fma32 = lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    matrices = np.eye(3) + rng.normal(0, 0.4, (3, 3, 3)) * [[1, 1, 3], [1, 1, 3], [0.05, 0.05, 0.1]]
    matrices[2, 1, 1] = np.nan
    coefficients = []
    for lines, inverse in ((3, 0), (3, 1), (2, 0), (2, 1)):
        given = np.ascontiguousarray(matrices[:, :lines]).reshape(-1)
        host, device = np.zeros(3 * 9, np.float32), np.zeros(3 * 9, np.float32)
        warp.coefficients_cpu(given, 3, lines, inverse, host)
        launch(warp_cuda.warp_coefficients, 1, 4, given, 3, lines, inverse, device)
        np.testing.assert_array_equal(host, device)
        assert np.isnan(host).tolist() == [False] * 18 + [True] * 9
        coefficients.append(host)
    for channels, interpolation in itertools.product((1, 3, 4), warp.SAMPLERS):
        sources, both = image_table(rng, SIZES, 0, channels)
        targets, room = image_table(rng, [(9, 33), (2, 32), (3, 5)], len(both), channels)
        both = np.concatenate([both, room])
        fill = np.int32(0x04030201) if channels > 1 else np.int32(200)
        border = (interpolation + channels) % 3  # each interpolation meets each
        perspective = 1 if border == warp.REPLICATE else 0
        table = coefficients[0 if perspective else 2]
        host, device = both.copy(), both.copy()
        warp.pointer_from_address = lambda address, memory=host: memory
        warp.words_from_address = lambda address, memory=host: memory.view(np.uint32)
        loop = warp.make_warp_cpu(interpolation, channels)
        loop(sources, targets, 3, 9, table, perspective, border, fill)
        kernel = warp_cuda.make_warp(interpolation, channels)
        numbers = (table, perspective, border, fill)
        grid, block = (2, 2, 3), (warp_cuda.TILE, warp_cuda.WARP_LINES)
        launch(kernel, grid, block, *as_bytes_and_words(device), sources, targets, *numbers)
        np.testing.assert_array_equal(host, device)
        assert (host[-64:] == both[-64:]).all()
        assert (host != both).any()


def run_move(rng: np.random.Generator) -> None:
    sizes = [(33, 40), (1, 5), (32, 64)]
    for channels, transpose in itertools.product((1, 3, 4), (0, 1)):
        sources, both = image_table(rng, sizes, 0, channels)
        shapes = [size[::-1] for size in sizes] if transpose else sizes
        targets, room = image_table(rng, shapes, len(both), channels)
        both = np.concatenate([both, room])
        mirrors = (1, 0) if transpose else (0, 1)
        host, device = both.copy(), both.copy()
        warp.pointer_from_address = lambda address, memory=host: memory
        warp.make_move_cpu(channels)(sources, targets, 3, 64, transpose, *mirrors)
        grid, block = (2, 2, 3), (warp_cuda.TILE, warp_cuda.MOVE_LINES)
        kernel = warp_cuda.make_move(channels)
        launch(kernel, grid, block, *as_bytes_and_words(device), sources, targets, transpose, *mirrors)
        np.testing.assert_array_equal(host, device)
        assert (host[-64:] == both[-64:]).all()


def as_bytes_and_words(memory: np.ndarray) -> tuple[object, object]:
    """The same memory twice; of host arrays the simulator would copy each back after the launch."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    return FakeCUDAArray(memory), FakeCUDAArray(memory.view(np.uint32))


def image_table(
    rng: np.random.Generator, sizes: list[tuple[int, int]], start: int, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images from address ``start`` on, each from a whole word, and 64 bytes behind them that are nobody's."""
    rows, first = [], start
    for height, width in sizes:
        rows.append([start, width * channels, height, width])
        start += -(-height * width * channels // 4) * 4
    return np.array(rows, np.int64).reshape(-1), rng.integers(0, 256, start - first + 64, dtype=np.uint8)


if __name__ == "__main__":
    case = sys.argv[1]
    cases = {
        "preprocess": run_preprocess,
        "nv12": run_nv12,
        "planes": run_planes,
        "pointwise": run_pointwise,
        "taps": run_taps,
        "image_regions": run_image_regions,
        "box_regions": run_box_regions,
        "nms": run_nms,
        "masks": run_masks,
        "mask_extras": run_mask_extras,
        "draw": run_draw,
        "instances": run_instances,
        "warp": run_warp,
        "move": run_move,
    }
    cases[case](np.random.default_rng(5))
    print(f"{case}: ok")
