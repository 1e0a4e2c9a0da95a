"""A decoder for services: futures, and batches decoded ahead."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference import random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import ImageBatch
from nbvision.runtime import memory


def written(format: str, mode: str = "RGB", size: tuple[int, int] = (97, 131)) -> bytes:
    file = io.BytesIO()
    pixels = random_image(np.random.default_rng(7), *size)
    Image.fromarray(pixels).resize((80, 60)).convert(mode).save(file, format)
    return file.getvalue()


JPEG, PROGRESSIVE, PNG, BMP = written("JPEG"), written("JPEG", "L"), written("PNG", "RGBA"), written("BMP")


def assert_same(got: ImageBatch, expected: ImageBatch) -> None:
    assert [str(error) for error in got.errors] == [str(error) for error in expected.errors]
    there = [index for index, error in enumerate(got.errors) if error is None]
    # Copied on the caller's stream: wrong pixels if it did not wait for the decoding thread's.
    for one, other in zip(got.select(there).to("cpu"), expected.select(there).to("cpu"), strict=True):
        np.testing.assert_array_equal(one, other)


def workers() -> set[threading.Thread]:
    """Of all decoders of the process."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("nbvision-decoder")}


# --- futures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"color": "bgr"}, {"color": "rgba"}, {"background": (9, 8, 7)}, {"recover": True}, {"limit_pixels": 100}],
    ids=str,
)
def test_a_decoder_decodes_as_its_options_say(device: Any, options: Any) -> None:
    files = [JPEG, PNG, b"broken", PNG[:3000]]
    expected = nbv.decode(files, device=device, **options)
    with nbv.Decoder(device=device, **options) as decoder:
        assert decoder.device == device
        for batch in (decoder(files), decoder.submit(files).result()):
            assert batch.color == options.get("color", "rgb")
            assert_same(batch, expected)
            assert [str(damage) for damage in batch.damage] == [str(damage) for damage in expected.damage]


def test_one_file_is_a_batch_of_one(device: Any, tmp_path: Any) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with nbv.Decoder(device=device) as decoder:
        for source in (PNG, path, str(path), [path]):
            assert_same(decoder.submit(source).result(), nbv.decode(PNG, device=device))


def test_work_from_many_threads(device: Any) -> None:
    files = [JPEG, PNG, b"broken", PROGRESSIVE]
    expected = nbv.decode(files, device=device)
    failures: list[BaseException] = []

    def work(decoder: nbv.Decoder) -> None:
        try:
            for future in [decoder.submit(files) for _ in range(8)]:
                assert_same(future.result(), expected)
        except BaseException as failure:
            failures.append(failure)

    with nbv.Decoder(device=device, workers=3) as decoder:
        callers = [threading.Thread(target=work, args=(decoder,)) for _ in range(5)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert failures == []


def test_coroutines_wait_for_futures(device: Any) -> None:
    expected = nbv.decode(PNG, device=device)

    async def all_of_them(decoder: nbv.Decoder) -> list[ImageBatch]:
        return await asyncio.gather(*[asyncio.wrap_future(decoder.submit(PNG)) for _ in range(6)])

    with nbv.Decoder(device=device) as decoder:
        for batch in asyncio.run(all_of_them(decoder)):
            assert_same(batch, expected)


def test_no_more_workers_than_asked_for() -> None:
    others = workers()
    with nbv.Decoder(device="cpu", workers=2) as decoder:
        assert workers() <= others  # none before the first work
        for future in [decoder.submit(BMP) for _ in range(20)]:
            future.result()
        own = workers() - others
        assert 1 <= len(own) <= 2
    assert not workers() & own


def test_threads_end_with_the_object() -> None:
    others = workers()
    decoder = nbv.Decoder(device="cpu")
    decoder.submit(BMP).result()
    own = workers() - others
    assert own
    del decoder
    gc.collect()
    for thread in own:
        thread.join(timeout=10)
    assert not workers() & own


def test_sources_that_are_none_are_refused_at_once(device: Any) -> None:
    with nbv.Decoder(device=device) as decoder:
        with pytest.raises(InputError, match=r"sources\[1\] is a int"):
            decoder.submit([PNG, 17])  # type: ignore[list-item]
        assert decoder.submit([]).result().sizes.shape == (0, 2)


def test_a_closed_decoder_takes_nothing(device: Any) -> None:
    decoder = nbv.Decoder(device=device)
    future = decoder.submit(PNG)
    decoder.close()
    assert future.result().ok.all()
    decoder.close()
    with pytest.raises(InputError, match="make another"):
        decoder.submit(PNG)
    assert decoder(PNG).ok.all()  # the caller's own thread still can


@pytest.mark.parametrize(
    "options",
    [{"color": "hsv"}, {"workers": 0}, {"workers": 1.5}, {"threads": 0}, {"limit_pixels": -1}, {"background": 3}],
    ids=str,
)
def test_options_that_are_none_are_refused_at_once(options: Any) -> None:
    with pytest.raises(InputError):
        nbv.Decoder(device="cpu", **options)


# --- batch after batch ------------------------------------------------------------------------------------------------


def test_batches_come_in_order(device: Any) -> None:
    batches: list[Any] = [[JPEG, PNG], [b"broken", PROGRESSIVE], [], [BMP]] * 4
    with nbv.Decoder(device=device) as decoder:
        for (files, images), wanted in zip(decoder.stream(iter(batches)), batches, strict=True):
            assert files is wanted
            assert_same(images, nbv.decode(files, device=device))


def test_two_batches_are_taken_ahead_and_no_more(device: Any) -> None:
    taken = []

    def batches() -> Iterator[Any]:
        for number in range(10):
            taken.append(number)
            yield [PNG]

    with nbv.Decoder(device=device) as decoder:
        decoded = decoder.stream(batches())
        assert taken == []
        next(decoded)
        assert taken == [0, 1, 2]
        next(decoded)
        assert taken == [0, 1, 2, 3]
        decoded.close()  # type: ignore[attr-defined]
        assert taken == [0, 1, 2, 3]


def test_a_batch_that_is_none_ends_the_stream_in_its_place(device: Any) -> None:
    with nbv.Decoder(device=device) as decoder:
        decoded = decoder.stream([[PNG], [BMP], [17]])  # type: ignore[list-item]
        assert next(decoded)[1].ok.all()
        assert next(decoded)[1].ok.all()
        with pytest.raises(InputError, match=r"sources\[0\] is a int"):
            next(decoded)


def test_what_a_source_of_batches_raises_comes_through(device: Any) -> None:
    def batches() -> Iterator[Any]:
        yield [PNG]
        raise ConnectionError("the network is gone")

    with nbv.Decoder(device=device) as decoder, pytest.raises(ConnectionError):
        list(decoder.stream(batches()))


def test_decoding_ahead_uses_the_callers_memory_source(device: Any) -> None:
    with memory.source("a film ahead"), nbv.Decoder(device=device) as decoder:
        list(decoder.stream([[PNG]] * 3))
    assert memory.stats(device=device).sources["a film ahead"].held_bytes > 0


def test_images_decoded_ahead_go_into_a_plan(device: Any) -> None:
    plan = nbv.Preprocess((32, 48), dtype="uint8")
    expected = to_host(plan(nbv.decode([PNG, JPEG], device=device))[0])
    with nbv.Decoder(device=device) as decoder:
        for _, images in decoder.stream([[PNG, JPEG]] * 5):
            np.testing.assert_array_equal(to_host(plan(images)[0]), expected)
