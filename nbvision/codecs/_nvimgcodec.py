"""nvImageCodec: its Python package, and for decoding its C library, called directly.

Its Python package lets go of Python's lock several times for each image, and beside a thread that runs Python each of
these times costs up to 5 ms until it has the lock again.  Here a batch lets go of it only while it is decoded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeAlias

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
_HANDLE_BYTES = ctypes.sizeof(ctypes.c_void_p)

_Handles: TypeAlias = "ctypes.Array[ctypes.c_void_p]"


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


class _Orientation(_Structure):
    _fields_ = (("rotated", ctypes.c_int), ("flip_x", ctypes.c_int), ("flip_y", ctypes.c_int))


class _PlaneInfo(_Structure):
    _fields_ = (
        ("width", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
        ("row_stride", ctypes.c_size_t),
        ("channels", ctypes.c_uint32),
        ("sample_type", ctypes.c_int),
        ("precision", ctypes.c_uint8),
    )


class _ImageInfo(_Structure):
    _fields_ = (
        ("codec_name", ctypes.c_char * 256),
        ("color_space", ctypes.c_int),
        ("subsampling", ctypes.c_int),
        ("sample_format", ctypes.c_int),
        ("orientation", _Orientation),
        ("planes", ctypes.c_uint32),
        ("plane", _PlaneInfo),
        ("other_planes", _PlaneInfo * 31),
        ("buffer", ctypes.c_void_p),
        ("buffer_kind", ctypes.c_int),
        ("cuda_stream", ctypes.c_void_p),
    )


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


@functools.lru_cache(maxsize=64)
def _info_of(color: Color, device: Device, stream: int) -> _ImageInfo:
    """What is the same of all images; to be copied."""
    samples, space = SAMPLES[color]
    info = _ImageInfo(
        _IMAGE,
        sample_format=_SAMPLE_FORMATS[samples],
        color_space=_COLOR_SPACES[space],
        subsampling=_GRAY_SUBSAMPLING if color == "gray" else _NO_SUBSAMPLING,
        buffer_kind=_BUFFER_KINDS[device],
        cuda_stream=stream,
        planes=1,
    )
    info.plane.channels, info.plane.sample_type = CHANNELS[color], _UINT8
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
        handles = ctypes.c_void_p * files
        # Of the files, and of where their pixels shall be.
        self.streams, self.images = handles(), handles()
        self.is_known = [False] * files  # whether nvImageCodec reads in a file what its header says

    def close(self) -> None:
        for handle in self.images[:]:
            if handle:
                self._library.nvimgcodecImageDestroy(handle)
        for handle in self.streams[:]:
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
            _EXECUTION,
            max_cpu_threads=threads,
            device_id=device_id,
            skip_pre_sync=1,  # nothing but this decoder writes there: see gpu_decode.decode_into
            backend_count=1,
            backends=backends,
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
        library, instance = self._library.quick, self._library.instance
        parse, look = library.nvimgcodecCodeStreamCreateFromHostMem, library.nvimgcodecCodeStreamGetImageInfo
        describe, channels = library.nvimgcodecImageCreate, CHANNELS[color]
        found, wanted = _ImageInfo(_IMAGE), _ImageInfo.from_buffer_copy(_info_of(color, self._device, stream))
        found_at, wanted_at = ctypes.addressof(found), ctypes.addressof(wanted)
        found_plane, plane = found.plane, wanted.plane
        opened = Opened(self._library, len(datas))
        handle_at, image_at = ctypes.addressof(opened.streams), ctypes.addressof(opened.images)
        try:
            for index, data in enumerate(datas):
                at = index * _HANDLE_BYTES
                status = parse(instance, handle_at + at, data, len(data), None)
                if status or look(opened.streams[index], found_at):
                    continue
                if (found_plane.height, found_plane.width) != sizes[index]:
                    continue
                opened.is_known[index] = True
                wanted.orientation = found.orientation  # from which it is turned, if that is asked for
                wanted.buffer = addresses[index]
                plane.height, plane.width = upright_sizes[index]
                plane.row_stride = plane.width * channels
                status = describe(instance, image_at + at, wanted_at)
                if status:
                    raise RuntimeError(f"nvimgcodecImageCreate says {status}")
        except BaseException:
            opened.close()
            raise
        return opened

    def decode(self, opened: Opened, *, apply_orientation: bool) -> list[bool]:
        """Decode a batch and wait for it on the host.

        Parameters
        ----------
        opened : Opened
        apply_orientation : bool
            Whether the EXIF is looked into.

        Returns
        -------
        list of bool
            Which were decoded. Refused is also what nvImageCodec takes for another size than the header says.

        Raises
        ------
        RuntimeError
            If the batch fails as a whole.
        """
        known = opened.is_known
        if all(known):
            return self._run(opened.streams, opened.images, apply_orientation)
        streams, images = (list(itertools.compress(handles, known)) for handles in (opened.streams, opened.images))
        handles = ctypes.c_void_p * len(streams)
        done = iter(self._run(handles(*streams), handles(*images), apply_orientation) if streams else ())
        return [is_known and next(done) for is_known in known]

    def _run(self, streams: _Handles, images: _Handles, apply_orientation: bool) -> list[bool]:
        library, future, count = self._library, ctypes.c_void_p(), len(streams)
        params = _DecodeParams(_DECODE_PARAMS, apply_orientation=int(apply_orientation))
        status = library.slow.nvimgcodecDecoderDecode(
            self._handle, streams, images, count, ctypes.byref(params), ctypes.byref(future)
        )
        if status:
            raise RuntimeError(f"nvimgcodecDecoderDecode says {status}")
        try:
            status = library.slow.nvimgcodecFutureWaitForAll(future)
            statuses, found = (ctypes.c_int * count)(), ctypes.c_size_t(count)
            status = status or library.quick.nvimgcodecFutureGetProcessingStatus(future, statuses, ctypes.byref(found))
            if status or found.value != count:
                raise RuntimeError(f"nvImageCodec gives {found.value} of {count} results, and says {status}")
        finally:
            library.quick.nvimgcodecFutureDestroy(future)
        return [status == _SUCCESS for status in statuses]
