"""The examples about services do what they say; the straightforward one answers what ``nbvision serve`` does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from nbvision.demo.catalogue import make_catalogue
from nbvision.indexing import image_files
from nbvision.ops.rle import rle_to_mask

EXAMPLES = str(Path(__file__).parent.parent / "examples")

pytest.importorskip("cv2")


@pytest.fixture(autouse=True, scope="module")
def _paths() -> Iterator[None]:
    sys.path.insert(0, EXAMPLES)
    yield
    sys.path.remove(EXAMPLES)


def test_a_picture_of_articles_is_recognized_once() -> None:
    from in_image_service import run

    found = run(articles=6, requests=30, readers=2, device="cpu")
    first, again, changed, loaded = found.values()
    assert 0 < first.recognized < first.pictures
    assert again.recognized == 0
    assert changed.recognized == 1
    assert loaded.recognized == 0
    assert {figures.requests for figures in found.values()} == {30}
    assert first.pictures == again.pictures == changed.pictures == loaded.pictures
    assert first.broken == again.broken == loaded.broken > 0


def test_the_straightforward_service_answers_the_same(tmp_path: Path) -> None:
    from straightforward_service import make_app

    from nbvision.serve.pipelines import RecognizerPipeline

    make_catalogue(tmp_path, products=3, photographs=1, queries=3, seed=8)
    pictures = [path.read_bytes() for path in image_files(tmp_path / "queries") if path.suffix == ".jpg"]
    pipeline = RecognizerPipeline(device="cpu")

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app("cpu", "fp32"))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [await client.post("/v1/garments", content=data) for data in [*pictures, b"no image"]]

    *answers, refused = asyncio.run(ask())
    assert refused.status_code == 422
    objects = 0
    for answer, ours in zip(answers, pipeline.run(pictures), strict=True):
        if isinstance(ours, Exception):
            assert answer.status_code == 422
            continue
        theirs = answer.json()
        assert len(theirs["objects"]) == len(ours["objects"])
        for one, other in zip(ours["objects"], theirs["objects"], strict=True):
            assert one["label"] == other["label"]
            np.testing.assert_allclose(one["box"], other["box"], atol=1)
            np.testing.assert_allclose(one["score"], other["score"], atol=0.01)
            assert np.dot(one["vector"], other["vector"]) > 0.99
            assert np.mean(np.equal(*rle_to_mask([one["mask"], other["mask"]]))) > 0.98
            objects += 1
    assert objects > 0
