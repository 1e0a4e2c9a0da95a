"""read_parquet: columns of bytes and of structs, names, nulls, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_readers import png

import nbvision as nbv
from nbvision.errors import DecodeError, InputError


def write(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.fixture
def tables(tmp_path: Path) -> list[Path]:
    struct = [{"bytes": png(n), "path": f"{n}.png" if n else None} for n in range(3)]
    return [
        write(tmp_path / "plain.parquet", image=[png(n) for n in range(5)], key=[f"key-{n}" for n in range(5)]),
        write(tmp_path / "struct.parquet", image=[*struct, None]),
    ]


def test_a_column_of_bytes(tables: list[Path]) -> None:
    batches = list(nbv.read_parquet(tables[0], column="image", batch_size=3))
    assert [len(batch) for batch in batches] == [3, 2]
    assert [bytes(item) for batch in batches for item in batch] == [png(n) for n in range(5)]
    assert batches[1][1].name == f"{tables[0]}[4]"
    (batch,) = nbv.read_parquet(tables[0], column="image", name_column="key", batch_size=9)
    assert [item.name for item in batch] == [f"key-{n}" for n in range(5)]


def test_a_column_of_structs(tables: list[Path], device: Any) -> None:
    (batch,) = nbv.read_parquet([tables[1]], column="image", batch_size=9)
    assert [item.name for item in batch] == [f"{tables[1]}[0]", "1.png", "2.png", f"{tables[1]}[3]"]
    errors = nbv.decode(batch, device=device).errors
    assert [error and error.kind for error in errors] == [None, None, None, "empty"]


def test_several_tables_in_order(tables: list[Path]) -> None:
    batches = list(nbv.read_parquet(tables, column="image", batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert bytes(batches[1][1]) == png(0)


def test_what_is_refused(tables: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'picture'"):
        list(nbv.read_parquet(tables[0], column="picture", batch_size=1))
    with pytest.raises(InputError, match=r"column 'key' of .* is string"):
        list(nbv.read_parquet(tables[0], column="key", batch_size=1))
    with pytest.raises(InputError, match="batch_size is 0"):
        nbv.read_parquet(tables[0], column="image", batch_size=0)
    (tmp_path / "text.parquet").write_bytes(b"no table at all")
    batches = nbv.read_parquet([tables[0], tmp_path / "text.parquet"], column="image", batch_size=4)
    assert [len(next(batches)), len(next(batches))] == [4, 1]
    with pytest.raises(DecodeError) as caught:
        next(batches)
    assert (caught.value.kind, caught.value.source) == ("corrupt", str(tmp_path / "text.parquet"))
    with pytest.raises(DecodeError) as caught:
        list(nbv.read_parquet(tmp_path / "nowhere.parquet", column="image", batch_size=4))
    assert caught.value.kind == "unreadable"
