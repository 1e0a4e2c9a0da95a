"""From decoded images to the detector's input: letterbox, scale, NCHW, in one launch or by the usual chain of calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .common import copied_bytes_per_us, gpu_us, launch_us, need, need_cuda, noise, straightforward, wall_us

FILL = 114
EXACT, RAGGED = "64 x 1080p to 640", "64 odd sizes to 608"  # the first is exactly a third: it skips every third row
SIDE = {EXACT: 640, RAGGED: 608}
IMAGES = 64

NBVISION = ["nbvision, parity cv2", "nbvision, parity fast"]
WITH_FUNCTION = "nbvision, a pixel function"
# What OpenCV has besides linear and nearest, of 1080p: name -> interpolation and height and width of the output.
SAMPLED = {"area, a third": ("area", 360, 640), "area to 224": ("area", 224, 224), "cubic to 640": ("cubic", 640, 640)}


@functools.lru_cache(maxsize=1)
def images_on_host(sources: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = rng.integers(700, 2001, (IMAGES, 2)) | 1 if sources == RAGGED else [(1080, 1920)] * IMAGES
    return [noise(int(height), int(width), seed) for seed, (height, width) in enumerate(sizes)]


@functools.lru_cache(maxsize=1)
def images_on_gpu(sources: str) -> Any:
    """(N, H, W, 3), or a list of (H, W, 3)."""
    import cupy

    if sources == RAGGED:
        return [cupy.asarray(image) for image in images_on_host(sources)]
    return cupy.asarray(np.stack(images_on_host(sources)))


class LetterboxOnGPU:
    """uint8 images in device memory to float16 NCHW in 0..1."""

    params = (
        [EXACT, RAGGED],
        [*NBVISION, WITH_FUNCTION, "torchvision v2", "torch interpolate", "CV-CUDA", "OpenCV, copied up"],
    )
    param_names = ("sources", "how")

    def setup(self, sources: str, how: str) -> None:
        need_cuda()
        from nbvision import Preprocess, as_batch

        if how == "CV-CUDA" and sources == RAGGED:
            raise NotImplementedError("written for images of one size only")
        images = images_on_gpu(sources)
        batch = as_batch(images)
        side = SIDE[sources]
        parity: Any = "fast" if how.endswith("fast") else "cv2"
        pre = Preprocess((side, side), scale=1 / 255, dtype="float16", fill=FILL, parity=parity)
        expected, geometry = pre(batch)
        self.places = geometry.regions[:, 5:9].get().tolist()  # left, top, width, height on each canvas
        self.moved_bytes = expected.nbytes + sum(
            min(2 * height, image.shape[0]) * image.shape[1] * 3
            for image, (_, _, _, height) in zip(images, self.places, strict=True)
        )
        if how in NBVISION:
            self.call: Callable[[], Any] = lambda: pre(batch, out=expected)
        elif how == WITH_FUNCTION:
            warmer = Preprocess((side, side), scale=1 / 255, dtype="float16", fill=FILL, pixel=_warmer())
            self.call = lambda: warmer(batch, out=expected)
        else:
            self.call = _GPU_PEERS[how](sources, side, self.places)
            _check_close(self.call(), expected)

    def track_us(self, sources: str, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, sources: str, how: str) -> float:
        """The same, as a multiple of the time that a copy of the bytes takes which must be read and written.

        Read must be every source row that an output row falls between, whole, and written every output.
        """
        return gpu_us(self.call) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"

    def track_host_us(self, sources: str, how: str) -> float:
        """What one call costs the Python thread, while the GPU is behind."""
        if how == "OpenCV, copied up":
            return float("nan")  # it waits for its copy, there is no launch to speak of
        return launch_us(self.call)

    track_host_us.unit = "us"


class BatchesOnGPU:
    """1080p images to 640 x 640 float16, for the curve of time against the batch."""

    params = ([1, 2, 4, 8, 16, 32, 64], ["nbvision", "torchvision v2"])
    param_names = ("images", "how")

    def setup(self, count: int, how: str) -> None:
        need_cuda()
        from nbvision import Preprocess, as_batch

        images = images_on_gpu(EXACT)[:count]
        batch = as_batch(images)
        pre = Preprocess((640, 640), scale=1 / 255, dtype="float16", fill=FILL)
        out, geometry = pre(batch)
        if how == "nbvision":
            self.call: Callable[[], Any] = lambda: pre(batch, out=out)
        else:
            self.call = _torchvision(EXACT, 640, geometry.regions[:, 5:9].get().tolist(), count)

    def track_us(self, count: int, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"


class AntialiasOnGPU:
    """64 x 1080p to 224 x 224 float16, antialiased and normalised as ImageNet's: the input of a classifier."""

    params = (
        [
            "nbvision, Pillow's bits",
            "nbvision, torch's levels",
            "nbvision, OpenCV's area",
            "torchvision v2",
            "torch interpolate",
            "CV-CUDA hq_resize",
        ],
    )
    param_names = ("how",)
    side = 224

    def setup(self, how: str) -> None:
        need_cuda()
        from nbvision import Preprocess, as_batch

        images = images_on_gpu(EXACT)
        batch = as_batch(images)
        options: Any = {"fit": "stretch", "parity": "pil", "dtype": "float16", "scale": 1 / 255}
        pre = Preprocess((self.side, self.side), **options)
        expected, _ = pre(batch)
        self.moved_bytes = expected.nbytes + images.nbytes
        if how.startswith("nbvision"):
            kinds = {"torch": {"parity": "torch"}, "OpenCV": {"parity": "cv2", "interpolation": "area"}}
            options |= next((kind for name, kind in kinds.items() if name in how), {})
            asked = Preprocess((self.side, self.side), **options)
            self.call: Callable[[], Any] = lambda: asked(batch, out=expected)
        else:
            self.call = _antialias_peer(how, images, self.side)
            _check_close(self.call(), expected)

    def track_us(self, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, how: str) -> float:
        """The same, as a multiple of the time that a copy of all images and of the output takes."""
        return gpu_us(self.call) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"


class SourcesOnGPU:
    """64 x 1080p to 640 letterbox, float16, from images that lie in memory in one way or another."""

    params = (["uint8 side by side", "uint8 planes", "float16", "float32"],)
    param_names = ("source",)

    def setup(self, source: str) -> None:
        need_cuda()
        import cupy

        from nbvision import Preprocess, as_batch

        images = images_on_gpu(EXACT)
        if source == "uint8 planes":
            images = cupy.ascontiguousarray(images.transpose(0, 3, 1, 2))
        elif source.startswith("float"):
            images = images.astype(source)
        batch = as_batch(images, layout="CHW" if "planes" in source else "HWC")
        pre = Preprocess((640, 640), scale=1 / 255, dtype="float16")
        out, _ = pre(batch)
        self.call: Callable[[], Any] = lambda: pre(batch, out=out)

    def track_us(self, source: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"


class WindowsOnCPU:
    """One 1080p image to 224 x 224 on the host, by filters that sum windows."""

    params = (["area", "cubic", "antialiased"], ["nbvision", "its library"])
    param_names = ("filter", "how")
    size = (1080, 1920)

    def setup(self, kind: str, how: str) -> None:
        from PIL import Image

        from nbvision import Preprocess

        image = noise(*self.size, 0)
        if how == "nbvision":
            options: Any = {"interpolation": kind} if kind != "antialiased" else {"parity": "pil"}
            pre = Preprocess((224, 224), fit="stretch", dtype="uint8", layout="NHWC", **options)
            out, _ = pre(image)
            self.call: Callable[[], Any] = lambda: pre(image, out=out)
        elif kind == "antialiased":
            self.call = lambda: np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))
        else:
            cv2 = need("cv2")
            flag = {"area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC}[kind]
            self.call = lambda: cv2.resize(image, (224, 224), interpolation=flag)

    def track_us(self, kind: str, how: str) -> float:
        """Time of one call, on all cores."""
        return wall_us(self.call)

    track_us.unit = "us"


class SamplersOnGPU:
    """64 x 1080p to float16 in 0..1 by OpenCV's area, of a whole ratio and of another, and by its cubic."""

    params = (list(SAMPLED), ["nbvision", "torch interpolate", "CV-CUDA", "OpenCV, copied up"])
    param_names = ("what", "how")

    def setup(self, what: str, how: str) -> None:
        need_cuda()
        from nbvision import Preprocess, as_batch

        interpolation, *size = SAMPLED[what]
        images = images_on_gpu(EXACT)
        batch = as_batch(images)
        options: Any = {"fit": "stretch", "interpolation": interpolation, "dtype": "float16", "scale": 1 / 255}
        pre = Preprocess((size[0], size[1]), **options)
        expected, _ = pre(batch)
        self.moved_bytes = expected.nbytes + images.nbytes
        if how == "nbvision":
            self.call: Callable[[], Any] = lambda: pre(batch, out=expected)
        else:
            self.call = _SAMPLER_PEERS[how](what, images)
            _check_close(self.call(), expected)

    def track_us(self, what: str, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, what: str, how: str) -> float:
        """The same, as a multiple of the time that a copy of all images and of the output takes."""
        return gpu_us(self.call) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"


class CropsOnGPU:
    """Boxes on the GPU, of 64 images, to 224 x 224 float16: from a detector to a classifier."""

    params = ([64, 256, 1024, 4096], ["nbvision", "torchvision roi_align", "a loop of torch interpolate"])
    param_names = ("boxes", "how")
    side = 224

    def setup(self, count: int, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import Preprocess, as_batch

        images = images_on_gpu(EXACT)
        batch = as_batch(images)
        rng = np.random.default_rng(2)
        corners = rng.integers(0, (1920 - 64, 1080 - 64), (count, 2))
        far = np.minimum(corners + rng.integers(64, 513, (count, 2)), (1920, 1080))
        on_host = np.concatenate([corners, far], axis=1).astype(np.float32)
        which = rng.integers(0, IMAGES, count)
        boxes, box_images = cupy.asarray(on_host), cupy.asarray(which)
        pre = Preprocess((self.side, self.side), fit="stretch", scale=1 / 255, dtype="float16")
        expected, _ = pre(batch, boxes=boxes, box_images=box_images)
        heights, widths = (on_host[:, [3, 2]] - on_host[:, [1, 0]]).T
        lines = np.minimum(heights, 2 * self.side)
        self.moved_bytes = expected.nbytes + float((lines * widths * 3).sum())
        if how == "nbvision":
            self.call: Callable[[], Any] = lambda: pre(batch, boxes=boxes, box_images=box_images, out=expected)
        else:
            self.call = _crop_peer(how, images, boxes, on_host.astype(int).tolist(), which.tolist(), self.side)
            _check_close(self.call(), expected)

    def track_us(self, count: int, how: str) -> float:
        """The GPU's time."""
        return gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, count: int, how: str) -> float:
        """The same, as a multiple of the time that a copy of the boxes' pixels and of the output takes."""
        return gpu_us(self.call) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"


class LetterboxOnCPU:
    """One uint8 image to float32 NCHW in 0..1."""

    params = (
        ["1080x1920", "1079x1917"],
        [*NBVISION, "OpenCV and NumPy", "OpenCV blobFromImage"],
    )
    param_names = ("size", "how")
    side = 640

    def setup(self, size: str, how: str) -> None:
        from nbvision import Preprocess, as_batch

        height, width = map(int, size.split("x"))
        image = noise(height, width, 1)
        parity: Any = "fast" if how.endswith("fast") else "cv2"
        pre = Preprocess((self.side, self.side), scale=1 / 255, fill=FILL, parity=parity)
        batch = as_batch([image])
        expected, _ = pre(batch)
        if how in NBVISION:
            self.call: Callable[[], Any] = lambda: pre(batch, out=expected)
        else:
            self.call = _opencv_on_cpu(image, self.side, blob=how == "OpenCV blobFromImage")
            _check_close(self.call(), expected)

    def track_us(self, size: str, how: str) -> float:
        """Time of one call, on all cores."""
        return wall_us(self.call)

    track_us.unit = "us"


# --- peers ---------------------------------------------------------------------------------------------------------

Places = Sequence[Sequence[int]]


def _padding(side: int, place: Sequence[int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the canvas around the image."""
    left, top, width, height = place
    return left, top, side - width - left, side - height - top


def _torchvision(sources: str, side: int, places: Places, count: int = IMAGES) -> Callable[[], Any]:
    torch, v2 = need("torch"), need("torchvision.transforms.v2.functional")
    images = images_on_gpu(sources)[:count]

    def one(image: Any, place: Sequence[int]) -> Any:
        image = v2.resize(image, [place[3], place[2]], antialias=False)
        image = v2.pad(image, list(_padding(side, place)), fill=FILL)
        return v2.to_dtype(image, torch.float16, scale=True)

    return _batch_or_loop(torch, images, one, places)


def _torch_interpolate(sources: str, side: int, places: Places) -> Callable[[], Any]:
    torch = need("torch")
    functional = torch.nn.functional
    images = images_on_gpu(sources)

    def one(image: Any, place: Sequence[int]) -> Any:
        left, top, right, bottom = _padding(side, place)
        image = image if image.ndim == 4 else image[None]
        image = functional.interpolate(image.half(), (place[3], place[2]), mode="bilinear", align_corners=False)
        image = functional.pad(image, (left, right, top, bottom), value=FILL).div_(255)
        return image if len(image) > 1 else image[0]

    return _batch_or_loop(torch, images, one, places)


def _batch_or_loop(torch: Any, images: Any, one: Callable[[Any, Any], Any], places: Places) -> Callable[[], Any]:
    """Equal sizes in one batch, others one by one: torch has no ragged images."""
    if not isinstance(images, list):
        batch = torch.from_dlpack(images).permute(0, 3, 1, 2)
        return lambda: one(batch, places[0]).contiguous()
    tensors = [torch.from_dlpack(image).permute(2, 0, 1) for image in images]
    return lambda: torch.stack([one(image, place) for image, place in zip(tensors, places, strict=True)]).contiguous()


def _cvcuda(sources: str, side: int, places: Places) -> Callable[[], Any]:
    cvcuda = need("cvcuda")
    batch = cvcuda.as_tensor(images_on_gpu(sources), "NHWC")
    left, top, right, bottom = _padding(side, places[0])
    shape = (IMAGES, places[0][3], places[0][2], 3)

    def call() -> Any:
        images = cvcuda.resize(batch, shape, cvcuda.Interp.LINEAR)
        images = cvcuda.copymakeborder(
            images,
            border_mode=cvcuda.Border.CONSTANT,
            border_value=[FILL] * 3,
            top=top,
            bottom=bottom,
            left=left,
            right=right,
        )
        return cvcuda.reformat(cvcuda.convertto(images, np.float32, scale=1 / 255), "NCHW").cuda()

    return call  # it has no float16 here, so it writes twice the bytes


def _antialias_peer(how: str, images: Any, side: int) -> Callable[[], Any]:
    size = (side, side)
    if how == "CV-CUDA hq_resize":
        cvcuda = need("cvcuda")
        batch = cvcuda.as_tensor(images, "NHWC")

        def hq_resize() -> Any:
            small = cvcuda.hq_resize(batch, size, antialias=True, interpolation=cvcuda.Interp.LINEAR)
            return cvcuda.reformat(cvcuda.convertto(small, np.float32, scale=1 / 255), "NCHW").cuda()

        return hq_resize
    torch = need("torch")
    pictures = torch.from_dlpack(images).permute(0, 3, 1, 2)
    if how == "torchvision v2":
        v2 = need("torchvision.transforms.v2.functional")
        return lambda: v2.to_dtype(
            v2.resize(pictures, list(size), antialias=True), torch.float16, scale=True
        ).contiguous()
    interpolate = torch.nn.functional.interpolate
    return lambda: interpolate(pictures.half(), size, mode="bilinear", antialias=True).div_(255).contiguous()


def _sampled_by_torch(what: str, images: Any) -> Callable[[], Any]:
    torch = need("torch")
    interpolation, *size = SAMPLED[what]
    if what == "area to 224":
        raise NotImplementedError("its area takes whole pixels")
    pictures = torch.from_dlpack(images).permute(0, 3, 1, 2)
    mode = {"area": "area", "cubic": "bicubic"}[interpolation]
    interpolate = torch.nn.functional.interpolate
    return lambda: interpolate(pictures.half(), size, mode=mode).clamp_(0, 255).div_(255).contiguous()


def _sampled_by_cvcuda(what: str, images: Any) -> Callable[[], Any]:
    cvcuda = need("cvcuda")
    interpolation, *size = SAMPLED[what]
    batch = cvcuda.as_tensor(images, "NHWC")
    kind = getattr(cvcuda.Interp, interpolation.upper())

    def call() -> Any:
        small = cvcuda.resize(batch, (IMAGES, *size, 3), kind)
        return cvcuda.reformat(cvcuda.convertto(small, np.float32, scale=1 / 255), "NCHW").cuda()

    return call  # it has no float16 here, so it writes twice the bytes


def _sampled_and_copied_up(what: str, images: Any) -> Callable[[], Any]:
    import cupy

    baseline, cv2 = straightforward(), need("cv2")
    interpolation, height, width = SAMPLED[what]
    flag = getattr(cv2, f"INTER_{interpolation.upper()}")

    def call() -> Any:
        small = [cv2.resize(image, (width, height), interpolation=flag) for image in images_on_host(EXACT)]
        return cupy.asarray(baseline.tensor_of(small, (height, width)).astype(np.float16))

    return call


_SAMPLER_PEERS: dict[str, Callable[[str, Any], Callable[[], Any]]] = {
    "torch interpolate": _sampled_by_torch,
    "CV-CUDA": _sampled_by_cvcuda,
    "OpenCV, copied up": _sampled_and_copied_up,
}


def _warmer() -> Any:
    from nbvision import pixel

    def warmer(r: float, g: float, b: float, amount: float = 0.05) -> tuple[float, float, float]:
        return r * (1 + amount), g, b * (1 - amount)

    return pixel(warmer)


def _crop_peer(how: str, images: Any, boxes: Any, corners: list[list[int]], which: list[int], side: int) -> Any:
    torch = need("torch")
    pictures = torch.from_dlpack(images).permute(0, 3, 1, 2)
    if how == "torchvision roi_align":
        roi_align = need("torchvision.ops").roi_align
        rois = torch.cat([torch.tensor(which, device="cuda")[:, None].float(), torch.from_dlpack(boxes)], dim=1)

        def align() -> Any:
            # It takes floats only, so the conversion of whole images is part of what it costs.
            crops = roi_align(pictures.float(), rois, (side, side), sampling_ratio=1, aligned=True)
            return crops.div_(255).half()

        return align
    interpolate = torch.nn.functional.interpolate

    def loop() -> Any:
        crops = [
            interpolate(pictures[image : image + 1, :, y1:y2, x1:x2].half(), (side, side), mode="bilinear")
            for image, (x1, y1, x2, y2) in zip(which, corners, strict=True)
        ]
        return torch.cat(crops).div_(255)

    return loop


def _opencv_copied_up(sources: str, side: int, places: Places) -> Callable[[], Any]:
    baseline = straightforward()
    import cupy

    images = images_on_host(sources)

    def call() -> Any:
        canvases = [baseline.letterbox(image, (side, side))[0] for image in images]
        return cupy.asarray(baseline.tensor_of(canvases, (side, side)).astype(np.float16))

    return call


_GPU_PEERS: dict[str, Callable[[str, int, Places], Callable[[], Any]]] = {
    "torchvision v2": _torchvision,
    "torch interpolate": _torch_interpolate,
    "CV-CUDA": _cvcuda,
    "OpenCV, copied up": _opencv_copied_up,
}


def _opencv_on_cpu(image: np.ndarray, side: int, *, blob: bool) -> Callable[[], Any]:
    baseline, cv2 = straightforward(), need("cv2")
    size = (side, side)
    if blob:
        return lambda: cv2.dnn.blobFromImage(baseline.letterbox(image, size)[0], 1 / 255)
    return lambda: baseline.tensor_of([baseline.letterbox(image, size)[0]], size)


def _check_close(got: Any, expected: Any) -> None:
    """A peer that computes something else is no peer: on average within two levels of 255."""
    if hasattr(got, "__cuda_array_interface__"):
        import cupy

        got, expected = cupy.asarray(got), expected.astype(np.float32)
    difference = float(abs(got.astype(np.float32) - expected).mean())
    assert got.shape == expected.shape, f"{got.shape} instead of {expected.shape}"
    assert difference < 2 / 255, f"differs by {difference * 255:.1f} levels on average"
