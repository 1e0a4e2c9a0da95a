"""read_tar: order, names, batches, memory, damage; and through a Decoder."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference import to_host

import nbvision as nbv
from nbvision.codecs.readers import NamedBytes
from nbvision.errors import DecodeError, InputError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (value + 1, 5), (value, 2, 3)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    first = {f"{n:03}.{end}": png(n) if end == "png" else b"7" for n in range(5) for end in ("png", "cls", "json")}
    return [
        shard(tmp_path / "a.tar", first),
        shard(tmp_path / "b.tar.gz", {"b/005.PNG": png(5), "b/006.jpg": b"not an image"}, "w:gz"),
    ]


def names(batches: Any) -> list[list[str]]:
    return [[item.name for item in batch] for batch in batches]


def test_batches_in_order(shards: list[Path]) -> None:
    batches = list(nbv.read_tar(shards, batch_size=3))
    assert names(batches) == [
        ["000.png", "001.png", "002.png"], ["003.png", "004.png", "b/005.PNG"], ["b/006.jpg"],
    ]  # fmt: skip
    assert [bytes(item) for item in batches[0]] == [png(n) for n in range(3)]
    assert names(nbv.read_tar(shards[0], batch_size=2, suffixes=[".cls"])) == [
        ["000.cls", "001.cls"],
        ["002.cls", "003.cls"],
        ["004.cls"],
    ]
    assert len(next(nbv.read_tar(shards[0], batch_size=99, suffixes=("",)))) == 15


def test_through_a_decoder(shards: list[Path], device: Any) -> None:
    with nbv.Decoder(device=device) as decoder:
        for files, images in decoder.stream(nbv.read_tar(shards, batch_size=4)):
            for file, error, index in zip(files, images.errors, range(4), strict=False):
                if file.name == "b/006.jpg":
                    assert error is not None
                    assert (error.kind, error.source) == ("not_an_image", "b/006.jpg")
                else:
                    number = int(file.name[-7:-4])
                    assert to_host(images[index])[0, 0].tolist() == [number, 2, 3]
                    assert images.sizes[index].tolist() == [5, number + 1]


def test_pipes_are_read_as_they_come(shards: list[Path]) -> None:
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(shards[0].read_bytes())

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb") as pipe:
        assert names(nbv.read_tar(pipe, batch_size=5)) == [[f"{n:03}.png" for n in range(5)]]
    thread.join()


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = shard(tmp_path / "large.tar", {f"{n}.png": bytes(200_000) for n in range(50)})

    class Counted(io.FileIO):
        count = 0

        def read(self, size: int = -1) -> Any:
            data = super().read(size)
            self.count += len(data)
            return data

    with Counted(path) as file:
        batches = nbv.read_tar(file, batch_size=2)
        assert file.count == 0
        next(batches)
        assert file.count < 800_000


def test_what_came_before_the_damage_is_delivered(shards: list[Path], tmp_path: Path) -> None:
    whole = shards[0].read_bytes()
    middle = whole.index(png(3)) + 20
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:middle])
    batches = nbv.read_tar(cut, batch_size=2)
    assert names([next(batches), next(batches)]) == [["000.png", "001.png"], ["002.png"]]
    with pytest.raises(DecodeError, match=r"cut\.tar") as caught:
        next(batches)
    assert (caught.value.kind, caught.value.source) == ("truncated", str(cut))


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(b"<html>404 Not Found</html>" * 100)
    with pytest.raises(DecodeError, match="damaged") as caught:
        list(nbv.read_tar(tmp_path / "text.tar", batch_size=1))
    assert caught.value.kind == "corrupt"
    with pytest.raises(DecodeError, match="nowhere") as caught:
        list(nbv.read_tar(tmp_path / "nowhere.tar", batch_size=1))
    assert caught.value.kind == "unreadable"


def test_every_cut_is_an_error_or_the_end(shards: list[Path], tmp_path: Path) -> None:
    for path in shards:
        whole = path.read_bytes()
        wanted = [bytes(item) for batch in nbv.read_tar(path, batch_size=1) for item in batch]
        for size in range(0, len(whole), 211):
            (tmp_path / "cut").write_bytes(whole[:size])
            seen: list[NamedBytes] = []
            kind = "none"
            try:
                for batch in nbv.read_tar(tmp_path / "cut", batch_size=1):
                    seen += batch
            except DecodeError as error:
                kind = error.kind
            assert kind in ("none", "truncated", "corrupt")
            assert all(bytes(item) in wanted for item in seen)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, None])
def test_batch_sizes_that_are_none(batch_size: Any) -> None:
    with pytest.raises(InputError, match="batch_size is"):
        nbv.read_tar("a.tar", batch_size=batch_size)


def test_named_bytes_are_bytes() -> None:
    named = NamedBytes(b"abc", "x.png")
    assert named == b"abc"
    assert named.name == "x.png"
    assert np.frombuffer(named, np.uint8).tolist() == [97, 98, 99]
