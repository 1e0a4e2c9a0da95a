"""In-Image: the goods in the pictures of articles, recognized once and served many times.

Articles come with pictures in any format, some of them broken, many of them in several articles. A reader's request
asks for an article's pictures; the service keeps results by what is in the files, so that a picture is recognized
when it is first read, and again only when it has changed or the models have. The example starts ``nbvision serve``,
reads articles as readers do (a few of them most of the time), changes a picture and loads the models anew, and prints
what was recognized and what was not again.

    python3 examples/in_image_service.py --articles 40 --readers 4 --requests 2000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from nbvision.demo.catalogue import make_catalogue
from nbvision.indexing import image_files

SERVE = [sys.executable, "-m", "nbvision", "serve"]


@dataclass(frozen=True)
class Article:
    """A text's pictures, in their order."""

    name: str
    pictures: Sequence[Path]


@dataclass
class Figures:
    """What readers saw, and what that cost."""

    requests: int
    pictures: int
    broken: int
    recognized: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float


class InImage:
    """What a publisher's site asks: the goods in an article's pictures."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)

    def __enter__(self) -> InImage:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def goods_of(self, article: Article) -> list[dict[str, Any]]:
        """A result for each picture: its objects, or its error, which takes nothing from the others."""
        files = [("images", (path.name, path.read_bytes())) for path in article.pictures]
        results: list[dict[str, Any]] = (
            self._client.post("/v1/garments", files=files).raise_for_status().json()["results"]
        )
        return results

    def recognized(self) -> int:
        """Pictures that went through the models so far."""
        return int(self._client.get("/v1/stats").json()["models"]["garments"]["items"])

    def load_models_anew(self) -> None:
        self._client.post("/v2/repository/models/garments/load").raise_for_status()


def make_articles(directory: Path, *, count: int, rng: np.random.Generator) -> list[Article]:
    """Articles of one to four of the demo's photographs, some of which are in several articles, some broken."""
    make_catalogue(directory, products=max(count // 2, 1), photographs=2, queries=1, seed=3)
    pictures = image_files(directory / "catalogue")
    return [
        Article(
            f"article-{number}", [pictures[index] for index in rng.integers(len(pictures), size=rng.integers(1, 5))]
        )
        for number in range(count)
    ]


@contextlib.contextmanager
def service(directory: Path, *, device: str, workers: int = 1) -> Iterator[str]:
    """``nbvision serve``, and its address."""
    path = directory / "serve.yaml"
    path.write_text(f"cache_bytes: 256000000\npipelines:\n  garments: {{kind: recognizer, device: {device}}}\n")
    with subprocess.Popen([*SERVE, str(path), "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            said = json.loads(line)
            url = said.get("url", url)
            if said["message"] == "ready":
                break
        with ThreadPoolExecutor(1) as pool:
            pool.submit(process.stderr.read)  # so that its log does not fill the pipe
            try:
                yield url
            finally:
                process.terminate()


def read(url: str, articles: Sequence[Article], *, requests: int, readers: int, seed: int) -> Figures:
    """Readers that ask for articles, a few of which are asked for most of the time."""
    weights = 1 / np.arange(1, len(articles) + 1)
    chosen = np.random.default_rng(seed).choice(len(articles), size=requests, p=weights / weights.sum())

    def one(number: int) -> tuple[float, int, int]:
        started_s = time.perf_counter()
        results = site.goods_of(articles[number])
        return time.perf_counter() - started_s, len(results), sum("error" in result for result in results)

    with InImage(url) as site, ThreadPoolExecutor(readers) as pool:
        before, started_s = site.recognized(), time.perf_counter()
        seconds, pictures, broken = zip(*pool.map(one, chosen), strict=True)
        requests_per_s = requests / (time.perf_counter() - started_s)
        recognized = site.recognized() - before
    return Figures(
        requests=requests,
        pictures=sum(pictures),
        broken=sum(broken),
        recognized=recognized,
        requests_per_s=requests_per_s,
        p50_ms=float(np.quantile(seconds, 0.5)) * 1e3,
        p99_ms=float(np.quantile(seconds, 0.99)) * 1e3,
    )


def run(*, articles: int, requests: int, readers: int, device: str) -> dict[str, Figures]:
    """The whole example, by what has happened before."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        made = make_articles(directory, count=articles, rng=np.random.default_rng(7))
        found: dict[str, Figures] = {}
        with service(directory, device=device) as url:
            ask = {"requests": requests, "readers": readers}
            found["first"] = read(url, made, **ask, seed=1)
            found["again"] = read(url, made, **ask, seed=1)
            changed, other = (
                made[0].pictures[0],
                next(path for path in image_files(directory / "queries") if path.suffix == ".jpg"),
            )
            changed.write_bytes(other.read_bytes())
            found["a picture changed"] = read(url, made, **ask, seed=1)
            with InImage(url) as site:
                site.load_models_anew()
            found["models loaded anew, the same"] = read(url, made, **ask, seed=1)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--articles", type=int, default=40)
    parser.add_argument("--requests", type=int, default=2000, help="of readers, each time")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    found = run(**vars(options))
    print(f"{'':30} requests  pictures  broken  recognized  requests/s    p50 ms    p99 ms")
    for name, figures in found.items():
        print(
            f"{name:30} {figures.requests:8} {figures.pictures:9} {figures.broken:7} {figures.recognized:11} "
            f"{figures.requests_per_s:11.0f} {figures.p50_ms:9.1f} {figures.p99_ms:9.1f}"
        )


if __name__ == "__main__":
    main()
