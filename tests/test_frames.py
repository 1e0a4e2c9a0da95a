"""decode_frames on both devices, against Pillow: animations, pages, limits, damage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence
from reference import to_host

import nbvision as nbv
from nbvision.errors import DecodeError, InputError


def animation(format: str, count: int = 5, size: tuple[int, int] = (37, 23), **options: Any) -> bytes:
    """Coarse noise, of which each frame changes a part."""
    rng = np.random.default_rng(3)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (6, 10, 3), np.uint8), 8, 0), 8, 1)[: size[1], : size[0]].copy()
    frames = []
    for _ in range(count):
        pixels[5:12, 7:20] = rng.integers(0, 256, 3)
        frames.append(Image.fromarray(pixels))
    file = io.BytesIO()
    several: dict[str, Any] = {"save_all": True, "append_images": frames[1:]} if count > 1 else {}
    frames[0].save(file, format, **several, **options)
    return file.getvalue()


FILES = {
    "gif": animation("GIF"),
    "webp": animation("WEBP", lossless=True),
    "png": animation("PNG"),
    "tiff": animation("TIFF"),
    "one png": animation("PNG", 1),
    "jpeg": animation("JPEG", 1),
}


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_frames_are_pillows(device: Any, data: bytes, color: Any, tmp_path: Path) -> None:
    with Image.open(io.BytesIO(data)) as image:
        mode = "L" if color == "gray" else "RGB"
        expected = [np.asarray(frame.convert(mode)).reshape(23, 37, -1) for frame in ImageSequence.Iterator(image)]
    (tmp_path / "file").write_bytes(data)
    for source in (data, tmp_path / "file"):
        batch = nbv.decode_frames(source, color=color, device=device)
        assert len(batch) == len(expected)
        assert batch.device == device
        for index, pixels in enumerate(expected):
            got = to_host(batch[index])
            np.testing.assert_array_equal(got[..., ::-1] if color == "bgr" else got, pixels)
    np.testing.assert_array_equal(
        to_host(nbv.decode(FILES["png"], device="cpu")[0]), to_host(nbv.decode_frames(FILES["png"], device="cpu")[0])
    )


def test_pages_of_other_sizes(device: Any) -> None:
    file = io.BytesIO()
    pages = [Image.new("RGB", size, (10, 20, 30)) for size in [(5, 7), (40, 3)]]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    assert nbv.decode_frames(file.getvalue(), device=device).sizes.tolist() == [[7, 5], [3, 40]]


def test_frames_stand_upright(device: Any) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    data = animation("WEBP", lossless=True, exif=tags)
    turned = nbv.decode_frames(data, device=device)
    assert turned.sizes.tolist() == [[37, 23]] * 5
    plain = nbv.decode_frames(FILES["webp"], device=device)
    np.testing.assert_array_equal(to_host(turned[2]), np.rot90(to_host(plain[2]), -1))


@pytest.mark.parametrize("limits", [{"limit_frames": 4}, {"limit_pixels": 37 * 23 * 5 - 1}], ids=str)
@pytest.mark.parametrize("name", ["gif", "webp", "png", "tiff"])
def test_limits(device: Any, name: str, limits: dict[str, int]) -> None:
    with pytest.raises(DecodeError, match="the limit is") as caught:
        nbv.decode_frames(FILES[name], device=device, **limits)
    assert caught.value.kind == "too_large"
    assert len(nbv.decode_frames(FILES[name], device=device, limit_frames=5, limit_pixels=37 * 23 * 5)) == 5


@pytest.mark.parametrize("name", ["gif", "webp", "png", "tiff"])
def test_cut_files_are_errors(device: Any, name: str) -> None:
    data = FILES[name]
    for tenth in range(1, 10):
        with pytest.raises(DecodeError):
            nbv.decode_frames(data[: len(data) * tenth // 10], device=device)


def test_what_is_refused(device: Any) -> None:
    with pytest.raises(InputError, match="expected one"):
        nbv.decode_frames([FILES["gif"]] * 2, device=device)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit_frames is 0"):
        nbv.decode_frames(FILES["gif"], limit_frames=0, device=device)
    with pytest.raises(DecodeError, match="nowhere"):
        nbv.decode_frames("nowhere.gif", device=device)
