"""The whole road: compressed photographs of the demo's shop to vectors, against the straightforward pipeline.

Both run the same engine objects on the same batches, so what differs is everything around the models.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from .common import catalogue_files, need, need_cuda, straightforward, wall_us

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
