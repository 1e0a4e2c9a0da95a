"""Drawing against NumPy and Pillow that draw the same again, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from reference import on, random_image, to_host

from nbvision import Detections, ImageBatch, Preprocess, decode, draw
from nbvision.errors import DecodeError, InputError
from nbvision.ops.boxes import FlatDetections
from nbvision.ops.draw import PALETTE

NAMES = ["shirt", "AV jQ@", "", "a much longer name"]
FONT_SIZE = 14


def blended(under, over, share):
    return (np.asarray(under, np.int64) * (255 - share) + np.asarray(over, np.int64) * share + 127) // 255


def channels_of(color: tuple[int, int, int], order: str) -> tuple[list[int], int]:
    """The colour in an image's channel order, and the level of text on it."""
    red, green, blue = color
    luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
    ink = 255 if luma < 140 else 0
    return {
        "rgb": [red, green, blue],
        "bgr": [blue, green, red],
        "rgba": [red, green, blue, 255],
        "bgra": [blue, green, red, 255],
        "gray": [luma],
    }[order], ink


def bar_of(texts: list[str], font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Coverage of a bar with these texts side by side, as Pillow draws them."""
    padding = -(-font.size // 4)
    lefts, x = [], padding
    for text in texts:
        indent = max(-int(font.getbbox(text)[0]), 0)
        lefts.append(x + indent)
        x += int(font.getbbox(text)[2]) + indent + padding
    bar = Image.new("L", (x, sum(font.getmetrics()) + 2))
    for left, text in zip(lefts, texts, strict=True):
        ImageDraw.Draw(bar).text((left, 1), text, fill=255, font=font)
    return np.asarray(bar, np.int64)


def whole(box) -> tuple[int, int, int, int] | None:
    if not (box[0] < box[2] and box[1] < box[3]):
        return None
    x1, y1, x2, y2 = (int(side) for side in np.rint(np.clip(box, -10000, 10000)))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def inside(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The 0/1 mask stretched: bilinear between pixel centres, a half is inside. Other sums are 1/(4 h w) away from a
    half at least, far more than float64's error."""

    def places(length, count):
        at = (np.arange(length) + 0.5) * count / length - 0.5
        low = np.floor(at).astype(int)
        return np.clip(low, 0, count - 1), np.clip(low + 1, 0, count - 1), at - low

    (top, bottom, down), (left, right, along) = places(height, mask.shape[0]), places(width, mask.shape[1])
    values = mask.astype(np.float64)
    lines = values[top] * (1 - down)[:, None] + values[bottom] * down[:, None]
    return lines[:, left] * (1 - along) + lines[:, right] * along >= 0.5 - 1e-9


def drawn_again(
    image, boxes, *, order="rgb", labels=None, scores=None, names=None, masks=None, regions=None, colors=PALETTE,
    thickness=2, share=115, threshold=0.0, font_size=FONT_SIZE, font=None,
):  # fmt: skip
    """What ``draw`` shall give for one image; the first box of the list lies on top."""
    picture = np.array(image, np.int64)
    height, width = picture.shape[:2]
    for index in reversed(range(len(boxes))):
        box = whole(boxes[index])
        if box is None or box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
            continue
        label = 0 if labels is None else int(labels[index])
        color, ink = channels_of(colors[label % len(colors)], order)
        region = None if masks is None else whole((boxes if regions is None else regions)[index])
        if region is not None:
            x1, y1, x2, y2 = region
            tint = np.zeros((height, width), bool)
            rows, columns = slice(max(y1, 0), max(min(y2, height), 0)), slice(max(x1, 0), max(min(x2, width), 0))
            stretched = inside(masks[index] > threshold, y2 - y1, x2 - x1)
            tint[rows, columns] = stretched[max(-y1, 0) :, max(-x1, 0) :][
                : height - rows.start, : width - columns.start
            ]
            picture[tint] = blended(picture[tint], color, share)
        x1, y1, x2, y2 = box
        ys, xs = np.mgrid[:height, :width]
        within = (xs >= x1) & (xs < x2) & (ys >= y1) & (ys < y2)
        core = (xs >= x1 + thickness) & (xs < x2 - thickness) & (ys >= y1 + thickness) & (ys < y2 - thickness)
        picture[within & ~core] = color
        texts = [names[label]] if names and 0 <= label < len(names) and names[label] else []
        if scores is not None:
            texts.append(f"{scores[index]:.2f}")
        if texts:
            bar = bar_of(texts, font or ImageFont.load_default(font_size))
            left, top = max(min(x1, width - bar.shape[1]), 0), y1 - bar.shape[0]
            top = max(y1, 0) if top < 0 else top
            bar = bar[: height - top, : width - left]
            place = picture[top : top + bar.shape[0], left : left + bar.shape[1]]
            place[:] = blended(
                blended(place, color, 255), [[ink] * min(len(color), 3) + [255] * (len(color) - 3)], bar[..., None]
            )
    return picture.astype(np.uint8)


def check(device, image, boxes, **options):
    order = options.get("order", "rgb")
    given = {key: on(device, value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    given.pop("order", None)
    if "regions" in given:
        given["mask_regions"] = given.pop("regions")
    before = image.copy()
    batch = ImageBatch.from_arrays([on(device, image)], color=order, device=device)
    drawn = draw(batch, on(device, np.asarray(boxes, np.float32)), **given)
    np.testing.assert_array_equal(to_host(drawn[0]), drawn_again(image, np.asarray(boxes, np.float32), **options))
    np.testing.assert_array_equal(to_host(batch[0]), before)
    assert (drawn.color, drawn.device) == (order, device)
    return to_host(drawn[0])


def random_boxes(rng, count, height, width):
    """Some partly or wholly outside, some inverted, some NaN or infinite, some at half pixels."""
    corners = rng.uniform(-0.3, 1.3, (count, 4)) * [width, height, width, height]
    boxes = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
    boxes[::3] = np.floor(boxes[::3]) + 0.5
    boxes[5::11] = boxes[5::11, [2, 3, 0, 1]]
    boxes[7::13, 1] = np.nan
    boxes[9::17, 2] = np.inf
    return boxes.astype(np.float32)


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["rgb", "bgr", "rgba", "bgra", "gray"])
@pytest.mark.parametrize("size", [(1, 1), (47, 61), (33, 200), (130, 7)])
def test_everything_at_once(device, rng, order, size):
    channels = {"gray": 1, "rgb": 3, "bgr": 3}.get(order, 4)
    count = 23
    check(
        device,
        random_image(rng, *size, channels),
        random_boxes(rng, count, *size),
        order=order,
        labels=rng.integers(-3, 30, count),
        scores=np.sort(rng.uniform(0, 1, count).astype(np.float32))[::-1].copy(),
        names=NAMES,
        masks=rng.normal(0, 1, (count, 5, 9)).astype(np.float32),
    )


@pytest.mark.parametrize("thickness", [0, 1, 3, 40, 1000])
def test_outlines(device, rng, thickness):
    check(device, random_image(rng, 60, 90), [[10, 10, 80, 50], [-5, 20, 20, 300], [3, 3, 4, 4]], thickness=thickness)


def test_an_outline_by_hand(device):
    image = np.zeros((5, 6, 3), np.uint8)
    drawn = draw(on(device, image), on(device, np.array([[1, 1, 5, 4]])), color=(7, 8, 9), thickness=1)
    wanted = ["......", ".xxxx.", ".x..x.", ".xxxx.", "......"]
    got = ["".join("x" if pixel.tolist() == [7, 8, 9] else "." for pixel in line) for line in to_host(drawn[0])]
    assert got == wanted


def test_three_hundred_boxes(device, rng):
    """More than a block of threads looks at in one go."""
    boxes = random_boxes(rng, 300, 150, 170)
    labels = rng.integers(0, 20, 300)
    check(device, random_image(rng, 150, 170), boxes, labels=labels, thickness=1)
    scores = np.round(rng.uniform(0, 1, 300), 2).astype(np.float32)
    best_first = np.argsort(-scores, kind="stable")
    image = random_image(rng, 150, 170)
    drawn = draw(on(device, image), on(device, boxes), labels=on(device, labels), scores=on(device, scores))
    wanted = drawn_again(image, boxes[best_first], labels=labels[best_first], scores=scores[best_first])
    np.testing.assert_array_equal(to_host(drawn[0]), wanted)


def test_boxes_that_draw_nothing(device, rng):
    nothing = [[9, 9, 5, 20], [np.nan, 1, 5, 5], [3, 3, 3, 9], [50, 0, 60, 10], [0, -9, 9, 0], [2.6, 2, 3.4, 9]]
    image = random_image(rng, 30, 50)
    masks = np.ones((len(nothing), 2, 2), np.float32)
    same = check(device, image, nothing, labels=np.zeros(len(nothing), int), names=NAMES, masks=masks)
    np.testing.assert_array_equal(same, image)


@pytest.mark.parametrize("font_size", [1, 9, 14, 33])
def test_text_is_pillows(device, rng, font_size):
    image = random_image(rng, 120, 300)
    boxes = [[5, 60, 250, 110], [200, 3, 290, 20], [280, 80, 299, 119], [20, 20, 120, 40]]
    scores = np.array([1, 0.995, 0.5, 0], np.float32)
    check(device, image, boxes, labels=np.arange(4), scores=scores, names=NAMES, font_size=font_size)


def test_a_font_of_the_callers(device, rng, tmp_path):
    path = tmp_path / "font.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)
    image, boxes = random_image(rng, 60, 120), np.array([[4, 35, 80, 58]], np.float32)
    drawn = draw(on(device, image), on(device, boxes), labels=[0], names=["AVAbag"], font=str(path), font_size=20)
    wanted = drawn_again(image, boxes, names=["AVAbag"], labels=[0], font=ImageFont.truetype(path, 20))
    np.testing.assert_array_equal(to_host(drawn[0]), wanted)
    with pytest.raises(InputError, match=r"font '.*nowhere\.ttf' cannot be read"):
        draw(on(device, image), font=str(tmp_path / "nowhere.ttf"))


@settings(max_examples=300, deadline=None)
@given(score=st.floats(-0.00390625, 1.00390625, width=32))
def test_scores_are_rounded_as_python_does(score):
    from nbvision_kernels.draw import score_strip

    assert score_strip(np.float32(score)) == abs(round(100 * float(f"{score:.2f}")))


def test_every_hundredth_and_every_tie():
    from nbvision_kernels.draw import score_strip

    for value in [*np.arange(0, 201) / 200, *np.arange(0, 65) / 64]:
        for score in (np.float32(value), np.nextafter(np.float32(value), np.float32(2))):
            assert score_strip(score) == round(100 * float(f"{score:.2f}"))


def test_scores_that_are_no_shares(device):
    """They have texts of their own, and NaN lies below."""
    image = np.zeros((90, 200, 3), np.uint8)
    boxes = np.array([[10, 25, 60, 80], [70, 25, 120, 80], [130, 25, 190, 80]], np.float32)
    scores = np.array([-0.5, np.nan, 7], np.float32)
    drawn = draw(on(device, image), on(device, boxes), scores=on(device, scores))
    wanted = image
    for box, text in zip(boxes, ["<0", "nan", ">1"], strict=True):
        wanted = drawn_again(wanted, box[None], names=[text], labels=[0])
    np.testing.assert_array_equal(to_host(drawn[0]), wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.bool_, np.int64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (28, 28), (150, 200)])
def test_masks_of_any_dtype_and_size(device, rng, dtype, shape):
    masks = (rng.normal(0, 1, (3, *shape)) > 0).astype(dtype)
    boxes = [[10, 10, 80, 50], [-15, 20, 40, 70], [30, -40, 200, 300]]
    check(device, random_image(rng, 60, 90), boxes, labels=np.arange(3), masks=masks, thickness=0)


def test_a_mask_of_the_boxs_size_is_not_resampled(device, rng):
    image, mask = random_image(rng, 40, 50), rng.normal(0, 1, (1, 20, 31)).astype(np.float32)
    options = {"color": (255, 0, 128), "thickness": 0, "opacity": 1.0, "mask_threshold": 0.3}
    drawn = to_host(
        draw(on(device, image), on(device, np.array([[7, 9, 38, 29]])), masks=on(device, mask), **options)[0]
    )
    wanted = image.copy()
    wanted[9:29, 7:38][mask[0] > np.float32(0.3)] = (255, 0, 128)
    np.testing.assert_array_equal(drawn, wanted)


def test_masks_of_crops_with_a_margin(device, rng):
    """The regions that a geometry gives are where the crops were cut."""
    image = random_image(rng, 80, 100)
    boxes = np.array([[20, 20, 60, 50], [70, 5, 99, 70]], np.float32)
    batch = ImageBatch.from_arrays([on(device, image)], device=device)
    pre = Preprocess((16, 16), fit="stretch", box_margin=0.25)
    _, geometry = pre(batch, boxes=on(device, boxes))
    regions = geometry.to_source(on(device, np.full((2, 4), [0, 0, 16, 16], np.float32)))
    masks = rng.normal(0, 1, (2, 1, 16, 16)).astype(np.float32)
    drawn = draw(batch, on(device, boxes), masks=on(device, masks), mask_regions=regions)
    crops = np.array([[10, 12, 70, 58], [62, 0, 100, 80]], np.float32)  # a quarter more on each side, whole, clipped
    np.testing.assert_array_equal(to_host(drawn[0]), drawn_again(image, boxes, masks=masks[:, 0], regions=crops))


# --- batches ----------------------------------------------------------------------------------------------------------


def found_in(rng, device, sizes, most):
    boxes = np.stack([random_boxes(rng, most, *size) for size in sizes])
    scores = np.sort(rng.uniform(0, 1, (len(sizes), most)).astype(np.float32), axis=1)[:, ::-1].copy()
    labels = rng.integers(0, 5, (len(sizes), most)).astype(np.int32)
    counts = rng.integers(0, most + 1, len(sizes)).astype(np.int32)
    host = (boxes, scores, labels, counts)
    return host, Detections(*(on(device, array) for array in host), device=device)


def test_detections_on_a_ragged_batch(device, rng):
    sizes = [(37, 90), (1, 1), (64, 33), (90, 70)]
    images = [random_image(rng, *size) for size in sizes]
    (boxes, scores, labels, counts), found = found_in(rng, device, sizes, 9)
    masks = rng.normal(0, 1, (4, 9, 6, 6)).astype(np.float32)
    batch = ImageBatch.from_arrays([on(device, image) for image in images], device=device)
    drawn = draw(batch, found, names=NAMES, masks=on(device, masks))
    wanted = []
    for index, image in enumerate(images):
        own = slice(int(counts[index]))
        texts = {"labels": labels[index, own], "scores": scores[index, own], "names": NAMES}
        wanted.append(drawn_again(image, boxes[index, own], masks=masks[index, own], **texts))
        np.testing.assert_array_equal(to_host(drawn[index]), wanted[index])

    flat = found.flat()
    filled = np.arange(9)[None] < counts[:, None]
    assert isinstance(flat, FlatDetections)
    for again in (
        draw(batch, flat, names=NAMES, masks=on(device, masks[filled])),
        draw(batch, found.to_host(), names=NAMES, masks=masks),
    ):
        for index in range(len(images)):
            np.testing.assert_array_equal(to_host(again[index]), wanted[index])


def test_boxes_in_any_order_of_images(device, rng):
    images = [random_image(rng, 40, 50) for _ in range(3)]
    boxes = random_boxes(rng, 12, 40, 50)
    which = np.array([2, 0, 2, 2, 0, 2, 0, 0, 2, 0, 2, 2])
    drawn = draw([on(device, image) for image in images], on(device, boxes), box_images=on(device, which))
    for index, image in enumerate(images):
        np.testing.assert_array_equal(to_host(drawn[index]), drawn_again(image, boxes[which == index]))


@pytest.mark.needs_cuda
def test_boxes_of_no_image_draw_nothing_on_cuda(rng):
    image = random_image(rng, 40, 50)
    boxes = np.array([[5, 5, 20, 20]] * 3, np.float32)
    drawn = draw(on("cuda", image), boxes, box_images=on("cuda", np.array([-1, 1, 2**40])))
    np.testing.assert_array_equal(to_host(drawn[0]), image)


@pytest.mark.needs_cuda
def test_nothing_waits_on_the_host(rng):
    """The stream still has long work before it when draw returns."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        batch = ImageBatch.from_arrays([on("cuda", random_image(rng, 60, 80))], device="cuda")
        _, found = found_in(rng, "cuda", [(60, 80)], 9)
        big = cupy.empty(1 << 30, cupy.uint8)
        target = draw(batch, found, names=NAMES)  # compiles, uploads, and fills the pools
        draw(batch, found, names=NAMES, out=target)
        stream.synchronize()
        for value in range(300):
            big.fill(value % 256)
        draw(batch, found, names=NAMES, out=target)
        assert not stream.done
        stream.synchronize()


def test_missing_images_stay_missing(device, rng):
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(random_image(rng, 20, 30)).save(file, "PNG")
    batch = decode([file.getvalue(), b"<html>"], device=device)
    drawn = draw(batch, on(device, np.array([[2, 2, 9, 9]] * 2)), box_images=on(device, np.array([0, 1])))
    assert drawn.sizes.tolist() == [[20, 30], [0, 0]]
    np.testing.assert_array_equal(to_host(drawn[0]), drawn_again(to_host(batch[0]), [[2, 2, 9, 9]]))
    with pytest.raises(DecodeError, match="expected a JPEG"):
        drawn[1]
    assert len(draw(batch.select([1]))) == 1


@pytest.mark.parametrize("boxes", [None, [], np.zeros((0, 4))])
def test_no_boxes_is_a_copy(device, rng, boxes):
    image = random_image(rng, 21, 33)
    batch = ImageBatch.from_arrays([on(device, image), on(device, image)], device=device)
    drawn = draw(batch, boxes, labels=None if boxes is None else [], names=NAMES)
    assert drawn is not batch
    for copy in drawn:
        np.testing.assert_array_equal(to_host(copy), image)
    assert len(draw(ImageBatch([], color="rgb", device=device), boxes)) == 0


def test_into_out_and_in_place(device, rng):
    """``out`` with padded rows; what lies beside them is left alone."""
    image, boxes = random_image(rng, 31, 45), random_boxes(rng, 8, 31, 45)
    labels = np.arange(8)
    wanted = drawn_again(image, boxes, labels=labels, names=NAMES)
    padded = on(device, np.full((31, 60, 3), 77, np.uint8))
    out = ImageBatch.from_arrays([padded[:, :45]], device=device)
    given = {"labels": on(device, labels), "names": NAMES}
    assert draw(on(device, image), on(device, boxes), out=out, **given) is out
    np.testing.assert_array_equal(to_host(padded)[:, :45], wanted)
    assert (to_host(padded)[:, 45:] == 77).all()

    batch = ImageBatch.from_arrays([on(device, image.copy())], device=device)
    draw(batch, on(device, boxes), out=batch, **given)
    np.testing.assert_array_equal(to_host(batch[0]), wanted)

    turned = on(device, np.ascontiguousarray(image.transpose(1, 0, 2))).transpose(1, 0, 2)
    np.testing.assert_array_equal(to_host(draw(turned, on(device, boxes), **given)[0]), wanted)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    boxes=st.lists(st.tuples(*[st.floats(-90, 90, width=32)] * 4), max_size=6),
    thickness=st.integers(0, 9),
    opacity=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_boxes(device, height, width, boxes, thickness, opacity, seed):
    rng = np.random.default_rng(seed)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    image, masks = random_image(rng, height, width), rng.normal(0, 1, (len(boxes), 4, 3)).astype(np.float32)
    options = {"names": NAMES, "thickness": thickness}
    drawn = draw(
        on(device, image),
        on(device, boxes),
        labels=np.arange(len(boxes)),
        masks=on(device, masks),
        opacity=opacity,
        **options,
    )
    share = round(opacity * 255)
    wanted = drawn_again(image, boxes, labels=np.arange(len(boxes)), masks=masks, share=share, **options)
    np.testing.assert_array_equal(to_host(drawn[0]), wanted)


def test_blending_is_a_rounded_division():
    from nbvision_kernels.draw import blend
    from numba import njit

    @njit
    def all_of_them():
        table = np.empty((256, 256, 256), np.int32)
        for under in range(256):
            for over in range(256):
                for share in range(256):
                    table[under, over, share] = blend(under, over, np.int32(share))
        return table

    under, over, share = np.ogrid[:256, :256, :256]
    np.testing.assert_array_equal(all_of_them(), blended(under, over, share))


# --- colours and what is refused --------------------------------------------------------------------------------------


def test_colours_are_chosen_by_label(device, rng):
    colors = [(1, 2, 3), (250, 240, 230), (0, 128, 255)]
    image, boxes = random_image(rng, 50, 80), random_boxes(rng, 7, 50, 80)
    labels = np.array([0, 1, 2, 3, -1, 2**31 - 1, 5])
    drawn = draw(on(device, image), on(device, boxes), labels=on(device, labels), names=NAMES, color=colors)
    wanted = drawn_again(image, boxes, labels=labels, names=NAMES, colors=colors)
    np.testing.assert_array_equal(to_host(drawn[0]), wanted)


def test_palette_colours_are_distinct():
    colors = np.array(PALETTE)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(len(colors), dtype=int)
    assert colors.shape == (20, 3)
    assert distances.min() > 50
    assert all(distances[index, (index + 1) % 20] > 150 for index in range(20))


BOX = np.array([[1, 1, 5, 5]], np.float32)


@pytest.mark.parametrize(
    ("boxes", "options", "message"),
    [
        (np.zeros((2, 3)), {}, r"boxes have shape \(2, 3\); expected \(M, 4\)"),
        ([["a"] * 4], {}, "boxes are no array of numbers"),
        ([[1, 2, 3, 4], [1]], {}, "boxes are no array of numbers"),
        (BOX, {"labels": [0, 1]}, r"labels have shape \(2,\); expected \(1,\)"),
        (BOX, {"labels": [0.5]}, "labels are no array of integers"),
        (BOX, {"scores": [[0.5]]}, r"scores have shape \(1, 1\)"),
        (BOX, {"box_images": [1]}, "box_images go from 1 to 1; the batch has 1 images"),
        (BOX, {"masks": np.zeros((2, 4, 4))}, r"masks have shape \(2, 4, 4\)"),
        (BOX, {"masks": np.zeros((1, 0, 4))}, r"masks have shape \(1, 0, 4\)"),
        (BOX, {"masks": np.zeros((4, 4))}, "one mask per box"),
        (BOX, {"masks": np.zeros((1, 4, 4)), "mask_regions": np.zeros((2, 4))}, "mask_regions have shape"),
        (BOX, {"names": "shirt"}, "expected several strings"),
        (BOX, {"names": [3]}, "name 0 is 3; expected a string"),
        (BOX, {"color": (1, 2)}, "expected three integers"),
        (BOX, {"color": (1, 2, 256)}, "expected 0 to 255"),
        (BOX, {"color": "red"}, "expected three integers"),
        (BOX, {"thickness": -1}, "thickness is -1"),
        (BOX, {"thickness": 1.5}, "a whole number"),
        (BOX, {"opacity": 1.1}, r"opacity is 1\.1; expected a number from 0 to 1"),
        (BOX, {"opacity": np.nan}, "opacity is nan"),
        (BOX, {"mask_threshold": np.nan}, "mask_threshold is nan"),
        (BOX, {"font_size": 0}, "font_size is 0"),
        (BOX, {"out": np.zeros((9, 9, 3), np.uint8)}, "out is a ndarray; expected an ImageBatch"),
    ],
)
def test_what_does_not_fit_is_refused(device, boxes, options, message):
    with pytest.raises(InputError, match=message):
        draw(on(device, np.zeros((9, 9, 3), np.uint8)), boxes, **options)


def test_batches_that_do_not_fit_are_refused(device, rng):
    images = [on(device, random_image(rng, 9, 9)) for _ in range(2)]
    with pytest.raises(InputError, match="2 images need the image of each box"):
        draw(images, BOX)
    for other in ([images[0][:8], images[1]], [images[0]]):
        with pytest.raises(InputError, match="of sizes"):
            draw(images, out=ImageBatch.from_arrays(other, device=device))
    with pytest.raises(InputError, match="expected rgb images"):
        draw(images, out=ImageBatch.from_arrays(images, color="bgr", device=device))
    _, found = found_in(rng, device, [(9, 9)] * 3, 2)
    with pytest.raises(InputError, match="detections are of 3 images; the batch has 2"):
        draw(images, found)
    _, found = found_in(rng, device, [(9, 9)] * 2, 2)
    with pytest.raises(InputError, match="leave them out"):
        draw(images, found, labels=[1])


def test_read_only_out_is_refused():
    image = np.zeros((4, 4, 3), np.uint8)
    image.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        draw(image, out=ImageBatch.from_arrays([image]))
