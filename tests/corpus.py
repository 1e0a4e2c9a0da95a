"""Decode every file under some folders, on each device there is, and say what became of it.

    python tests/corpus.py FOLDER... [--out verdicts.json]

For collections that are not ours to publish: PngSuite, the images of Pillow's tests, your own. Pixels are compared with
Pillow's. Exits with 1 if an error has no kind, the devices disagree on more than 1 % of the files, or pixels differ.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageOps

import nbvision as nbv
from nbvision.codecs import read_header
from nbvision.errors import DecodeError, DecodeErrorKind
from nbvision.runtime.device import cuda_unavailable_because

LIMIT_PIXELS = 50_000_000
GPU_LEVELS, GPU_MEAN = 8, 0.7  # of JPEGs on the GPU; everything else is equal


def by_pillow(data: bytes) -> Any:
    """Upright RGB, or None where Pillow refuses the file, or shows something that is not 8-bit colour."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.load()
            if image.mode[0] in "IF":
                return None
            if "exif" in image.info or image.format == "TIFF":  # and not from XMP or ImageMagick's text
                image = ImageOps.exif_transpose(image)
            image.info.pop("transparency", None)
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def verdicts(files: list[bytes], device: str) -> tuple[list[str], list[Any]]:
    """Files of any names in one batch, with and without recovery."""
    batch = nbv.decode(files, device=device, strict=True, limit_pixels=LIMIT_PIXELS)
    recovered = nbv.decode(files, device=device, recover=True, limit_pixels=LIMIT_PIXELS)
    for error in (*batch.errors, *recovered.errors, *recovered.damage):
        if error is not None and (type(error) is not DecodeError or error.kind not in get_args(DecodeErrorKind)):
            raise AssertionError(f"{error!r} is no typed error")
    pixels = [
        None if error else np.asarray(batch[i].get() if device == "cuda" else batch[i])
        for i, error in enumerate(batch.errors)
    ]
    return ["ok" if error is None else error.kind for error in batch.errors], pixels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    paths = sorted(path for folder in arguments.folders for path in folder.rglob("*") if path.is_file())
    files = [path.read_bytes() for path in paths]
    devices = ["cpu"] if cuda_unavailable_because() else ["cpu", "cuda"]
    found = {device: verdicts(files, device) for device in devices}
    unequal, unlike_pillow = [], []
    for index, (path, data) in enumerate(zip(paths, files, strict=True)):
        kinds = {device: found[device][0][index] for device in devices}
        if len(set(kinds.values())) > 1:
            unequal.append((path.name, kinds))
        expected = by_pillow(data) if "ok" in kinds.values() else None
        for device in devices:
            got = found[device][1][index]
            if got is None or expected is None or read_header(data).bits > 8:
                continue
            difference = np.abs(got.astype(int) - expected) if got.shape == expected.shape else np.array([255])
            lenient = device == "cuda" and read_header(data).format == "jpeg"
            if difference.max() > (GPU_LEVELS if lenient else 0) or difference.mean() > GPU_MEAN:
                unlike_pillow.append((path.name, device, int(difference.max()), round(float(difference.mean()), 3)))
    for device in devices:
        print(f"{device}: {len(files)} files:", dict(collections.Counter(found[device][0]).most_common()))
    print(f"verdicts differ on {len(unequal)}:", *unequal, sep="\n  ")
    print(f"pixels differ from Pillow's on {len(unlike_pillow)}:", *unlike_pillow, sep="\n  ")
    if arguments.out:
        table = {path.name: [found[device][0][index] for device in devices] for index, path in enumerate(paths)}
        arguments.out.write_text(json.dumps({"devices": devices, "verdicts": table}, indent=1) + "\n")
    return 0 if len(unequal) <= 0.01 * len(files) and not unlike_pillow else 1


if __name__ == "__main__":
    sys.exit(main())
