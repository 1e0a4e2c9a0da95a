"""Every code block of the README and the docs runs; the commands are the ones CI runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nbvision as nbv
from nbvision.demo.garments import backgrounds, draw_scene, make_products

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.relative_to(ROOT)}:{page.read_text()[: found.start()].count(chr(10)) + 1}", found[2])
        for page in PAGES
        for found in BLOCK.finditer(page.read_text())
        if found[1] == language
    ]


@pytest.fixture
def folder_with_images(tmp_path, monkeypatch):
    """The files that the examples name."""
    rng = np.random.default_rng(3)
    for name in ("a.jpg", "b.png", "c.webp"):
        scene = draw_scene(make_products(2, seed=77), background=backgrounds("test")[0], size=(240, 320), rng=rng)
        Image.fromarray(scene.image).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBVISION_DEVICE", "cpu")
    return tmp_path


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=lambda value: value if "\n" not in value else "")
def test_python_block_runs(folder_with_images, place, code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder_with_images, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{place}\n{done.stderr[-2000:]}"


def test_the_service_that_the_docs_describe(folder_with_images):
    """Its files are files of a service, its commands are commands, and what its clients ask is answered."""
    for module in ("fastapi", "uvicorn", "yaml", "httpx", "prometheus_client", "python_multipart", "tritonclient"):
        pytest.importorskip(module)
    from serving import Server

    from nbvision.cli import _parser
    from nbvision.serve import read_config

    text = (ROOT / "docs" / "serving.md").read_text()
    files = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).splitlines()
    clients = re.findall(r"^```python client\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for number, file in enumerate(files):
        (folder_with_images / f"{number}.yaml").write_text(file)
        assert read_config(folder_with_images / f"{number}.yaml").pipelines
    served = [line for line in lines if line.startswith("nbvision serve")]
    asked = [line for line in lines if line.startswith("curl -s ")]
    assert _parser().parse_args(served[0].split()[1:]).port == 8000
    assert len(served) + len(asked) == len(lines)
    with Server(files[0], folder_with_images) as server:
        for command in [*asked, *clients]:
            here = command.replace("localhost:8000", server.url.removeprefix("http://"))
            if command in clients:
                run = [sys.executable, "-W", "error", "-c", here]
            else:
                run = ["bash", "-c", here.replace("curl -s ", "curl -s --fail ")]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
            assert done.stdout.strip()
            assert '"error"' not in done.stdout


def test_there_are_examples():
    assert len(blocks("python")) >= 2


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- tests -->\n```bash\n(.*?)\n```", readme, re.DOTALL)
    assert found is not None
    assert "pip install" in found[1]
    assert "pytest" in found[1]
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_links_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("page", "functions"),
    [
        ("preprocess.md", [nbv.Preprocess, nbv.Preprocess.__call__]),
        ("draw.md", [nbv.draw]),
        ("codecs.md", [nbv.encode]),
    ],
    ids=["preprocess", "draw", "codecs"],
)
def test_tables_have_every_option_and_its_default(page, functions):
    told = {}
    for names, defaults in re.findall(r"^\| (`.*?`) \| (.*?) ?\|", (ROOT / "docs" / page).read_text(), re.MULTILINE):
        names, defaults = (re.findall("`(.*?)`", cell) for cell in (names, defaults))
        told.update(zip(names, defaults or ["required"], strict=False))
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if name != "self":
                default = repr(parameter.default).replace("'", '"')
                assert told.get(name) == ("required" if parameter.default is parameter.empty else default), name
