"""Every kernel there is, as data: what tests compile for all architectures and what warm-up compiles for this one.

A description names its types and says how its functions are made; Numba and the functions are imported only when it is
compiled.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from nbvision_kernels import codes, read_source
from nbvision_kernels.chain import Chain, extended, make_shade_export

__all__ = [
    "CudaFrame",
    "Kernel",
    "NumbaKernel",
    "all_kernels",
    "argmax_map_kernel",
    "box_candidates_kernel",
    "box_iou_kernel",
    "box_regions_kernel",
    "cut_out_kernel",
    "cut_out_rgba_kernel",
    "dense_masks_kernel",
    "fill_taps_kernel",
    "fill_windows_kernel",
    "head_candidates_kernel",
    "image_regions_kernel",
    "instance_masks_kernel",
    "lay_out_kernel",
    "mask_boxes_kernel",
    "mask_centroids_kernel",
    "mask_table_kernel",
    "move_kernel",
    "paint_kernel",
    "paste_masks_kernel",
    "pointwise_kernel",
    "preprocess_kernel",
    "rank_candidates_kernel",
    "resample_kernel",
    "suppress_kernel",
    "warp_coefficients_kernel",
    "warp_kernel",
    "warp_plan_kernel",
    "window_kernel",
]

# Types by Numba's names; a star makes a pointer.
void, i32, i64, u32, f32 = "void", "int32", "int64", "uint32", "float32"
u8_pointer, i32_pointer, i64_pointer, f32_pointer = "uint8*", "int32*", "int64*", "float32*"
u32_pointer, u64_pointer, f64_pointer = "uint32*", "uint64*", "float64*"
_C_TYPES = {i32: "int", i64: "long long", f32: "float"}


# What kernels of regions and of tap tables call, which is compiled apart and linked in.
WRITE_REGION = "nbv_write_region"
WRITE_REGION_ARGUMENTS = (i32_pointer, i64_pointer, f32_pointer, *(i64,) * 6, *(i32,) * 8)
WRITE_TAPS = "nbv_write_taps"
WRITE_WINDOW = "nbv_write_window"
WRITE_TAPS_ARGUMENTS = (i32_pointer, i32_pointer, *(i32,) * 6)
PACK_TAPS = "nbv_pack_taps"
PACK_TAPS_ARGUMENTS = (i32_pointer, i64, i32)

# name -> (function, result, arguments)
DeviceFunctions = dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]]


@dataclass(frozen=True)
class NumbaKernel:
    """A kernel written in Python. ``make`` returns its function, compiled for ``arguments``."""

    name: str
    entry: str
    make: Callable[[], Callable[..., None]] = field(hash=False, compare=False)
    arguments: tuple[str, ...]
    float64: bool = False  # allowed only where one thread does the work of a whole output
    calls: Callable[[], DeviceFunctions] = field(default=dict, hash=False, compare=False)  # what is linked besides

    @property
    def defines(self) -> dict[str, int | str]:
        return {}

    def device_functions(self) -> DeviceFunctions:
        """The body as a device function: what links with :meth:`source_text`."""
        return {f"nbv_{self.entry}": (self.make(), void, self.arguments), **self.calls()}

    def roomier(self) -> None:
        """There is no version with more registers."""
        return None

    def source_text(self) -> str:
        """CUDA C that gives the body a plain entry point; Numba's own would have a mangled name."""
        c_types = [_C_TYPES.get(argument, "void *") for argument in self.arguments]
        names = [f"a{index}" for index in range(len(c_types))]
        parameters = ", ".join(f"{c_type} {name}" for c_type, name in zip(c_types, names, strict=True))
        return (
            f'extern "C" __device__ void nbv_{self.entry}({parameters});\n'
            f'extern "C" __global__ void {self.entry}({parameters}) {{ nbv_{self.entry}({", ".join(names)}); }}\n'
        )


@dataclass(frozen=True)
class CudaFrame:
    """A CUDA C frame and the Python device functions linked into it, which ``make`` returns."""

    name: str
    entry: str
    source: str
    defines: dict[str, int | str] = field(hash=False)
    make: Callable[[], DeviceFunctions] = field(hash=False, compare=False)
    float64: bool = False

    def device_functions(self) -> DeviceFunctions:
        return self.make()

    def roomier(self) -> CudaFrame | None:
        """The same with more registers a thread, for a pixel function that needs them."""
        registers = int(self.defines.get("REGISTERS", _MOST_REGISTERS))
        more = min(registers + 32, _MOST_REGISTERS)
        return replace(self, defines=self.defines | {"REGISTERS": more}) if more > registers else None

    def source_text(self) -> str:
        return read_source(self.source)


Kernel = NumbaKernel | CudaFrame

_SOURCES = {codes.SOURCE_CHW: "planes", codes.SOURCE_F16: "f16", codes.SOURCE_F32: "f32", codes.SOURCE_NV12: "nv12"}
_SAMPLERS = {codes.NEAREST: "nearest", codes.LINEAR_EXACT: "linear_exact", codes.LINEAR_FAST: "linear_fast"}
_LAYOUTS = {codes.NCHW: "nchw", codes.NHWC: "nhwc", codes.NHWC4: "nhwc4", codes.GRAY: "gray"}
_STORES = {
    codes.STORE_U8: ("u8", "uint8*"),
    codes.STORE_I8: ("i8", "int8*"),
    codes.STORE_F16: ("f16", "float16*"),
    codes.STORE_BF16: ("bf16", "uint16*"),
    codes.STORE_F32: ("f32", "float32*"),
}
_REGION_FIELDS = ["IMAGE", "X", "Y", "WIDTH", "HEIGHT", "LEFT", "TOP", "OUT_WIDTH", "OUT_HEIGHT", "FIELDS"]
_REGION_FIELDS += ["UNIT_X", "UNIT_Y", "SCALES"]
_MOST_REGISTERS = 239  # 255 where a multiprocessor has more for each thread
# sampler -> lines a thread of the frame, and its registers: what was fastest on sm_90 for three bytes a pixel; others
# get more, or some spill. docs/preprocess.md has the alternatives.
_FRAME_SHAPES = {codes.NEAREST: (4, 64), codes.LINEAR_EXACT: (3, 56), codes.LINEAR_FAST: (4, 64)}
_NV12_SHAPES = {codes.NEAREST: (4, 64), codes.LINEAR_EXACT: (3, 72), codes.LINEAR_FAST: (3, 72)}


def preprocess_kernel(
    sampler: int,
    layout: int,
    store: int,
    *,
    channels: int = 3,
    source_type: int = codes.SOURCE_U8,
    chain: Chain | None = None,
    line_threads: int = codes.LINE_THREADS[0],
    frame: bool = True,
) -> CudaFrame | NumbaKernel:
    """The fused plan of one type: its CUDA C frame, or the plain Numba kernel, which serves every number of
    ``channels`` but takes no ``chain``, no floats and no planes."""
    nv12 = source_type == codes.SOURCE_NV12
    store_name, stored = _STORES[store]
    weight = f32 if sampler == codes.LINEAR_FAST else i32
    name = f"preprocess-{_SAMPLERS[sampler]}-{_LAYOUTS[layout]}-{store_name}"
    if frame:
        lines, registers = (_NV12_SHAPES if nv12 else _FRAME_SHAPES)[sampler]
        if line_threads == codes.LINE_THREADS[1] and not nv12:
            lines = 4  # measured at 224, whose lines are whole blocks of 16
        pixel_bytes = codes.pixel_bytes_of(source_type, channels)
        registers += (
            16 * (pixel_bytes != 3 and not nv12) + 16 * (layout == codes.GRAY) + 8 * (nv12 and layout != codes.NCHW)
        )
        if source_type == codes.SOURCE_CHW:  # three times the loads of a line
            lines, registers = 3, 80
        gray = channels == 1 and not nv12
        floats = source_type in (codes.SOURCE_F16, codes.SOURCE_F32)
        types_of_plan = {"SOURCE": source_type, "PIXEL_BYTES": pixel_bytes, "GRAY": int(gray), "STORE_TYPE": store}
        types_of_plan |= {"LAYOUT": layout, "PAIRS": int(sampler != codes.NEAREST), "WEIGHT": int(weight == f32)}
        read = f"{channels}-{_SOURCES[source_type]}" if floats else _SOURCES.get(source_type, f"{pixel_bytes}-bytes")
        return CudaFrame(
            name=f"{name}-{read}-frame-{line_threads}" + (f"-{chain.digest}" if chain else ""),
            entry="preprocess",
            source="preprocess.cu",
            defines=types_of_plan
            | {"LINES": lines, "REGISTERS": registers, "LINE_THREADS": line_threads}
            | {f"REGION_{name}": getattr(codes, name) for name in _REGION_FIELDS}
            | _chain_defines(chain),
            make=lambda: _plan_functions(sampler, source_type) | _chain_function(chain),
        )

    def make() -> Callable[..., None]:
        from nbvision_kernels.preprocess_cuda import make_kernel

        function: Callable[..., None] = make_kernel(sampler, layout, store, source_type)
        return function

    tables = (u8_pointer, i64_pointer, i32_pointer, i64_pointer, f32_pointer, stored)
    name += "-nv12-numba" if nv12 else "-numba"
    return NumbaKernel(name, "preprocess", make, (*tables, *(i32,) * 5, *(f32,) * 9, *(weight,) * 6))


def _plan_functions(sampler: int, source_type: int) -> DeviceFunctions:
    from nbvision_kernels import nv12
    from nbvision_kernels.preprocess import SAMPLERS, make_blend_export, make_taps_export
    from nbvision_kernels.sampling import exact_down

    along_x, along_y, blend = SAMPLERS[sampler]
    fast = sampler == codes.LINEAR_FAST
    weights = f32_pointer if fast else i32_pointer
    pixels = f32_pointer if source_type in (codes.SOURCE_F16, codes.SOURCE_F32) else i32_pointer
    taps = (i32, i64, i64, f32, i32, i32_pointer, weights)
    functions: DeviceFunctions = {
        "nbv_along_x": (make_taps_export(along_x), void, taps),
        "nbv_along_y": (make_taps_export(along_y), void, taps),
        "nbv_blend": (make_blend_export(blend), f32, (pixels, weights, weights)),
    }
    if source_type == codes.SOURCE_NV12:
        convert = nv12.make_convert_export(nv12.fast_rgb if fast else nv12.exact_rgb)
        functions["nbv_convert"] = (convert, void, (weights,) * 3)
    elif sampler == codes.LINEAR_EXACT:
        functions["nbv_down"] = (exact_down, f32, (i32,) * 4)
    return functions


def resample_kernel(layout: int, store: int, *, pixel_bytes: int = 3, chain: Chain | None = None) -> CudaFrame:
    """The plan of the resample family; the filter is in its tap tables."""
    return CudaFrame(
        name=f"resample-{_LAYOUTS[layout]}-{_STORES[store][0]}-{pixel_bytes}-bytes"
        + (f"-{chain.digest}" if chain else ""),
        entry="resample",
        source="resample.cu",
        defines={"PIXEL_BYTES": pixel_bytes, "STORE_TYPE": store, "LAYOUT": layout}
        | {"LINES": codes.RESAMPLE_LINES, "WARPS": codes.RESAMPLE_WARPS, "WEIGHT_BITS": codes.TAP_WEIGHT_BITS}
        | {f"REGION_{name}": getattr(codes, name) for name in _REGION_FIELDS}
        | _chain_defines(chain),
        make=lambda: _resample_functions() | _chain_function(chain),
    )


def _resample_functions() -> DeviceFunctions:
    from nbvision_kernels.resample import saturate_sum, vertical_first

    return {"nbv_saturate_sum": (saturate_sum, i32, (i32,)), "nbv_vertical_first": (vertical_first, i32, (i32,) * 4)}


_WINDOWS = {kind: f"{parity}-{interpolation}" for (parity, interpolation), (kind, _) in codes.KINDS.items()}


def window_kernel(kind: int, layout: int, store: int, *, pixel_bytes: int = 3, chain: Chain | None = None) -> CudaFrame:
    """The plan of the window family."""
    return CudaFrame(
        name=f"window-{_WINDOWS[kind]}-{_LAYOUTS[layout]}-{_STORES[store][0]}-{pixel_bytes}-bytes"
        + (f"-{chain.digest}" if chain else ""),
        entry="window",
        source="window.cu",
        defines={"PIXEL_BYTES": pixel_bytes, "STORE_TYPE": store, "LAYOUT": layout}
        | {f"REGION_{name}": getattr(codes, name) for name in _REGION_FIELDS}
        | _chain_defines(chain),
        make=lambda: _window_function(kind) | _chain_function(chain),
    )


def _window_function(kind: int) -> DeviceFunctions:
    from nbvision_kernels.window import make_window_export

    arguments = (u8_pointer, i64, i32, i32_pointer, i32_pointer, *(i32,) * 4)
    return {"nbv_window": (make_window_export(kind), f32, arguments)}


def fill_windows_kernel() -> NumbaKernel:
    """Tap tables of the window family."""
    arguments = (i32_pointer, i32_pointer, *(i32,) * 4)
    make = _imported("resample_cuda", "fill_windows")
    return NumbaKernel("window-taps", "fill_windows", make, arguments, float64=True, calls=_write_window)


def _write_window() -> DeviceFunctions:
    from nbvision_kernels.window import write_window

    return {WRITE_WINDOW: (write_window, void, WRITE_TAPS_ARGUMENTS)}


def fill_taps_kernel() -> NumbaKernel:
    """Tap tables of the resample family."""
    arguments = (i32_pointer, i32_pointer, *(i32,) * 4)
    make = _imported("resample_cuda", "fill_taps")
    return NumbaKernel("resample-taps", "fill_taps", make, arguments, float64=True, calls=_write_taps)


def _write_taps() -> DeviceFunctions:
    from nbvision_kernels.resample import pack_taps, write_taps

    return {WRITE_TAPS: (write_taps, void, WRITE_TAPS_ARGUMENTS), PACK_TAPS: (pack_taps, void, PACK_TAPS_ARGUMENTS)}


def _chain_defines(chain: Chain | None) -> dict[str, int | str]:
    if chain is None:
        return {}
    names = [f"number_{index}" for index in range(chain.number_count)]
    return {
        "CHAIN": 1,
        "CHAIN_PARAMETERS": ", int bgr" + "".join(f", float {name}" for name in names),
        "CHAIN_NUMBERS": ", ".join(names) or "0.0f",
    }


def _chain_function(chain: Chain | None) -> DeviceFunctions:
    if chain is None:
        return {}
    return {"nbv_shade": (make_shade_export(chain), void, (f32_pointer, f32, f32, f32_pointer))}


def image_regions_kernel() -> NumbaKernel:
    """Regions of whole images."""
    arguments = (i64_pointer, i32, i32_pointer, i64_pointer, f32_pointer, *(i32,) * 8)
    make = _imported("regions_cuda", "fill_image_regions")
    return NumbaKernel("image-regions", "fill_image_regions", make, arguments, float64=True, calls=_write_region)


def box_regions_kernel() -> NumbaKernel:
    """Regions of boxes that live on the device."""
    tables = (i64_pointer, i64_pointer, f32_pointer, i32, f32, i32_pointer, i64_pointer, f32_pointer)
    make = _imported("regions_cuda", "fill_box_regions")
    arguments = (*tables, *(i32,) * 8)
    return NumbaKernel("box-regions", "fill_box_regions", make, arguments, float64=True, calls=_write_region)


def _write_region() -> DeviceFunctions:
    from nbvision_kernels.regions import write_region

    return {WRITE_REGION: (write_region, void, WRITE_REGION_ARGUMENTS)}


def head_candidates_kernel() -> NumbaKernel:
    """Anchors of a head over the threshold."""
    head = (f32_pointer, u32_pointer, i32, i32, i32, i32_pointer, f32_pointer, f32)
    arguments = (*head, u64_pointer, f32_pointer, f32_pointer, i32_pointer)
    return NumbaKernel("head-candidates", "head_candidates", _imported("boxes_cuda", "head_candidates"), arguments)


def box_candidates_kernel() -> NumbaKernel:
    """Plain boxes over the threshold."""
    arguments = (f32_pointer, u32_pointer, i32_pointer, i32, f32, u64_pointer)
    return NumbaKernel("box-candidates", "box_candidates", _imported("boxes_cuda", "box_candidates"), arguments)


_CANDIDATES = (
    f32_pointer,
    f32_pointer,
    i32_pointer,
    i32_pointer,
    i32_pointer,
)  # boxes, scores, labels, indices, counts


def rank_candidates_kernel() -> NumbaKernel:
    """The best candidates of each image in order."""
    given = (f32_pointer, f32_pointer, i32_pointer)
    arguments = (u64_pointer, i32, i32, i32, *given, u64_pointer, *_CANDIDATES)
    return NumbaKernel("rank-candidates", "rank_candidates", _imported("boxes_cuda", "rank_candidates"), arguments)


def suppress_kernel(*, soft: bool) -> NumbaKernel:
    """Ranked candidates to kept boxes."""
    numbers = (i32, f32, f32, i32, i32) if soft else (i32, f32, i32, i32)
    entry = "soft_suppress" if soft else "suppress"
    arguments = (*_CANDIDATES, *numbers, *_CANDIDATES)
    return NumbaKernel(entry.replace("_", "-"), entry, _imported("boxes_cuda", entry), arguments)


def box_iou_kernel() -> NumbaKernel:
    """Overlap of every pair of boxes."""
    arguments = (f32_pointer, f32_pointer, i32, i32, f32_pointer)
    return NumbaKernel("box-iou", "box_iou", _imported("boxes_cuda", "box_iou"), arguments)


def mask_boxes_kernel() -> NumbaKernel:
    """Extents and areas of masks."""
    arguments = (f32_pointer, i32, i32, f32, f32_pointer, f32_pointer, i32_pointer)
    return NumbaKernel("mask-boxes", "mask_boxes", _imported("masks_cuda", "mask_boxes"), arguments)


def cut_out_kernel() -> NumbaKernel:
    """Crops cut out along their masks."""
    arguments = (f32_pointer, f32_pointer, i32, f32, f32, *(f32,) * 6, f32_pointer)
    return NumbaKernel("cut-out", "cut_out", _imported("masks_cuda", "cut_out"), arguments)


def mask_centroids_kernel() -> NumbaKernel:
    """Centroids of masks."""
    arguments = (f32_pointer, i32, i32, f32, f32_pointer, i32, f32_pointer)
    return NumbaKernel("mask-centroids", "mask_centroids", _imported("masks_cuda", "mask_centroids"), arguments)


def cut_out_rgba_kernel() -> NumbaKernel:
    """Objects cut out of images, with their masks as alpha."""
    tables = (u8_pointer, u32_pointer, i64_pointer, i64_pointer, i32_pointer, i32, i32)
    arguments = (*tables, f32_pointer, i32, i32, f32, i32)
    return NumbaKernel("cut-out-rgba", "cut_out_rgba", _imported("masks_cuda", "cut_out_rgba"), arguments)


def paste_masks_kernel() -> NumbaKernel:
    """Masks of crops in their sources."""
    arguments = (f32_pointer, f32_pointer, i64_pointer, i32, i32, i32, f32, i64, i32, u8_pointer)
    return NumbaKernel("paste-masks", "paste_masks", _imported("masks_cuda", "paste_masks"), arguments)


def lay_out_kernel() -> NumbaKernel:
    """Detections to what is drawn of each, and where."""
    tables = (i32, i64_pointer, i32_pointer, i32, f32_pointer, f32_pointer, i32_pointer, f32_pointer)
    arguments = (*tables, i32, i32, i32_pointer, *(i32,) * 3, i32_pointer)
    return NumbaKernel("draw-lay-out", "lay_out", _imported("draw_cuda", "lay_out"), arguments)


def paint_kernel() -> NumbaKernel:
    """Images with their detections drawn on them."""
    tables = (u8_pointer, i64_pointer, i64_pointer, i32, *(i32_pointer,) * 4, u8_pointer, i32)
    masks = (f32_pointer, i32, i32, f32, i32)
    return NumbaKernel(
        "draw-paint", "paint", _imported("draw_cuda", "paint"), (*tables, *masks, u8_pointer, i32_pointer, i32, i32)
    )


def argmax_map_kernel() -> NumbaKernel:
    """The best class of each pixel."""
    arguments = (f32_pointer, i32, i32, i32_pointer)
    return NumbaKernel("argmax-map", "argmax_map", _imported("masks_cuda", "argmax_map"), arguments)


def mask_table_kernel() -> NumbaKernel:
    """Where the pixels of each instance mask go."""
    arguments = (f32_pointer, i64_pointer, i32, f32_pointer, i32, i32, i32, i32, i64, i64_pointer, i64_pointer)
    return NumbaKernel("mask-table", "mask_table", _imported("instances_cuda", "mask_table"), arguments)


def instance_masks_kernel() -> NumbaKernel:
    """Prototypes to the pixels of instance masks."""
    arguments = (f32_pointer, f32_pointer, i64_pointer, i64_pointer, *(i32,) * 6, f32, i32, i32, u8_pointer)
    return NumbaKernel("instance-masks", "instance_masks", _imported("instances_cuda", "instance_masks"), arguments)


def dense_masks_kernel() -> NumbaKernel:
    """Instance masks on whole canvases."""
    arguments = (u8_pointer, i64_pointer, i32, i32, i32, u8_pointer)
    return NumbaKernel("dense-masks", "dense_masks", _imported("instances_cuda", "dense_masks"), arguments)


_INTERPOLATIONS = {codes.WARP_NEAREST: "nearest", codes.WARP_LINEAR: "linear", codes.WARP_CUBIC: "cubic"}


def warp_coefficients_kernel() -> NumbaKernel:
    """Matrices that live on the device, inverted."""
    make = _imported("warp_cuda", "warp_coefficients")
    arguments = (f64_pointer, i32, i32, i32, f32_pointer)
    return NumbaKernel("warp-coefficients", "warp_coefficients", make, arguments, float64=True)


def warp_kernel(interpolation: int, channels: int) -> NumbaKernel:
    """Images through matrices."""

    def make() -> Callable[..., None]:
        from nbvision_kernels.warp_cuda import make_warp

        function: Callable[..., None] = make_warp(interpolation, channels)
        return function

    arguments = (u8_pointer, u32_pointer, i64_pointer, i64_pointer, f32_pointer, *(i32,) * 3)
    return NumbaKernel(f"warp-{_INTERPOLATIONS[interpolation]}-{channels}-bytes", "warp", make, arguments)


def warp_plan_kernel(
    interpolation: int, channels: int, layout: int, store: int, *, chain: Chain | None = None
) -> CudaFrame:
    """The fused plan through matrices."""

    def make() -> DeviceFunctions:
        from nbvision_kernels.warp_plan import make_warp_export

        arguments = (u8_pointer, u32_pointer, i64, i64, i32, i32, f32_pointer, *(i32,) * 5)
        return {"nbv_warp": (make_warp_export(interpolation, channels), u32, arguments)} | _chain_function(chain)

    return CudaFrame(
        name=f"warp-plan-{_INTERPOLATIONS[interpolation]}-{_LAYOUTS[layout]}-{_STORES[store][0]}-{channels}-bytes"
        + (f"-{chain.digest}" if chain else ""),
        entry="warp_plan",
        source="warp_plan.cu",
        defines={"PIXEL_BYTES": channels, "STORE_TYPE": store, "LAYOUT": layout, "COEFFICIENTS": codes.COEFFICIENTS}
        | _chain_defines(chain),
        make=make,
    )


def move_kernel(channels: int) -> NumbaKernel:
    """Images flipped and turned."""

    def make() -> Callable[..., None]:
        from nbvision_kernels.warp_cuda import make_move

        function: Callable[..., None] = make_move(channels)
        return function

    arguments = (u8_pointer, u32_pointer, i64_pointer, i64_pointer, i32, i32, i32)
    return NumbaKernel(f"move-{channels}-bytes", "move", make, arguments)


def pointwise_kernel(operation: int, channels: int, out_channels: int) -> NumbaKernel:
    """Each byte of images from those at the same place."""

    def make() -> Callable[..., None]:
        from nbvision_kernels.pointwise_cuda import make_pointwise

        function: Callable[..., None] = make_pointwise(operation, channels, out_channels)
        return function

    arguments = (u8_pointer, u32_pointer, f32_pointer, *(i64_pointer,) * 4, i32, f32, f32, f32)
    name = f"pointwise-{codes.OPERATIONS[operation]}-{channels}-to-{out_channels}-bytes"
    return NumbaKernel(name, "pointwise", make, arguments)


def all_kernels() -> Iterator[Kernel]:
    """Every kernel of every common type, each rarer type at least once; of the portable one, which nothing launches but
    tests, each sampler once. What differs in nothing but how a value is stored is compiled for three bytes a pixel."""
    from nbvision_kernels.gray import GRAY_CV2, GRAY_PIL

    opencvs_gray, pillows_gray = extended(None, GRAY_CV2), extended(None, GRAY_PIL)
    layouts, stores = (codes.NCHW, codes.NHWC), (codes.STORE_U8, codes.STORE_F16, codes.STORE_F32)
    for sampler in _SAMPLERS:
        for layout, store in itertools.product(layouts, stores):
            for channels in (1, 3, 4):
                yield preprocess_kernel(sampler, layout, store, channels=channels)
            yield preprocess_kernel(sampler, layout, store, source_type=codes.SOURCE_NV12)
        for layout in layouts:
            yield preprocess_kernel(sampler, layout, codes.STORE_I8)
        yield preprocess_kernel(sampler, codes.NCHW, codes.STORE_BF16)
        yield preprocess_kernel(sampler, codes.NCHW, codes.STORE_F16, line_threads=codes.LINE_THREADS[1])
        yield preprocess_kernel(sampler, codes.NHWC4, codes.STORE_F16)
        yield preprocess_kernel(sampler, codes.GRAY, codes.STORE_F16, chain=opencvs_gray)
        for store in (codes.STORE_U8, codes.STORE_F16):
            yield preprocess_kernel(sampler, codes.NCHW, store, source_type=codes.SOURCE_CHW)
        for source_type in (codes.SOURCE_U8, codes.SOURCE_NV12):
            yield preprocess_kernel(
                sampler, codes.NCHW, codes.STORE_F32, channels=1, source_type=source_type, frame=False
            )
    for sampler, source_type in itertools.product(
        (codes.NEAREST, codes.LINEAR_FAST), (codes.SOURCE_F16, codes.SOURCE_F32)
    ):
        yield preprocess_kernel(sampler, codes.NCHW, codes.STORE_F16, source_type=source_type)
    for channels in (1, 4):
        yield preprocess_kernel(
            codes.LINEAR_FAST, codes.NCHW, codes.STORE_F16, channels=channels, source_type=codes.SOURCE_F32
        )
    for layout in layouts:
        for pixel_bytes, store in itertools.product((1, 3, 4), stores):
            yield resample_kernel(layout, store, pixel_bytes=pixel_bytes)
        yield resample_kernel(layout, codes.STORE_I8)
    yield resample_kernel(codes.NHWC4, codes.STORE_F16)
    yield resample_kernel(codes.NCHW, codes.STORE_BF16)
    yield resample_kernel(codes.GRAY, codes.STORE_F16, chain=pillows_gray)
    yield fill_taps_kernel()
    for kind in (codes.CV2_AREA, codes.CV2_CUBIC, codes.TORCH_CUBIC):
        for pixel_bytes in (1, 3, 4):
            yield window_kernel(kind, codes.NCHW, codes.STORE_F16, pixel_bytes=pixel_bytes)
        yield window_kernel(kind, codes.NHWC, codes.STORE_U8)
    yield fill_windows_kernel()
    yield image_regions_kernel()
    yield box_regions_kernel()
    yield head_candidates_kernel()
    yield box_candidates_kernel()
    yield rank_candidates_kernel()
    yield suppress_kernel(soft=False)
    yield suppress_kernel(soft=True)
    yield box_iou_kernel()
    yield mask_boxes_kernel()
    yield mask_centroids_kernel()
    yield cut_out_kernel()
    yield cut_out_rgba_kernel()
    yield paste_masks_kernel()
    yield lay_out_kernel()
    yield paint_kernel()
    yield argmax_map_kernel()
    yield mask_table_kernel()
    yield instance_masks_kernel()
    yield dense_masks_kernel()
    yield warp_coefficients_kernel()
    for operation in (codes.THRESHOLD, codes.ADD_WEIGHTED):  # which know of no channels
        yield pointwise_kernel(operation, 3, 3)
    for channels in (1, 3, 4):
        yield move_kernel(channels)
        for interpolation in _INTERPOLATIONS:
            yield warp_kernel(interpolation, channels)
            yield warp_plan_kernel(interpolation, channels, codes.NCHW, codes.STORE_F16)
        for operation in (codes.LUT, codes.BLEND_BYTES, codes.BLEND_FLOATS):
            yield pointwise_kernel(operation, channels, channels)
        for out_channels in (1, 3, 4):
            yield pointwise_kernel(codes.COLOR, channels, out_channels)


def _imported(module: str, name: str) -> Callable[[], Callable[..., None]]:
    """A kernel function, imported only when it is compiled: its module needs the CUDA extra."""

    def make() -> Callable[..., None]:
        function: Callable[..., None] = getattr(importlib.import_module(f"nbvision_kernels.{module}"), name)
        return function

    return make
