"""Compressed images in memory to RGB pixels, a batch at a time."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from .common import in_turns, jpeg, need, need_cuda, scenery, wait_for_gpu, wall_us

SIZES = {"500x375": (375, 500), "1920x1080": (1080, 1920)}
BATCHES = {"500x375": 256, "1920x1080": 64}
BATCH = 64  # on the CPU
DIFFERENT = 8  # images; a batch repeats them
AHEAD = 12  # batches of a stream that is timed as a whole


@functools.lru_cache(maxsize=2)
def files(size: str, count: int) -> list[bytes]:
    height, width = SIZES[size]
    scene = scenery(height, width, 1)
    offsets = [(height * index // DIFFERENT, width * index // DIFFERENT) for index in range(DIFFERENT)]
    encoded = [jpeg(np.roll(scene, offset, (0, 1))) for offset in offsets]
    return [encoded[index % DIFFERENT] for index in range(count)]


IN_PROCESSES = "nbvision, ahead in processes"
ENGINE = "nvImageCodec, engine alone"


class JpegOnGPU:
    """Into device memory, the wait for the GPU included, a call for each batch; OpenCV stays on the host.

    ``nbvision, ahead`` are twelve batches through ``Decoder.stream``, which decodes the next while one is used.
    """

    params = (
        list(SIZES),
        [
            "nbvision",
            "nbvision, deterministic",
            "nbvision, ahead",
            "nvImageCodec",
            ENGINE,
            "torchvision",
            "OpenCV, 1 thread",
            "OpenCV, a thread a core",
        ],
    )
    param_names = ("size", "how")

    def setup(self, size: str, how: str) -> None:
        need_cuda()
        count = BATCHES[size]
        batch = files(size, count)
        self.images = count * (AHEAD if how.endswith("ahead") else 1)
        self.call = _GPU_DECODERS[how](batch)
        _check(self.call(), size, count)
        for _ in range(5):  # in which nbvision learns how to divide a batch
            self.call()

    def track_us_per_image(self, size: str, how: str) -> float:
        return wall_us(self.call, finish=wait_for_gpu, seconds=2) / self.images

    track_us_per_image.unit = "us/image"


class BestSingleWayOnGPU:
    """The faster of nvImageCodec's ways, the engine alone or as it comes, in turns with ``nbvision.decode``.

    Figures that are measured one after the other differ by up to 40 % from one minute to the next.
    """

    params = (list(SIZES), [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    param_names = ("size", "batch")

    def setup(self, size: str, batch: int) -> None:
        need_cuda()
        self.calls = [_GPU_DECODERS[name](files(size, batch)) for name in ("nbvision", "nvImageCodec", ENGINE)]
        for call in self.calls * 5:
            _check(call(), size, batch)

    def track_times_as_long(self, size: str, batch: int) -> float:
        ours, *others = in_turns(self.calls, turns=7, seconds=0.1)
        return min(others) / ours

    track_times_as_long.unit = "x nbvision's time"


class StreamedInTurnsOnGPU:
    """What takes so many batches ahead beside nbvision, in turns; shrunk to 224 x 224 or only decoded."""

    params = (list(SIZES), ["the engine alone, only decoded", "DALI, shrunk"])
    param_names = ("size", "peer")

    def setup(self, size: str, peer: str) -> None:
        need_cuda()
        batch = files(size, BATCHES[size])
        if peer.startswith("DALI"):
            prepared = [_STREAMS["nbvision"](batch), _STREAMS["DALI"](batch)]
        else:
            prepared = [_STREAMS["nbvision, decode only"](batch), (_nvimgcodec(batch, engine_alone=True), 1)]
        self.calls = [call for call, _ in prepared]
        self.batches = [batches for _, batches in prepared]
        for call in self.calls:
            call()

    def track_times_as_long(self, size: str, peer: str) -> float:
        times = in_turns(self.calls, turns=9, seconds=0.3)
        ours, theirs = (us / batches for us, batches in zip(times, self.batches, strict=True))
        return theirs / ours

    track_times_as_long.unit = "x nbvision's time"


class MixedOnGPU:
    """60 % baseline JPEG of 300 to 2,000 pixels, 15 % progressive, 15 % PNG, 10 % WebP, into device memory.

    OpenCV's pixels stay on the host.
    """

    params = (["nbvision", "nbvision, ahead", IN_PROCESSES, "nvImageCodec", "OpenCV, a thread a core"],)
    param_names = ("how",)

    def setup(self, how: str) -> None:
        need_cuda()
        batch = mixed_files(MIXED)
        self.images = MIXED * (AHEAD if "ahead" in how else 1)
        self.call = _GPU_DECODERS[how](batch)
        for _ in range(3):
            assert len(self.call()) == MIXED

    def track_us_per_image(self, how: str) -> float:
        return wall_us(self.call, finish=wait_for_gpu, seconds=3) / self.images

    track_us_per_image.unit = "us/image"


class StreamedOnGPU:
    """Decode, then shrink to 224 x 224, normalise, float16 NCHW; batches ahead of their use, from bytes in memory."""

    params = (
        list(SIZES),
        [
            "nbvision",
            "nbvision, decode only",
            "DALI",
            "nvImageCodec and torchvision",
            "torchvision",
            "Pillow, a process a core",
        ],
    )
    param_names = ("size", "how")

    def setup(self, size: str, how: str) -> None:
        need_cuda()
        count = BATCHES[size]
        batch = files(size, count)
        self.call, batches = _STREAMS[how](batch)
        self.images = count * batches
        self.call()

    def track_us_per_image(self, size: str, how: str) -> float:
        return wall_us(self.call, finish=wait_for_gpu, seconds=2) / self.images

    track_us_per_image.unit = "us/image"


class JpegOnCPU:
    """Into host memory; all but nbvision in a plain loop, as they come."""

    params = (list(SIZES), ["nbvision", "nbvision, 1 thread", "simplejpeg", "OpenCV, 1 thread", "Pillow"])
    param_names = ("size", "how")

    def setup(self, size: str, how: str) -> None:
        self.call = _CPU_DECODERS[how](files(size, BATCH))
        _check(self.call(), size, BATCH)

    def track_us_per_image(self, size: str, how: str) -> float:
        return wall_us(self.call) / BATCH

    track_us_per_image.unit = "us/image"


def _check(images: Any, size: str, count: int) -> None:
    assert len(images) == count
    shape = tuple(images[0].shape)
    assert shape in ((*SIZES[size], 3), (3, *SIZES[size])), f"decoded to {shape}"


# --- decoders ------------------------------------------------------------------------------------------------------


def _nbvision(device: Any, **options: Any) -> Callable[[list[bytes]], Callable[[], Any]]:
    def prepare(batch: list[bytes]) -> Callable[[], Any]:
        from nbvision import Decoder, decode

        Decoder(device=device).warm_up()
        return lambda: decode(batch, device=device, **options)

    return prepare


def _ahead(batch: list[bytes], **options: Any) -> Callable[[], Any]:
    from nbvision import Decoder

    decoder = Decoder(device="cuda", **options)
    decoder.warm_up()

    def call() -> Any:
        images = None
        for _, decoded in decoder.stream([batch] * AHEAD):
            images = decoded
        return images

    return call


def _nvimgcodec(batch: list[bytes], *, engine_alone: bool = False) -> Callable[[], Any]:
    codec = need("nvidia.nvimgcodec")
    backends = [codec.Backend(codec.BackendKind.HW_GPU_ONLY)] if engine_alone else None
    decoder = codec.Decoder(**({"backends": backends} if backends else {}))
    return lambda: decoder.decode(batch)


def _torchvision(batch: list[bytes]) -> Callable[[], Any]:
    torch, io_of = need("torch"), need("torchvision.io")
    tensors = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in batch]
    return lambda: io_of.decode_jpeg(tensors, mode=io_of.ImageReadMode.RGB, device="cuda")


def _opencv(batch: list[bytes], *, threads: int = 1) -> Callable[[], Any]:
    cv2 = need("cv2")
    pool = ThreadPoolExecutor(threads)

    def one(data: bytes) -> Any:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def call() -> Any:
        before = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            return list(pool.map(one, batch))
        finally:
            cv2.setNumThreads(before)

    return call


def _simplejpeg(batch: list[bytes]) -> Callable[[], Any]:
    simplejpeg = need("simplejpeg")
    return lambda: [simplejpeg.decode_jpeg(data) for data in batch]


def _pillow(batch: list[bytes]) -> Callable[[], Any]:
    return lambda: [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch]


CORES = len(os.sched_getaffinity(0))
_GPU_DECODERS = {
    "nbvision": _nbvision("cuda"),
    "nbvision, deterministic": _nbvision("cuda", deterministic=True),
    "nbvision, ahead": _ahead,
    IN_PROCESSES: functools.partial(_ahead, processes=CORES, shared_bytes=2 << 30),
    "nvImageCodec": _nvimgcodec,
    ENGINE: functools.partial(_nvimgcodec, engine_alone=True),
    "torchvision": _torchvision,
    "OpenCV, 1 thread": _opencv,
    "OpenCV, a thread a core": functools.partial(_opencv, threads=CORES),
}
_CPU_DECODERS = {
    "nbvision": _nbvision("cpu"),
    "nbvision, 1 thread": _nbvision("cpu", threads=1),
    "simplejpeg": _simplejpeg,
    "OpenCV, 1 thread": _opencv,
    "Pillow": _pillow,
}


# --- mixed loads ---------------------------------------------------------------------------------------------------

MIXED = 128


@functools.lru_cache(maxsize=1)
def mixed_files(count: int) -> list[bytes]:
    rng = np.random.default_rng(5)
    scene = Image.fromarray(scenery(2000, 2000, 2))
    kinds: list[tuple[str, dict[str, Any]]] = [("JPEG", {"quality": 88})] * 12
    kinds += [("JPEG", {"quality": 88, "progressive": True})] * 3 + [("PNG", {})] * 3 + [("WEBP", {"quality": 85})] * 2
    made = []
    for index in range(40):
        format, options = kinds[index % len(kinds)]
        width = int(rng.integers(300, 2001 if format == "JPEG" else 1001))
        height = int(min(width * rng.uniform(0.6, 1.0), 2000))
        file = io.BytesIO()
        left, top = int(rng.integers(0, 2001 - width)), int(rng.integers(0, 2001 - height))
        scene.crop((left, top, left + width, top + height)).save(file, format, **options)
        made.append(file.getvalue())
    return [made[index] for index in rng.permutation(np.arange(count) % len(made))]


# --- decode and shrink -----------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _stream(batch: list[bytes], *, shrink: bool) -> tuple[Callable[[], Any], int]:
    from nbvision import Decoder, Preprocess

    decoder = Decoder(device="cuda")
    decoder.warm_up()
    plan = Preprocess((224, 224), fit="stretch", dtype="float16", scale=1 / 255, mean=MEAN, std=STD)

    def call() -> Any:
        for _, images in decoder.stream([batch] * AHEAD):
            if shrink:
                plan(images)

    return call, AHEAD


def _dali(batch: list[bytes], *, hw_decoder_load: float) -> Callable[[], Any]:
    dali, fn, types = need("nvidia.dali"), need("nvidia.dali.fn"), need("nvidia.dali.types")
    encoded = [np.frombuffer(data, np.uint8) for data in batch]
    width, height = Image.open(io.BytesIO(batch[0])).size
    with dali.Pipeline(batch_size=len(batch), num_threads=CORES, device_id=0, prefetch_queue_depth=2) as pipeline:
        images = fn.decoders.image(
            fn.external_source(lambda: encoded, batch=True, no_copy=True),
            device="mixed",
            output_type=types.RGB,
            hw_decoder_load=hw_decoder_load,
            preallocate_width_hint=width,
            preallocate_height_hint=height,
        )
        small = fn.resize(images, size=[224, 224], interp_type=types.INTERP_LINEAR, antialias=False)
        mean, std = [255 * value for value in MEAN], [255 * value for value in STD]
        tensor = fn.crop_mirror_normalize(small, dtype=types.FLOAT16, output_layout="CHW", mean=mean, std=std)
        pipeline.set_outputs(tensor)

    def call() -> Any:
        for _ in range(AHEAD):
            pipeline.run()

    return call


def _dali_stream(batch: list[bytes]) -> tuple[Callable[[], Any], int]:
    ways = (_dali(batch, hw_decoder_load=load) for load in (0.65, 0.9, 1.0))  # how much the engine decodes
    return min(ways, key=lambda call: wall_us(call, finish=wait_for_gpu, seconds=0)), AHEAD


def _torch_shrink(images: Any) -> Any:
    torch, functional = need("torch"), need("torchvision.transforms.v2.functional")
    small = torch.stack([functional.resize(image, [224, 224], antialias=False) for image in images])
    return functional.normalize(small.half() / 255, MEAN, STD)


def _torchvision_stream(batch: list[bytes]) -> tuple[Callable[[], Any], int]:
    decode = _torchvision(batch)
    return lambda: _torch_shrink(decode()), 1


def _nvimgcodec_stream(batch: list[bytes]) -> tuple[Callable[[], Any], int]:
    torch, decode = need("torch"), _nvimgcodec(batch)
    return lambda: _torch_shrink([torch.from_dlpack(image).permute(2, 0, 1) for image in decode()]), 1


def _by_pillow(data: bytes) -> np.ndarray:
    small = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, np.float32) / 255
    return ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1).astype(np.float16)


def _pillow_stream(batch: list[bytes]) -> tuple[Callable[[], Any], int]:
    import multiprocessing

    pool = ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn"))
    return lambda: np.stack(list(pool.map(_by_pillow, batch, chunksize=4))), 1


_STREAMS = {
    "nbvision": functools.partial(_stream, shrink=True),
    "nbvision, decode only": functools.partial(_stream, shrink=False),
    "DALI": _dali_stream,
    "nvImageCodec and torchvision": _nvimgcodec_stream,
    "torchvision": _torchvision_stream,
    "Pillow, a process a core": _pillow_stream,
}
