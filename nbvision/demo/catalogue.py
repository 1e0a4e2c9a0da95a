"""The shop on disk: photographs of every product in mixed formats, some broken, and scenes to query with."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from nbvision.demo.garments import Product, Scene, backgrounds, draw_scene, make_products
from nbvision.errors import InputError

__all__ = ["Catalogue", "Photograph", "make_catalogue", "product_of"]

PHOTOGRAPH_SIZE = (480, 640)
_PRODUCT_SEED = 9  # of products that no training run has seen; see examples/train_demo_models.py
_FORMATS: tuple[tuple[str, str, dict[str, object]], ...] = (
    (".jpg", "JPEG", {"quality": 88}),
    (".progressive.jpg", "JPEG", {"quality": 88, "progressive": True}),
    (".png", "PNG", {"compress_level": 1}),
    (".webp", "WEBP", {"quality": 85, "method": 0}),
)


@dataclass(frozen=True)
class Photograph:
    """One image file and what is really in it."""

    path: Path
    scene: Scene


@dataclass(frozen=True)
class Catalogue:
    """Products, photographs of one product each, scenes of several, and files that are broken on purpose.

    ``shelf`` is the directory of the photographs and the broken files.
    """

    shelf: Path
    products: Sequence[Product]
    photographs: Sequence[Photograph]
    queries: Sequence[Photograph]
    broken: Sequence[Path]

    @property
    def files(self) -> list[Path]:
        """What a shop would hand over to be indexed: good and broken files alike."""
        return sorted([photograph.path for photograph in self.photographs] + list(self.broken))


def product_of(path: str | Path) -> str:
    """The product that a catalogue photograph shows: its file name up to the underscore."""
    return Path(path).name.split("_")[0]


def make_catalogue(
    directory: Path,
    *,
    products: int,
    photographs: int,
    queries: int,
    seed: int,
    on_image: Callable[[], None] = lambda: None,
) -> Catalogue:
    """Draw and write a catalogue.

    Parameters
    ----------
    directory : Path
        Gets ``catalogue/`` and ``queries/``.
    products, photographs, queries : int
        Products, photographs of each, and query scenes with one to three garments.
    seed : int
        0 or more. The same seed gives the same files.
    on_image : callable
        Called after each image, to show progress.

    Raises
    ------
    InputError
        For a count below 1 or a seed below 0, whose products a training run may have seen.
    """
    for name, value, least in (("products", products, 1), ("photographs", photographs, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} is {value}; expected {least} or more")
    rng = np.random.default_rng(seed)
    goods = make_products(products, seed=_PRODUCT_SEED + seed)
    photos = backgrounds("test")
    shelf, asked = directory / "catalogue", directory / "queries"
    shelf.mkdir(parents=True, exist_ok=True)
    asked.mkdir(parents=True, exist_ok=True)

    def photograph(shown: Sequence[Product], stem: Path) -> Photograph:
        background = photos[rng.integers(len(photos))]
        scene = draw_scene(shown, background=background, size=PHOTOGRAPH_SIZE, rng=rng)
        on_image()
        return Photograph(_write(scene.image, stem, int(rng.integers(len(_FORMATS)))), scene)

    stock = [photograph([product], shelf / f"{product.id}_{view}") for product in goods for view in range(photographs)]
    scenes = []
    for number in range(queries):
        shown = rng.choice(len(goods), size=min(int(rng.integers(1, 4)), len(goods)), replace=False)
        scenes.append(photograph([goods[index] for index in shown], asked / f"query-{number:04d}"))
    return Catalogue(shelf, goods, stock, scenes, _write_broken(shelf, stock[0].scene.image))


def _write(image: npt.NDArray[np.uint8], stem: Path, kind: int) -> Path:
    suffix, name, options = _FORMATS[kind]
    path = stem.with_name(stem.name + suffix)
    path.write_bytes(_encoded(image, name, **options))
    return path


def _encoded(image: npt.NDArray[np.uint8], name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, name, **options)
    return stream.getvalue()


def _write_broken(shelf: Path, image: npt.NDArray[np.uint8]) -> list[Path]:
    """The files every real catalogue has somewhere: cut off, empty, not an image, a header that lies."""
    jpeg, png = _encoded(image, "JPEG", quality=88), _encoded(image, "PNG")
    frame = jpeg.index(b"\xff\xc0") + 5  # height and width of the baseline frame header
    contents = {
        "broken-cut_0.jpg": jpeg[: len(jpeg) // 2],
        "broken-cut_1.png": png[: len(png) // 2],
        "broken-empty_0.jpg": b"",
        "broken-text_0.jpg": b"<html>404 Not Found</html>" * 40,
        "broken-huge_0.jpg": jpeg[:frame] + b"\xff\xdc\xff\xdc" + jpeg[frame + 4 :],
    }
    for name, content in contents.items():
        (shelf / name).write_bytes(content)
    return [shelf / name for name in contents]
