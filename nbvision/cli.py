"""The command line: `nbvision`, and its commands, which `_parser` lists."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbvision
from nbvision.errors import InputError, NbvisionError, SearchError
from nbvision.runtime.cache import cache_dir

if TYPE_CHECKING:
    from nbvision.recognizer import Recognizer

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 an error, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (NbvisionError, OSError) as error:  # OSError: of the files that the user named
        print(f"nbvision: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nbvision", description="Images in, a model's answer out.")
    parser.add_argument("--version", action="version", version=f"nbvision {nbvision.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, devices, and what each missing extra costs")
    info.set_defaults(command=_info)

    demo = commands.add_parser("demo", help="the whole pipeline on a catalogue drawn for it")
    demo.add_argument("--out", type=Path, default=Path("nbvision-demo"), help="directory to write (%(default)s)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    demo.add_argument("--products", type=_positive, default=120, help="products of the catalogue (%(default)s)")
    demo.add_argument("--queries", type=_positive, default=90, help="query scenes (%(default)s)")
    demo.add_argument("--seed", type=_whole, default=0, help="of the products and scenes (%(default)s)")
    _add_device_options(demo)
    demo.set_defaults(command=_demo)

    index = commands.add_parser("index", help="index the images of a directory")
    index.add_argument("directory", type=Path, help="where the images are")
    index.add_argument("--index", type=Path, help="where the index goes (DIRECTORY.index)")
    _add_model_options(index)
    index.set_defaults(command=_index)

    search = commands.add_parser("search", help="the nearest indexed images to each object of an image")
    search.add_argument("index", type=Path, help="what `nbvision index` wrote")
    search.add_argument("image", type=Path, help="what to look for")
    search.add_argument("-k", type=int, default=5, help="answers for each object (%(default)s)")
    _add_model_options(search)
    search.set_defaults(command=_search)

    build = commands.add_parser("build-engine", help="make ready what an ONNX model needs on this machine, and keep it")
    build.add_argument("model", type=Path, help="an ONNX file")
    build.add_argument(
        "--batch", type=_positive, nargs=3, default=(1, 16, 64), metavar=("MIN", "OPT", "MAX"), help="sizes (1 16 64)"
    )
    _add_device_options(build)
    build.set_defaults(command=_build_engine)

    profile = commands.add_parser("profile-engine", help="how long a model takes, by batch size and precision")
    profile.add_argument("model", type=Path, help="an ONNX file")
    profile.add_argument(
        "--batches", type=_positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="sizes (1 2 4 ... 64)"
    )
    profile.add_argument(
        "--precisions", choices=["fp32", "fp16"], nargs="+", default=["fp32"], help="of TensorRT (fp32)"
    )
    profile.add_argument("--seconds", type=float, default=0.5, help="for each point (%(default)s)")
    profile.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where it works")
    profile.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    profile.add_argument("--picture", type=Path, metavar="FILE", help="draw the curves; needs the extra `plot`")
    profile.set_defaults(command=_profile_engine)

    quantized = commands.add_parser("quantize", help="an int8 version of a model, with ranges from your own images")
    quantized.add_argument("model", type=Path, help="an ONNX file with one input (batch, 3, height, width)")
    quantized.add_argument("images", type=Path, help="directory of images of the kind that the model will meet")
    quantized.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    quantized.add_argument(
        "--fit", choices=["letterbox", "stretch", "cover"], default="letterbox", help="(%(default)s)"
    )
    quantized.add_argument("--scale", type=float, default=1 / 255, help="of pixels before mean and std (1/255)")
    quantized.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="after the scale (none)")
    quantized.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="after the scale (none)")
    quantized.add_argument("--limit", type=_positive, default=400, help="images to read at most (%(default)s)")
    quantized.add_argument("--method", choices=["minmax", "percentile"], default="minmax", help="(%(default)s)")
    quantized.add_argument("--exclude", nargs="*", default=[], metavar="NODE", help="nodes that stay in float32")
    quantized.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    quantized.set_defaults(command=_quantize)

    capacity = commands.add_parser("plan-capacity", help="how many cards a load wants, by simulation of the batcher")
    capacity.add_argument(
        "times", type=Path, help="what `nbvision profile-engine --json` wrote, or {size: milliseconds}"
    )
    capacity.add_argument("--rate", type=float, required=True, help="requests a second")
    capacity.add_argument("--deadline-ms", type=float, default=40.0, help="of a request (%(default)s)")
    capacity.add_argument("--burst", type=_positive, default=1, help="requests that come at once (%(default)s)")
    capacity.add_argument("--max-batch", type=_positive, default=64, help="(%(default)s)")
    capacity.add_argument("--precision", choices=["fp32", "fp16"], help="of the times (the first)")
    capacity.add_argument(
        "--share", type=float, default=0.99, help="of the requests that shall be in time (%(default)s)"
    )
    capacity.add_argument("--jitter", type=float, default=0.05, help="of a batch's time (%(default)s)")
    capacity.add_argument("--most-cards", type=_positive, default=64, help="to try (%(default)s)")
    capacity.set_defaults(command=_plan_capacity)

    serve = commands.add_parser("serve", help="pipelines over HTTP and gRPC, from a YAML file")
    serve.add_argument("config", type=Path, help="what is served; docs/serving.md says how it is written")
    serve.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    serve.add_argument("--port", type=_whole, default=8000, help="0 takes a free one (%(default)s)")
    serve.add_argument("--grpc-port", type=_positive, help="for gRPC; needs the extra `grpc` (none)")
    serve.add_argument("--workers", type=_positive, default=1, help="processes that share the port (%(default)s)")
    serve.add_argument("--gpus", nargs="*", default=[], metavar="ID", help="of the workers, in turns (all)")
    serve.set_defaults(command=_serve)
    return parser


def _serve(options: argparse.Namespace) -> int:
    from nbvision.serve import serve

    where = {"host": options.host, "port": options.port, "grpc_port": options.grpc_port}
    return serve(options.config, workers=options.workers, gpus=options.gpus, **where)


def _whole(text: str, *, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
    return int(text)


_positive = functools.partial(_whole, least=1)


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where it works")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16"],
        default="fp32",
        help="of TensorRT; a CPU computes in fp32 (%(default)s)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", type=Path, help="directory of detector.onnx, masker.onnx, embedder.onnx (the demo's garments)"
    )
    _add_device_options(parser)


def _load_recognizer(options: argparse.Namespace) -> Recognizer:
    from nbvision.demo.run import models_directory
    from nbvision.recognizer import Recognizer

    return Recognizer.load(options.models or models_directory(), device=options.device, precision=options.precision)


def _info(options: argparse.Namespace) -> int:
    from nbvision.runtime.info import describe

    print(describe())
    return 0


def _demo(options: argparse.Namespace) -> int:
    from nbvision.console import Console
    from nbvision.demo.run import figures_as_json, run_demo

    console = Console()
    figures = run_demo(
        options.out,
        console,
        device=options.device,
        precision=options.precision,
        products=options.products,
        queries=options.queries,
        seed=options.seed,
    )
    where = f"{figures.device}, {figures.runtime}, {figures.precision}"
    quality = [("mAP@0.5", figures.map_50), ("mask IoU", figures.mask_iou)]
    quality += [("recall@1", figures.recall_at_1), ("recall@5", figures.recall_at_5)]
    console.table(
        "quality on held-out images", ["measure", "value"], [(name, f"{value:.3f}") for name, value in quality]
    )
    rates = [(name, f"{rate:,.0f}") for name, rate in figures.images_per_second.items()]
    console.table(f"speed on {where}", ["stage", "items/s"], rates)
    errors = [(kind, str(count)) for kind, count in figures.errors_by_kind.items()]
    console.table("files that are broken on purpose", ["error", "files"], errors)
    console.print(f"{figures.images} images, {figures.queries} queries in {figures.seconds:.1f} s")
    console.print(f"picture: {options.out / 'report.png'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(figures_as_json(figures))
    return 0


def _index(options: argparse.Namespace) -> int:
    from nbvision.codecs.headers import IMAGE_SUFFIXES
    from nbvision.console import Console
    from nbvision.indexing import image_files, index_files
    from nbvision.search import Index

    if not options.directory.is_dir():
        raise InputError(f"{options.directory} is no directory; expected a directory of images")
    files = image_files(options.directory)
    if not files:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise InputError(f"{options.directory} holds no images; expected file names that end in {suffixes}")
    console = Console()
    path = options.index or Path(f"{options.directory.resolve()}.index")  # resolved: "." has no name
    with console.status("loading the models"):
        recognizer = _load_recognizer(options)
    index = Index(recognizer.dimension, model=recognizer.digest)
    problems: Counter[str] = Counter()
    messages = []
    with console.progress("indexing", len(files)) as advance:
        for batch, found in index_files(index, recognizer, files, root=options.directory):
            for number, error in enumerate(found.errors):
                if error is not None:
                    problems[error.kind] += 1
                    messages.append(str(error))
                elif len(found.of_image(number)) == 0:
                    problems["nothing found"] += 1
                    messages.append(f"{batch[number]}: no object found")
                advance()
    for message in messages:
        console.print(message)
    if problems:
        reasons = [(kind, str(count)) for kind, count in sorted(problems.items())]
        console.table("not indexed", ["reason", "files"], reasons)
    if len(index) == 0:  # an index that is there already is worth more than an empty one
        raise SearchError(f"none of {len(files)} images can be indexed; {path} is not written")
    index.save(path)
    console.print(f"{len(index)} of {len(files)} images indexed in {path}")
    return 0  # broken files are told above; what could be indexed is


def _search(options: argparse.Namespace) -> int:
    from nbvision.console import Console
    from nbvision.demo.run import LOADING, WEAK_SIMILARITY
    from nbvision.search import Index

    if not options.index.is_dir():
        raise SearchError(
            f"INDEX {options.index} is no directory; expected an index: make one with `nbvision index DIRECTORY`"
        )
    if not options.image.is_file():
        raise InputError(f"IMAGE {options.image} is no file; expected an image file")
    console = Console()
    with console.status(LOADING):
        recognizer = _load_recognizer(options)
        index = Index.load(options.index, model=recognizer.digest)
        found = recognizer.recognize([options.image])
    if found.errors[0] is not None:
        raise found.errors[0]
    if len(found) == 0:
        raise SearchError(f"{options.image}: no object found, so there is nothing to search for")
    hits = index.search(found.vectors, k=options.k)
    weak = WEAK_SIMILARITY if options.models is None else float("-inf")  # of other models nobody has measured it
    for number in range(len(found)):
        x1, y1, x2, y2 = found.boxes[number]
        label = recognizer.classes[found.labels[number]]
        title = f"{label} {found.scores[number]:.2f} at {x1:.0f},{y1:.0f} - {x2:.0f},{y2:.0f}"
        answers = zip(hits.ids[number], hits.scores[number], strict=True)
        rows = [(name, f"{score:.3f}", "weak" if score < weak else "") for name, score in answers]
        console.table(title, ["image", "similarity", "match"], rows)
    if (hits.scores < weak).any():
        console.print(f"weak: a similarity under {weak}, which pictures of other products have too")
    return 0


def _build_engine(options: argparse.Namespace) -> int:
    from nbvision.console import Console
    from nbvision.engines import Engine

    console = Console()
    started = time.perf_counter()
    with console.status(f"building {options.model.name}; TensorRT may take minutes"):
        engine = Engine(options.model, precision=options.precision, batch=tuple(options.batch), device=options.device)
    console.print(repr(engine))
    console.print(f"ready in {time.perf_counter() - started:.1f} s; the next start loads what is kept in {cache_dir()}")
    return 0


def _profile_engine(options: argparse.Namespace) -> int:
    from nbvision.console import Console
    from nbvision.engines import profile_engine

    console = Console()
    with console.progress("timing", len(options.precisions) * len(set(options.batches))) as advance:
        profile = profile_engine(
            options.model,
            precisions=options.precisions,
            batches=options.batches,
            seconds=options.seconds,
            device=options.device,
            progress=lambda found: advance(),
        )
    rows = [
        (found.precision, str(found.batch), f"{found.p50_ms:.3f}", f"{found.p99_ms:.3f}", f"{found.items_per_s:,.0f}")
        for found in profile.times
    ]
    columns = ["precision", "batch", "p50 ms", "p99 ms", "items/s"]
    console.table(f"{profile.name} on {profile.device}, {profile.runtime}", columns, rows)
    if options.json:
        profile.save(options.json)
    if options.picture:
        profile.draw(options.picture)
        console.print(f"picture: {options.picture}")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from nbvision.codecs import decode
    from nbvision.console import Console
    from nbvision.engines import Engine, quantize
    from nbvision.indexing import image_files
    from nbvision.ops.preprocess import Preprocess

    batch_size = 8
    console = Console()
    inputs = Engine(options.model, device="cpu").inputs
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise InputError(f"{options.model} takes {inputs}; expected one input (batch, 3, height, width)")
    plan = Preprocess(inputs[0].shape[2:], fit=options.fit, scale=options.scale, mean=options.mean, std=options.std)
    files = image_files(options.images)[: options.limit]
    if len(files) < 2:
        raise InputError(f"{options.images} has {len(files)} images; expected two at least, and hundreds in earnest")
    held_out = files[:: max(4, len(files) // (4 * batch_size))]  # to measure errors with: a quarter, at most 32

    def batches(chosen: Sequence[Path]) -> Iterator[Any]:
        for start in range(0, len(chosen), batch_size):
            batch = decode(chosen[start : start + batch_size], device="cpu")
            whole = [index for index, error in enumerate(batch.errors) if error is None]
            if whole:
                yield plan(batch.select(whole))[0]

    with console.status(f"quantizing {options.model.name} with {len(files) - len(held_out)} images"):
        report = quantize(
            options.model,
            options.out,
            calibration=batches([path for path in files if path not in set(held_out)]),
            validation=batches(held_out),
            method=options.method,
            exclude=options.exclude,
        )
    console.print(str(report))
    if options.json:
        report.save(options.json)
    return 0


def _plan_capacity(options: argparse.Namespace) -> int:
    from nbvision.batching.latency import LatencyCurve
    from nbvision.batching.policy import POLICIES
    from nbvision.batching.simulator import arrivals, goodput, simulate
    from nbvision.console import Console

    if not options.rate > 0 or not 0 < options.share <= 1:
        raise InputError(f"rate is {options.rate}, share {options.share}; expected a positive rate, a share of 0 to 1")
    curve = LatencyCurve.load(options.times, precision=options.precision)
    load = {"deadline_ms": options.deadline_ms, "max_batch": options.max_batch, "jitter": options.jitter}
    console = Console()
    with console.status("simulating"):
        rates = [
            (
                policy,
                f"{goodput(curve, policy=policy, share=options.share, burst=options.burst, count=5000, **load):,.0f}",
            )
            for policy in POLICIES
        ]
        coming = arrivals(options.rate, 20_000, burst=options.burst)
        for cards in range(1, options.most_cards + 1):
            found = simulate(coming, curve, cards=cards, **load)
            if found.share_in_time >= options.share:
                break
    console.table(
        f"requests/s of one card, {options.share:.0%} of them within {options.deadline_ms:g} ms",
        ["policy", "requests/s"],
        rates,
    )
    if found.share_in_time < options.share:
        console.print(f"{options.rate:g} requests/s: {cards} cards are too few. {found}")
        return 1
    console.print(f"{options.rate:g} requests/s want {cards} card{'s' if cards > 1 else ''}: {found}")
    return 0
