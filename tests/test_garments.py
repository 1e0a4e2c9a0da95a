"""The demo's drawn photographs: the truth that comes with them must be exact, and the same every time."""

from __future__ import annotations

from collections import Counter
from importlib import resources

import numpy as np
import pytest

from nbvision.demo.garments import CLASSES, Product, Scene, backgrounds, draw_scene, make_products

PLAIN = np.full((60, 80, 3), 200, dtype=np.uint8)


def draw(products: list[Product], seed: int, size: tuple[int, int] = (240, 320)) -> Scene:
    return draw_scene(products, background=PLAIN, size=size, rng=np.random.default_rng(seed))


def scenes() -> list[Scene]:
    products = make_products(30, seed=3)
    sizes = [(240, 320), (320, 240), (97, 131)]
    return [draw(products[i : i + 1 + i % 3], seed=i, size=sizes[i % len(sizes)]) for i in range(24)]


def test_same_seed_same_scene() -> None:
    products = make_products(3, seed=0)
    first, again, other = draw(products, 5), draw(products, 5), draw(products, 6)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert first.product_ids == again.product_ids
    assert not np.array_equal(first.image, other.image)


def test_fields_agree_in_length_and_type() -> None:
    for scene in scenes():
        count, (height, width) = len(scene.product_ids), scene.image.shape[:2]
        assert count >= 1
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == np.uint8
        assert (scene.boxes.shape, scene.boxes.dtype) == ((count, 4), np.float32)
        assert (scene.class_indices.shape, scene.class_indices.dtype) == ((count,), np.int64)
        assert (scene.masks.shape, scene.masks.dtype) == ((count, height, width), np.bool_)


def test_boxes_are_tight_and_inside() -> None:
    for scene in scenes():
        height, width = scene.image.shape[:2]
        for mask, (x1, y1, x2, y2) in zip(scene.masks, scene.boxes.astype(int), strict=True):
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert mask[y1, :].any()
            assert mask[y2 - 1, :].any()
            assert mask[:, x1].any()
            assert mask[:, x2 - 1].any()


def test_no_pixel_belongs_to_two_garments() -> None:
    assert all(scene.masks.sum(axis=0).max() == 1 for scene in scenes())


def test_class_follows_the_product() -> None:
    for scene in scenes():
        names = [product_id.rsplit("-", 1)[0] for product_id in scene.product_ids]
        assert names == [CLASSES[index] for index in scene.class_indices]


def test_garment_is_where_its_mask_says() -> None:
    """Under the mask, the picture differs from the even background; far from it, it does not."""
    scene = draw(make_products(2, seed=1)[1:], seed=11)
    far = scene.image[~scene.masks.any(axis=0)]
    ordinary = np.median(far, axis=0)
    changed = np.abs(scene.image.astype(int) - ordinary.astype(int)).max(axis=2) > 40
    assert changed[scene.masks[0]].mean() > 0.8
    assert changed[~scene.masks[0]].mean() < 0.15


def test_products_are_balanced_unique_and_disjoint_between_seeds() -> None:
    products, others = make_products(61, seed=0), make_products(61, seed=1)
    counts = Counter(product.class_index for product in products)
    assert set(counts) == set(range(len(CLASSES)))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({product.id for product in products + others}) == 122
    assert len({product.seed for product in products + others}) == 122
    assert make_products(61, seed=0) == products


def test_different_products_look_different() -> None:
    """In the same pose and light, two products of a class share neither all colours nor the cut."""
    shirts = make_products(48, seed=2)[:: len(CLASSES)]
    pictures = [draw([shirt], seed=4).image.astype(float) for shirt in shirts]
    distances = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(distances) > 2.0


@pytest.mark.parametrize(("count", "seed"), [(-1, 0), (1_000_001, 0), (6, -1)])
def test_impossible_sets_are_refused(count: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must"):
        make_products(count, seed=seed)


def test_no_picture_serves_both_splits() -> None:
    names = [file.name for file in resources.files("nbvision.demo").joinpath("photos").iterdir()]
    sources = {split: {n.split("_")[1] for n in names if n.startswith(split)} for split in ("train", "test")}
    assert sources["train"]
    assert sources["test"]
    assert not sources["train"] & sources["test"]


def test_photographs_are_small_colour_pictures() -> None:
    for split in ("train", "test"):
        photos = backgrounds(split)  # type: ignore[arg-type]
        assert len(photos) >= 5
        for photo in photos:
            assert photo.dtype == np.uint8
            assert photo.ndim == 3
            assert photo.shape[2] == 3
            assert max(photo.shape) <= 640


def test_every_photograph_is_listed_with_its_source() -> None:
    folder = resources.files("nbvision.demo").joinpath("photos")
    readme = folder.joinpath("README.md").read_text(encoding="utf-8")
    for file in folder.iterdir():
        if file.name.endswith(".jpg"):
            assert f"`{file.name}`" in readme
