"""Images through affine and perspective matrices, flipped, and turned."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError
from nbvision.image import ImageBatch, to_device
from nbvision.ops.arguments import as_given, collected, finite, image_size, one_of, target_for, whole
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import Device, array_module, device_of

__all__ = [
    "BORDERS",
    "INTERPOLATIONS",
    "Border",
    "Interpolation",
    "coefficients_of",
    "flip",
    "packed_fill",
    "rotate",
    "rotation_matrix",
    "translated",
    "warp_affine",
    "warp_perspective",
]

Interpolation = Literal["linear", "nearest", "cubic"]
Border = Literal["constant", "replicate", "reflect"]

INTERPOLATIONS = {"nearest": 0, "linear": 1, "cubic": 2}  # as nbvision_kernels.codes numbers them
BORDERS = {"constant": 0, "replicate": 1, "reflect": 2}
_MAX_GRID_Z = 65535
_THREADS = 64


def warp_affine(
    images: Any,
    matrix: Any,
    size: tuple[int, int],
    *,
    interpolation: Interpolation = "linear",
    border: Border = "constant",
    fill: float | Sequence[float] = 0.0,
    inverse: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Images through 2 x 3 matrices, as ``cv2.warpAffine`` does it.

    Nearest and linear give the bytes of OpenCV 5 on x86 with AVX2: the same float32 arithmetic, fused multiply-adds
    included. Only the columns behind OpenCV's last full vector, at most 31 at the right edge, round differently there:
    of noise, 0.05 % of their linear values are one level off, and 0.001 % of nearest ones are the neighbour's. Cubic
    (a = -0.75) is one level off in 0.1 % anywhere. OpenCV 4 rounds positions to 1/32 of a pixel. Both devices give the
    same bytes.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W) or (H, W, C) uint8 array, one (N, H, W, C) array, several arrays, or a batch. C is 1, 3 or 4.
    matrix : (2, 3) or (N, 2, 3) array
        For all images or one for each; x and y of the source times it are x and y of the output, in pixels, the centre
        of the first pixel being 0. On the host or on the images' device, whence it never comes to the host.
    size : (int, int)
        Height and width of the output, each up to 65535.
    interpolation : {"linear", "nearest", "cubic"}
    border : {"constant", "replicate", "reflect"}
        What lies outside an image: ``fill``, its outermost pixels, or its mirror image about their centres
        (OpenCV's ``BORDER_REFLECT_101``; farther away than the image is long, the mirror image of that, which
        OpenCV's cubic has not).
    fill : float or one float per channel
        0..255, rounded half to even.
    inverse : bool
        Whether ``matrix`` maps output to source instead (OpenCV's ``WARP_INVERSE_MAP``).
    out : ImageBatch or array, optional
        Where to write, not the images themselves: for a batch a batch of that size, else a contiguous array of the
        result's shape, where the images are.
    stream : CUDA stream, optional
        Default: CuPy's current stream. Nothing waits on the host.

    Returns
    -------
    ImageBatch or array
        What came in goes out: for a batch a batch, whose missing images stay missing; for one array one of its library
        (NumPy, CuPy, torch); for several, or one of four axes, an (N, H, W, C) array. The channels keep their order.

    Raises
    ------
    InputError
        For shapes, ranges or devices that do not fit, and for a matrix on the host that is not finite or, unless
        ``inverse``, singular. An image whose matrix on the device is such becomes ``fill``.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> image = np.zeros((60, 90, 3), np.uint8)
    >>> nbv.warp_affine(image, nbv.rotation_matrix((45, 30), 15), (60, 90)).shape
    (60, 90, 3)
    """
    return _warp(images, matrix, 2, size, interpolation, border, fill, inverse, out, stream)


def warp_perspective(
    images: Any,
    matrix: Any,
    size: tuple[int, int],
    *,
    interpolation: Interpolation = "linear",
    border: Border = "constant",
    fill: float | Sequence[float] = 0.0,
    inverse: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Images through 3 x 3 matrices, as ``cv2.warpPerspective`` does it.

    Everything is as in :func:`warp_affine`, except that ``matrix`` is (3, 3) or (N, 3, 3). An output pixel that falls
    on no point of the plane, where 0 would be divided by 0, becomes ``fill``.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
    matrix : (3, 3) or (N, 3, 3) array
    size : (int, int)
    interpolation : {"linear", "nearest", "cubic"}
    border : {"constant", "replicate", "reflect"}
    fill : float or one float per channel
    inverse : bool
    out : ImageBatch or array, optional
    stream : CUDA stream, optional

    Returns
    -------
    ImageBatch or array
        What came in, of that size.

    Raises
    ------
    InputError
        See :func:`warp_affine`.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> image = np.zeros((60, 90, 3), np.uint8)
    >>> tilted = [[1, 0.1, 0], [0, 1, 0], [0, 0.002, 1]]
    >>> nbv.warp_perspective(image, tilted, (60, 90), border="replicate").shape
    (60, 90, 3)
    """
    return _warp(images, matrix, 3, size, interpolation, border, fill, inverse, out, stream)


def flip(images: Any, *, horizontal: bool = False, vertical: bool = False, out: Any = None, stream: Any = None) -> Any:
    """Images mirrored: left and right exchanged, top and bottom, or both.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        See :func:`warp_affine`.
    horizontal, vertical : bool
    out : ImageBatch or array, optional
        Where to write, not the images themselves; not for arrays of several sizes.
    stream : CUDA stream, optional

    Returns
    -------
    ImageBatch or array
        What came in; for arrays of several sizes a list.

    Raises
    ------
    InputError
        If shapes or devices do not fit.
    """
    return _move(images, (False, bool(horizontal), bool(vertical)), out, stream)


def rotate(images: Any, quarter_turns: int, *, out: Any = None, stream: Any = None) -> Any:
    """Images turned counter-clockwise by multiples of 90 degrees, like ``numpy.rot90``; no pixel changes.

    For other angles see :func:`rotation_matrix`.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        See :func:`warp_affine`.
    quarter_turns : int
        Negative ones turn clockwise.
    out : ImageBatch or array, optional
        Where to write, not the images themselves; not for arrays of several sizes.
    stream : CUDA stream, optional

    Returns
    -------
    ImageBatch or array
        What came in, height and width exchanged by odd numbers of turns; for arrays of several sizes a list.

    Raises
    ------
    InputError
        If shapes or devices do not fit, or ``quarter_turns`` is no integer.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.rotate(np.zeros((60, 90, 3), np.uint8), 1).shape
    (90, 60, 3)
    """
    turns = whole("quarter_turns", quarter_turns, least=-(1 << 62)) % 4
    transpose, mirror_x, mirror_y = turns % 2 == 1, turns in (2, 3), turns in (1, 2)
    return _move(images, (transpose, mirror_x, mirror_y), out, stream)


def rotation_matrix(center: tuple[float, float], degrees: float, scale: float = 1.0) -> npt.NDArray[np.float64]:
    """The (2, 3) matrix that turns an image about a point, as ``cv2.getRotationMatrix2D`` gives it.

    Parameters
    ----------
    center : (float, float)
        x and y of the point that stays where it is.
    degrees : float
        Counter-clockwise as one looks at the image.
    scale : float
        Enlarges.

    Returns
    -------
    (2, 3) float64 array
        For :func:`warp_affine`.

    Raises
    ------
    InputError
        If a number is not finite.
    """
    try:
        x, y = center
    except (TypeError, ValueError):
        raise InputError(f"center is {center!r}; expected x and y") from None
    x, y = finite("center", x), finite("center", y)
    angle = math.radians(finite("degrees", degrees))
    along, across = finite("scale", scale) * math.cos(angle), scale * math.sin(angle)
    return np.array([[along, across, (1 - along) * x - across * y], [-across, along, across * x + (1 - along) * y]])


# --- the two devices --------------------------------------------------------------------------------------------------


def _warp(
    images: Any,
    matrix: Any,
    lines: int,
    size: tuple[int, int],
    interpolation: Interpolation,
    border: Border,
    fill: float | Sequence[float],
    inverse: bool,
    out: Any,
    stream: Any,
) -> Any:
    images, batch = collected(images)
    sizes = [image_size(size)] * len(batch)
    return _warped(images, batch, matrix, lines, sizes, interpolation, border, fill, inverse, out, stream)


def translated(
    images: Any,
    offset: tuple[int, int],
    growth: tuple[int, int],
    border: Border,
    fill: float | Sequence[float],
    out: Any,
    stream: Any,
) -> Any:
    """Images moved by whole pixels, down and right, on canvases that are higher and wider by ``growth``."""
    images, batch = collected(images)
    sizes = [(height + growth[0], width + growth[1]) for height, width in batch.sizes.tolist()]
    matrix = np.array([[1, 0, offset[1]], [0, 1, offset[0]]], np.float64)
    return _warped(images, batch, matrix, 2, sizes, "nearest", border, fill, False, out, stream)


def _warped(
    images: Any,
    batch: ImageBatch,
    matrix: Any,
    lines: int,
    sizes: list[tuple[int, int]],
    interpolation: Interpolation,
    border: Border,
    fill: float | Sequence[float],
    inverse: bool,
    out: Any,
    stream: Any,
) -> Any:
    kind = INTERPOLATIONS[one_of("interpolation", interpolation, Interpolation)]
    edge = np.int32(BORDERS[one_of("border", border, Border)])
    packed = packed_fill(fill, batch.channels)
    perspective = np.int32(lines == 3)
    with _on(stream, batch.device):
        matrices = _checked_matrices(matrix, lines, bool(inverse), len(batch), batch.device)
        present = [size if there else (0, 0) for size, there in zip(sizes, batch.ok, strict=True)]
        target, result = target_for(images, batch, present, out)
        coefficients = _coefficients(matrices, bool(inverse))
        if batch.device == "cuda":
            from nbvision_kernels.catalog import warp_kernel
            from nbvision_kernels.codes import WARP_LINES, WARP_TILE

            kernel = warp_kernel(kind, batch.channels)
            numbers = (perspective, edge, packed)
            _launch(
                kernel,
                batch,
                target,
                (coefficients,),
                numbers,
                tile=(WARP_TILE, WARP_LINES),
                block=(WARP_TILE, WARP_LINES),
            )
        elif len(batch):
            _loop("warp", kind, batch.channels)(
                batch.table.reshape(-1),
                target.table.reshape(-1),
                len(batch),
                max(height for height, _ in sizes),
                coefficients.reshape(-1),
                perspective,
                edge,
                packed,
            )
        return as_given(result, images, out)


def _move(images: Any, how: tuple[bool, bool, bool], out: Any, stream: Any) -> Any:
    images, batch = collected(images)
    transpose, *_ = numbers = tuple(np.int32(step) for step in how)
    with _on(stream, batch.device):
        sizes = (batch.sizes[:, ::-1] if transpose else batch.sizes).tolist()
        target, result = target_for(images, batch, [(height, width) for height, width in sizes], out)
        if batch.device == "cuda":
            from nbvision_kernels.catalog import move_kernel
            from nbvision_kernels.codes import MOVE_LINES, WARP_TILE

            _launch(
                move_kernel(batch.channels),
                batch,
                target,
                (),
                numbers,
                tile=(WARP_TILE, WARP_TILE),
                block=(WARP_TILE, MOVE_LINES),
            )
        elif len(batch):
            tables = (batch.table.reshape(-1), target.table.reshape(-1))
            _loop("move", batch.channels)(*tables, len(batch), int(target.sizes[:, 0].max()), *numbers)
        return as_given(result, images, out)


def _launch(
    kernel: Any,
    batch: ImageBatch,
    target: ImageBatch,
    per_image: tuple[Any, ...],
    numbers: tuple[Any, ...],
    *,
    tile: tuple[int, int],
    block: tuple[int, int],
) -> None:
    """One launch over all images, or several if there are more than a grid is deep."""
    batch.use_on_current_stream()
    target.use_on_current_stream()
    height, width = target.sizes.max(axis=0, initial=0).tolist()
    if not height:
        return
    function = load_kernel(kernel, target.table.device.id)
    tables = (batch.table, target.table, *per_image)
    for first in range(0, len(batch), _MAX_GRID_Z):
        part = slice(first, first + _MAX_GRID_Z)
        grid = (-(-width // tile[0]), -(-height // tile[1]), len(batch.sizes[part]))
        function(grid, block, (0, 0, *(table[part] for table in tables), *numbers))


def coefficients_of(matrix: Any, count: int, inverse: bool, device: Device) -> tuple[Any, np.int32]:
    """(count, 9) float32 on the device, and whether the matrices, affine or not, are perspective: output to source."""
    lines = 3 if tuple(getattr(matrix, "shape", np.shape(matrix)))[-2:] == (3, 3) else 2
    matrices = _checked_matrices(matrix, lines, inverse, count, device)
    return _coefficients(matrices, inverse), np.int32(lines == 3)


def _coefficients(matrices: Any, inverse: bool) -> Any:
    """(N, 9) float32 where the matrices are: output to source."""
    from nbvision_kernels.codes import COEFFICIENTS

    device = device_of(matrices)
    count, lines, _ = matrices.shape
    coefficients = memory.acquire(count * COEFFICIENTS * 4, device=device).view((count, COEFFICIENTS), dtype=np.float32)
    numbers = (np.int32(count), np.int32(lines), np.int32(inverse))
    if device == "cuda" and count:
        from nbvision_kernels.catalog import warp_coefficients_kernel

        kernel = load_kernel(warp_coefficients_kernel(), matrices.device.id)
        kernel((-(-count // _THREADS),), (_THREADS,), (matrices, *numbers, coefficients))
    elif count:
        _loop("coefficients")(matrices.reshape(-1), *numbers, coefficients.reshape(-1))
    return coefficients


@functools.cache
def _loop(name: str, *types: int) -> Any:
    from nbvision_kernels import warp as kernels

    if not types:
        return cpu_loop(f"warp-{name}", kernels.coefficients_cpu, parallel=False)
    loop = getattr(kernels, f"make_{name}_cpu")(*types)
    return cpu_loop("-".join(map(str, (name, *types))), loop)


def _on(stream: Any, device: Device) -> contextlib.AbstractContextManager[Any]:
    given: contextlib.AbstractContextManager[Any] = stream
    return given if stream is not None and device == "cuda" else contextlib.nullcontext()


# --- arguments --------------------------------------------------------------------------------------------------------


def _checked_matrices(matrix: Any, lines: int, inverse: bool, count: int, device: Device) -> Any:
    """(count, lines, 3) float64 on the device; what is on the host is known to be of use."""
    given_on = device_of(matrix)
    if given_on == "cuda" and device == "cpu":
        raise InputError("matrix is on cuda, the images are on cpu; give both on one device")
    try:
        matrices = to_device(matrix, given_on)
        if matrices.dtype.kind not in "fiu":
            raise TypeError(f"dtype {matrices.dtype}")
    except (TypeError, ValueError) as error:
        raise InputError(f"matrix is no array of numbers ({error}); expected ({lines}, 3) or (N, {lines}, 3)") from None
    if matrices.shape not in {(lines, 3), (count, lines, 3)}:
        raise InputError(
            f"matrix has shape {matrices.shape}; expected ({lines}, 3) for all images or ({count}, {lines}, 3), "
            "one for each"
        )
    if given_on == "cpu":
        _check_on_host(matrices.reshape(-1, lines, 3).astype(np.float64), inverse)
    xp = array_module(device)
    matrices = xp.asarray(matrices, dtype=np.float64)
    return xp.ascontiguousarray(xp.broadcast_to(matrices, (count, lines, 3)))


def _check_on_host(matrices: npt.NDArray[np.float64], inverse: bool) -> None:
    for index, matrix in enumerate(matrices):
        if not np.isfinite(matrix).all():
            raise InputError(f"matrix {index} is {matrix.tolist()}; expected finite numbers")
    if inverse or not len(matrices):
        return
    coefficients = _coefficients(np.ascontiguousarray(matrices), inverse)
    for index, good in enumerate(np.isfinite(coefficients).all(axis=1)):
        if not good:
            raise InputError(
                f"matrix {index} is {matrices[index].tolist()}, which cannot be inverted; expected one that can, or "
                "inverse=True if it maps output to source"
            )


def packed_fill(fill: float | Sequence[float], channels: int) -> Any:
    """One byte a channel in an int32, the first in the lowest."""
    try:
        values = np.broadcast_to(np.asarray(fill, np.float64).reshape(-1), channels)
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if not ((values >= 0) & (values <= 255)).all():
        raise InputError(f"fill is {fill!r}; expected a number from 0 to 255, or {channels}, one per channel")
    packed = sum(int(value) << 8 * channel for channel, value in enumerate(np.rint(values)))
    return np.int32(packed - ((packed >> 31) << 32))
