"""What decoded pixels mean: alpha over a colour, ICC profiles in sRGB."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from reference import to_host

from nbvision.codecs.decode import decode
from nbvision.codecs.headers import read_header
from nbvision.errors import InputError

WHITE, GREEN = (255, 255, 255), (10, 200, 30)


def picture(mode: str = "RGBA", size: tuple[int, int] = (61, 43)) -> Image.Image:
    noise = np.random.default_rng(5).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)
    return image if mode == "RGBA" else image.convert(mode)


def written(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def by_pillow(data: bytes, background: tuple[int, int, int], mode: str = "RGB") -> Any:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return np.asarray(Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB").convert(mode))


# --- alpha ------------------------------------------------------------------------------------------------------------

WITH_ALPHA = {
    "png": written(picture(), "PNG"),
    "gray-alpha png": written(picture("LA"), "PNG"),
    "palette png with alpha": written(picture("RGB").quantize(32), "PNG", transparency=bytes(range(0, 256, 8))),
    "png with a transparent colour": written(picture("RGB").quantize(32), "PNG", transparency=3),
    "webp": written(picture(), "WEBP", lossless=True),
    "turned webp": written(picture(), "WEBP", lossless=True, exif=exif(6)),
    "avif": written(picture(), "AVIF"),
    "gif": written(picture("RGB").quantize(32), "GIF", transparency=3),
    "tiff": written(picture(), "TIFF"),
}
WITHOUT_ALPHA = {
    "png": written(picture("RGB"), "PNG"),
    "webp": written(picture("RGB"), "WEBP"),
    "jpeg": written(picture("RGB"), "JPEG"),
    "16-bit png": written(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
}


@pytest.mark.parametrize("background", [WHITE, GREEN])
@pytest.mark.parametrize("data", WITH_ALPHA.values(), ids=WITH_ALPHA.keys())
def test_alpha_is_blended_over_a_colour(device: Any, data: bytes, background: tuple[int, int, int]) -> None:
    batch = decode([data, data], background=background, device=device)
    expected = by_pillow(data, background)
    np.testing.assert_array_equal(to_host(batch[1]), expected)
    reversed_order = decode(data, background=background, color="bgr", device=device)
    np.testing.assert_array_equal(to_host(reversed_order[0]), expected[:, :, ::-1])
    gray = decode(data, background=background, color="gray", device=device)
    np.testing.assert_array_equal(to_host(gray[0])[:, :, 0], by_pillow(data, background, "L"))


@pytest.mark.parametrize("data", WITHOUT_ALPHA.values(), ids=WITHOUT_ALPHA.keys())
def test_images_without_alpha_do_not_change(device: Any, data: bytes) -> None:
    with_it, without = decode(data, background=GREEN, device=device), decode(data, device=device)
    np.testing.assert_array_equal(to_host(with_it[0]), to_host(without[0]))


def test_blending_a_damaged_image(device: Any) -> None:
    data = WITH_ALPHA["png"]
    batch = decode(data[: len(data) * 3 // 4], background=GREEN, recover=True, device=device)
    (damage,) = batch.damage
    assert damage is not None
    assert damage.valid_rows is not None
    assert damage.valid_rows > 10
    rows = slice(damage.valid_rows)
    np.testing.assert_array_equal(to_host(batch[0])[rows], by_pillow(data, GREEN)[rows])


@pytest.mark.parametrize("background", [7, (1, 2), (1, 2, 256), (-1, 0, 0), (0.5, 0, 0), "white", (1, 2, 3, 4)])
def test_backgrounds_that_are_none(background: Any) -> None:
    with pytest.raises(InputError, match="expected three integers of 0 to 255"):
        decode([], background=background)


def test_background_needs_a_colour_without_alpha() -> None:
    with pytest.raises(InputError, match="leave one of them out"):
        decode([], background=WHITE, color="rgba")


# --- profiles ---------------------------------------------------------------------------------------------------------

TO_XYZ = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])  # wide, D50
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # D50
GAMMA = 2.2


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def wide_profile() -> bytes:
    """The smallest ICC profile (v2) of three primaries and a gamma; these are Adobe's."""
    columns = [b"XYZ \0\0\0\0" + b"".join(s15(value) for value in column) for column in TO_XYZ.T]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + b"\0\0"
    text = b"wide"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)
    white = b"XYZ \0\0\0\0" + s15(0.9642) + s15(1.0) + s15(0.8249)
    tags = [(b"desc", described), (b"wtpt", white), (b"cprt", b"text\0\0\0\0none\0\0\0\0")]
    tags += list(zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True))
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags:
        padded = content + bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += padded
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + s15(0.9642) + s15(1.0) + s15(0.8249) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


WIDE = wide_profile()
PROFILED = {
    "jpeg": ("JPEG", "RGB", {"quality": 95}),
    "png": ("PNG", "RGB", {}),
    "rgba png": ("PNG", "RGBA", {}),
    "webp": ("WEBP", "RGB", {"lossless": True}),
    "tiff": ("TIFF", "RGB", {}),
    "avif": ("AVIF", "RGB", {}),
}


def in_srgb(pixels: Any) -> Any:
    """By the formulas, in float64."""
    linear = (pixels / 255.0) ** (round(GAMMA * 256) / 256) @ (np.linalg.inv(SRGB_TO_XYZ) @ TO_XYZ).T
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("format", "mode", "options"), PROFILED.values(), ids=PROFILED.keys())
def test_colours_become_srgb(device: Any, format: str, mode: str, options: Any) -> None:
    data = written(picture(mode), format, icc_profile=WIDE, **options)
    assert read_header(data).has_profile
    stored = decode(data, device="cpu")[0]
    np.testing.assert_array_equal(decode(data, device="cpu", srgb=False)[0], stored)
    converted = to_host(decode(data, srgb=True, device=device)[0])
    expected = in_srgb(stored.astype(np.float64))
    assert np.abs(converted - expected).max() <= 2
    assert np.abs(converted.astype(int) - stored).max() > 20  # or nothing was tested


def test_damage_inside_is_found_with_a_profile_too(device: Any) -> None:
    data = bytearray(written(picture("RGB", (200, 150)), "JPEG", icc_profile=WIDE))
    start = len(data) - 800
    data[start : start + 40] = bytes(range(40))
    plain, converted = (decode(bytes(data), srgb=srgb, device="cpu").errors[0] for srgb in (False, True))
    on_device = decode(bytes(data), srgb=True, device=device)
    assert plain is not None
    assert plain.kind == "corrupt"
    assert str(plain) == str(converted) == str(on_device.errors[0])
    recovered = decode(bytes(data), srgb=True, recover=True, device=device)
    assert recovered.damage[0] is not None
    assert recovered.ok.all()


def test_alpha_is_kept_beside_converted_colours() -> None:
    data = written(picture(), "PNG", icc_profile=WIDE)
    converted, stored = (decode(data, color="rgba", srgb=srgb, device="cpu")[0] for srgb in (True, False))
    np.testing.assert_array_equal(converted[:, :, 3], stored[:, :, 3])
    assert np.abs(converted[:, :, :3] - in_srgb(stored[:, :, :3].astype(np.float64))).max() <= 2


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("RGB", b"no profile at all"),
        ("RGB", WIDE[:200]),
        ("L", WIDE),  # of three channels, for one
        ("RGB", None),
    ],
    ids=["srgb", "nonsense", "cut off", "of other channels", "none"],
)
def test_profiles_that_change_nothing(device: Any, mode: str, profile: bytes | None) -> None:
    options = {} if profile is None else {"icc_profile": profile}
    data = written(picture(mode), "PNG", **options)
    assert read_header(data).has_profile is (profile is not None)
    with_it, without = decode(data, srgb=True, device=device), decode(data, device=device)
    np.testing.assert_array_equal(to_host(with_it[0]), to_host(without[0]))


def test_many_profiles_in_many_threads() -> None:
    """More than a thread keeps transforms of."""
    profiles = [WIDE[:-8] + bytes([index]) * 4 + WIDE[-4:] for index in range(12)]
    datas = [written(picture("RGB"), "PNG", icc_profile=profile) for profile in profiles] * 8
    expected = decode(datas[0], srgb=True, device="cpu")[0]
    batch = decode(datas, srgb=True, device="cpu", threads=8)
    assert batch.ok.all()
    assert all(image.shape == expected.shape for image in batch)
    np.testing.assert_array_equal(batch[0], expected)
    np.testing.assert_array_equal(batch[12], expected)
