"""An index on disk.

A directory::

    index.json                    the manifest: what the index is; name, size and digest of the two files
    vectors-<generation>.faiss    the FAISS index
    ids-<generation>.json         the string ids, in the order of the FAISS index's vectors
    lock                          held by whoever saves

Every save writes two new files and then replaces the manifest in one step, so a crash at any point leaves
the previous index whole.  Files that the manifest does not name are swept by the save that left them, or by
the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nbvision.errors import SearchError
from nbvision.search._faiss import require_faiss

__all__ = ["FileRecord", "Manifest", "read_manifest", "read_snapshot", "write_snapshot"]

FORMAT = "nbvision-index"
VERSION = 1
MANIFEST_NAME = "index.json"

_DATA_NAME = re.compile(r"(vectors-[0-9a-f]{16}\.faiss|ids-[0-9a-f]{16}\.json)(\.partial)?")
_CHUNK_BYTES = 1 << 20
_REBUILD = "build the index again from its embeddings, or restore the directory from a copy"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file beside it."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an index on disk is."""

    dimension: int
    metric: str
    model: str
    count: int
    vectors: FileRecord
    ids: FileRecord


def write_snapshot(directory: Path, *, vectors: Any, ids: list[str], dimension: int, metric: str, model: str) -> None:
    """Make ``directory`` hold this index instead of the one it held, in one step."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _sole_writer(directory):
            try:
                generation = secrets.token_hex(8)
                manifest = Manifest(
                    dimension=dimension,
                    metric=metric,
                    model=model,
                    count=len(ids),
                    vectors=_write_vectors(directory / f"vectors-{generation}.faiss", vectors),
                    ids=_write_file(
                        directory / f"ids-{generation}.json",
                        lambda write: write(json.dumps(ids, indent=0).encode()),
                    ),
                )
                _replace_manifest(directory, manifest)
            finally:
                _sweep(directory)
    except OSError as error:
        raise SearchError(
            f"{directory}: the index cannot be saved: {error}; the directory holds the previous index, if "
            f"there was one, or this one, whole; make room or give write access, and save again"
        ) from error


def read_manifest(directory: Path) -> Manifest:
    """The manifest in ``directory``; SearchError if there is none that this version reads."""
    path = directory / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise SearchError(
            f"{path}: cannot be read: {error.strerror}; expected a directory that Index.save wrote; "
            f"check the path, or build and save the index first"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SearchError(f"{path}: is truncated or no JSON ({error}); {_REBUILD}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SearchError(f"{path}: is not the manifest of an index: expected format {FORMAT!r}; check the path")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise SearchError(
            f"{path}: has format version {version}, expected at most {VERSION}: a newer nbvision wrote it; "
            f"upgrade nbvision, or build the index again with this one"
        )
    manifest = _parse_manifest(content) if version == VERSION else None
    if manifest is None:
        raise SearchError(f"{path}: has missing or impossible values; {_REBUILD}")
    return manifest


def read_snapshot(directory: Path, manifest: Manifest) -> tuple[Any, list[str]]:
    """The FAISS index and the string ids that ``manifest`` names; SearchError unless both are whole."""
    ids = _read_ids(directory / manifest.ids.name, manifest)
    vectors = _read_vectors(directory / manifest.vectors.name, manifest)
    return vectors, ids


@contextlib.contextmanager
def _sole_writer(directory: Path) -> Iterator[None]:
    """Hold the directory against other saves, of this process and of others; a crash lets go of it."""
    with open(directory / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_vectors(path: Path, vectors: Any) -> FileRecord:
    faiss = require_faiss()
    return _write_file(path, lambda write: faiss.write_index(vectors, faiss.PyCallbackIOWriter(write)))


def _write_file(path: Path, dump: Callable[[Callable[[bytes], int]], object]) -> FileRecord:
    """Let ``dump`` write a new file, and see it on the disk before returning."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def write(chunk: bytes) -> int:
            digest.update(chunk)
            return file.write(chunk)

        dump(write)
        file.flush()
        os.fsync(file.fileno())
        return FileRecord(path.name, file.tell(), digest.hexdigest())


def _replace_manifest(directory: Path, manifest: Manifest) -> None:
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    # Named like a data file, so that _sweep finds it after a crash.
    partial = directory / f"{manifest.ids.name}.partial"
    _write_file(partial, lambda write: write(json.dumps(content, indent=2).encode()))
    _sync_directory(directory)  # the new names must be on the disk before the manifest speaks of them
    os.replace(partial, directory / MANIFEST_NAME)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Remove the data files that the manifest does not name; none while the manifest cannot be read."""
    named: set[str] = set()
    if (directory / MANIFEST_NAME).exists():
        try:
            manifest = read_manifest(directory)
        except SearchError:
            return
        named = {manifest.vectors.name, manifest.ids.name}
    for path in directory.iterdir():
        if _DATA_NAME.fullmatch(path.name) and path.name not in named:
            with contextlib.suppress(OSError):  # the next save tries again
                path.unlink()


def _parse_manifest(content: dict[str, Any]) -> Manifest | None:
    """The manifest, or None if a value is missing or impossible."""
    dimension, count = content.get("dimension"), content.get("count")
    metric, model = content.get("metric"), content.get("model")
    vectors, ids = _parse_record(content.get("vectors")), _parse_record(content.get("ids"))
    if type(dimension) is not int or type(count) is not int or dimension < 1 or count < 0:
        return None
    if not isinstance(metric, str) or not isinstance(model, str) or vectors is None or ids is None:
        return None
    return Manifest(dimension, metric, model, count, vectors, ids)


def _parse_record(content: Any) -> FileRecord | None:
    if not isinstance(content, dict):
        return None
    name, size_bytes, sha256 = (content.get(key) for key in ("name", "size_bytes", "sha256"))
    if not isinstance(name, str) or not _DATA_NAME.fullmatch(name):  # a name, never a path out of the directory
        return None
    if type(size_bytes) is not int or not isinstance(sha256, str):
        return None
    return FileRecord(name, size_bytes, sha256)


@contextlib.contextmanager
def _open_whole(path: Path, record: FileRecord) -> Iterator[BinaryIO]:
    """The file, open at its start, once its size and digest are what the manifest says."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; only the opening is inside this try
    except OSError as error:
        raise SearchError(f"{path}: cannot be read: {error.strerror}; {_REBUILD}") from error
    with file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes != record.size_bytes:
            raise SearchError(f"{path}: has {size_bytes} bytes, expected {record.size_bytes}; {_REBUILD}")
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != record.sha256:
            raise SearchError(
                f"{path}: has SHA-256 {digest.hexdigest()}, expected {record.sha256}: its content changed; {_REBUILD}"
            )
        file.seek(0)
        yield file


def _read_ids(path: Path, manifest: Manifest) -> list[str]:
    with _open_whole(path, manifest.ids) as file:
        try:
            ids = json.load(file)
        except (ValueError, RecursionError) as error:
            raise SearchError(f"{path}: is no JSON ({error}); {_REBUILD}") from error
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise SearchError(f"{path}: is not a list of strings; {_REBUILD}")
    if not len(ids) == len(set(ids)) == manifest.count:
        raise SearchError(
            f"{path}: holds {len(ids)} ids, {len(set(ids))} different, expected {manifest.count} different; {_REBUILD}"
        )
    return ids


def _read_vectors(path: Path, manifest: Manifest) -> Any:
    faiss = require_faiss()
    with _open_whole(path, manifest.vectors) as file:
        try:
            vectors = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        except RuntimeError as error:
            raise SearchError(f"{path}: FAISS {faiss.__version__} cannot read it ({error}); {_REBUILD}") from error
    if not isinstance(vectors, faiss.IndexIDMap2):
        raise SearchError(f"{path}: is a FAISS {type(vectors).__name__}, expected an IndexIDMap2; {_REBUILD}")
    if (vectors.ntotal, vectors.d) != (manifest.count, manifest.dimension):
        raise SearchError(
            f"{path}: holds {vectors.ntotal} vectors of dimension {vectors.d}, expected {manifest.count} of "
            f"dimension {manifest.dimension}; {_REBUILD}"
        )
    return vectors
