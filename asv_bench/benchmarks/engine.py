"""What a call of an engine costs the host and the GPU, against TensorRT's bare call on the same context."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .common import gpu_us, launch_us, need, need_cuda

BATCHES = [1, 16]
NETWORKS = ["9 convolutions", "50 convolutions"]
WAYS = ["Engine.run, out=", "Engine.run, out=, CUDA graphs", "Engine.run", "bare execute_async_v3"]


class EngineOnGPU:
    """A network of small convolutions, 32 channels at 28 x 28, in float16."""

    params = (NETWORKS, BATCHES, WAYS)
    param_names = ("network", "batch", "how")

    def setup(self, network: str, batch: int, how: str) -> None:
        need_cuda()
        import cupy

        engine = engines(network, "graphs" in how)
        x = cupy.random.default_rng(0).standard_normal((batch, 32, 28, 28), dtype=np.float32)
        out = {"y": cupy.empty_like(x)}
        self.stream = cupy.cuda.Stream(non_blocking=True)
        with self.stream:
            for _ in range(4):
                engine.run({"x": x}, out)
        if how == "Engine.run":
            self.call = lambda: engine.run({"x": x})
        elif how.startswith("bare"):
            context, pointer = engine._executor._lanes[0][-1]._context, self.stream.ptr
            self.call = lambda: context.execute_async_v3(pointer)
        else:
            self.call = lambda: engine.run({"x": x}, out)

    def track_us(self, network: str, batch: int, how: str) -> float:
        with self.stream:
            return gpu_us(self.call)

    track_us.unit = "us"

    def track_host_us(self, network: str, batch: int, how: str) -> float:
        with self.stream:
            return launch_us(self.call)

    track_host_us.unit = "us"


class EngineOverhead:
    """What a call with ``out=`` takes the host more than TensorRT's own call, or the launch of the same graph, does.

    Both in turns, so that both see the same machine; ten calls at a time, which the GPU's queue has room for.
    """

    params = (NETWORKS, BATCHES, ["Engine.run, out=", "Engine.run, out=, CUDA graphs"])
    param_names = ("network", "batch", "how")
    rounds, calls = 100, 10

    def setup(self, network: str, batch: int, how: str) -> None:
        need_cuda()
        import cupy

        engine = engines(network, "graphs" in how)
        inputs = {"x": cupy.random.default_rng(0).standard_normal((batch, 32, 28, 28), dtype=np.float32)}
        out = {"y": cupy.empty_like(inputs["x"])}
        self.stream = stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            for _ in range(4):
                engine.run(inputs, out)
        lane = engine._executor._lanes[0][-1]
        context, graph = lane._context, lane._graph
        if (graph is None) == ("graphs" in how):
            raise RuntimeError(f"a call of {how!r} is {'no' if graph is None else 'a'} graph")
        self.ours = lambda: engine.run(inputs, out)
        self.bare = (lambda: context.execute_async_v3(stream.ptr)) if graph is None else (lambda: graph.launch(stream))

    def track_us(self, network: str, batch: int, how: str) -> float:
        with self.stream:
            return statistics.median(self._host_us(self.ours) - self._host_us(self.bare) for _ in range(self.rounds))

    track_us.unit = "us"

    def _host_us(self, call: Callable[[], Any]) -> float:
        self.stream.synchronize()
        started_s = time.perf_counter()
        for _ in range(self.calls):
            call()
        return (time.perf_counter() - started_s) * 1e6 / self.calls


@functools.lru_cache(maxsize=4)
def engines(network: str, cuda_graphs: bool) -> Any:
    from nbvision import Engine
    from nbvision.errors import MissingExtraError

    onnx = need("onnx")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.onnx"
        onnx.save(convolutions(int(network.split()[0])), path)
        try:
            return Engine(path, precision="fp16", batch=(1, 1, 16), device="cuda", cuda_graphs=cuda_graphs)
        except MissingExtraError as error:
            raise NotImplementedError(str(error)) from error


def convolutions(count: int) -> Any:
    """An ONNX model: 3 x 3 convolutions, each with a ReLU, from (N, 32, 28, 28) to the same."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(count)
    nodes, weights = [], []
    name = "x"
    for index in range(count):
        kernel = (rng.standard_normal((32, 32, 3, 3)) / 12).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        target = "y" if index == count - 1 else f"r{index}"
        nodes += [
            helper.make_node("Conv", [name, f"w{index}"], [f"c{index}"], name=f"conv{index}", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{index}"], [target], name=f"relu{index}"),
        ]
        name = target
    shape = ["N", 32, 28, 28]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
