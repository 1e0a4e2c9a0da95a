"""decode(reduce=): the size of the image divided, by libjpeg where it is a JPEG, by Pillow's averages elsewhere."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from reference import to_host

import nbvision as nbv
from nbvision.errors import InputError

SIZES = [(64, 96), (61, 45), (100, 17), (33, 250)]


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(height).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_jpegs_are_libjpegs_own(device: Any, reduce: int, options: dict[str, Any]) -> None:
    files = [encoded(picture(*size), "JPEG", **options) for size in SIZES]
    batch = nbv.decode(files, reduce=reduce, device=device)
    for index, (height, width) in enumerate(SIZES):
        image = Image.open(io.BytesIO(files[index]))
        image.draft("RGB", (max(width // reduce, 1), max(height // reduce, 1)))
        assert image.size == (-(-width // reduce), -(-height // reduce))
        np.testing.assert_array_equal(to_host(batch[index]), np.asarray(image))


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("color", ["rgb", "bgra", "gray"])
def test_other_images_are_pillows_averages(device: Any, reduce: int, color: Any) -> None:
    pictures = [picture(*SIZES[0]), picture(*SIZES[1], "RGBA"), picture(*SIZES[2], "L"), picture(*SIZES[3], "CMYK")]
    formats = ["PNG", "WEBP", "TIFF", "JPEG"]
    options: list[dict[str, Any]] = [{}, {"lossless": True}, {}, {}]
    files = [encoded(*each[:2], **each[2]) for each in zip(pictures, formats, options, strict=True)]
    batch = nbv.decode(files, reduce=reduce, color=color, device=device)
    mode, order = {"rgb": ("RGB", [0, 1, 2]), "bgra": ("RGBA", [2, 1, 0, 3]), "gray": ("L", [0])}[color]
    for index, file in enumerate(files):
        expected = np.asarray(Image.open(io.BytesIO(file)).convert(mode).reduce(reduce))
        expected = expected.reshape(*expected.shape[:2], -1)[:, :, order]
        np.testing.assert_array_equal(to_host(batch[index]), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_reduced_images_stand_upright(device: Any, orientation: int, format: str) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(picture(61, 45), format, exif=tags)
    image = Image.open(io.BytesIO(data))
    if format == "JPEG":
        image.draft("RGB", (45 // 2, 61 // 2))
        small = image
    else:
        small = image.reduce(2)
    small.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(small))
    np.testing.assert_array_equal(to_host(nbv.decode(data, reduce=2, device=device)[0]), expected)


def test_the_smallest_images(device: Any) -> None:
    sizes = [(1, 1), (1, 9), (3, 2), (8, 8), (7, 15)]
    files = [encoded(picture(*size), format) for size in sizes for format in ("JPEG", "PNG")]
    for reduce in (2, 4, 8):
        batch = nbv.decode(files, reduce=reduce, device=device)
        assert batch.errors == (None,) * len(files)
        wanted = [(-(-height // reduce), -(-width // reduce)) for height, width in sizes for _ in range(2)]
        assert [tuple(size) for size in batch.sizes.tolist()] == wanted


def test_damage_is_found_all_the_same(device: Any) -> None:
    data = encoded(picture(200, 300), "JPEG")
    middle = len(data) // 2
    damaged = data[:middle] + bytes(40) + data[middle + 40 :]
    batch = nbv.decode([data[:middle], damaged, data], reduce=4, device=device)
    assert [error and error.kind for error in batch.errors] == ["truncated", "corrupt", None]


def test_a_decoder_reduces(device: Any) -> None:
    data = encoded(picture(61, 45), "JPEG")
    with nbv.Decoder(reduce=4, device=device) as decoder:
        assert decoder.submit([data]).result().sizes.tolist() == [[16, 12]]


def test_what_is_refused(device: Any) -> None:
    for reduce in (0, 3, 16, "2", None):
        with pytest.raises(InputError, match="expected 1, 2, 4 or 8"):
            nbv.decode(b"", reduce=reduce, device=device)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="full size only"):
        nbv.decode(b"", reduce=2, recover=True, device=device)
