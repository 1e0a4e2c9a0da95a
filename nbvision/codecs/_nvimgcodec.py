"""nvImageCodec: its Python package, and for decoding its C library, called directly.

Its Python package lets go of Python's lock several times for each image, and beside a thread that runs Python each of
these times costs up to 5 ms until it has the lock again.  Here a batch lets go of it only while it is decoded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from nbvision.errors import MissingExtraError
from nbvision.image import CHANNELS, Color
from nbvision.runtime.device import CUDA_EXTRA

__all__ = ["SAMPLES", "DecoderHandle", "Opened", "Pixels", "nvimgcodec"]

# nvImageCodec's names of the sample format and the colour space, by ours. It cannot add an alpha channel.
SAMPLES: dict[Color, tuple[str, str]] = {
    "rgb": ("I_RGB", "SRGB"),
    "bgr": ("I_BGR", "SRGB"),
    "gray": ("I_Y", "GRAY"),
}


class Pixels:
    """Device memory as nvImageCodec wants it described; an array of CuPy's takes four times as long to make."""

    __slots__ = ("__cuda_array_interface__",)

    def __init__(self, address: int, shape: tuple[int, int, int]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (address, False), "version": 3}


def _missing() -> MissingExtraError:
    return MissingExtraError("nvidia.nvimgcodec", extra=CUDA_EXTRA, needed_for="JPEGs on the GPU")


@functools.cache
def nvimgcodec() -> ModuleType:
    """The package, which is imported when it is needed."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # read at import; it would log every refused image
    try:
        from nvidia import nvimgcodec as module
    except ImportError as error:
        raise _missing() from error
    found: ModuleType = module
    return found


# --- the C library, version 0.9 ---------------------------------------------------------------------------------------

_VERSION = (0, 9)
# Types of structures, and values of enumerations.
_PROPERTIES, _INSTANCE, _DECODE_PARAMS, _IMAGE, _BACKEND, _BACKEND_PARAMS, _EXECUTION = 1, 2, 5, 11, 17, 29, 30
BACKENDS = {"CPU_ONLY": 1, "HYBRID_CPU_GPU": 3, "HW_GPU_ONLY": 4}
CPU_ONLY_DEVICE = -99999
_SAMPLE_FORMATS = {"I_Y": 4, "I_RGB": 8, "I_BGR": 10}
_COLOR_SPACES = {"SRGB": 1, "GRAY": 2}
_UINT8 = 0x0802
_NO_SUBSAMPLING, _GRAY_SUBSAMPLING = 0, 7
_BUFFER_KINDS = {"cuda": 1, "cpu": 2}
_LOAD_FIXED = 2
_SUCCESS = 1

_HEAD = [("struct_type", "i4"), ("struct_size", "u8"), ("struct_next", "u8")]
_PLANE_INFO = np.dtype(
    [
        *_HEAD,
        ("width", "u4"),
        ("height", "u4"),
        ("row_stride", "u8"),
        ("channels", "u4"),
        ("sample_type", "i4"),
        ("precision", "u1"),
    ],
    align=True,
)
_ORIENTATION = np.dtype([*_HEAD, ("rotated", "i4"), ("flip_x", "i4"), ("flip_y", "i4")], align=True)
_IMAGE_INFO = np.dtype(
    [
        *_HEAD,
        ("codec_name", "S256"),
        ("color_space", "i4"),
        ("subsampling", "i4"),
        ("sample_format", "i4"),
        ("orientation", _ORIENTATION),
        ("planes", "u4"),
        ("plane", _PLANE_INFO, 32),
        ("buffer", "u8"),
        ("buffer_kind", "i4"),
        ("cuda_stream", "u8"),
    ],
    align=True,
)


class _Structure(ctypes.Structure):
    """What every structure begins with."""

    _fields_: ClassVar[Any] = (
        ("struct_type", ctypes.c_int),
        ("struct_size", ctypes.c_size_t),
        ("struct_next", ctypes.c_void_p),
    )

    def __init__(self, struct_type: int, **values: Any) -> None:
        super().__init__(struct_type, ctypes.sizeof(self), None)
        for name, value in values.items():
            setattr(self, name, value)


class _Properties(_Structure):
    _fields_ = (("version", ctypes.c_uint32), ("extension_version", ctypes.c_uint32))


class _InstanceInfo(_Structure):
    _fields_ = (
        ("load_builtin_modules", ctypes.c_int),
        ("load_extension_modules", ctypes.c_int),
        ("extension_modules_path", ctypes.c_char_p),
        ("create_debug_messenger", ctypes.c_int),
        ("debug_messenger", ctypes.c_void_p),
        ("message_severity", ctypes.c_uint32),
        ("message_category", ctypes.c_uint32),
    )


class _BackendParams(_Structure):
    _fields_ = (("load_hint", ctypes.c_float), ("load_hint_policy", ctypes.c_int))


class _Backend(_Structure):
    _fields_ = (("kind", ctypes.c_int), ("params", _BackendParams))


class _ExecutionParams(_Structure):
    _fields_ = (
        ("device_allocator", ctypes.c_void_p),
        ("pinned_allocator", ctypes.c_void_p),
        ("max_cpu_threads", ctypes.c_int),
        ("executor", ctypes.c_void_p),
        ("device_id", ctypes.c_int),
        ("pre_init", ctypes.c_int),
        ("skip_pre_sync", ctypes.c_int),
        ("backend_count", ctypes.c_int),
        ("backends", ctypes.POINTER(_Backend)),
    )


class _DecodeParams(_Structure):
    _fields_ = (("apply_orientation", ctypes.c_int),)


class _Library:
    """The functions that decoding takes. ``quick`` ones keep Python's lock, ``slow`` ones let go of it."""

    def __init__(self, path: Path) -> None:
        self.quick, self.slow = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        pointer, size, number, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p
        for library, name, *arguments in (
            (self.quick, "GetProperties", pointer),
            (self.slow, "InstanceCreate", pointer, pointer),
            (self.slow, "DecoderCreate", pointer, pointer, pointer, text),
            (self.slow, "DecoderDestroy", pointer),
            (self.quick, "CodeStreamCreateFromHostMem", pointer, pointer, text, size, pointer),
            (self.quick, "CodeStreamGetImageInfo", pointer, pointer),
            (self.quick, "CodeStreamDestroy", pointer),
            (self.quick, "ImageCreate", pointer, pointer, pointer),
            (self.quick, "ImageDestroy", pointer),
            (self.slow, "DecoderDecode", pointer, pointer, pointer, number, pointer, pointer),
            (self.slow, "FutureWaitForAll", pointer),
            (self.quick, "FutureGetProcessingStatus", pointer, pointer, pointer),
            (self.quick, "FutureDestroy", pointer),
        ):
            function = getattr(library, f"nvimgcodec{name}")
            function.argtypes, function.restype = arguments, ctypes.c_int
        properties = _Properties(_PROPERTIES)
        self._check("nvimgcodecGetProperties", self.quick.nvimgcodecGetProperties(ctypes.byref(properties)))
        version = divmod(properties.version // 100, 10)
        if version != _VERSION:
            raise MissingExtraError(
                f"nvidia.nvimgcodec {_VERSION[0]}.{_VERSION[1]}", extra=CUDA_EXTRA, needed_for="JPEGs on the GPU"
            )
        self.instance = ctypes.c_void_p()
        info = _InstanceInfo(_INSTANCE, load_builtin_modules=1, load_extension_modules=1)
        status = self.slow.nvimgcodecInstanceCreate(ctypes.byref(self.instance), ctypes.byref(info))
        self._check("nvimgcodecInstanceCreate", status)

    @staticmethod
    def _check(name: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{name} says {status}")


def _image_infos(count: int) -> npt.NDArray[Any]:
    infos = np.zeros(count, _IMAGE_INFO)
    infos["struct_type"], infos["struct_size"] = _IMAGE, _IMAGE_INFO.itemsize
    return infos


@functools.cache
def _library() -> _Library:
    found = importlib.util.find_spec("nvidia.nvimgcodec") if importlib.util.find_spec("nvidia") else None
    for folder in (found and found.submodule_search_locations) or ():
        for path in Path(folder).glob("libnvimgcodec.so.0"):
            return _Library(path)
    raise _missing()


class Opened(NamedTuple):
    """A batch that has been parsed."""

    streams: npt.NDArray[np.uint64]  # handles of the files
    images: npt.NDArray[np.uint64]  # of where their pixels shall be
    known: npt.NDArray[np.int64]  # which files these are, of the batch
    files: int  # of the batch


class DecoderHandle:
    """A decoder of one backend; no two threads may decode at once.

    Parameters
    ----------
    backend : {"HW_GPU_ONLY", "HYBRID_CPU_GPU", "CPU_ONLY"}
    device_id : int
    threads : int
        Of the host, at most.

    Raises
    ------
    MissingExtraError
        Without nvImageCodec.
    RuntimeError
        If it makes no such decoder.
    """

    def __init__(self, backend: str, device_id: int, *, threads: int) -> None:
        self._library = library = _library()
        backends = (_Backend * 1)()
        params = _BackendParams(_BACKEND_PARAMS, load_hint=1.0, load_hint_policy=_LOAD_FIXED)
        backends[0] = _Backend(_BACKEND, kind=BACKENDS[backend], params=params)
        execution = _ExecutionParams(
            _EXECUTION, max_cpu_threads=threads, device_id=device_id, backend_count=1, backends=backends
        )
        self._handle = ctypes.c_void_p()
        status = library.slow.nvimgcodecDecoderCreate(
            library.instance, ctypes.byref(self._handle), ctypes.byref(execution), b""
        )
        if status or not self._handle:
            raise RuntimeError(f"nvimgcodecDecoderCreate({backend}) says {status}")
        self._device = "cpu" if device_id == CPU_ONLY_DEVICE else "cuda"

    @contextlib.contextmanager
    def open(
        self,
        datas: Sequence[bytes],
        sizes: Sequence[tuple[int, int]],
        upright_sizes: Sequence[tuple[int, int]],
        addresses: Sequence[int],
        *,
        color: Color,
        stream: int,
    ) -> Iterator[Opened]:
        """Parse a batch and say where its pixels shall be: all that can be done while another thread decodes.

        Parameters
        ----------
        datas : sequence of bytes
        sizes, upright_sizes : sequence of (int, int)
            Height and width as the header says, and as they shall be.
        addresses : sequence of int
            Where each image of its upright size starts, without gaps between its lines.
        color : {"rgb", "bgr", "gray"}
        stream : int
            The CUDA stream with which the work is ordered; of no meaning on the host.

        Raises
        ------
        RuntimeError
            If the batch fails as a whole.
        """
        streams, images = np.zeros(len(datas), np.uint64), np.zeros(len(datas), np.uint64)
        try:
            parsed, agrees = self._parse(datas, sizes, streams)
            known = np.flatnonzero(agrees)
            infos = _image_infos(len(known))
            infos["orientation"] = parsed["orientation"][known]  # from which it is turned, if that is asked for
            infos["buffer"] = np.array(addresses, np.uint64)[known]
            infos["buffer_kind"], infos["cuda_stream"] = _BUFFER_KINDS[self._device], stream
            self._describe(infos, np.array(upright_sizes, np.uint32)[known], color, images)
            yield Opened(np.ascontiguousarray(streams[known]), images[: len(known)], known, len(datas))
        finally:
            for handle in images[images != 0].tolist():
                self._library.quick.nvimgcodecImageDestroy(handle)
            for handle in streams[streams != 0].tolist():
                self._library.quick.nvimgcodecCodeStreamDestroy(handle)

    def decode(self, opened: Opened, *, apply_orientation: bool) -> npt.NDArray[np.bool_]:
        """Decode a batch and wait for it on the host.

        Parameters
        ----------
        opened : Opened
        apply_orientation : bool
            Whether the EXIF is looked into.

        Returns
        -------
        (N,) bool array
            Which were decoded. Refused is also what nvImageCodec takes for another size than the header says.

        Raises
        ------
        RuntimeError
            If the batch fails as a whole.
        """
        done = np.zeros(opened.files, bool)
        if len(opened.known):
            done[opened.known] = self._run(opened.streams, opened.images, apply_orientation)
        return done

    def _parse(
        self, datas: Sequence[bytes], sizes: Sequence[tuple[int, int]], streams: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Parse the files: what nvImageCodec reads in them, and whether that is what the headers say."""
        library, instance = self._library.quick, self._library.instance
        infos, parsed = _image_infos(len(datas)), np.zeros(len(datas), bool)
        handles, at, each = streams.ctypes.data, infos.ctypes.data, infos.itemsize
        for index, data in enumerate(datas):
            if library.nvimgcodecCodeStreamCreateFromHostMem(instance, handles + 8 * index, data, len(data), None) == 0:
                info = at + each * index
                parsed[index] = library.nvimgcodecCodeStreamGetImageInfo(int(streams[index]), info) == 0
        heights, widths = np.array(sizes, np.int64).T
        first = infos["plane"][:, 0]
        return infos, parsed & (first["height"] == heights) & (first["width"] == widths)

    def _describe(
        self, infos: npt.NDArray[Any], sizes: npt.NDArray[np.uint32], color: Color, images: npt.NDArray[np.uint64]
    ) -> None:
        """Tell how the pixels shall be, and make images of that."""
        samples, space = SAMPLES[color]
        infos["sample_format"], infos["color_space"] = _SAMPLE_FORMATS[samples], _COLOR_SPACES[space]
        infos["subsampling"] = _GRAY_SUBSAMPLING if color == "gray" else _NO_SUBSAMPLING
        infos["planes"] = 1
        plane = infos["plane"][:, 0]
        plane["height"], plane["width"] = sizes.T
        plane["channels"], plane["sample_type"] = CHANNELS[color], _UINT8
        plane["row_stride"] = sizes[:, 1].astype(np.uint64) * CHANNELS[color]
        create, instance = self._library.quick.nvimgcodecImageCreate, self._library.instance
        handles, at, each = images.ctypes.data, infos.ctypes.data, infos.itemsize
        for index in range(len(infos)):
            status = create(instance, handles + 8 * index, at + each * index)
            if status:
                raise RuntimeError(f"nvimgcodecImageCreate says {status}")

    def _run(
        self, streams: npt.NDArray[np.uint64], images: npt.NDArray[np.uint64], apply_orientation: bool
    ) -> npt.NDArray[np.bool_]:
        library, future = self._library, ctypes.c_void_p()
        params = _DecodeParams(_DECODE_PARAMS, apply_orientation=int(apply_orientation))
        status = library.slow.nvimgcodecDecoderDecode(
            self._handle,
            streams.ctypes.data,
            images.ctypes.data,
            len(streams),
            ctypes.byref(params),
            ctypes.byref(future),
        )
        if status:
            raise RuntimeError(f"nvimgcodecDecoderDecode says {status}")
        try:
            status = library.slow.nvimgcodecFutureWaitForAll(future)
            statuses, count = np.zeros(len(streams), np.int32), ctypes.c_size_t(len(streams))
            status = status or library.quick.nvimgcodecFutureGetProcessingStatus(
                future, statuses.ctypes.data, ctypes.byref(count)
            )
            if status or count.value != len(streams):
                raise RuntimeError(f"nvImageCodec gives {count.value} of {len(streams)} results, and says {status}")
        finally:
            library.quick.nvimgcodecFutureDestroy(future)
        done: npt.NDArray[np.bool_] = statuses == _SUCCESS
        return done
