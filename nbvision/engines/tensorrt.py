"""TensorRT on CUDA, by named tensors: 8.5, 10, 11 and TensorRT-RTX."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from nbvision.engines._trt import TensorRT
from nbvision.engines._trt_memory import Allocations, DeferredOutput, Stage, slabs
from nbvision.engines.build import BuildOptions, build_plan
from nbvision.engines.onnx_file import OnnxFile
from nbvision.engines.plan_cache import plan_path, read_plan, sole_builder, write_plan
from nbvision.engines.spec import TensorSpec, batch_class, check_out
from nbvision.errors import EngineError, InputError, MemoryLimitError
from nbvision.runtime import memory
from nbvision.runtime.device import require_cupy

__all__ = ["TensorRTExecutor"]

_ADDRESS_ALIGNMENT_BYTES = 256  # TensorRT's kernels load vectors and do not check

_LAST_DEFAULT_STREAM = 2  # 0, and CUDA's names for the legacy and the per-thread default stream
_GRAPH_AFTER = 2  # calls with the same arrays, which is a sign that more will come; TensorRT wants one before a capture
_LANES = 4  # graphs of a profile, where contexts may share one
_STAGE_AFTER = 8  # calls with other arrays than before: then the graph gets memory of its own, and arrays are copied

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
OutputShapes: TypeAlias = tuple[tuple[int, ...] | None, ...]  # None: it depends on the data
# What a call runs on: the shapes of the inputs, the addresses of inputs and outputs, and scratch memory.
Known: TypeAlias = "tuple[Shapes, tuple[int, ...], memory.Buffer]"

logger = logging.getLogger("nbvision")


class TensorRTExecutor:
    """One plan; an execution context for each optimisation profile, or several where calls are kept as graphs.

    Work runs on the caller's stream. Only from CUDA's default stream, on which TensorRT would synchronize, it goes to a
    stream of the executor's own, which waits for the caller's and which the caller's then waits for, on the device.

    Raises
    ------
    EngineError
        If the plan cannot be built, or the device cannot load it.
    MemoryLimitError
        If there is no memory for the weights.
    """

    def __init__(
        self,
        trt: TensorRT,
        model: OnnxFile,
        options: BuildOptions,
        *,
        cache_dir: Path | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        cupy = require_cupy("a TensorRT engine")
        self._cuda = cuda = cupy.cuda
        self._array_type = cupy.ndarray
        self._trt = trt
        self._file_name = model.path.name
        self._batches = options.batches
        self._lock = threading.Lock()  # a context belongs to one thread at a time
        self._allocations = Allocations()
        self._allocator = trt.create_allocator(self._allocations.allocate, self._allocations.free)
        self._runtime = trt.create("Runtime")
        self._runtime.gpu_allocator = self._allocator
        self._engine = self._load_or_build(model, options, cache_dir)
        self._slabs = slabs(cuda.Device().id)
        self._slabs.reserve(trt.activation_bytes(self._engine))
        self._stream = cuda.Stream(non_blocking=True)
        self._inputs_ready = cuda.Event(disable_timing=True)
        self._outputs_ready = cuda.Event(disable_timing=True)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        specs = [self._spec(name) for name in names]
        self.inputs = tuple(spec for spec in specs if self._is_input(spec))
        self.outputs = tuple(spec for spec in specs if not self._is_input(spec))
        self._known: dict[Shapes, tuple[list[_Lane], OutputShapes]] = {}
        lanes = _LANES if cuda_graphs and trt.shares_profiles else 1
        self._lanes = [
            [self._make_lane(profile, cuda_graphs) for _ in range(lanes)]
            for profile in range(self._engine.num_optimization_profiles)
        ]

    def run(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        """Run; see :class:`nbvision.engines.engine.Executor`."""
        # The host queues many calls a millisecond: loops, for a list comprehension costs a call of a function.
        caller = self._cuda.get_current_stream()
        arrays, addresses = [], []
        for spec in self.inputs:
            array = inputs[spec.name]
            address = array.data.ptr
            if address % _ADDRESS_ALIGNMENT_BYTES:  # TensorRT cannot read there, as where a slice of a batch starts
                array = array.copy()
                address = array.data.ptr
            arrays.append(array)
            addresses.append(address)
        shapes = tuple([array.shape for array in arrays])
        stream = caller if caller.ptr > _LAST_DEFAULT_STREAM else self._stream
        with self._lock:
            lanes, output_shapes = self._known.get(shapes) or self._infer(shapes)
            slab = self._slabs.of(stream)
            results = []
            for spec, shape in zip(self.outputs, output_shapes, strict=True):
                result = self._output(spec, shape, out.get(spec.name))
                results.append(result)
                if result is not None:
                    addresses.append(result.data.ptr)
            known = shapes, tuple(addresses), slab
            lane = lanes[0] if len(lanes) == 1 else _lane_for(lanes, known)
            stage = lane.stage_for(stream, known)
            if stream is not caller:  # after the outputs were taken, whose last readers the caller's stream waits for
                caller.record(self._inputs_ready)
                stream.wait_event(self._inputs_ready)
            lane.follow(stream)
            if stage is None:
                queued = lane.run(stream, known)
            else:
                stage.take(arrays, stream)
                queued = lane.run(stream, (stage.shapes, stage.addresses, slab))
                stage.give(results, stream)
            if stream is not caller:
                stream.record(self._outputs_ready)
                caller.wait_event(self._outputs_ready)
            if lane.deferred:
                results = lane.take_deferred(self.outputs, results)
        given = {}
        for array in arrays:
            memory.record_use(array, caller)
        for spec, result in zip(self.outputs, results, strict=True):
            given[spec.name] = result
            if result is None:
                queued = False
            else:
                memory.record_use(result, caller)
        if not queued:
            self._allocations.raise_failure()
            raise EngineError(f"{self._file_name}: {self._trt} refuses to run: {self._trt.take_reason()}")
        return given

    def _profile_of(self, shapes: Shapes) -> int:
        """The first optimisation profile that takes this batch."""
        if len(self._lanes) == 1:
            return 0
        batch = next(shape[0] for spec, shape in zip(self.inputs, shapes, strict=True) if spec.batched)
        return next(index for index, size in enumerate(self._batches) if size.min <= batch <= size.max)

    def _load_or_build(self, model: OnnxFile, options: BuildOptions, cache_dir: Path | None) -> Any:
        path = plan_path(cache_dir, self._trt, model, options)
        with contextlib.nullcontext() if path.exists() else sole_builder(path):
            return self._load_or_build_alone(model, options, path)

    def _load_or_build_alone(self, model: OnnxFile, options: BuildOptions, path: Path) -> Any:
        plan = read_plan(path)
        if plan is not None:
            engine = self._load(plan)
            if engine is not None:
                logger.info("%s: plan loaded from %s", self._file_name, path)
                return engine
            logger.warning("the plan %s does not load (%s); it is built anew", path, self._trt.take_reason())
        plan = build_plan(self._trt, model, options)
        engine = self._load(plan)
        if engine is None:
            raise EngineError(f"{self._file_name}: {self._trt} does not run here: {self._trt.take_reason()}")
        write_plan(path, plan)
        return engine

    def _load(self, plan: bytes) -> Any:
        engine = self._runtime.deserialize_cuda_engine(plan)
        self._allocations.raise_failure()
        return engine

    def _make_lane(self, profile: int, cuda_graphs: bool) -> _Lane:
        context = self._trt.create_context(self._engine, profile, self._stream)
        if context is None:
            self._allocations.raise_failure()
            raise EngineError(f"{self._file_name}: {self._trt} makes no execution context: {self._trt.take_reason()}")
        max_batch = self._batches[profile].max
        return _Lane(self._trt, self._file_name, context, self.inputs, self.outputs, max_batch, cuda_graphs=cuda_graphs)

    def _spec(self, name: str) -> TensorSpec:
        dtype = self._trt.dtype(self._engine.get_tensor_dtype(name))
        return TensorSpec(name, dtype, tuple(self._engine.get_tensor_shape(name)))

    def _is_input(self, spec: TensorSpec) -> bool:
        return bool(self._engine.get_tensor_mode(spec.name) == self._trt.api.TensorIOMode.INPUT)

    def _infer(self, shapes: Shapes) -> tuple[list[_Lane], OutputShapes]:
        """The lanes for these shapes of the inputs, and the shapes of the outputs, asked once."""
        lanes = self._lanes[self._profile_of(shapes)]
        found = lanes[0].infer(shapes)
        if None in found:
            for lane in lanes[1:]:
                lane.infer(shapes)
        self._known[shapes] = lanes, found
        return lanes, found

    def _output(self, spec: TensorSpec, shape: tuple[int, ...] | None, out: Any) -> Any:
        """Where TensorRT shall write an output; None if it will ask."""
        if shape is None:
            if out is not None:
                raise InputError(f"out[{spec.name!r}] cannot be given: the shape of that output depends on the data")
            return None
        if out is None:
            size_bytes = math.prod(shape) * spec.dtype.itemsize
            return memory.acquire(size_bytes, device="cuda").view(shape, dtype=spec.dtype)
        fits = type(out) is self._array_type and out.shape == shape and out.dtype == spec.dtype
        if not fits or not out.flags.c_contiguous:
            check_out(spec, out, shape=shape, device="cuda")
        if out.data.ptr % _ADDRESS_ALIGNMENT_BYTES:
            raise InputError(
                f"out[{spec.name!r}] starts at {out.data.ptr:#x}; expected a multiple of "
                f"{_ADDRESS_ALIGNMENT_BYTES} bytes. Give a whole array, not a slice"
            )
        return out


class _Lane:
    """An execution context, what it was last told, and the graph of that, if it was told so often enough."""

    def __init__(
        self,
        trt: TensorRT,
        file_name: str,
        context: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        max_batch: int,
        *,
        cuda_graphs: bool,
    ) -> None:
        self._trt, self._file_name, self._context = trt, file_name, context
        self._specs = inputs, outputs
        self._inputs, self._outputs = [spec.name for spec in inputs], [spec.name for spec in outputs]
        self.deferred: dict[str, DeferredOutput] = {}  # outputs whose shape depends on the data
        self._allocators: list[Any] = []  # TensorRT keeps none of its own
        self._cuda = require_cupy("a TensorRT engine").cuda
        self._event = self._cuda.Event(disable_timing=True)
        self._shapes: Shapes = ((),) * len(inputs)
        self._bound = [*self._inputs, *self._outputs]  # whose addresses it is told
        self._addresses: tuple[int, ...] = (0,) * len(self._bound)
        self._slab: memory.Buffer | None = None  # kept, for a graph has its address
        self._stream: Any = None
        self._calls = 0  # in this state
        self._graph: Any = None
        self._capture_stream = self._cuda.Stream(non_blocking=True) if cuda_graphs else None
        self.stage: Stage | None = None
        self._may_stage = cuda_graphs and all(spec.batched and spec.fixed_beyond_batch for spec in (*inputs, *outputs))
        self._max_batch = max_batch
        self._changes = 0

    def knows(self, known: Known) -> bool:
        """Whether the next call would run on this, as it stands."""
        shapes, addresses, slab = known
        return self._addresses == addresses and self._shapes == shapes and self._slab is slab

    def infer(self, shapes: Shapes) -> OutputShapes:
        """The shapes of the outputs for those of the inputs."""
        self._tell_shapes(shapes)
        found = [tuple(self._context.get_tensor_shape(name)) for name in self._outputs]
        for name, shape in zip(self._outputs, found, strict=True):
            if -1 in shape and name not in self.deferred:
                self._defer(name)
        # After a call TensorRT 8.5 says what that call's data gave, whatever the new shapes.
        known = zip(self._outputs, found, strict=True)
        return tuple([None if name in self.deferred else shape for name, shape in known])

    def _defer(self, name: str) -> None:
        output = self.deferred[name] = DeferredOutput()
        allocator = self._trt.create_output_allocator(output.allocate, output.notify)
        self._allocators.append(allocator)
        if not self._context.set_output_allocator(name, allocator):
            raise EngineError(
                f"{self._file_name}: {self._trt} takes no allocator of {name!r}: {self._trt.take_reason()}"
            )
        self._bound.remove(name)
        self._addresses = (0,) * len(self._bound)
        self._capture_stream = None  # the shape comes back to the host in the middle of the call

    def take_deferred(self, specs: tuple[TensorSpec, ...], results: list[Any]) -> list[Any]:
        """``results`` with what the last call put into memory it asked for; None where it did not ask."""
        return [
            self.deferred[spec.name].take(spec.dtype) if array is None else array
            for spec, array in zip(specs, results, strict=True)
        ]

    def stage_for(self, stream: Any, known: Known) -> Stage | None:
        """The memory that this call shall be copied through, so that it can be a graph; None if it need not or may not.

        It has room for the largest batch so far, rounded up, and a graph computes all of it.
        """
        if not self._may_stage or self._capture_stream is None or stream.is_capturing():
            return None
        if self.stage is None:
            self._changes += not self.knows(known)
            if self._changes <= _STAGE_AFTER:
                return None
        batch = known[0][0][0]
        if self.stage is None or self.stage.batch < batch:
            try:
                self.stage = Stage(*self._specs, min(batch_class(batch), self._max_batch), stream)
            except MemoryLimitError as error:
                logger.warning("%s: no CUDA graphs (%s); calls are queued one by one", self._file_name, error)
                self.stage, self._may_stage = None, False
        return self.stage

    def follow(self, stream: Any) -> None:
        """Let what is queued on ``stream`` from now on come after the last call, whose memory it uses again."""
        if self._stream is not None and self._stream.ptr != stream.ptr:
            self._stream.record(self._event)
            stream.wait_event(self._event)
        self._stream = stream

    def run(self, stream: Any, known: Known) -> bool:
        """Queue one call on ``stream``, which follows; False if TensorRT refuses."""
        if not self.knows(known):
            shapes, addresses, slab = known
            self._tell_shapes(shapes)
            self._tell_addresses(addresses, slab)
        if self._graph is not None and not stream.is_capturing():
            self._graph.launch(stream)
            return True
        if self.deferred:
            with stream:  # who asks for memory asks for that stream
                queued = bool(self._context.execute_async_v3(stream.ptr))
        else:
            queued = bool(self._context.execute_async_v3(stream.ptr))
        self._calls += 1
        if queued and self._calls == _GRAPH_AFTER and self._capture_stream is not None and not stream.is_capturing():
            self._graph = self._captured(self._capture_stream)
        return queued

    def _tell_shapes(self, shapes: Shapes) -> None:
        self._calls, self._graph = 0, None
        for name, shape, before in zip(self._inputs, shapes, self._shapes, strict=True):
            if shape != before and not self._context.set_input_shape(name, shape):
                self._shapes = ((),) * len(shapes)
                what = f"{name!r} of shape {shape}"
                raise EngineError(f"{self._file_name}: {self._trt} refuses {what}: {self._trt.take_reason()}")
        self._shapes = shapes

    def _tell_addresses(self, addresses: tuple[int, ...], slab: memory.Buffer) -> None:
        for name, address, before in zip(self._bound, addresses, self._addresses, strict=True):
            if address != before:
                self._context.set_tensor_address(name, address)
        self._addresses = addresses
        if self._slab is None or self._slab.address != slab.address:
            self._trt.set_activations(self._context, slab.address, slab.size_bytes)
        self._slab = slab

    def _captured(self, stream: Any) -> Any:
        """The call as a graph; None, and no further attempt, if it cannot be one."""
        try:
            stream.begin_capture()
            try:
                captured = self._context.execute_async_v3(stream.ptr)
            finally:
                graph = stream.end_capture()
        except self._cuda.runtime.CUDARuntimeError as error:
            captured, graph = False, None
            logger.warning("%s: no CUDA graph (%s); calls are queued one by one", self._file_name, error)
        else:
            if not captured:
                logger.warning("%s: no CUDA graph: %s", self._file_name, self._trt.take_reason())
        if not captured:
            self._capture_stream = None
            return None
        return graph


def _lane_for(lanes: list[_Lane], known: Known) -> _Lane:
    """The lane that knows this, else the one that was used longest ago; the last in the list is the latest."""
    index = next((index for index, lane in enumerate(lanes) if lane.knows(known)), 0)
    lane = lanes.pop(index)
    lanes.append(lane)
    return lane
