"""Decoder.open: what the host decodes begins before there is a batch, and nothing else changes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_decode import encode, photo
from test_decoder import BMP, JPEG, PNG, assert_same

import nbvision as nbv
from nbvision.codecs import _threads, host
from nbvision.codecs.open import OpenImage
from nbvision.errors import InputError
from nbvision.runtime import memory
from nbvision.runtime.device import available_cores

PROGRESSIVE = encode(photo(), "JPEG", progressive=True)
AHEAD = 1 << 24  # also on the CPU
FILES = [JPEG, PNG, b"broken", PROGRESSIVE, PNG[:3000], BMP, b""]


def wait_for(image: OpenImage) -> None:
    ends_s = time.monotonic() + 20
    while not image.is_decoded:
        assert time.monotonic() < ends_s, f"{image} was not begun"
        time.sleep(0.001)


@contextmanager
def no_free_thread() -> Iterator[None]:
    """Within this context the threads of every decode are busy with something else."""
    go_on = threading.Event()
    all_in = threading.Barrier(available_cores() + 1)

    def wait() -> None:
        all_in.wait(20)
        go_on.wait(20)

    for _ in range(available_cores()):
        _threads.begin(wait)
    all_in.wait(20)
    try:
        yield
    finally:
        go_on.set()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"color": "bgra"},
        {"color": "gray"},
        {"recover": True},
        {"background": [9, 8, 7]},
        {"reduce": 2},
        {"strict": True},
    ],
    ids=str,
)
def test_opened_images_are_decoded_as_their_files_are(device: Any, options: Any) -> None:
    expected = nbv.decode(FILES, device=device, **options)
    with nbv.Decoder(device=device, ahead_bytes=AHEAD, **options) as decoder:
        opened = [decoder.open(data) for data in FILES]
        for sources in (opened, opened, [opened[0], *FILES[1:3], *opened[3:]]):
            for batch in (
                decoder(sources),
                decoder.submit(sources).result(),
                nbv.decode(sources, device=device, **options),
            ):
                assert_same(batch, expected)
                assert [str(damage) for damage in batch.damage] == [str(damage) for damage in expected.damage]
                rows = [[error and error.valid_rows for error in each.damage] for each in (batch, expected)]
                assert rows[0] == rows[1]


def test_what_the_host_decodes_is_decoded_before_the_batch(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = nbv.decode([PNG, PROGRESSIVE, JPEG], device=device)
    with nbv.Decoder(device=device, ahead_bytes=AHEAD) as decoder:
        opened = [decoder.open(data) for data in (PNG, PROGRESSIVE, JPEG)]
        for image in opened[: 3 if device == "cpu" else 2]:
            wait_for(image)

        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError("it was decoded already")

        monkeypatch.setattr(host, "decode_into", refuse)
        assert_same(decoder(opened), expected)


def test_headers_are_read_at_once(device: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(PNG[:3000])
    with nbv.Decoder(device=device, limit_pixels=97 * 1000, ahead_bytes=AHEAD) as decoder:
        whole, cut, missing, none = map(decoder.open, (PNG, path, tmp_path / "missing", b"no image"))
        assert (whole.header and whole.header.format, whole.error, whole.nbytes) == ("png", None, len(PNG))
        assert "png" in repr(whole)
        kinds = [image.error and image.error.kind for image in (cut, missing, none)]
        assert kinds == ["truncated", "unreadable", "not_an_image"]
        assert cut.error is not None
        assert cut.error.source == str(path)
        assert "truncated" in repr(cut) or "ends before" in repr(cut)
        path.unlink()
        assert decoder.open(whole) is whole
        big = decoder.open(nbv.encode(np.zeros((1000, 98, 3), np.uint8), "png"))
        assert big.error is not None
        assert big.error.kind == "too_large"


def test_an_image_that_nobody_waits_for_is_not_decoded(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode_into = host.decode_into

    def note(out: Any, data: bytes, *arguments: Any, **options: Any) -> None:
        decoded.append(data)
        decode_into(out, data, *arguments, **options)

    monkeypatch.setattr(host, "decode_into", note)
    with nbv.Decoder(device=device, ahead_bytes=AHEAD) as decoder:
        with no_free_thread():
            given_up, wanted = decoder.open(BMP), decoder.open(PNG)
            del given_up
            gc.collect()
        wait_for(wanted)
        assert decoded == [PNG]


def test_no_free_thread_is_waited_for(device: Any) -> None:
    """The caller decodes what nobody has begun."""
    expected = nbv.decode([PNG, BMP], device=device)
    with nbv.Decoder(device=device, ahead_bytes=AHEAD) as decoder, no_free_thread():
        assert_same(decoder([decoder.open(PNG), decoder.open(BMP)]), expected)


def test_no_more_pixels_are_ahead_than_allowed(device: Any) -> None:
    height, width = nbv.decode(PNG, device="cpu").sizes[0].tolist()
    expected = nbv.decode([PNG] * 3, device=device)
    with nbv.Decoder(device=device, ahead_bytes=2 * height * width * 3) as decoder:
        opened = [decoder.open(PNG) for _ in range(3)]
        wait_for(opened[0])
        wait_for(opened[1])
        assert_same(decoder(opened), expected)
        assert not opened[2].is_decoded  # but in its batch
        del opened[0]
        gc.collect()
        another = decoder.open(PNG)
        wait_for(another)
        assert not opened[1].is_decoded
    with nbv.Decoder(device=device, ahead_bytes=0) as decoder:
        image = decoder.open(PNG)
        assert_same(decoder([image] * 3), expected)
        assert not image.is_decoded


def test_by_default_it_is_the_gpu_that_the_host_works_ahead_for(device: Any) -> None:
    with nbv.Decoder(device=device) as decoder:
        image = decoder.open(PNG)
        if device == "cuda":
            wait_for(image)
        assert decoder(image).ok.all()
        assert image.is_decoded is (device == "cuda")


def test_many_threads_decode_the_same_opened_images(device: Any) -> None:
    expected = nbv.decode(FILES, device=device)
    with nbv.Decoder(device=device, workers=4, ahead_bytes=AHEAD) as decoder, ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            opened = [decoder.open(data) for data in FILES]
            for future in [threads.submit(decoder, opened) for _ in range(8)]:
                assert_same(future.result(), expected)


def test_pixels_ahead_outlive_their_image_until_they_are_copied(device: Any) -> None:
    """Pinned memory is given out again only after the copy from it; the same files over and over reuse it."""
    pictures = [nbv.encode(np.full((301, 403, 3), level, np.uint8), "png") for level in range(0, 250, 10)]
    with nbv.Decoder(device=device, ahead_bytes=AHEAD) as decoder:
        batches = []
        for _ in range(12):
            batches.append(decoder([decoder.open(data) for data in pictures]))
        for batch in batches:
            for level, pixels in zip(range(0, 250, 10), batch.to("cpu"), strict=True):
                assert (pixels == level).all()


def test_memory_is_of_the_source_that_opened(device: Any) -> None:
    with nbv.Decoder(device=device, ahead_bytes=AHEAD) as decoder:
        with memory.source("opened here"):
            image = decoder.open(PNG)
        wait_for(image)
        place = "pinned" if device == "cuda" else "cpu"
        assert memory.stats(device=place).sources["opened here"].used_bytes > 0
        del image
        gc.collect()
        assert memory.stats(device=place).sources["opened here"].used_bytes == 0


def test_a_batch_has_its_own_limit_and_options(device: Any) -> None:
    with nbv.Decoder(device=device, ahead_bytes=AHEAD) as decoder:
        image = decoder.open(PNG)
        (error,) = nbv.decode(image, device=device, limit_pixels=10).errors
        assert error is not None
        assert error.kind == "too_large"
        assert decoder(image).ok.all()
        for options in ({"color": "gray"}, {"recover": True}, {"reduce": 2}, {"background": (1, 2, 3)}):
            with pytest.raises(InputError, match="was opened for"):
                nbv.decode([PNG, image], device=device, **options)
        with pytest.raises(InputError, match="first frame"):
            nbv.decode_frames(image, device=device)


def test_what_is_no_source_is_refused_at_once(device: Any) -> None:
    decoder = nbv.Decoder(device=device, ahead_bytes=AHEAD)
    for source in (3, None, [PNG, PNG], []):
        with pytest.raises(InputError):
            decoder.open(source)
    decoder.close()
    with pytest.raises(InputError, match="make another"):
        decoder.open(PNG)
    for ahead_bytes in (-1, 1.5):
        with pytest.raises(InputError, match="ahead_bytes"):
            nbv.Decoder(device=device, ahead_bytes=ahead_bytes)


def test_memory_that_is_refused_ahead_is_asked_for_again(device: Any) -> None:
    """What fails in a thread fails nobody: who decodes the batch tries again, as of its own source."""
    expected = nbv.decode(PNG, device=device)
    with nbv.Decoder(device=device, ahead_bytes=AHEAD) as decoder:
        with memory.source("tight", budget_bytes=1):
            image = decoder.open(PNG)
        with no_free_thread():  # who has come to an end with it
            assert not image.is_decoded
        with (
            memory.source("tight, too", budget_bytes=1),
            pytest.raises(nbv.errors.MemoryLimitError, match="tight, too"),
        ):
            decoder(image)
        assert_same(decoder(image), expected)
