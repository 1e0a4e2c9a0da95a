"""decode_host(): what the host does of one image ahead of its batch, and decode(), which takes it from there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_decode import JPEGS, OTHERS, assert_like, by_pillow, on_host

import nbvision as nbv
from nbvision.errors import DecodeError, InputError
from nbvision.runtime import memory

FILES = {**JPEGS, **OTHERS}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_as_without(device: Any, name: str) -> None:
    held = nbv.decode_host(FILES[name], device=device)
    assert held.header == nbv.codecs.read_header(FILES[name])
    (got,) = on_host(nbv.decode(held, device=device))
    assert_like(got, nbv.decode(FILES[name], device="cpu")[0], exact=held.is_decoded)


def test_what_is_left_to_the_gpu(device: Any) -> None:
    """Baseline JPEG, and nothing else; without a GPU nothing is left."""
    left = {name for name, data in FILES.items() if not nbv.decode_host(data, device=device).is_decoded}
    slivers = {"1x1", "37x3", "37x3 4:2:2", "37x4"}  # of fewer than five columns
    baseline = set(JPEGS) - {"progressive"} - slivers
    assert left == (baseline if device == "cuda" else set())


def test_a_batch_of_all_kinds_keeps_its_order(device: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(OTHERS["webp"])
    names = ["png", "4:2:0", "progressive", "lossless webp", "4:2:2"]
    sources: list[Any] = [OTHERS["png"], *[nbv.decode_host(FILES[name], device=device) for name in names], b"none"]
    sources.append(nbv.decode_host(path, device=device))
    batch = nbv.decode(sources, device=device)
    assert [error and error.kind for error in batch.errors] == [None] * 6 + ["not_an_image", None]
    batch = batch.to("cpu")
    for index, name in enumerate(["png", *names]):
        assert_like(batch[index], by_pillow(FILES[name]), exact=name[0] != "4" or device == "cpu")
    assert_like(batch[7], by_pillow(OTHERS["webp"]), exact=True)


def test_one_may_be_taken_again_and_by_many_threads(device: Any) -> None:
    held = [nbv.decode_host(FILES[name], device=device) for name in ("png", "webp", "progressive")]
    meeting = threading.Barrier(4)

    def take(_: int) -> list[Any]:
        meeting.wait(timeout=60)
        return [on_host(nbv.decode([*held, *held], device=device)) for _ in range(5)][-1]

    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(take, range(4)):
            for index, name in enumerate(("png", "webp", "progressive") * 2):
                assert np.array_equal(batch[index], by_pillow(FILES[name]))


def test_memory_is_not_given_out_while_it_is_copied(device: Any) -> None:
    """Hosts let go at once of what a batch has taken, and others get that memory while the GPU may still copy it."""
    rng = np.random.default_rng(3)
    files = [nbv.encode(rng.integers(0, 256, (300, 400, 3), np.uint8), "png") for _ in range(4)]
    expected = [by_pillow(data) for data in files]
    for turn in range(40):
        held = [nbv.decode_host(data, device=device) for data in files]
        batch = nbv.decode(held, device=device)
        del held
        nbv.decode_host(files[turn % 4], device=device)  # in memory that has just been let go
        for got, wanted in zip(on_host(batch), expected, strict=True):
            assert np.array_equal(got, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"color": "bgra"},
        {"color": "gray"},
        {"background": (10, 20, 30)},
        {"reduce": 2},
        {"srgb": True},
    ],
)
def test_options_are_those_of_the_batch(device: Any, options: Any) -> None:
    for name in ("rgba png", "4:2:0", "webp"):
        held = nbv.decode_host(FILES[name], device=device, **options)
        (got,), (plain,) = (on_host(nbv.decode(source, device=device, **options)) for source in (held, FILES[name]))
        assert np.array_equal(got, plain)
    held = nbv.decode_host(FILES["png"], device=device, color="bgr")
    with pytest.raises(InputError, match=r"sources\[1\] is decoded on the host as .*'bgr'.*; expected .*'rgb'"):
        nbv.decode([FILES["png"], held], device=device)


def test_files_that_are_none(device: Any, tmp_path: Path) -> None:
    cut = FILES["png"][:2000]
    for source, kind in ((b"", "empty"), (b"none", "not_an_image"), (cut, "truncated"), (tmp_path / "x", "unreadable")):
        with pytest.raises(DecodeError) as caught:
            nbv.decode_host(source, device=device)
        assert caught.value.kind == kind
        assert nbv.decode(source, device=device).errors[0].kind == kind  # type: ignore[union-attr]
    with pytest.raises(DecodeError, match="the limit is 100"):
        nbv.decode_host(FILES["png"], device=device, limit_pixels=100)
    with pytest.raises(InputError, match="expected bytes or a path"):
        nbv.decode_host(3, device=device)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="color is 'cmyk'"):
        nbv.decode_host(FILES["png"], device=device, color="cmyk")  # type: ignore[arg-type]


def test_damage_is_recovered_once(device: Any) -> None:
    whole = nbv.encode(by_pillow(FILES["4:2:0"]), "jpeg")
    assert whole is not None
    cut = whole[: len(whole) // 2]
    held = nbv.decode_host(cut, device=device, recover=True)
    assert held.is_decoded
    batch = nbv.decode([held, cut], device=device, recover=True)
    assert batch.errors == (None, None)
    assert [damage.kind for damage in batch.damage if damage] == ["truncated", "truncated"]
    first, second = on_host(batch)
    assert np.array_equal(first, second)


def test_pixels_live_as_long_as_what_holds_them(device: Any) -> None:
    place: Any = "pinned" if device == "cuda" else "cpu"
    with memory.source("held"):
        held = nbv.decode_host(FILES["png"], device=device)
        assert memory.stats(device=place).sources["held"].used_bytes >= 97 * 131 * 3
        del held
        assert memory.stats(device=place).sources["held"].used_bytes == 0
