"""What only a GPU's decoders do: two of them share a batch, and the engine does not wait for a stream."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference import random_image

import nbvision as nbv
from nbvision.codecs import gpu_decode
from nbvision.runtime import memory

pytestmark = pytest.mark.needs_cuda


def photo(height: int, width: int, seed: int) -> Image.Image:
    coarse = Image.fromarray(random_image(np.random.default_rng(seed), 9, 13))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(height: int, width: int, seed: int, **options: Any) -> bytes:
    file = io.BytesIO()
    photo(height, width, seed).save(file, "JPEG", **({"quality": 88} | options))
    return file.getvalue()


def by_pillow(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


# --- two decoders -----------------------------------------------------------------------------------------------------


def test_both_decoders_share_large_batches() -> None:
    files = [jpeg(500 + 40 * (seed % 3), 700 - 30 * (seed % 5), seed) for seed in range(24)]
    expected = [by_pillow(data) for data in files]
    gpu_decode._by_device.clear()  # what other tests have taught it
    for _ in range(8):
        batch = nbv.decode(files, device="cuda")
        for got, wanted in zip(batch.to("cpu"), expected, strict=True):
            difference = np.abs(got.astype(int) - wanted)
            assert difference.max() <= 3
            assert difference.mean() <= 0.5
    (decoders,) = gpu_decode._by_device.values()
    (known,) = decoders._balance._classes.values()
    assert known.alone_ms > 0, "the engine's rate was never measured"
    assert known.together_ms > 0, "the CUDA decoder was never tried"


def test_a_first_batch_of_one_does_not_slow_down_the_next() -> None:
    """nvImageCodec gives its first backend as many images of each batch as the first batch had."""
    files = [jpeg(480, 640, seed) for seed in range(12)]
    nbv.decode(files[0], device="cuda", deterministic=True)
    singly = [nbv.decode(data, device="cuda")[0].get() for data in files]  # by the engine
    together = nbv.decode(files, device="cuda", deterministic=True).to("cpu")
    for one, other in zip(singly, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_deterministic_batches_are_equal_bit_by_bit() -> None:
    files = [jpeg(480, 640, seed) for seed in range(40)]
    expected = [nbv.decode(data, device="cuda")[0].get() for data in files]
    with nbv.Decoder(device="cuda", deterministic=True) as decoder:
        for _ in range(4):
            for got, wanted in zip(decoder.submit(files).result().to("cpu"), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_everything_in_one_batch() -> None:
    kinds: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}]
    files = [jpeg(300 + seed, 401, seed, **kinds[seed % 4]) for seed in range(32)]
    batch = nbv.decode([*files, b"broken", files[0][:2000]], device="cuda").select(range(32)).to("cpu")
    for got, data in zip(batch, files, strict=True):
        assert np.abs(got.astype(int) - by_pillow(data)).max() <= 8


# --- memory that is still being read ----------------------------------------------------------------------------------


def corrupted(iterations: int) -> int:
    """How many batches are overwritten by the next one while the GPU still reads them, at full speed."""
    import cupy

    files = [[jpeg(480, 640, seed), jpeg(360, 200, seed)] for seed in (1, 2, 3)]
    with memory.source("hazard"):
        references = [[image.copy() for image in nbv.decode(pair, device="cuda")] for pair in files]
        delay = cupy.zeros(1 << 27, np.uint8)
        wrong = cupy.zeros((), np.int64)
        addresses = set()
        for index in range(iterations):
            batch = nbv.decode(files[index % 3], device="cuda")
            addresses.add(int(batch._rows[0, 0]))
            for _ in range(4):
                cupy.add(delay, 1, out=delay)  # keeps the stream busy before it reads
            for image, reference in zip(batch, references[index % 3], strict=True):
                wrong += (image != reference).any()
            del image, batch  # its memory is free for the next one
        assert len(addresses) <= 3, "the ring was not reused"
        return int(wrong)


def test_no_image_is_overwritten_while_it_is_read() -> None:
    assert corrupted(1000) == 0


def test_the_guard_is_what_prevents_it(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = memory.acquire

    def without_waiting(size_bytes: int, **options: Any) -> memory.Buffer:
        return acquire(size_bytes, **(options | {"wait_on_host": False}))

    monkeypatch.setattr(memory, "acquire", without_waiting)
    assert corrupted(200) > 0
