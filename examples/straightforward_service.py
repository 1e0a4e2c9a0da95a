"""The service most people write first, as the baseline to measure ``nbvision serve`` against.

FastAPI, an image a request, one after the other through OpenCV and the models; FastAPI's threads wait for each other
at the models, whose calls are not made at the same time. Its answers are those of ``nbvision serve``.

    python3 examples/straightforward_service.py --port 8001 --device cuda
"""

from __future__ import annotations

import argparse
import json
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.concurrency import run_in_threadpool
from straightforward import StraightforwardRecognizer

from nbvision.demo.run import models_directory
from nbvision.ops.rle import mask_to_rle
from nbvision.recognizer import load_engine


def make_app(device: str, precision: str) -> FastAPI:
    """The whole service."""
    app = FastAPI()
    directory = models_directory()
    engines = [
        load_engine(directory, name, device=device, precision=precision) for name in ("detector", "masker", "embedder")
    ]
    classes = json.loads(engines[0].metadata["nbvision.classes"])
    recognizer, lock = StraightforwardRecognizer(*engines), threading.Lock()

    def recognize(data: bytes) -> dict[str, Any]:
        with lock:
            found = recognizer.recognize([data])
        if found.errors[0] is not None:
            raise HTTPException(422, found.errors[0])
        rle = mask_to_rle(found.masks)
        objects = [
            {
                "box": found.boxes[index].tolist(),
                "score": float(found.scores[index]),
                "label": classes[found.labels[index]],
                "mask": {"size": rle[index]["size"], "counts": rle[index]["counts"].decode()},
                "vector": found.vectors[index].tolist(),
            }
            for index in range(len(found))
        ]
        return {"objects": objects}

    @app.post("/v1/garments")
    async def garments(request: Request) -> dict[str, Any]:
        return await run_in_threadpool(recognize, await request.body())

    @app.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    options = parser.parse_args()
    uvicorn.run(make_app(options.device, options.precision), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
