"""The command line as a user types it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nbvision
from nbvision import Index
from nbvision.cli import main
from nbvision.demo.catalogue import Catalogue, make_catalogue
from nbvision.demo.run import models_directory


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return make_catalogue(tmp_path_factory.mktemp("shop"), products=4, photographs=1, queries=1, seed=0)


@pytest.fixture
def shelf(catalogue: Catalogue, tmp_path: Path) -> Path:
    """A folder with four good images, one of them in a folder below, a text named like an image, an empty file."""
    folder = tmp_path / "shelf"
    (folder / "below").mkdir(parents=True)
    for number, photograph in enumerate(catalogue.photographs):
        target = folder / "below" if number == 0 else folder
        (target / photograph.path.name).write_bytes(photograph.path.read_bytes())
    (folder / "text.jpg").write_text("this is no image at all")
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("nobody asked for this file")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of one command."""
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def assert_fails(result: tuple[int, str, str], *said: str) -> None:
    """Exit status 1 and a message on stderr, without a traceback."""
    status, _, errors = result
    assert status == 1
    assert errors.startswith("nbvision: ")
    assert "Traceback" not in errors
    for text in said:
        assert text in errors


def index_of(capsys: pytest.CaptureFixture[str], shelf: Path) -> Path:
    """The index of the good images on the shelf."""
    assert run(capsys, "index", shelf, "--device", "cpu")[0] == 0
    return shelf.with_name("shelf.index")


def table_rows(printed: str) -> list[list[str]]:
    """The cells of every row that Rich has drawn."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]


# --- info and demo ----------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, errors = run(capsys, "info")
    assert (status, errors) == (0, "")
    lines = printed.splitlines()
    assert lines[0].startswith("nbvision ")
    assert f"numpy {np.__version__}" in printed
    assert sum(line.startswith("cuda ") for line in lines) == 1
    extras = lines[lines.index("extras") + 1 :]
    named = [
        "cuda13",
        "tensorrt",
        "tensorrt-rtx",
        "onnx",
        "quantize",
        "search",
        "codecs",
        "polygons",
        "parquet",
        "bfloat16",
        "serve",
        "grpc",
        "tracing",
        "cli",
        "plot",
    ]
    assert [line.split()[0] for line in extras] == named


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figures, out = tmp_path / "new" / "figures.json", tmp_path / "out"
    status, printed, errors = run(
        capsys, "demo", "--products", "6", "--queries", "4", "--device", "cpu", "--out", out, "--json", figures
    )
    assert (status, errors) == (0, "")
    content = json.loads(figures.read_text())
    assert (content["products"], content["queries"], content["device"]) == (6, 4, "cpu")
    assert (out / "report.png").is_file()
    for measure in ("mAP@0.5", "mask IoU", "recall@1", "recall@5"):
        assert measure in printed
    for kind in content["errors_by_kind"]:
        assert kind in printed
    assert str(out / "report.png") in printed
    assert Index.load(out / "index")  # what it indexed can be searched later


@pytest.mark.parametrize(
    ("option", "value"),
    [("--products", "0"), ("--products", "many"), ("--queries", "0"), ("--queries", "-3"), ("--seed", "-9")],
)
def test_demo_with_impossible_numbers_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["demo", "--device", "cpu", "--out", str(tmp_path / "out"), f"{option}={value}"])
    assert exit_info.value.code == 2
    assert option in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- index and search -------------------------------------------------------------------------------------------------


def test_index_then_search(capsys: pytest.CaptureFixture[str], shelf: Path, catalogue: Catalogue) -> None:
    status, printed, _ = run(capsys, "index", shelf, "--device", "cpu")
    assert status == 0  # two files cannot be decoded, which costs the others nothing
    path = shelf.with_name("shelf.index")
    assert f"4 of 6 images indexed in {path}" in printed
    assert f"{shelf / 'text.jpg'}: " in printed
    assert f"{shelf / 'empty.png'}: " in printed
    assert ["empty", "1"] in table_rows(printed)
    assert ["not_an_image", "1"] in table_rows(printed)

    index = Index.load(path)
    names = [photograph.path.name for photograph in catalogue.photographs]
    assert len(index) == 4
    for name in (f"below/{names[0]}", *names[1:]):
        assert name in index

    status, printed, errors = run(capsys, "search", path, shelf / names[2], "--device", "cpu", "-k", "3")
    assert (status, errors) == (0, "")
    first, *others = table_rows(printed)[:3]
    assert first[0] == names[2]
    assert float(first[1]) > 0.999
    assert all(float(similarity) < float(first[1]) for _, similarity, _ in others)


def test_weak_matches_are_called_weak(capsys: pytest.CaptureFixture[str], shelf: Path, catalogue: Catalogue) -> None:
    """The same photograph is no weak match, other garments are; of other models nothing is said."""
    path, image = index_of(capsys, shelf), shelf / catalogue.photographs[1].path.name
    _, printed, _ = run(capsys, "search", path, image, "--device", "cpu", "-k", "4")
    assert [row[2] for row in table_rows(printed)] == ["", "weak", "weak", "weak"]
    assert all((float(similarity) < 0.55) == (match == "weak") for _, similarity, match in table_rows(printed))
    assert "weak: a similarity under 0.55" in printed
    _, printed, _ = run(capsys, "search", path, image, "--device", "cpu", "-k", "1")
    assert "weak" not in printed
    _, printed, _ = run(capsys, "search", path, image, "--device", "cpu", "--models", models_directory())
    assert "weak" not in printed


def test_index_where_it_is_told_to_go(capsys: pytest.CaptureFixture[str], shelf: Path, tmp_path: Path) -> None:
    arguments = [shelf / "below", "--device", "cpu", "--index", tmp_path / "elsewhere"]
    status, printed, errors = run(capsys, "index", *arguments)
    assert (status, errors) == (0, "")
    assert "not indexed" not in printed
    assert len(Index.load(tmp_path / "elsewhere")) == 1
    assert not shelf.with_name("below.index").exists()


def test_index_of_the_current_directory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shelf: Path
) -> None:
    monkeypatch.chdir(shelf / "below")
    assert run(capsys, "index", ".", "--device", "cpu")[0] == 0
    assert len(Index.load(shelf / "below.index")) == 1


def test_file_names_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], shelf: Path, catalogue: Catalogue
) -> None:
    """Brackets mean styles to Rich, a long path would be broken, and a byte need be no UTF-8."""
    good, bad = shelf / ("long-" * 30 + "[blue].jpg"), shelf / "[red] :smile: no image.jpg"
    good.write_bytes(catalogue.queries[0].path.read_bytes())
    bad.write_text("no image")
    Path(os.fsdecode(os.fsencode(shelf) + b"/latin-\xe9.jpg")).write_text("no image")
    status, printed, _ = run(capsys, "index", shelf, "--device", "cpu")
    assert status == 0
    assert f"{bad}: " in printed
    assert f"{shelf}/latin-?.jpg: " in printed
    _, printed, _ = run(capsys, "search", shelf.with_name("shelf.index"), good, "--device", "cpu", "-k", "1")
    assert good.name in "".join(row[0] for row in table_rows(printed))  # folded over several lines


# --- failures ---------------------------------------------------------------------------------------------------------


def test_index_of_a_missing_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert_fails(run(capsys, "index", missing, "--device", "cpu"), str(missing), "expected a directory")
    assert not missing.with_name("missing.index").exists()


def test_nothing_to_index_leaves_the_index_as_it_was(
    capsys: pytest.CaptureFixture[str], shelf: Path, tmp_path: Path
) -> None:
    """A folder whose disk is not mounted looks empty."""
    empty, broken, plain = (tmp_path / name for name in ("empty", "broken", "plain"))
    for folder in (empty, broken, plain):
        folder.mkdir()
    (empty / "notes.txt").touch()
    (broken / "text.jpg").write_text("this is no image at all")
    Image.new("RGB", (320, 240), (127, 127, 127)).save(plain / "grey.png")

    path = index_of(capsys, shelf)
    before = (path / "index.json").read_bytes()
    said = {empty: "holds no images", broken: "none of 1 images can be indexed", plain: "none of 1 images"}
    for folder, text in said.items():
        assert_fails(run(capsys, "index", folder, "--device", "cpu", "--index", path), text)
        assert_fails(run(capsys, "index", folder, "--device", "cpu"), text)
        assert not folder.with_name(f"{folder.name}.index").exists()
    assert (path / "index.json").read_bytes() == before
    assert len(Index.load(path)) == 4

    assert_fails(run(capsys, "search", path, plain / "grey.png", "--device", "cpu"), "grey.png: no object found")


def test_search_in_a_missing_index(capsys: pytest.CaptureFixture[str], catalogue: Catalogue, tmp_path: Path) -> None:
    image, missing = catalogue.photographs[0].path, tmp_path / "missing"
    for path in (missing, image):
        assert_fails(run(capsys, "search", path, image, "--device", "cpu"), f"INDEX {path} is no directory")
    assert_fails(run(capsys, "search", catalogue.shelf, image, "--device", "cpu"), str(catalogue.shelf), "build")


def test_search_with_a_missing_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Said at once, before a model is loaded."""
    for path in (tmp_path / "missing.jpg", tmp_path):
        status, printed, errors = run(capsys, "search", tmp_path, path, "--device", "cpu")
        assert_fails((status, printed, errors), f"IMAGE {path} is no file")
        assert printed == ""


@pytest.mark.parametrize("name", ["text.jpg", "empty.png"])
def test_search_with_an_unreadable_image(capsys: pytest.CaptureFixture[str], shelf: Path, name: str) -> None:
    assert_fails(run(capsys, "search", index_of(capsys, shelf), shelf / name, "--device", "cpu"), name)


def test_search_for_no_neighbours(capsys: pytest.CaptureFixture[str], shelf: Path, catalogue: Catalogue) -> None:
    image = catalogue.photographs[0].path
    assert_fails(run(capsys, "search", index_of(capsys, shelf), image, "--device", "cpu", "-k", "0"), "k is 0")


def test_search_in_an_index_of_another_model(
    capsys: pytest.CaptureFixture[str], catalogue: Catalogue, tmp_path: Path
) -> None:
    index = Index(128, model="other")
    index.add(["a"], np.eye(1, 128, dtype=np.float32))
    index.save(tmp_path / "other.index")
    image = catalogue.photographs[0].path
    assert_fails(run(capsys, "search", tmp_path / "other.index", image, "--device", "cpu"), "other")


@pytest.mark.parametrize("command", ["index", "search"])
def test_missing_models(
    capsys: pytest.CaptureFixture[str], catalogue: Catalogue, shelf: Path, tmp_path: Path, command: str
) -> None:
    models = tmp_path / "no-models"
    arguments = [shelf] if command == "index" else [tmp_path, catalogue.photographs[0].path]
    assert_fails(run(capsys, command, *arguments, "--models", models, "--device", "cpu"), str(models))


def test_a_file_where_a_directory_should_go(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["--products", "1", "--queries", "1", "--device", "cpu", "--out", tmp_path / "file"]
    assert_fails(run(capsys, "demo", *arguments), "file")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["index"], ["search", "only-one"], ["index", ".", "--device", "tpu"], ["info", "--what"]]
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: nbvision" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("info", "demo", "index", "search"))


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nbvision {nbvision.__version__}\n"


# --- engines ----------------------------------------------------------------------------------------------------------


def test_profile_engine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = models_directory() / "embedder.onnx"
    options = ["--batches", "4", "1", "2", "--seconds", "0.05", "--device", "cpu"]
    files = ["--json", tmp_path / "profile.json", "--picture", tmp_path / "profile.png"]
    status, printed, errors = run(capsys, "profile-engine", model, *options, *files)
    assert (status, errors) == (0, "")
    rows = [row for row in table_rows(printed) if row[0] == "fp32"]
    assert [row[1] for row in rows] == ["1", "2", "4"]
    figures = json.loads((tmp_path / "profile.json").read_text())
    assert (figures["name"], figures["device"], figures["runtime"]) == ("embedder", "cpu", "onnxruntime")
    for row, point in zip(rows, figures["times"], strict=True):
        assert float(row[2]) == pytest.approx(point["p50_ms"], abs=0.001)
        assert 0 < point["p50_ms"] <= point["p99_ms"]
    with Image.open(tmp_path / "profile.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_plan_capacity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    times, other = tmp_path / "times.json", tmp_path / "other.json"
    times.write_text(json.dumps({size: 2 + 0.25 * size for size in (1, 8, 64)}))
    status, printed, errors = run(capsys, "plan-capacity", times, "--rate", "9000", "--burst", "8")
    assert (status, errors) == (0, "")
    assert "9000 requests/s want 3 cards: 20000 requests" in " ".join(printed.split())
    assert "eager and reject" in printed
    status, printed, _ = run(capsys, "plan-capacity", times, "--rate", "9000", "--most-cards", "2")
    assert status == 1
    assert "2 cards are too few" in printed
    profiled = [{"precision": name, "batch": 4, "p99_ms": ms} for name, ms in (("fp32", 9.0), ("fp16", 1.0))]
    other.write_text(json.dumps({"name": "detector", "times": profiled}))
    for precision, cards in (("fp32", 5), ("fp16", 1)):
        printed = run(capsys, "plan-capacity", other, "--rate", "2000", "--max-batch", "4", "--precision", precision)[1]
        assert f"want {cards} card" in printed
    for text in ("no JSON", "[]", "{}", '{"a": 1}', '{"times": [{"batch": 1}]}'):
        other.write_text(text)
        assert_fails(run(capsys, "plan-capacity", other, "--rate", "5"), "says no times of batches")
    assert_fails(run(capsys, "plan-capacity", times, "--rate", "0"), "positive rate")


def test_quantize(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images = tmp_path / "images" / "below"
    images.mkdir(parents=True)
    rng = np.random.default_rng(2)
    for index in range(12):
        pixels = rng.integers(0, 256, (9, 7, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        Image.fromarray(pixels).save(
            images / f"{index}.{'png' if index % 2 else 'JPG'}", format=["JPEG", "PNG"][index % 2]
        )
    (images / "broken.jpg").write_bytes(b"not an image")
    (images / "notes.txt").write_text("no image either")
    model, out, report = models_directory() / "embedder.onnx", tmp_path / "int8.onnx", tmp_path / "report.json"
    options = ["--fit", "stretch", "--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2", "--json", report]
    status, printed, errors = run(capsys, "quantize", model, images.parent, "--out", out, *options)
    assert (status, errors) == (0, "")
    assert out.stat().st_size < model.stat().st_size / 2
    assert "cosine" in printed
    assert json.loads(report.read_text())["size_bytes"] == [model.stat().st_size, out.stat().st_size]
    x = rng.standard_normal((2, 3, 96, 96)).astype(np.float32)
    exact, int8 = (nbvision.Engine(path, device="cpu")(x).ravel() for path in (model, out))
    assert exact @ int8 / np.linalg.norm(exact) / np.linalg.norm(int8) > 0.9
    (tmp_path / "empty").mkdir()
    assert_fails(run(capsys, "quantize", model, tmp_path / "empty", "--out", out), "has 0 images")
    assert_fails(run(capsys, "quantize", tmp_path / "no.onnx", images, "--out", out), "no.onnx")


def test_build_engine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = models_directory() / "embedder.onnx"
    status, printed, errors = run(capsys, "build-engine", model, "--batch", "1", "2", "4", "--device", "cpu")
    assert (status, errors) == (0, "")
    assert "Engine('embedder', onnxruntime, fp32" in printed
    assert "ready in" in printed
    (tmp_path / "no.onnx").write_bytes(b"not a model")
    assert_fails(run(capsys, "build-engine", tmp_path / "no.onnx", "--device", "cpu"), "no.onnx")
    assert_fails(run(capsys, "profile-engine", tmp_path / "none.onnx", "--device", "cpu"), "none.onnx")
    assert_fails(run(capsys, "build-engine", model, "--batch", "3", "2", "4", "--device", "cpu"), "(3, 2, 4)")
