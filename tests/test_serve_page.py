"""The page for people, in a real browser: an image in, boxes and times out, and the service's charts."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Server

from nbvision.demo.catalogue import make_catalogue
from nbvision.indexing import image_files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    make_catalogue(directory, products=1, photographs=1, queries=1, seed=11)
    return image_files(directory / "queries")[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = """
    token: letmein
    pipelines:
      garments: {kind: recognizer, device: cpu, stage_times: true}
      echo: {kind: python, device: cpu, function: 'serve_functions:echo'}
    """
    with Server(config, tmp_path_factory.mktemp("service"), wait=False) as server:
        server.wait_for("ready")
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server: Server, browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url))
    page.goto(server.url)
    page.fill("#token", "letmein")
    page.wait_for_function("document.getElementById('model').options.length == 2", timeout=10_000)
    yield page
    context.close()
    assert complaints == []
    assert all(url.startswith((server.url, "blob:", "data:")) for url in outside)  # nothing from elsewhere


def pixels(page: Any) -> Any:
    """The picture as it is shown, RGBA."""
    url = page.evaluate("() => document.getElementById('picture').toDataURL('image/png')")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        return np.array(picture.convert("RGBA"))


def test_an_image_gets_its_objects(page: Any, server: Server, picture: Path) -> None:
    page.select_option("#model", "garments")
    page.set_input_files("#file", str(picture))
    page.wait_for_function("/found$/.test(document.getElementById('message').textContent)", timeout=60_000)
    expected = server.ask("garments", picture.read_bytes(), headers={"Authorization": "Bearer letmein"}).json()
    assert len(expected["objects"]) >= 1

    rows = page.locator("#found tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == [one["label"] for one in expected["objects"]]
    times = page.locator("#times tbody").inner_text()
    for stage in ("decode", "detect", "mask", "embed", "there and back"):
        assert re.search(rf"{stage}\s+[\d.]+ ms", times)

    shown = pixels(page).astype(int)
    assert shown.shape[:2] == (expected["height"], expected["width"])
    plain = np.array(Image.open(picture).convert("RGB")).astype(int)
    changed = np.abs(shown[..., :3] - plain).max(axis=2) > 40
    x1, y1, x2, y2 = (round(value) for value in expected["objects"][0]["box"])
    edge = np.concatenate([changed[y1 : y1 + 2, x1:x2].any(0), changed[y1:y2, x1 : x1 + 2].any(1)])
    assert edge.mean() > 0.9  # a line all along the box
    far = np.ones(changed.shape, bool)
    for one in expected["objects"]:
        left, top, right, bottom = (round(value) for value in (*one["crop_box"],))
        far[max(top - 20, 0) : bottom + 20, max(left - 20, 0) : right + 200] = False
    assert not changed[far].any()  # and nothing elsewhere


def test_masks_are_where_they_are(page: Any) -> None:
    """The page's own reading of run lengths, against the library's."""
    from nbvision.ops.rle import mask_to_rle

    rng = np.random.default_rng(3)
    for mask in (rng.random((1, 13, 7)) > 0.5, np.ones((1, 3, 5), bool), np.zeros((1, 64, 64), bool)):
        (rle,) = mask_to_rle(mask)
        counts = page.evaluate("(text) => runs(text)", rle["counts"].decode())
        values = np.repeat(np.arange(len(counts)) % 2, counts).reshape(mask.shape[2], mask.shape[1]).T
        assert np.array_equal(values.astype(bool), mask[0])


def test_what_is_no_image_is_said(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image at all")
    page.select_option("#model", "garments")
    page.set_input_files("#file", str(broken))
    page.wait_for_function("document.getElementById('message').className == 'error'", timeout=20_000)
    assert page.locator("#message").inner_text().startswith("422")


def test_a_wrong_token_is_said(page: Any, picture: Path) -> None:
    page.fill("#token", "wrong")
    page.set_input_files("#file", str(picture))
    page.wait_for_function("document.getElementById('message').className == 'error'", timeout=20_000)
    assert page.locator("#message").inner_text().startswith("401")


def test_markup_in_answers_is_text(page: Any, server: Server, tmp_path: Path) -> None:
    """What a pipeline answers is shown, never run."""
    page.evaluate(
        "show(document.createElement('canvas'), {width: 9, height: 9, objects: ["
        "{box: [1, 1, 5, 5], score: 1, label: '<img src=x onerror=alert(1)>'}]})"
    )
    assert page.locator("#found tbody img").count() == 0
    assert "<img" in page.locator("#found tbody").inner_text()


def test_charts_move(page: Any, server: Server) -> None:
    page.wait_for_function("document.querySelectorAll('#charts figure').length >= 5", timeout=20_000)
    for number in range(3):
        buffer = io.BytesIO()
        Image.fromarray(np.full((20, 20 + number, 3), 9, np.uint8)).save(buffer, "PNG")
        server.ask("garments", buffer.getvalue(), headers={"Authorization": "Bearer letmein"}).raise_for_status()
    page.wait_for_function(r"/garments.*healthy.*\d+ answered/s.test(document.getElementById('counts').innerText)")
    page.wait_for_function("document.getElementById('charts').innerText.includes('items a second: ')")
    page.wait_for_function("document.getElementById('timeline').naturalWidth == 900", timeout=20_000)
