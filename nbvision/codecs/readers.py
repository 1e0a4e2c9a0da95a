"""Compressed images out of archives and tables, batch by batch, for :meth:`nbvision.Decoder.stream`."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, TypeAlias

from nbvision.codecs.headers import IMAGE_SUFFIXES
from nbvision.errors import DecodeError, InputError, MissingExtraError

__all__ = ["NamedBytes", "read_parquet", "read_tar"]

Path: TypeAlias = str | os.PathLike[str]


class NamedBytes(bytes):
    """The bytes of a file with the name that it has where it comes from; wherever bytes are taken, it is.

    Attributes
    ----------
    name : str
    """

    name: str

    def __new__(cls, data: bytes, name: str) -> NamedBytes:
        named = super().__new__(cls, data)
        named.name = name
        return named


def read_tar(
    sources: Path | IO[bytes] | Iterable[Path | IO[bytes]],
    *,
    batch_size: int,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
) -> Iterator[list[NamedBytes]]:
    """Read the images of tar files, such as WebDataset's shards, from front to back, a batch at a time.

    Parameters
    ----------
    sources : path, binary file, or several of them
        Read once and never sought in, so pipes and sockets will do. Compressed archives are known by their content.
    batch_size : int
        Images of a batch; the last one may have fewer. A batch may hold images of two archives.
    suffixes : sequence of str
        How the names of members end that are read, whatever the case; ``("",)`` reads them all.

    Yields
    ------
    list of NamedBytes
        In the order of the archives. ``name`` is that of the member; errors of decoding have it as their ``source``.

    Raises
    ------
    InputError
        For a ``batch_size`` that is no positive integer.
    DecodeError
        Of kind ``"unreadable"`` if an archive cannot be opened, or ``"truncated"`` or ``"corrupt"`` if it is damaged,
        after the images before the damage; ``source`` is the archive.
    """
    _check_batch_size(batch_size)
    several = [sources] if isinstance(sources, (str, os.PathLike)) or hasattr(sources, "read") else sources
    endings = tuple(suffix.lower() for suffix in suffixes)
    return _in_batches(itertools.chain.from_iterable(_members(source, endings) for source in several), batch_size)


def _members(source: Any, endings: tuple[str, ...]) -> Iterator[NamedBytes]:
    is_path = isinstance(source, (str, os.PathLike))
    name = os.fsdecode(source) if is_path else str(getattr(source, "name", "a stream"))
    try:
        with tarfile.open(os.fsdecode(source) if is_path else None, "r|*", None if is_path else source) as archive:
            for member in archive:
                vars(archive)["members"].clear()  # it would keep every header of the archive
                if not member.isfile() or not member.name.lower().endswith(endings):
                    continue
                file = archive.extractfile(member)
                data = file.read() if file is not None else b""
                if len(data) < member.size:
                    raise DecodeError(f"the archive ends inside {member.name}", kind="truncated", source=name)
                yield NamedBytes(data, member.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DecodeError(f"the archive cannot be read: {reason}", kind="unreadable", source=name) from error
    except (tarfile.TarError, EOFError) as error:
        kind: Any = "truncated" if "unexpected end" in str(error) else "corrupt"
        raise DecodeError(f"the archive is damaged: {error}", kind=kind, source=name) from error


def read_parquet(
    paths: Path | Iterable[Path], *, column: str, batch_size: int, name_column: str | None = None
) -> Iterator[list[NamedBytes]]:
    """Read compressed images from a column of Parquet files, a batch at a time.

    Parameters
    ----------
    paths : path, or several of them
    column : str
        Binary, or a struct with a binary field ``bytes`` and perhaps a ``path``, as Hugging Face writes images. Null is
        an image of no bytes, which cannot be decoded.
    batch_size : int
        Images of a batch; the last one may have fewer.
    name_column : str, optional
        Whose values name the images; default: the struct's ``path``, else the file and the row.

    Yields
    ------
    list of NamedBytes
        In the order of the rows.

    Raises
    ------
    InputError
        For a ``batch_size`` that is no positive integer, or a column that is not there or holds no bytes.
    MissingExtraError
        If pyarrow is not installed.
    DecodeError
        Of kind ``"unreadable"`` or ``"corrupt"``, with the file as ``source``, after the images before it.
    """
    _check_batch_size(batch_size)
    try:
        import pyarrow.parquet  # noqa: F401  (asked here, not at the first batch)
    except ImportError as error:
        raise MissingExtraError("pyarrow", extra="parquet", needed_for="read_parquet()") from error
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    rows = (_rows(os.fsdecode(path), column, name_column, batch_size) for path in several)
    return _in_batches(itertools.chain.from_iterable(rows), batch_size)


def _rows(path: str, column: str, name_column: str | None, batch_size: int) -> Iterator[NamedBytes]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            wanted = [column, *([name_column] if name_column else [])]
            missing = [name for name in wanted if name not in table.schema_arrow.names]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}; expected one of {table.schema_arrow.names}")
            kind = table.schema_arrow.field(column).type
            if pyarrow.types.is_struct(kind):
                kind = next((field.type for field in kind if field.name == "bytes"), kind)
            if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
                raise InputError(
                    f"column {column!r} of {path} is {kind}; expected bytes, or a struct of bytes and path"
                )
            row = 0
            for batch in table.iter_batches(batch_size, columns=wanted):
                names = batch.column(name_column).to_pylist() if name_column else [None] * len(batch)
                for value, name in zip(batch.column(column).to_pylist(), names, strict=True):
                    is_struct = isinstance(value, dict)
                    data, own = (value["bytes"], value.get("path")) if is_struct else (value, None)
                    chosen = next((each for each in (name, own) if each is not None), f"{path}[{row}]")
                    yield NamedBytes(data or b"", str(chosen))
                    row += 1
    except OSError as error:
        raise DecodeError(f"the table cannot be read: {error}", kind="unreadable", source=path) from error
    except pyarrow.ArrowException as error:
        raise DecodeError(f"the table is damaged: {error}", kind="corrupt", source=path) from error


def _in_batches(images: Iterator[NamedBytes], size: int) -> Iterator[list[NamedBytes]]:
    """Lists of ``size``; an error comes after the images before it."""
    batch: list[NamedBytes] = []
    try:
        for image in images:
            batch.append(image)
            if len(batch) == size:
                yield batch
                batch = []
    except (DecodeError, InputError):
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected a positive integer")
