"""The package as a whole: light to import, its public names in order, its house rules kept."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest

import nbvision


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy():
    loaded = json.loads(run_python("import nbvision, sys, json; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"numba", "cupy", "cuda", "torch", "onnxruntime", "tensorrt", "faiss", "PIL", "cv2", "rich", "numpy"}
    assert not heavy & {name.split(".")[0] for name in loaded}


def test_import_is_quick():
    """Of several tries the best, so that a busy machine does not decide."""
    code = "import time; t = time.perf_counter(); import nbvision; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_public_names_are_sorted_and_there():
    assert nbvision.__all__ == sorted(nbvision.__all__)
    for name in nbvision.__all__:
        value = getattr(nbvision, name)
        assert value.__doc__, name
    assert set(nbvision.__all__) <= set(dir(nbvision))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'letterboxed'"):
        _ = nbvision.letterboxed


def test_error_tree_is_the_one_drawn():
    from nbvision import errors

    for name in errors.__all__:
        value = getattr(errors, name)
        if isinstance(value, type):
            assert issubclass(value, errors.NbvisionError)
            assert name in (errors.__doc__ or "")


@pytest.mark.parametrize(
    "error",
    [
        nbvision.DecodeError("cut off", kind="truncated", source="a.jpg"),
        nbvision.MissingExtraError("cupy", extra="cuda13", needed_for="a kernel"),
        nbvision.InputError("wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_copy_and_pickle(error):
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__dict__ == error.__dict__


def test_a_kernel_on_disk_is_found_without_numba() -> None:
    """Numba takes a quarter of a second to import, which a process with a warm cache need not pay at its first call."""
    program = """
import sys
import nbvision
from nbvision_kernels import catalog, codes

nbvision.Preprocess((64, 64), dtype="float16", mean=0.5)
nbvision.Preprocess((64, 64), parity="pil", interpolation="lanczos")
plan = codes.LINEAR_EXACT, codes.NCHW, codes.STORE_F16
described = [catalog.preprocess_kernel(*plan), catalog.preprocess_kernel(*plan, source_type=codes.SOURCE_NV12)]
described += [catalog.resample_kernel(*plan[1:]), catalog.window_kernel(codes.CV2_AREA, *plan[1:])]
described += [catalog.warp_plan_kernel(codes.WARP_LINEAR, 3, *plan[1:]), catalog.suppress_kernel(soft=True)]
described += [catalog.image_regions_kernel(), catalog.pointwise_kernel(codes.THRESHOLD, 3, 3)]
assert len({(kernel.name, kernel.entry) for kernel in described}) == len(described)
print("numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
