"""The whole pipeline on both devices: what it finds, and what broken files, empty batches and misfits do to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import on, to_host

from nbvision.codecs import decode
from nbvision.demo.catalogue import Catalogue, make_catalogue
from nbvision.demo.metrics import match_objects
from nbvision.demo.run import models_directory
from nbvision.engines import Engine
from nbvision.errors import DecodeError, EngineError, InputError, MemoryLimitError
from nbvision.recognizer import Recognition, Recognizer, StageTimes, in_batches
from nbvision.runtime import memory
from nbvision.runtime._rings import Manager

STAGES = {"decode", "detect", "crop", "mask", "embed"}
BROKEN = [b"", b"<html>404 Not Found</html>" * 40, "no-such-file.jpg"]
BROKEN_KINDS = ["empty", "not_an_image", "unreadable"]

# Batches of other sizes may run other kernels, which sum in another order; a mask's edge pixel may then flip.
SAME_BOXES = {"rtol": 0, "atol": 0.05}
SAME_VECTORS = {"rtol": 0, "atol": 0.01}


@functools.cache
def recognizer(device: str) -> Recognizer:
    """The demo's models; one load for the module."""
    return Recognizer.load(models_directory(), device=device)


@functools.cache
def masker(device: str, batch: tuple[int, int, int]) -> Engine:
    return Engine(models_directory() / "masker.onnx", device=device, batch=batch)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    # Of this seed every score is far above the threshold, so both devices find the same objects.
    return make_catalogue(tmp_path_factory.mktemp("shop"), products=8, photographs=1, queries=4, seed=6)


@pytest.fixture(scope="module")
def files(catalogue: Catalogue) -> list[bytes]:
    """Each good image of the catalogue, photographs first."""
    return [image.path.read_bytes() for image in (*catalogue.photographs, *catalogue.queries)]


@functools.cache
def _recognized(device: str, files: tuple[bytes, ...]) -> Recognition:
    return recognizer(device).recognize(files)


def recognized(device: str, files: list[bytes]) -> Recognition:
    """All good images in one batch; run once a device."""
    return _recognized(device, tuple(files))


def assert_same_objects(actual: Recognition, expected: Recognition) -> None:
    np.testing.assert_array_equal(actual.images, expected.images)
    np.testing.assert_array_equal(actual.labels, expected.labels)
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=0, atol=1e-3)
    np.testing.assert_allclose(actual.boxes, expected.boxes, **SAME_BOXES)
    np.testing.assert_allclose(actual.vectors, expected.vectors, **SAME_VECTORS)
    assert np.mean(actual.masks != expected.masks) < 1e-3


def assert_nothing_found(found: Recognition, device: str) -> None:
    assert len(found) == 0
    assert found.boxes.shape == found.mask_boxes.shape == (0, 4)
    assert found.masks.shape[0] == found.scores.shape[0] == found.labels.shape[0] == len(found.crop_geometry) == 0
    assert found.vectors.shape == (0, recognizer(device).dimension)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_most_garments_are_found_with_the_right_class(device: str, catalogue: Catalogue, files: list[bytes]) -> None:
    found = recognized(device, files)
    scenes = [image.scene for image in (*catalogue.photographs, *catalogue.queries)]
    matched = sum(len(match_objects(found, number, scene)) for number, scene in enumerate(scenes))
    there = sum(len(scene.class_indices) for scene in scenes)
    assert found.errors == (None,) * len(files)
    assert matched >= 0.9 * there
    assert len(found) <= 1.2 * there


def test_objects_come_by_image_then_score(device: str, files: list[bytes]) -> None:
    found = recognized(device, files)
    assert np.all(np.diff(found.images) >= 0)
    assert found.scores.min() >= recognizer(device).score_threshold
    for image in range(len(files)):
        assert np.all(np.diff(found.scores[found.of_image(image)]) <= 0)


def test_mask_boxes_lie_inside_the_image(device: str, catalogue: Catalogue, files: list[bytes]) -> None:
    found = recognized(device, files)
    height, width = catalogue.photographs[0].scene.image.shape[:2]
    assert np.all(found.mask_boxes >= 0)
    assert np.all(found.mask_boxes <= [width, height, width, height])
    covered = found.masks.any(axis=(1, 2))
    assert covered.all()
    assert np.all(found.mask_boxes[covered, 2:] > found.mask_boxes[covered, :2])


def test_vectors_have_length_one(device: str, files: list[bytes]) -> None:
    found = recognized(device, files)
    assert found.vectors.shape == (len(found), recognizer(device).dimension)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-4)


def test_everything_comes_back_on_the_host(device: str, files: list[bytes]) -> None:
    found = recognized(device, files)
    for name in ("images", "boxes", "mask_boxes", "masks", "scores", "labels", "vectors"):
        array = getattr(found, name)
        assert isinstance(array, np.ndarray), name
        assert len(array) == len(found), name
    assert isinstance(found.crop_geometry.regions, np.ndarray)
    np.testing.assert_array_equal(found.crop_geometry.images, found.images)


@pytest.mark.needs_cuda
def test_both_devices_agree(files: list[bytes]) -> None:
    host, gpu = recognized("cpu", files), recognized("cuda", files)
    np.testing.assert_array_equal(host.images, gpu.images)
    for mine in range(len(host)):
        candidates = gpu.of_image(int(host.images[mine]))  # close scores may come in another order
        distances = np.abs(gpu.boxes[candidates] - host.boxes[mine]).max(axis=1)
        other = candidates[distances.argmin()]
        assert distances.min() < 1.5
        assert gpu.labels[other] == host.labels[mine]
        assert float(host.vectors[mine] @ gpu.vectors[other]) > 0.99


# --- what goes in -----------------------------------------------------------------------------------------------------


def test_a_broken_file_changes_nothing_for_the_others(device: str, files: list[bytes]) -> None:
    middle = len(files) // 2
    found = recognizer(device).recognize([*files[:middle], files[0][:2000], *files[middle:]])
    error = found.errors[middle]
    assert isinstance(error, DecodeError)
    assert [number for number, error in enumerate(found.errors) if error is not None] == [middle]
    assert len(found.of_image(middle)) == 0
    shifted = dataclasses.replace(found, images=found.images - (found.images > middle))
    alone = recognized(device, files)
    assert_same_objects(shifted, alone)
    if device == "cpu":  # ONNX Runtime computes each image of a batch alike: not one bit changes
        for name in ("boxes", "scores", "mask_boxes", "masks", "vectors"):
            np.testing.assert_array_equal(getattr(shifted, name), getattr(alone, name), err_msg=name)


def test_only_broken_files(device: str) -> None:
    found = recognizer(device).recognize(BROKEN)
    assert [error.kind for error in found.errors if error is not None] == BROKEN_KINDS
    assert_nothing_found(found, device)


def test_empty_list(device: str) -> None:
    found = recognizer(device).recognize([])
    assert found.errors == ()
    assert_nothing_found(found, device)


def test_one_image_alone_needs_no_list(device: str, catalogue: Catalogue, files: list[bytes]) -> None:
    expected = recognizer(device).recognize(files[:1])
    assert len(expected) > 0
    path = catalogue.photographs[0].path
    for source in (files[0], bytearray(files[0]), memoryview(files[0]), path, str(path)):
        assert_same_objects(recognizer(device).recognize(source), expected)


def test_an_image_batch_equals_its_files(device: str, files: list[bytes]) -> None:
    batch = decode([*files, b""], device=device)
    found = recognizer(device).recognize(batch)
    assert found.errors == batch.errors
    assert_same_objects(found, recognizer(device).recognize([*files, b""]))


def test_opened_images_equal_their_files(device: str, files: list[bytes]) -> None:
    engines = (recognizer(device).detector, recognizer(device).masker, recognizer(device).embedder)
    with_processes = Recognizer(*engines, decode_processes=1)
    sources = [*files, b""]
    for one in (recognizer(device), with_processes):
        found = one.recognize([one.open(data) for data in sources])
        assert [error and error.kind for error in found.errors] == [None] * len(files) + ["empty"]
        assert_same_objects(found, recognizer(device).recognize(sources))


def test_stream_is_the_batches_one_after_the_other(device: str, files: list[bytes]) -> None:
    parts = list(recognizer(device).stream(iter(files), batch_size=5))
    assert [len(sources) for sources, _ in parts] == [5, 5, 2]
    assert [source for sources, _ in parts for source in sources] == files
    whole = recognized(device, files)
    boxes = np.concatenate([found.boxes for _, found in parts])
    np.testing.assert_allclose(boxes, whole.boxes, **SAME_BOXES)


def test_stream_refuses_a_batch_of_nothing(device: str) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        next(recognizer(device).stream([b""], batch_size=0))


# --- times ------------------------------------------------------------------------------------------------------------


def test_stage_times(device: str, files: list[bytes]) -> None:
    times = StageTimes()
    found = recognizer(device).recognize(files, times=times)
    again = recognizer(device).recognize(files, times=times)
    assert set(times.seconds) == set(times.items) == set(times.per_second()) == STAGES
    assert all(rate > 0 for rate in times.per_second().values())
    assert times.items["decode"] == times.items["detect"] == 2 * len(files)
    assert times.items["crop"] == times.items["mask"] == times.items["embed"] == len(found) + len(again)


def test_stage_times_of_an_image_batch_have_no_decoding(device: str, files: list[bytes]) -> None:
    times = StageTimes()
    recognizer(device).recognize(decode(files[:1], device=device), times=times)
    assert set(times.seconds) == STAGES - {"decode"}


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3, 4, 5, 11])
def test_in_batches_splits_over_the_engines_largest(device: str, count: int, rng: np.random.Generator) -> None:
    crops = on(device, rng.random((count, 3, 96, 96), dtype=np.float32))
    split, whole = masker(device, (1, 2, 4)), masker(device, (1, 8, 16))
    assert split.batch is not None
    assert split.batch.max == 4
    logits = in_batches(split, crops)
    assert logits.shape == (count, 1, 96, 96)
    np.testing.assert_allclose(to_host(logits), to_host(whole(crops)), rtol=1e-3, atol=1e-3)


def test_digest_and_dimension(device: str) -> None:
    assert recognizer(device).dimension == 128
    swapped = copy.copy(recognizer(device))
    swapped.embedder = swapped.masker
    assert len(recognizer(device).digest) == 64
    assert swapped.digest != recognizer(device).digest


def with_classes(engine: Engine, classes: str) -> Any:
    """The engine, as if its file named other classes."""
    other = copy.copy(engine)
    other.metadata = {**engine.metadata, "nbvision.classes": classes}
    return other


@pytest.mark.parametrize("classes", ['["coat"]', "not JSON", "6", '{"coat": 1}'])
def test_classes_that_do_not_fit_the_detector(device: str, classes: str) -> None:
    whole = recognizer(device)
    with pytest.raises(EngineError, match="class"):
        Recognizer(with_classes(whole.detector, classes), whole.masker, whole.embedder)


def test_models_that_do_not_fit_together(device: str) -> None:
    whole = recognizer(device)
    with pytest.raises(EngineError, match="masker names 6 classes, but its output is"):
        Recognizer(whole.masker, whole.masker, whole.embedder)
    with pytest.raises(EngineError, match=r"masker takes \(320, 320\) crops, the embedder \(96, 96\)"):
        Recognizer(whole.detector, whole.detector, whole.embedder)
    with pytest.raises(EngineError, match=r"embedder gives .*; expected one output \(batch, 1, 96, 96\)"):
        Recognizer(whole.detector, whole.embedder, whole.masker)
    with pytest.raises(EngineError, match=r"masker gives .*; expected one output \(batch, any\)"):
        Recognizer(whole.detector, whole.masker, whole.masker)


def test_missing_models(device: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"detector\.onnx"):
        Recognizer.load(tmp_path, device=device)


@pytest.mark.parametrize(
    ("device", "place"),
    [("cpu", "cpu"), *(pytest.param("cuda", place, marks=pytest.mark.needs_cuda) for place in ("cuda", "pinned"))],
)
def test_no_allocation_may_break_the_road(
    device: str, place: str, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out at each place where it is asked for: the right answer or a typed error, then all is well."""
    allocate = Manager._allocate
    asked = 0

    def allocate_until(fatal: int) -> Callable[[Manager, int], Any]:
        def counted(self: Manager, size_bytes: int) -> Any:
            nonlocal asked
            if self.device == place:
                asked += 1
                if asked > fatal:
                    raise MemoryLimitError("injected")
            return allocate(self, size_bytes)

        return counted

    def check() -> None:
        found = recognizer(device).recognize(batch)
        assert found.errors == expected.errors
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.masks, expected.masks)
        np.testing.assert_allclose(found.vectors, expected.vectors, **SAME_VECTORS)

    is_jpeg = [file.startswith(b"\xff\xd8") for file in files]
    batch = [files[is_jpeg.index(True)], files[is_jpeg.index(False)]]
    expected = recognizer(device).recognize(batch)
    assert len(expected) > 0
    monkeypatch.setattr(Manager, "_allocate", allocate_until(1_000))
    with memory.source("counted"):
        check()
    failures, allocations = 0, asked
    for fatal in range(allocations):
        asked = 0
        with memory.source(f"out of memory at {fatal}"):
            with monkeypatch.context() as patch:
                patch.setattr(Manager, "_allocate", allocate_until(fatal))
                try:
                    check()
                except MemoryLimitError as error:
                    failures += "injected" in str(error)
            monkeypatch.setattr(Manager, "_allocate", allocate)
            check()
    assert 0 < failures <= allocations
