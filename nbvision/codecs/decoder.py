"""Decoding for services: options set once, batches under way while the caller does something else."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nbvision.codecs import headers, png
from nbvision.codecs._processes import processes as shared_processes
from nbvision.codecs._threads import ahead
from nbvision.codecs.decode import LIMIT_PIXELS, Source, as_items, check_options, decode_items, how_to_decode
from nbvision.codecs.open import OpenImage
from nbvision.errors import InputError
from nbvision.image import Color, ImageBatch
from nbvision.runtime.device import Device, array_module, available_cores, own_stream

__all__ = ["Decoder"]

_WORKERS_ON_CUDA = 2  # one reads headers while the other has its turn on the JPEG engine


class Decoder:
    """Decodes batches in threads of its own; any thread may hand in work, and wait for it or not.

    Parameters
    ----------
    color, background, srgb, device, limit_pixels, recover, strict, deterministic, reduce, threads
        As :func:`nbvision.decode` takes them.
    workers : int, optional
        Batches that are decoded at the same time. Default: 2 on CUDA, where they take turns on the JPEG engine, and one
        for each core on the CPU, where single images come from many callers.
    processes : int
        Processes that decode what is the host's in place of threads of this one; 0, the default, has none. Their Python
        does not wait for this one's, and a file that ends a process is an error like any other; docs/codecs.md says
        what they bring. Each takes 70 MB of its own. Decoders of a process that ask for the same share theirs, which
        end with the last of them. Linux only.
    shared_bytes : int
        Of files and pixels that the processes may have under way, together. What finds no room, or would take more than
        a quarter of it, is decoded by threads.

    Raises
    ------
    InputError
        For options that :func:`nbvision.decode` does not take, ``workers`` that are no positive integer, negative
        ``processes``, or ``shared_bytes`` that are not positive.
    DeviceError, MissingExtraError
        If the device cannot be used, or there can be no processes.

    Notes
    -----
    Threads start with the first work and end with :meth:`close`, at the end of a ``with``, or with the object. A forked
    child starts threads of its own.
    """

    def __init__(
        self,
        *,
        color: Color = "rgb",
        background: tuple[int, int, int] | None = None,
        srgb: bool = False,
        device: Device | None = None,
        limit_pixels: int = LIMIT_PIXELS,
        recover: bool = False,
        strict: bool = False,
        deterministic: bool = False,
        reduce: int = 1,
        threads: int | None = None,
        workers: int | None = None,
        processes: int = 0,
        shared_bytes: int = 256 << 20,
    ) -> None:
        check_options(color, background, limit_pixels, recover, reduce, threads)
        self._how = how_to_decode(color, background, srgb, reduce, device, recover)
        if workers is not None and (not isinstance(workers, int) or workers <= 0):
            raise InputError(f"workers is {workers!r}; expected a positive integer, or None")
        if not isinstance(processes, int) or processes < 0:
            raise InputError(f"processes is {processes!r}; expected an integer of 0 or more")
        if not isinstance(shared_bytes, int) or shared_bytes <= 0:
            raise InputError(f"shared_bytes is {shared_bytes!r}; expected a positive integer")
        self.device: Device = self._how.device
        self.workers = workers or (_WORKERS_ON_CUDA if self.device == "cuda" else available_cores())
        self._limit_pixels = limit_pixels
        self._options: dict[str, Any] = {"strict": strict, "deterministic": deterministic, "threads": threads}
        self._device_id = array_module("cuda").cuda.Device().id if self.device == "cuda" else None
        self._processes = shared_processes(processes, shared_bytes) if processes else None
        if self._processes is not None and self.device == "cuda":
            self._processes.pin()
        self._closed = False
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __call__(self, sources: Source | Iterable[Source]) -> ImageBatch:
        """Decode now, in the caller's thread and on its stream; see :func:`nbvision.decode`."""
        return self._decode_now(sources)

    def open(self, source: Source) -> OpenImage:
        """Read a file's header now, and let a process begin with what the host has to decode.

        For an image that waits until others make a batch with it: with ``processes``, all but the JPEGs of the GPU are
        pixels by then. It takes microseconds, and the time to read the file if ``source`` is a path. An image that is
        let go of before a process has come to it is not decoded.

        Parameters
        ----------
        source : bytes-like, str or os.PathLike

        Returns
        -------
        OpenImage
            For this decoder's :meth:`__call__`, :meth:`submit` and :meth:`stream`, and for :func:`nbvision.decode` with
            the same options. What is wrong with the file is its ``error``, and that of its batch.

        Raises
        ------
        InputError
            If ``source`` is none.
        """
        items = as_items(source)
        if len(items) != 1:
            raise InputError(f"source is {len(items)} files; expected one")
        if isinstance(items[0], OpenImage):
            return items[0]
        return OpenImage(items[0], self._how, self._processes, limit_pixels=self._limit_pixels)

    def submit(self, sources: Source | Iterable[Source]) -> Future[ImageBatch]:
        """Decode in a thread of the decoder.

        Returns
        -------
        concurrent.futures.Future of ImageBatch
            Of one item for each source, as :func:`nbvision.decode` gives it: an image that cannot be decoded is an
            error of the batch, not of the future. In a coroutine: ``await asyncio.wrap_future(future)``. On CUDA the
            pixels are written on another stream; what takes an ImageBatch waits for them.

        Raises
        ------
        InputError
            If ``sources`` are none, or the decoder is closed.
        """
        return self._submit(as_items(sources))

    def stream(self, batches: Iterable[list[Source]]) -> Iterator[tuple[list[Source], ImageBatch]]:
        """Decode batch after batch, the next two while the caller uses one.

        Parameters
        ----------
        batches : iterable of lists
            Each as :func:`nbvision.decode` takes it; up to two are taken before they are asked for. A generator may
            read them from an archive, a database or a network.

        Yields
        ------
        batch, ImageBatch
            In order.

        Raises
        ------
        InputError
            At the batch whose sources are none.
        """
        return ahead(self._submit, batches)

    def warm_up(self) -> None:
        """Load what the first files would wait for, and wait for the processes, if there shall be any.

        That is Numba and its loops for PNGs and for the headers of JPEGs: 0.7 s, and 7 s for the first time on a
        machine. A process that has not imported Numba leaves PNGs to Pillow until they come to 100 MB of pixels, and
        reads headers one by one until it has read 50,000; those that come then wait.
        """
        headers.warm_up()
        png.warm_up(self._how.wanted.color)
        if self._processes is not None:
            self._processes.wait_until_ready()

    def close(self) -> None:
        """End the threads once their work is done, and let go of the processes. Work is not taken any more."""
        self._closed = True
        if self._pool is not None and self._pool[0] == os.getpid():
            self._pool[1].shutdown()
        self._pool = None
        self._processes = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Decoder({self._how.wanted.color}, {self.device}, {self.workers} workers)"

    def _submit(self, sources: Any) -> Future[ImageBatch]:
        if self._closed:
            raise InputError("this Decoder is closed; make another")
        if self._pool is None or self._pool[0] != os.getpid():  # a forked child has the pool without its threads
            self._pool = os.getpid(), ThreadPoolExecutor(self.workers, thread_name_prefix="nbvision-decoder")
        # In the caller's context: memory counts as of its source.
        return self._pool[1].submit(contextvars.copy_context().run, self._decode, sources)

    def _decode(self, sources: Any) -> ImageBatch:
        with contextlib.nullcontext() if self._device_id is None else own_stream(self._device_id):
            return self._decode_now(sources)

    def _decode_now(self, sources: Any) -> ImageBatch:
        items = as_items(sources)
        return decode_items(items, self._how, self._limit_pixels, by=self._processes, **self._options)
