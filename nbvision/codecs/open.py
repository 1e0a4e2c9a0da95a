"""Compressed images before they are pixels: bytes, what their header says, and what the host makes of them."""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

from nbvision.codecs import gpu_decode, host, recovery
from nbvision.codecs._threads import begin
from nbvision.codecs.headers import Header, as_bytes, read_header
from nbvision.errors import DecodeError
from nbvision.image import CHANNELS
from nbvision.runtime import memory
from nbvision.runtime.device import Device, own_stream

__all__ = ["Allowance", "CompressedImage", "How", "OpenImage", "decode_on_host", "read_image"]


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
    ahead: OpenImage | None = None  # whose host pixels it shall have


# --- bytes and headers -----------------------------------------------------------------------------------------------


def read_image(source: Any, limit_pixels: int, recover: bool = False) -> CompressedImage | DecodeError:
    """Read a file and its header; what is wrong with them is returned."""
    is_path = isinstance(source, (str, os.PathLike))
    path = os.fsdecode(source) if is_path else getattr(source, "name", None)
    try:
        data = _read_file(os.fsdecode(source)) if is_path else as_bytes(source)
        header = read_header(data)
        _check_size(header, limit_pixels)
        damage = None if header.complete else _truncated(header)
        if damage is not None and not recover:
            raise damage
    except DecodeError as error:
        return _bare(error, path)
    return CompressedImage(data, header, path, damage=damage and _bare(damage, path))


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DecodeError(f"the file cannot be read: {reason}", kind="unreadable") from error


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
        rows = recovery.decode_into(out, image.data, image.header, wanted=how.wanted, damage=image.damage)
        image.damage.valid_rows = rows
    except DecodeError as error:
        image.error = image.damage or _bare(error, image.source)


class Allowance:
    """Bytes of pixels that images may hold, together, ahead of their batches."""

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes
        self._changing = threading.RLock()  # a finalizer may run while it is held

    def take(self, holder: object, size_bytes: int) -> bool:
        """Whether so much is left for an object, which then has it for as long as it lives."""
        with self._changing:
            if size_bytes > self._left_bytes:
                return False
            self._left_bytes -= size_bytes
        weakref.finalize(holder, self._give_back, size_bytes).atexit = False
        return True

    def _give_back(self, size_bytes: int) -> None:
        with self._changing:
            self._left_bytes += size_bytes


class OpenImage:
    """A compressed image whose header is read, and which a thread decodes if that is the host's to do.

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

    def __init__(
        self, source: Any, how: How, allowance: Allowance, *, limit_pixels: int, device_id: int | None
    ) -> None:
        self.how = how
        self.header: Header | None = None
        self.error: DecodeError | None = None
        self.nbytes = 0
        self.is_decoded = False  # the host's part
        self._deciding = threading.Lock()
        self._pixels: tuple[memory.Buffer, Any] | None = None
        found = read_image(source, limit_pixels, how.recover)
        if isinstance(found, DecodeError):
            self.error = found
            return
        self._image, self.header, self.nbytes = found, found.header, len(found.data)
        # Beyond what may be ahead, its batch decodes it.
        self._is_ahead = not how.is_for_gpu(found) and allowance.take(self, math.prod(how.shape(found)))
        if self._is_ahead:
            # In the caller's context: memory counts as of its source.
            begin(contextvars.copy_context().run, _decode_if_wanted, weakref.ref(self), device_id)

    def __repr__(self) -> str:
        if self.header is None:
            return f"OpenImage({self.error!r})"
        height, width = self.how.wanted.size(self.header)
        return f"OpenImage({self.header.format}, {height} x {width})"

    def for_batch(self, limit_pixels: int) -> CompressedImage | DecodeError:
        """The image as a batch wants it, which may have a limit of its own, or what is wrong with it."""
        if self.error is not None:
            return self.error
        try:
            _check_size(self._image.header, limit_pixels)
        except DecodeError as error:
            return _bare(error, self._image.source)
        return replace(self._image, ahead=self if self._is_ahead else None)

    def decode(self) -> None:
        """Decode what is the host's, or wait until another thread has."""
        with self._deciding:
            if self.is_decoded:
                return
            shape = self.how.shape(self._image)
            buffer = memory.acquire(math.prod(shape), device="pinned" if self.how.device == "cuda" else "cpu")
            pixels = buffer.view(shape)
            decode_on_host(self._image, pixels, self.how)
            if self._image.error is None:
                self._pixels = buffer, pixels
            self.is_decoded = True

    def give(self, image: CompressedImage) -> Any:
        """The host's pixels for a batch's image, which gets to know what is wrong; None if there are none.

        On CUDA they are for CuPy's current stream to copy.
        """
        self.decode()
        image.error, image.damage = self._image.error, self._image.damage
        if self._pixels is None:
            return None
        buffer, pixels = self._pixels
        buffer.record_stream()
        return pixels


def _decode_if_wanted(reference: weakref.ref[OpenImage], device_id: int | None) -> None:
    image = reference()
    if image is not None:  # or it was given up, and nobody waits for it
        with contextlib.nullcontext() if device_id is None else own_stream(device_id):
            image.decode()
