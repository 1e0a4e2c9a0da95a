"""Compressed images before they are pixels: bytes, what their header says, and what the host makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nbvision.codecs import gpu_decode, host, recovery
from nbvision.codecs._processes import HostJob, Processes
from nbvision.codecs.headers import Header, as_bytes, read_header
from nbvision.errors import DecodeError
from nbvision.image import CHANNELS
from nbvision.runtime.device import Device

__all__ = ["CompressedImage", "File", "How", "OpenImage", "decode_on_host", "open_file", "read_file", "read_image"]


@dataclass(frozen=True, slots=True)
class How:
    """How images are decoded, as far as it matters which of them the host decodes, and to what."""

    wanted: host.Wanted
    device: Device
    recover: bool = False

    def is_for_gpu(self, image: CompressedImage) -> bool:
        """Whether the GPU shall try; what is known to be damaged is the host's."""
        if self.device != "cuda" or image.damage is not None:
            return False
        wanted, header = self.wanted, image.header
        return wanted.reduce == 1 and gpu_decode.takes(header, wanted.color) and not wanted.converts(header)

    def shape(self, image: CompressedImage) -> tuple[int, int, int]:
        """(H, W, C) of the image's pixels."""
        return *self.wanted.size(image.header), CHANNELS[self.wanted.color]


@dataclass(slots=True, eq=False)
class CompressedImage:
    """One image on its way through a batch, from bytes to pixels."""

    data: bytes
    header: Header
    source: str | None
    offset_bytes: int = 0  # in the batch's buffer: where the pixels shall be
    error: DecodeError | None = None
    damage: DecodeError | None = None  # of an image that shall be recovered: what is wrong with it
    job: HostJob | None = None  # of a process that decodes it


# --- bytes and headers -----------------------------------------------------------------------------------------------


class File(NamedTuple):
    """Compressed bytes, and what errors call them."""

    data: bytes
    source: str | None


def read_file(source: Any) -> File | DecodeError:
    """Bytes as they are, or a path's; what is wrong with it is returned."""
    if type(source) is bytes:  # most are
        return File(source, None)
    if not isinstance(source, (str, os.PathLike)):
        return File(as_bytes(source), getattr(source, "name", None))
    path = os.fsdecode(source)
    try:
        with open(path, "rb") as file:
            return File(file.read(), path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        return DecodeError(f"the file cannot be read: {reason}", kind="unreadable", source=path)


def read_image(source: Any, limit_pixels: int, recover: bool = False) -> CompressedImage | DecodeError:
    """Read a file and its header; what is wrong with them is returned."""
    file = read_file(source)
    return open_file(file, None, limit_pixels, recover) if isinstance(file, File) else file


def open_file(file: File, header: Header | None, limit_pixels: int, recover: bool) -> CompressedImage | DecodeError:
    """The image, if its header, which may have been read, says that all is well; else what is wrong."""
    data, source = file
    try:
        header = header or read_header(data)
        _check_size(header, limit_pixels)
        if header.complete:
            return CompressedImage(data, header, source)
        if not recover:
            raise _truncated(header)
    except DecodeError as error:
        return _bare(error, source)
    return CompressedImage(data, header, source, damage=_bare(_truncated(header), source))


def _check_size(header: Header, limit_pixels: int) -> None:
    if header.pixels > limit_pixels:
        raise DecodeError(
            f"the header says {header.height} x {header.width} = {header.pixels} pixels; the limit is {limit_pixels}. "
            "Raise limit_pixels if you trust the file",
            kind="too_large",
        )


def _truncated(header: Header) -> DecodeError:
    return DecodeError(
        f"this {header.format.upper()} of {header.height} x {header.width} pixels ends before its last pixel",
        kind="truncated",
    )


def _bare(error: DecodeError, path: str | None) -> DecodeError:
    """The error without its traceback, whose frames would keep the file and the buffers as long as the error lives."""
    return DecodeError(str(error), kind=error.kind, source=path, valid_rows=error.valid_rows)


# --- pixels of the host ----------------------------------------------------------------------------------------------


def decode_on_host(image: CompressedImage, out: Any, how: How) -> None:
    """Decode into ``out``, (H, W, C) uint8; what is wrong is the image's ``error``, or its ``damage``."""
    try:
        if image.damage is None:
            try:
                host.decode_into(out, image.data, image.header, wanted=how.wanted)
                return
            except DecodeError as error:
                if not how.recover or error.kind not in ("truncated", "corrupt"):
                    raise
                image.damage = _bare(error, image.source)
        out[:] = 0  # not what the memory held before
        rows = recovery.decode_into(out, image.data, image.header, wanted=how.wanted, damage=image.damage)
        image.damage.valid_rows = rows
    except DecodeError as error:
        image.error = image.damage or _bare(error, image.source)


class OpenImage:
    """A compressed image whose header is read, and which a process decodes if that is the host's to do.

    :meth:`nbvision.Decoder.open` makes it. Whatever takes compressed images takes it in their place, from any thread
    and as often as wanted.

    Attributes
    ----------
    header : Header or None
        None if there is none to be read.
    error : DecodeError or None
        What is known to be wrong by the header. Damage inside is found when a batch is decoded.
    nbytes : int
        Bytes of the file.
    """

    def __init__(self, source: Any, how: How, by: Processes | None, *, limit_pixels: int) -> None:
        self.how = how
        self.header: Header | None = None
        self.error: DecodeError | None = None
        self.nbytes = 0
        found = read_image(source, limit_pixels, how.recover)
        if isinstance(found, DecodeError):
            self.error = found
            return
        self._image, self.header, self.nbytes = found, found.header, len(found.data)
        if by is not None and not how.is_for_gpu(found):
            found.job = by.begin(found, how)

    def __repr__(self) -> str:
        if self.header is None:
            return f"OpenImage({self.error!r})"
        height, width = self.how.wanted.size(self.header)
        return f"OpenImage({self.header.format}, {height} x {width})"

    @property
    def is_decoded(self) -> bool:
        """Whether a process has decoded it, or has found what is wrong inside."""
        return self.error is None and self._image.job is not None and self._image.job.is_decoded

    def add_done_callback(self, callback: Callable[[OpenImage], Any]) -> None:
        """Call ``callback(image)`` once there is nothing more to wait for before a batch, from any thread.

        That is when a process has decoded it, at once if none does, and after half a second in any case.
        """
        if self.error is not None or self._image.job is None:
            callback(self)
        else:
            self._image.job.add_done_callback(lambda: callback(self))

    def for_batch(self, limit_pixels: int) -> CompressedImage | DecodeError:
        """The image as a batch wants it, which may have a limit of its own, or what is wrong with it."""
        if self.error is not None:
            return self.error
        try:
            _check_size(self._image.header, limit_pixels)
        except DecodeError as error:
            return _bare(error, self._image.source)
        damage = self._image.damage  # whose valid_rows each batch writes
        return replace(self._image, damage=damage and _bare(damage, self._image.source))
