"""The search index against NumPy's brute force, against a dict, and against all that can befall its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbvision.errors import InputError, MissingExtraError, SearchError
from nbvision.search import Hits, Index
from nbvision.search import _faiss as faiss_module
from nbvision.search import _snapshot as snapshot_module
from nbvision.search import index as index_module
from nbvision.search._locks import ReadWriteLock

DIMENSION = 8
MODEL = "sha256:model-a"


def random_vectors(count: int, dimension: int = DIMENSION, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def names(count: int, prefix: str = "photo") -> list[str]:
    return [f"{prefix}/{number}.jpg" for number in range(count)]


def filled(count: int = 20, seed: int = 0) -> Index:
    index = Index(DIMENSION, model=MODEL)
    index.add(names(count), random_vectors(count, seed=seed))
    return index


def unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True)


def assert_nearest(hits: Hits, model: dict[str, np.ndarray], queries: np.ndarray, k: int, metric: str = "cosine"):
    """Ids are told apart by their scores, so that ties may come in any order."""
    prepare = unit if metric == "cosine" else (lambda vectors: vectors.astype(np.float64))
    keys = list(model)
    stored = np.array([model[key] for key in keys]).reshape(len(keys), queries.shape[1])
    scores = prepare(queries) @ prepare(stored).T
    depth = min(k, len(keys))
    assert hits.scores.dtype == np.float32
    assert hits.scores.shape == (len(queries), depth)
    assert [len(row) for row in hits.ids] == [depth] * len(queries)
    for row in range(len(queries)):
        expected = np.sort(scores[row])[::-1][:depth]
        np.testing.assert_allclose(hits.scores[row], expected, rtol=1e-4, atol=1e-5)
        assert len(set(hits.ids[row])) == depth
        of_hits = [scores[row, keys.index(name)] for name in hits.ids[row]]
        np.testing.assert_allclose(hits.scores[row], of_hits, rtol=1e-4, atol=1e-5)


def assert_same_index(left: Index, right: Index) -> None:
    queries = random_vectors(5, seed=99)
    mine, theirs = left.search(queries, k=1000), right.search(queries, k=1000)
    assert mine.ids == theirs.ids
    np.testing.assert_array_equal(mine.scores, theirs.scores)
    assert (left.dimension, left.metric, left.model) == (right.dimension, right.metric, right.model)


# Searching


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("queries", [1, 3, 50])  # FAISS takes another path from 20 on
@pytest.mark.parametrize("k", [1, 10, 300, 1000])
def test_search_finds_what_brute_force_finds(metric: Any, queries: int, k: int) -> None:
    stored = random_vectors(300, 32) * np.linspace(0.1, 10, 300, dtype=np.float32)[:, None]
    asked = random_vectors(queries, 32, seed=1)
    index = Index(32, model=MODEL, metric=metric)
    index.add(names(300), stored)
    model = dict(zip(names(300), stored, strict=True))
    assert_nearest(index.search(asked, k=k), model, asked, k, metric)


def test_a_vector_finds_itself_first_with_cosine_one() -> None:
    vectors = random_vectors(20)
    hits = filled().search(vectors * 1e-3, k=1)
    assert [row[0] for row in hits.ids] == names(20)
    np.testing.assert_allclose(hits.scores, 1, rtol=1e-5)


def test_empty_index_and_no_queries() -> None:
    empty = Index(DIMENSION, model=MODEL)
    hits = empty.search(random_vectors(3), k=5)
    assert hits.ids == [[], [], []]
    assert hits.scores.shape == (3, 0)
    hits = filled().search(random_vectors(0), k=5)
    assert hits.ids == []
    assert hits.scores.shape == (0, 5)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_cosine_does_not_depend_on_the_length(scale: float) -> None:
    index = Index(2, model=MODEL)
    index.add(["x"], np.array([[scale, 0]], np.float32))
    assert index.search(np.array([[scale, 0]], np.float32), k=1).scores[0, 0] == 1


def test_float16_and_strided_vectors() -> None:
    vectors = random_vectors(20).astype(np.float16)
    index = Index(DIMENSION, model=MODEL)
    index.add(names(20), np.asfortranarray(vectors))
    padded = np.zeros((20, 2 * DIMENSION), np.float16)
    padded[:, ::2] = vectors
    hits = index.search(padded[:, ::2], k=3)
    assert_nearest(hits, dict(zip(names(20), vectors, strict=True)), vectors, 3)


def test_the_callers_vectors_are_neither_changed_nor_kept() -> None:
    vectors = random_vectors(20)
    before = vectors.copy()
    for metric in ("cosine", "inner_product"):
        index = Index(DIMENSION, model=MODEL, metric=metric)  # type: ignore[arg-type]
        index.add(names(20), vectors)
        first = index.search(before, k=3)
        np.testing.assert_array_equal(vectors, before)
        vectors[:] = 1
        np.testing.assert_array_equal(index.search(before, k=3).scores, first.scores)
        vectors[:] = before


def test_arrays_of_other_libraries_on_the_host() -> None:
    class Foreign:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return self.array

    index = Index(DIMENSION, model=MODEL)
    index.add(names(20), Foreign(random_vectors(20)))
    assert_same_index(index, filled())


# Adding and removing


def test_add_replaces() -> None:
    index = filled()
    new = random_vectors(1, seed=5)
    index.add(["photo/3.jpg"], new)
    assert len(index) == 20
    assert index.search(new, k=1).ids == [["photo/3.jpg"]]
    model = dict(zip(names(20), random_vectors(20), strict=True)) | {"photo/3.jpg": new[0]}
    assert_nearest(index.search(new, k=100), model, new, 100)


def test_remove_says_how_many_and_passes_over_strangers() -> None:
    index = filled()
    assert index.remove(["photo/1.jpg", "nobody", "photo/1.jpg", "photo/2.jpg"]) == 2
    assert len(index) == 18
    assert "photo/1.jpg" not in index
    assert "photo/3.jpg" in index
    assert 3 not in index
    assert index.remove([]) == 0


def test_adding_nothing_changes_nothing() -> None:
    index = filled()
    index.add([], random_vectors(0))
    assert_same_index(index, filled())


def test_numpy_strings_are_strings(tmp_path: Path) -> None:
    index = Index(DIMENSION, model=MODEL)
    index.add(np.array(["a", "b"]), random_vectors(2))  # type: ignore[arg-type]
    assert "a" in index
    assert {type(name) for name in index.search(random_vectors(1), k=2).ids[0]} == {str}


KEYS = st.sampled_from(["a", "b", "c", "d", "e", "", "ü/1", "\udcff"])
VALUES = st.lists(st.integers(-3, 3), min_size=3, max_size=3).filter(any)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.dictionaries(KEYS, VALUES, max_size=4)),
        st.tuples(st.just("remove"), st.lists(KEYS, max_size=4)),
        st.tuples(st.just("reload"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, query=VALUES, k=st.integers(1, 10))
def test_any_sequence_of_changes_behaves_like_a_dict(steps: Any, query: list[int], k: int) -> None:
    index, model = Index(3, model=MODEL), {}
    for step, argument in steps:
        if step == "add":
            index.add(list(argument), np.array(list(argument.values()), np.float32).reshape(-1, 3))
            model |= {name: np.array(value, np.float32) for name, value in argument.items()}
        elif step == "remove":
            assert index.remove(argument) == len(set(argument) & set(model))
            model = {name: value for name, value in model.items() if name not in argument}
        else:
            with tempfile.TemporaryDirectory() as directory:
                index.save(directory)
                index = Index.load(directory, model=MODEL)
        assert len(index) == len(model)
        assert all(name in index for name in model)
    queries = np.array([query], np.float32)
    assert_nearest(index.search(queries, k=k), model, queries, k)


# Refusing

BAD_VECTORS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "nan": (lambda v: with_value(v, np.nan), r"NaN or infinity.*'new/1.jpg'"),
    "infinity": (lambda v: with_value(v, np.inf), r"NaN or infinity.*'new/1.jpg'"),
    "zero": (lambda v: v * np.array([[1], [0], [1]], np.float32), r"length 0.*'new/1.jpg'"),
    "float16 infinity": (lambda v: with_value(v, 1e6).astype(np.float16), r"NaN or infinity.*'new/1.jpg'"),
    "dimension": (lambda v: v[:, :-1], r"shape \(3, 7\); expected \(3, 8\)"),
    "one vector": (lambda v: v[0], r"shape \(8,\); expected \(3, 8\)"),
    "cube": (lambda v: v[None], r"expected \(3, 8\)"),
    "too few": (lambda v: v[:2], r"got 2 vectors for 3 ids"),
    "float64": (lambda v: v.astype(np.float64), r"dtype float64; expected float32 or float16"),
    "int": (lambda v: v.astype(np.int8), r"dtype int8"),
    "complex": (lambda v: v.astype(np.complex64), r"dtype complex64"),
    "text": (lambda v: "vectors", r"dtype <U7"),
    "ragged": (lambda v: [[1.0], [1.0, 2.0]], r"a list that NumPy cannot read"),
    "none": (lambda v: None, r"dtype object"),
}


def with_value(vectors: np.ndarray, value: float) -> np.ndarray:
    changed = vectors.copy()
    changed[1, 2] = value
    return changed


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("case", BAD_VECTORS)
def test_bad_vectors_are_refused_and_nothing_changes(case: str) -> None:
    spoil, message = BAD_VECTORS[case]
    index = filled()
    with pytest.raises(InputError, match=message):
        index.add(names(3, "new"), spoil(random_vectors(3)))
    assert_same_index(index, filled())


def test_a_bad_replacement_leaves_the_old_vector() -> None:
    index = filled()
    with pytest.raises(InputError, match=r"photo/0.jpg"):
        index.add(["photo/0.jpg"], np.zeros((1, DIMENSION), np.float32))
    assert_same_index(index, filled())


def test_bad_queries_are_refused_by_number() -> None:
    with pytest.raises(InputError, match="NaN or infinity: queries 1;"):
        filled().search(with_value(random_vectors(3), np.nan), k=1)
    with pytest.raises(InputError, match=r"length 0.*: queries 0, 1, 2, 3, 4 and 2 more;"):
        filled().search(np.zeros((7, DIMENSION), np.float32), k=1)
    with pytest.raises(InputError, match=r"shape \(8,\); expected \(queries, 8\)"):
        filled().search(random_vectors(1)[0], k=1)


def test_inner_product_takes_zero_and_refuses_what_would_overflow() -> None:
    index = Index(2, model=MODEL, metric="inner_product")
    index.add(["zero", "long"], np.array([[0, 0], [1.5e19, 1e19]], np.float32))
    hits = index.search(np.array([[1.5e19, 1e19]], np.float32), k=2)
    assert hits.ids == [["long", "zero"]]
    assert np.isfinite(hits.scores).all()
    with pytest.raises(InputError, match=r"length over .*'longer'"):
        index.add(["longer"], np.array([[2e19, 0]], np.float32))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("abc", "single str 'abc'"),
        (b"abc", "single bytes"),
        (["a", 1, "c"], "ids holds 1; expected strings"),
        ([Path("a"), "b", "c"], "convert with str"),
        (["a", "b", "a"], "more than once: 'a'"),
    ],
)
def test_bad_ids_are_refused(ids: Any, message: str) -> None:
    index = filled()
    with pytest.raises(InputError, match=message):
        index.add(ids, random_vectors(3))
    assert_same_index(index, filled())


@pytest.mark.parametrize("k", [0, -1, 1.0, "3", True, None])
def test_bad_k_is_refused(k: Any) -> None:
    with pytest.raises(InputError, match=r"^k is .*expected an integer of at least 1"):
        filled().search(random_vectors(1), k=k)


def test_bad_arguments_of_an_index_are_refused() -> None:
    with pytest.raises(InputError, match="dimension is 0"):
        Index(0, model=MODEL)
    with pytest.raises(InputError, match="model is ''"):
        Index(3, model="")
    with pytest.raises(InputError, match="metric is 'l2'; expected one of"):
        Index(3, model=MODEL, metric="l2")  # type: ignore[arg-type]


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss_module.require_faiss.cache_clear()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"nbvision\[search\]"):
        Index(3, model=MODEL)


def test_importing_the_room_does_not_import_faiss() -> None:
    code = "import sys, nbvision.search; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=child_environment()).returncode == 0


# On disk


def data_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name not in ("index.json", "lock"))


def file_of(directory: Path, kind: str) -> Path:
    if kind == "manifest":
        return directory / "index.json"
    return directory / json.loads((directory / "index.json").read_text())[kind]["name"]


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_round_trip(tmp_path: Path, metric: Any, count: int) -> None:
    index = Index(DIMENSION, model=MODEL, metric=metric)
    index.add(names(count), random_vectors(count))
    index.remove(names(count)[5:7])
    index.add(names(count)[:2], random_vectors(count, seed=3)[:2])
    index.save(tmp_path / "deep" / "index")
    loaded = Index.load(tmp_path / "deep" / "index", model=MODEL)
    assert_same_index(index, loaded)
    assert len(loaded) == len(index)
    for both in (index, loaded):  # and it goes on living
        both.add(["more", *names(count)[:1]], random_vectors(2, seed=4)[: 1 + min(count, 1)])
        both.remove(names(count)[1:3])
    assert_same_index(index, loaded)


def test_ids_of_any_characters_survive(tmp_path: Path) -> None:
    ids = ["", " ", "a\nb", '"', "\\", "ü", "日本", "\x00", "\udcff", "😀", "a/b\u2028c"]
    index = Index(DIMENSION, model="m\n'ü\"")
    index.add(ids, random_vectors(len(ids)))
    index.save(tmp_path)
    assert_same_index(index, Index.load(tmp_path, model="m\n'ü\""))


def test_directory_of_any_name(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"na\xefve \xff")
    filled().save(str(directory))
    assert_same_index(Index.load(str(directory)), filled())


def test_saving_again_leaves_only_the_new_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    filled().save(tmp_path)
    before = data_files(tmp_path)
    filled(count=7, seed=1).save(tmp_path)
    after = data_files(tmp_path)
    assert len(before) == len(after) == 3
    assert set(before) & set(after) == {"notes.txt"}
    assert_same_index(Index.load(tmp_path), filled(count=7, seed=1))


def test_another_model_is_refused_and_both_are_named(tmp_path: Path) -> None:
    filled().save(tmp_path)
    with pytest.raises(SearchError, match=r"made by model 'sha256:model-a', expected model 'sha256:model-b'"):
        Index.load(tmp_path, model="sha256:model-b")
    assert Index.load(tmp_path).model == MODEL


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"nowhere/index.json: cannot be read: No such file"):
        Index.load(tmp_path / "nowhere")
    with pytest.raises(SearchError, match="cannot be read"):
        Index.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match="cannot be read: Not a directory"):
        Index.load(tmp_path / "file")


@pytest.mark.parametrize("kind", ["manifest", "vectors", "ids"])
def test_a_deleted_file_is_reported(tmp_path: Path, kind: str) -> None:
    filled().save(tmp_path)
    path = file_of(tmp_path, kind)
    path.unlink()
    with pytest.raises(SearchError, match=f"{path}: cannot be read: No such file"):
        Index.load(tmp_path)


@pytest.mark.parametrize("kind", ["manifest", "vectors", "ids"])
def test_a_file_truncated_anywhere_is_reported(tmp_path: Path, kind: str) -> None:
    filled().save(tmp_path)
    path = file_of(tmp_path, kind)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SearchError) as caught:
            Index.load(tmp_path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    assert_same_index(Index.load(tmp_path), filled())


@pytest.mark.parametrize("kind", ["vectors", "ids"])
def test_one_changed_bit_is_reported(tmp_path: Path, kind: str) -> None:
    filled().save(tmp_path)
    path = file_of(tmp_path, kind)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(SearchError, match="its content changed"):
            Index.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "truncated or no JSON"),
        (b"garbage", "truncated or no JSON"),
        (b"\xff\xfe\x00", "truncated or no JSON"),
        (b"[" * 100_000, "truncated or no JSON"),
        (b"null", "not the manifest"),
        (b"[]", "not the manifest"),
        (b'{"name": "a web page"}', "not the manifest"),
        (b'{"format": "nbvision-index"}', "missing or impossible values"),
        (b'{"format": "nbvision-index", "version": "1"}', "missing or impossible values"),
        (b'{"format": "nbvision-index", "version": 99}', "has format version 99, expected at most 1"),
    ],
)
def test_a_foreign_manifest_is_reported(tmp_path: Path, text: bytes, message: str) -> None:
    filled().save(tmp_path)
    (tmp_path / "index.json").write_bytes(text)
    with pytest.raises(SearchError, match=message) as caught:
        Index.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    filled(count=3).save(tmp_path)  # a new index may take its place
    assert len(Index.load(tmp_path)) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dimension", 9),
        ("dimension", 10**30),
        ("dimension", -1),
        ("dimension", True),
        ("dimension", "8"),
        ("count", 19),
        ("count", -1),
        ("count", None),
        ("metric", "l2"),
        ("metric", 1),
        ("model", ""),
        ("model", None),
        ("vectors", None),
        ("vectors", "x"),
        ("ids", {"name": "../../etc/passwd", "size_bytes": 1, "sha256": ""}),
        ("ids", {"name": "ids-0123456789abcdef.json", "size_bytes": "1", "sha256": ""}),
        ("ids", {"name": "ids-0123456789abcdef.json", "size_bytes": 1}),
    ],
)
def test_a_manifest_of_wrong_values_is_reported(tmp_path: Path, key: str, value: Any) -> None:
    filled().save(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(SearchError, match=str(tmp_path)):
        Index.load(tmp_path)


def replace_file(directory: Path, kind: str, content: bytes) -> None:
    """Put a foreign file in place, with a manifest that vouches for it."""
    manifest = json.loads((directory / "index.json").read_text())
    path = directory / manifest[kind]["name"]
    path.unlink()
    record = snapshot_module._write_file(path, lambda write: write(content))
    manifest[kind] |= {"size_bytes": record.size_bytes, "sha256": record.sha256}
    (directory / "index.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "is no JSON"),
        (b"{}", "not a list of strings"),
        (b"[1, 2]", "not a list of strings"),
        (b'["a"]', "holds 1 ids, 1 different, expected 20 different"),
        (json.dumps(["a"] * 20).encode(), "holds 20 ids, 1 different"),
    ],
)
def test_foreign_ids_are_reported(tmp_path: Path, content: bytes, message: str) -> None:
    filled().save(tmp_path)
    replace_file(tmp_path, "ids", content)
    with pytest.raises(SearchError, match=message):
        Index.load(tmp_path)


def test_foreign_vectors_are_reported(tmp_path: Path) -> None:
    faiss = faiss_module.require_faiss()
    flat = faiss.IndexFlatIP(DIMENSION)
    small = faiss.IndexIDMap2(faiss.IndexFlatIP(DIMENSION))
    for content, message in (
        (b"garbage", "FAISS .* cannot read it"),
        (faiss.serialize_index(flat).tobytes(), "is a FAISS IndexFlatIP, expected an IndexIDMap2"),
        (faiss.serialize_index(small).tobytes(), "holds 0 vectors of dimension 8, expected 20"),
    ):
        filled().save(tmp_path)
        replace_file(tmp_path, "vectors", content)
        with pytest.raises(SearchError, match=message):
            Index.load(tmp_path)


# Saving that fails


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_save_that_fails_leaves_the_previous_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    filled().save(tmp_path)
    before = data_files(tmp_path)
    monkeypatch.setattr(os, step, fail)
    expected = SearchError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        filled(count=5, seed=1).save(tmp_path)
    assert data_files(tmp_path) == before
    assert_same_index(Index.load(tmp_path), filled())


def test_a_disk_that_fills_up_amid_the_vectors(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from nbvision.errors import SearchError\n"
        "from nbvision.search import Index\n"
        "index = Index(64, model='m')\n"
        "index.add([str(n) for n in range(5000)], np.ones((5000, 64), np.float32))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    index.save(sys.argv[1])\n"
        "except SearchError as error:\n"
        "    sys.exit(0 if 'cannot be saved' in str(error) else str(error))\n"
        "sys.exit('saved')\n"
    )
    filled().save(tmp_path)
    before = data_files(tmp_path)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=child_environment(), check=True)
    assert data_files(tmp_path) == before
    assert_same_index(Index.load(tmp_path), filled())


CRASH = """
import os, pathlib, sys
import numpy as np
from nbvision.search import Index

directory, steps = sys.argv[1], int(sys.argv[2])
vectors = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
index = Index(8, model="sha256:model-a")
index.add([f"photo/{number}.jpg" for number in range(5)], vectors)
left = steps

def die_at_the_step(function):
    def step(*arguments, **keywords):
        global left
        if left == 0:
            os._exit(17)
        left -= 1
        return function(*arguments, **keywords)
    return step

os.fsync, os.replace = die_at_the_step(os.fsync), die_at_the_step(os.replace)
pathlib.Path.unlink = die_at_the_step(pathlib.Path.unlink)
index.save(directory)
"""


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_process_that_dies_at_any_step_leaves_one_index_whole(tmp_path: Path) -> None:
    filled().save(tmp_path / "0")
    seen = []
    for steps in range(20):
        directory = tmp_path / str(steps)
        filled().save(directory)
        command = [sys.executable, "-c", CRASH, str(directory), str(steps)]
        code = subprocess.run(command, env=child_environment()).returncode
        seen.append(len(Index.load(directory, model=MODEL)))
        expected = filled() if seen[-1] == 20 else filled(count=5, seed=1)
        assert_same_index(Index.load(directory), expected)
        filled(count=3).save(directory)  # the next save sweeps what the crash left
        assert len(data_files(directory)) == 2
        if code == 0:
            break
        assert code == 17
    # three files and the directory synchronised, then the step itself, then directory and two old files
    assert seen == [20] * 5 + [5] * 4


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match="cannot be saved"):
        filled().save(tmp_path / "file")


# Threads


def test_load_takes_the_new_index_if_a_save_ends_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled().save(tmp_path)
    stale = snapshot_module.read_manifest(tmp_path)
    filled(count=5, seed=1).save(tmp_path)
    answers = [stale]
    real = snapshot_module.read_manifest
    monkeypatch.setattr(index_module, "read_manifest", lambda path: answers.pop() if answers else real(path))
    assert_same_index(Index.load(tmp_path), filled(count=5, seed=1))


def run_threads(*bodies: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures


def test_searches_changes_saves_and_loads_together(tmp_path: Path) -> None:
    index = filled()
    index.save(tmp_path)
    kept, queries = names(20)[:10], random_vectors(10)

    def search() -> None:
        for _ in range(100):
            hits = index.search(queries, k=1)
            assert [row[0] for row in hits.ids] == kept

    def change() -> None:
        for turn in range(100):
            index.add(names(20)[10:], -10 * queries + np.float32(turn / 1000))
            index.remove(names(20)[15:])

    def save() -> None:
        for _ in range(10):
            index.save(tmp_path)

    def load() -> None:
        for _ in range(10):
            assert [row[0] for row in Index.load(tmp_path).search(queries, k=1).ids] == kept

    run_threads(search, search, change, change, save, save, load)
    assert len(index) == 15
    assert len(data_files(tmp_path)) == 2


def test_the_lock_lets_readers_in_together_and_a_writer_alone() -> None:
    lock, together = ReadWriteLock(), threading.Barrier(3, timeout=30)

    def read() -> None:
        with lock.read():
            together.wait()

    run_threads(read, read, read)
    inside = 0

    def write() -> None:
        nonlocal inside
        for _ in range(200):
            with lock.write():
                assert inside == 0
                inside += 1
                inside -= 1

    def look() -> None:
        for _ in range(200):
            with lock.read():
                assert inside == 0

    run_threads(write, write, look, look)


def test_a_waiting_writer_goes_before_new_readers() -> None:
    lock, order = ReadWriteLock(), []
    writer = threading.Thread(target=lambda: enter(lock.write, "writer"))
    reader = threading.Thread(target=lambda: enter(lock.read, "reader"))

    def enter(way: Callable[[], Any], name: str) -> None:
        with way():
            order.append(name)

    with lock.read():
        writer.start()
        while not lock._writers_waiting:
            pass
        reader.start()
        reader.join(0.1)
        assert reader.is_alive()
    writer.join(30)
    reader.join(30)
    assert order == ["writer", "reader"]


def test_faiss_is_imported_without_a_warning() -> None:
    code = "from nbvision.search import Index; Index(3, model='m')"
    command = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.run(command, env=child_environment()).returncode == 0
