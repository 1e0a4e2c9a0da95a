"""nvImageCodec: its Python package, and for decoding its C library, called directly.

Its Python package lets go of Python's lock several times for each image, and beside a thread that runs Python each of
these times costs up to 5 ms until it has the lock again.  Here a batch lets go of it only while it is decoded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from nbvision.errors import MissingExtraError
from nbvision.image import CHANNELS, Color
from nbvision.runtime.device import CUDA_EXTRA, Device

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


def _blank_info() -> npt.NDArray[Any]:
    info = np.zeros(1, _IMAGE_INFO)
    info["struct_type"], info["struct_size"] = _IMAGE, _IMAGE_INFO.itemsize
    return info


_BLANK_INFO = _blank_info()


def _addresses(array: npt.NDArray[Any]) -> range:
    """Of each item."""
    first: int = array.ctypes.data
    return range(first, first + array.nbytes, array.itemsize)


@functools.lru_cache(maxsize=64)
def _info_of(color: Color, device: Device, stream: int) -> npt.NDArray[Any]:
    """What is the same of all images."""
    samples, space = SAMPLES[color]
    info = _blank_info()
    info["sample_format"], info["color_space"] = _SAMPLE_FORMATS[samples], _COLOR_SPACES[space]
    info["subsampling"] = _GRAY_SUBSAMPLING if color == "gray" else _NO_SUBSAMPLING
    info["buffer_kind"], info["cuda_stream"] = _BUFFER_KINDS[device], stream
    info["planes"] = 1
    info["plane"][:, 0]["channels"], info["plane"][:, 0]["sample_type"] = CHANNELS[color], _UINT8
    return info


@functools.cache
def _library() -> _Library:
    found = importlib.util.find_spec("nvidia.nvimgcodec") if importlib.util.find_spec("nvidia") else None
    for folder in (found and found.submodule_search_locations) or ():
        for path in Path(folder).glob("libnvimgcodec.so.0"):
            return _Library(path)
    raise _missing()


class Opened:
    """A batch that has been parsed, until it is closed."""

    def __init__(self, library: _Library, files: int) -> None:
        self._library = library.quick
        self.files = files  # of the batch
        # Handles of the files, and of where their pixels shall be.
        self.streams, self.images = np.zeros((2, files), np.uint64)
        self.is_known: npt.NDArray[np.bool_]  # whether nvImageCodec reads in a file what its header says

    def close(self) -> None:
        for handle in self.images.tolist():
            if handle:
                self._library.nvimgcodecImageDestroy(handle)
        for handle in self.streams.tolist():
            if handle:
                self._library.nvimgcodecCodeStreamDestroy(handle)


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
        self._device: Device = "cpu" if device_id == CPU_ONLY_DEVICE else "cuda"

    def open(
        self,
        datas: Sequence[bytes],
        sizes: Sequence[tuple[int, int]],
        upright_sizes: Sequence[tuple[int, int]],
        addresses: Sequence[int],
        *,
        color: Color,
        stream: int,
    ) -> Opened:
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

        Returns
        -------
        Opened
            To be closed, and not before it has been decoded.

        Raises
        ------
        RuntimeError
            If the batch fails as a whole.
        """
        opened = Opened(self._library, len(datas))
        try:
            orientations = self._parse(datas, sizes, opened)
            infos = np.repeat(_info_of(color, self._device, stream), len(datas))
            infos["orientation"] = orientations  # from which it is turned, if that is asked for
            infos["buffer"] = addresses
            plane, upright = infos["plane"][:, 0], np.array(upright_sizes, np.uint32)
            plane["height"], plane["width"] = upright.T
            plane["row_stride"] = upright[:, 1].astype(np.uint64) * CHANNELS[color]
            self._describe(infos, opened)
        except BaseException:
            opened.close()
            raise
        return opened

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
        known = opened.is_known
        if known.all():
            return self._run(opened.streams, opened.images, apply_orientation)
        done = np.zeros(opened.files, bool)
        if known.any():
            done[known] = self._run(opened.streams[known], opened.images[known], apply_orientation)
        return done

    def _parse(self, datas: Sequence[bytes], sizes: Sequence[tuple[int, int]], opened: Opened) -> npt.NDArray[Any]:
        """Parse the files, and see whether what nvImageCodec reads in them is what their headers say.

        Returns
        -------
        structured array
            Their orientations.
        """
        infos, library, instance = np.repeat(_BLANK_INFO, len(datas)), self._library.quick, self._library.instance
        create, look = library.nvimgcodecCodeStreamCreateFromHostMem, library.nvimgcodecCodeStreamGetImageInfo
        created = [
            create(instance, handle, data, len(data), None)
            for handle, data in zip(_addresses(opened.streams), datas, strict=True)
        ]
        statuses = [
            status or look(stream, info)
            for status, stream, info in zip(created, opened.streams.tolist(), _addresses(infos), strict=True)
        ]
        found, (heights, widths) = infos["plane"][:, 0], np.array(sizes, np.uint32).T
        opened.is_known = (found["height"] == heights) & (found["width"] == widths)
        if any(statuses):
            opened.is_known &= np.array(statuses) == 0
        return infos["orientation"]

    def _describe(self, infos: npt.NDArray[Any], opened: Opened) -> None:
        """Make images of what is known."""
        create, instance = self._library.quick.nvimgcodecImageCreate, self._library.instance
        places = zip(opened.is_known.tolist(), _addresses(opened.images), _addresses(infos), strict=True)
        for is_known, handle, info in places:
            status = is_known and create(instance, handle, info)
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
