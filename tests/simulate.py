"""What test_simulator.py runs under Numba's simulator: each kernel against its CPU twin, on arrays just long enough."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from nbvision_kernels import (
    boxes,
    boxes_cuda,
    draw,
    draw_cuda,
    masks,
    masks_cuda,
    preprocess,
    preprocess_cuda,
    regions,
    regions_cuda,
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
    table, steps = np.zeros(count * regions.FIELDS, np.int32), np.zeros(count * regions.STEPS, np.int64)
    return table, steps, np.zeros(count * regions.SCALES, np.float32)


def image_regions(
    sources: np.ndarray, height: int, width: int, linear: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tables = empty_tables(len(SIZES))
    regions.fill_regions_cpu(sources, *tables, height, width, regions.FIT_LETTERBOX, True, True, linear)
    return tables


def run_preprocess(rng: np.random.Generator) -> None:
    pixels, sources = pixels_and_sources(rng)
    height, width = 6, 9
    for sampler in (preprocess.NEAREST, preprocess.LINEAR_EXACT, preprocess.LINEAR_FAST):
        for layout in (preprocess.NCHW, preprocess.NHWC):
            tables = image_regions(sources, height, width, sampler != preprocess.NEAREST)
            out = np.full(len(SIZES) * 3 * height * width, np.nan, np.float32)
            kernel = preprocess_cuda.make_kernel(sampler, layout, preprocess.STORE_F32)
            numbers = [np.float32(value) for value in (1, 1, 1, 0, 0, 0, 114, 114, 114)]
            arguments = (pixels, sources, *tables, out, height, width, 3, 0, 0, *numbers)
            launch(kernel, (2, 1, len(SIZES)), (8, 8), *arguments)
            assert np.isfinite(out).all()
            assert out.min() >= 0
            assert out.max() <= 255


def run_box_regions(rng: np.random.Generator) -> None:
    _, sources = pixels_and_sources(rng)
    given = np.array([[0, 0, 5, 5], [-3, -3, 90, 90], [2, 2, 2, 4], [np.nan, 0, 1, 1], [0.5, 0.5, 3.5, 8]], np.float32)
    images = np.array([0, 1, 2, 0, 2], np.int64)
    results = []
    for fill in ("host", "device"):
        tables = empty_tables(5)
        fit = (8, 8, regions.FIT_STRETCH, True, True, True)
        if fill == "host":
            regions.fill_box_regions_cpu(sources, images, given.reshape(-1), np.float32(0.1), *tables, *fit)
        else:
            numbers = (given.reshape(-1), 5, np.float32(0.1))
            launch(regions_cuda.fill_box_regions, 1, 8, sources, images, *numbers, *tables, *fit)
        results.append(tables)
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    empty = results[0][0].reshape(5, -1)[:, regions.WIDTH] == 0
    assert empty.tolist() == [False, False, True, True, False]


def run_nms(rng: np.random.Generator) -> None:
    _, sources = pixels_and_sources(rng)
    table, _, scales = image_regions(sources, 16, 16, True)
    images, classes, anchors, most, kept = 3, 2, 21, 9, 4
    head = rng.uniform(0, 16, (images, 4 + classes, anchors)).astype(np.float32)
    head[:, 4:] = np.round(rng.uniform(0, 1, (images, classes, anchors)), 1)
    results = []
    for target in ("host", "device"):
        outputs = [np.zeros(images * kept * n, t) for n, t in [(4, np.float32), (1, np.float32), (1, np.int32)]]
        counts = np.zeros(images, np.int32)
        numbers = (np.float32(0.3), np.float32(0.4), 1, most, kept)
        if target == "host":
            boxes.nms_cpu(head.reshape(-1), images, classes, anchors, table, scales, *numbers, *outputs, counts)
        else:
            scratch = [np.zeros(images * anchors, np.float32), np.zeros(images * anchors, np.int32)]
            scratch += [np.zeros(images * most, np.float32), np.zeros(images * most * 4, np.float32)]
            scratch += [np.zeros(images * most, np.int32), np.zeros(images * most, np.uint8)]
            arguments = (head.reshape(-1), classes, anchors, table, scales, *numbers, *scratch, *outputs, counts)
            launch(boxes_cuda.nms, images, 32, *arguments)
        results.append([*outputs, counts])
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    assert results[0][3].min() > 0


def run_masks(rng: np.random.Generator) -> None:
    count, height, width = 3, 5, 7
    logits = rng.normal(0, 1, (count, height, width)).astype(np.float32)
    logits[1] = -1
    scales = rng.uniform(0.5, 2, count * regions.SCALES).astype(np.float32)
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
        records = np.full(count * draw.FIELDS, -9, np.int32)
        both = np.concatenate([pixels, np.zeros(size, np.uint8)])
        found = (given.reshape(-1), given.reshape(-1), labels, scores, 1, names, strips.reshape(-1))
        lay_out = (count, sources, images, len(SIZES), *found, text_height, padding, colors, records)
        lists = (channels, rows, starts, counts, records, palette, 1, masks_given, mask_height, mask_width)
        last = (np.float32(0), 100, atlas, strips.reshape(-1), text_height, padding)
        if target == "host":
            draw.pointer_from_address = lambda address, memory=both: memory
            draw.lay_out_cpu(*lay_out)
            draw.paint_cpu(sources, targets, len(SIZES), 9, *lists, *last)
        else:
            launch(draw_cuda.lay_out, 9, 32, *lay_out)
            block = (draw_cuda.TILE_WIDTH, draw_cuda.TILE_HEIGHT)
            launch(draw_cuda.paint, (1, 2, len(SIZES)), block, both, sources, targets, *lists, *last)
        results.append((records, both))
    for host, device in zip(*results, strict=True):
        np.testing.assert_array_equal(host, device)
    np.testing.assert_array_equal(results[0][1][:size], pixels)
    assert (results[0][1][size:] != pixels).any()


if __name__ == "__main__":
    case = sys.argv[1]
    cases = {
        "preprocess": run_preprocess,
        "box_regions": run_box_regions,
        "nms": run_nms,
        "masks": run_masks,
        "draw": run_draw,
    }
    cases[case](np.random.default_rng(5))
    print(f"{case}: ok")
