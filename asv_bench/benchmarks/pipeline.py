"""The whole road: compressed photographs of the demo's shop to vectors, against the straightforward pipeline.

Both run the same engine objects on the same batches, so what differs is everything around the models.
"""

from __future__ import annotations

import collections
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from .common import catalogue_files, jpeg, need, need_cuda, scenery, straightforward, wait_for_gpu, wall_us

BATCH = 32
IMAGES = {"cpu": 32, "cuda": 256}
ENGINES = ["cpu, fp32", "cuda, fp32", "cuda, fp16"]


@functools.lru_cache(maxsize=1)
def recognizers(engines: str) -> tuple[Any, Any]:
    """nbvision's and the straightforward one, over the same engines."""
    device, precision = engines.split(", ")
    baseline = straightforward()
    if device == "cuda":
        need_cuda()
    else:
        need("onnxruntime")
    from nbvision.demo.run import models_directory
    from nbvision.errors import MissingExtraError
    from nbvision.recognizer import Recognizer

    try:
        ours = Recognizer.load(models_directory(), device=device, precision=precision)
    except MissingExtraError as error:
        raise NotImplementedError(str(error)) from error
    return ours, baseline.StraightforwardRecognizer(ours.detector, ours.masker, ours.embedder)


def pass_over(recognizer: Any, files: list[bytes]) -> Callable[[], Any]:
    """One pass over all files; what was found is on the host at its end."""
    return lambda: [found for _, found in recognizer.stream(files, batch_size=BATCH)]


class Recognize:
    params = (ENGINES, ["nbvision", "OpenCV and NumPy"])
    param_names = ("engines", "how")
    images = IMAGES

    def setup(self, engines: str, how: str) -> None:
        ours, theirs = recognizers(engines)
        files = catalogue_files(self.images[ours.device])
        self.count = len(files)
        self.call = pass_over(ours if how == "nbvision" else theirs, files)

    def track_us_per_image(self, engines: str, how: str) -> float:
        return wall_us(self.call, seconds=3.0) / self.count

    track_us_per_image.unit = "us/image"


class RecognizeRatio:
    """Both in turns, so that both see the same machine."""

    params = (ENGINES,)
    param_names = ("engines",)
    images = IMAGES
    rounds = 5

    def setup(self, engines: str) -> None:
        ours, theirs = recognizers(engines)
        files = catalogue_files(self.images[ours.device])
        self.calls = [pass_over(ours, files), pass_over(theirs, files)]
        self.least_agreement = 1.0 if ours.device == "cpu" else 0.95  # nvJPEG's pixels are not libjpeg's to the bit

    def track_share_of_opencv(self, engines: str) -> float:
        """nbvision's time as a share of the straightforward pipeline's: 0.2 is five times as fast."""
        found, baseline = (call() for call in self.calls)  # warms up
        agreed = [straightforward().agreement(*pair) for pair in zip(found, baseline, strict=True)]
        assert min(agreed) >= self.least_agreement, f"only {min(agreed):.0%} of a batch's objects agree"
        ratios = []
        for _ in range(self.rounds):
            ours, theirs = (_seconds(call) for call in self.calls)
            ratios.append(ours / theirs)
        return statistics.median(ratios)

    track_share_of_opencv.unit = "of OpenCV and NumPy's time"


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --- stages side by side ----------------------------------------------------------------------------------------------

SIZE, BATCHES = (720, 1280), 32
MODELS = ["TensorRT, the demo's detector, fp32", "torch, resnet18 compiled, fp16"]
WAYS = ["Pipeline after Decoder.stream", "Pipeline", "one after the other"]
WAYS += ["Pipeline, JPEGs by the engine", "decode by the engine alone"]
WAYS += ["Decoder.stream alone", "decode alone", "model alone", "torchvision, the same model"]


class StagesOnGPU:
    """JPEGs to a model's answer on the host: overlapped, one after the other, and what bounds it."""

    params = (MODELS, WAYS)
    param_names = ("model", "how")

    def setup(self, model: str, how: str) -> None:
        need_cuda()
        from nbvision import Decoder, Pipeline, decode

        batches, decoder = [photographs()] * BATCHES, Decoder()
        stages = tensorrt_stages() if model.startswith("TensorRT") else torch_stages()
        if "by the engine" in how:  # which leaves the multiprocessors to the model
            stages = stages | {"decode": functools.partial(decode, deterministic=True)}
        if how == "torchvision, the same model":
            if not model.startswith("torch"):
                raise NotImplementedError("torchvision is timed beside torch")
            chain = torchvision_chain(stages["model"])
            self.call = lambda: [chain(files) for files in batches]
        elif how in ("decode alone", "decode by the engine alone"):
            self.call = lambda: [stages["decode"](files) for files in batches]
        elif how == "Decoder.stream alone":
            self.call = lambda: collections.deque(decoder.stream(batches), maxlen=0)  # keeps none
        elif how == "model alone":
            given = stages["preprocess"](stages["decode"](batches[0]))
            self.call = lambda: [stages["model"](given) for _ in batches]
        elif how == "Pipeline after Decoder.stream":
            made = Pipeline({name: stage for name, stage in stages.items() if name != "decode"})
            self.call = lambda: list(made.stream(images for _, images in decoder.stream(batches)))
        else:
            made = Pipeline(stages)
            is_stream = how.startswith("Pipeline")
            self.call = (lambda: list(made.stream(batches))) if is_stream else lambda: list(map(made, batches))
        self.images = BATCH * BATCHES

    def track_us_per_image(self, model: str, how: str) -> float:
        return wall_us(self.call, finish=wait_for_gpu, seconds=2.0) / self.images

    track_us_per_image.unit = "us/image"


@functools.cache
def photographs() -> list[bytes]:
    return [jpeg(scenery(*SIZE, seed)) for seed in range(BATCH)]


@functools.lru_cache(maxsize=1)
def tensorrt_stages() -> dict[str, Callable[[Any], Any]]:
    from nbvision import Preprocess, decode, nms
    from nbvision.demo.run import models_directory
    from nbvision.errors import MissingExtraError
    from nbvision.image import to_device
    from nbvision.recognizer import load_engine

    try:
        detector = load_engine(models_directory(), "detector", device="cuda", cuda_graphs=True)
    except MissingExtraError as error:
        raise NotImplementedError(str(error)) from error
    plan = Preprocess(detector.inputs[0].shape[2:], scale=1 / 255)
    return {
        "decode": decode,
        "preprocess": plan,
        "model": lambda given: (detector(given[0]), given[1]),
        "answer": lambda found: to_device(nms(*found).boxes, "cpu"),
    }


@functools.lru_cache(maxsize=1)
def torch_stages() -> dict[str, Callable[[Any], Any]]:
    """The same with a torch module, on the stage's stream, from and to arrays without a copy."""
    import cupy

    from nbvision import Preprocess, decode

    torch, models = need("torch"), need("torchvision.models")
    module = torch.compile(models.resnet18(num_classes=10).cuda().half().eval())
    plan = Preprocess((224, 224), fit="stretch", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), dtype="float16")

    @torch.inference_mode()
    def model(x: Any) -> Any:
        with torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
            return cupy.from_dlpack(module(torch.from_dlpack(x)))

    return {"decode": decode, "preprocess": lambda batch: plan(batch)[0], "model": model, "answer": lambda y: y.get()}


def torchvision_chain(model: Callable[[Any], Any]) -> Callable[[list[bytes]], Any]:
    import cupy
    import numpy as np

    torch, io_of, v2 = need("torch"), need("torchvision.io"), need("torchvision.transforms.v2")
    change = v2.Compose(
        [
            v2.Resize((224, 224), antialias=True),
            v2.ToDtype(torch.float16, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def chain(files: list[bytes]) -> Any:
        encoded = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files]
        images = torch.stack([change(image) for image in io_of.decode_jpeg(encoded, device="cuda")])
        torch.cuda.current_stream().synchronize()  # the model runs on CuPy's
        return model(cupy.from_dlpack(images)).get()

    return chain
