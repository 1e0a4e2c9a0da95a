"""Pixel functions: the user's own Python, compiled into the fused kernel of :class:`nbvision.Preprocess`."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nbvision.errors import InputError
from nbvision.ops.arguments import finite

if TYPE_CHECKING:
    from nbvision_kernels.chain import Chain

__all__ = ["PixelFunction", "as_pixel_functions", "chain_of", "pixel"]


@dataclass(frozen=True)
class PixelFunction:
    """A function of one pixel, made with :func:`pixel`, and the numbers bound to its parameters.

    Attributes
    ----------
    name : str
    numbers : dict of str to float
        Its parameters beyond the pixel, with the values that they have now.
    wants_position : bool
        Whether it takes the pixel's place on the canvas.
    """

    function: types.FunctionType
    wants_position: bool
    numbers: dict[str, float] = field(hash=False)

    @property
    def name(self) -> str:
        return self.function.__name__

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The function itself, in plain Python, to try it on numbers or on whole arrays."""
        return self.function(*arguments, **(self.numbers if len(arguments) <= self._fixed else {}) | keywords)

    def bind(self, **numbers: float) -> PixelFunction:
        """The same function with other numbers; compiles nothing.

        Raises
        ------
        InputError
            For a name that is no parameter, or a value that is no finite number.
        """
        unknown = sorted(set(numbers) - set(self.numbers))
        if unknown:
            raise InputError(f"{self.name} has no parameter {unknown[0]!r}; it has {sorted(self.numbers) or 'none'}")
        checked = {name: finite(f"{name} of {self.name}", value) for name, value in numbers.items()}
        return PixelFunction(self.function, self.wants_position, self.numbers | checked)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value:g}' for name, value in self.numbers.items())})"

    @property
    def _fixed(self) -> int:
        return 5 if self.wants_position else 3


def pixel(function: Callable[..., Any]) -> PixelFunction:
    """Make a pixel function, to be given to ``Preprocess(pixel=...)``.

    It takes red, green and blue as float32 of 0..255, whatever the order of channels in source and output, and returns
    three numbers, which need not stay in that range. After ``r, g, b`` it may take ``x, y``, the column and line on the
    canvas, counted from 0. Parameters after those are numbers with a default; :meth:`PixelFunction.bind` changes them
    without compiling.

    It is compiled by Numba for both devices, in float32: constants of Python count as float32 too. It may call
    functions of ``math`` and other plain functions, and use numbers and NumPy arrays of its module, which are compiled
    in. Without functions of ``math``, CPU and GPU give the same bits.

    Raises
    ------
    InputError
        If its parameters are others. What Numba cannot compile is a :class:`~nbvision.CompileError` of the first call.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> @nbv.pixel
    ... def warm(r, g, b, amount=0.05):
    ...     return r * (1 + amount), g, b * (1 - amount)
    >>> pre = nbv.Preprocess((2, 2), fit="stretch", pixel=warm.bind(amount=0.5), dtype="uint8", layout="NHWC")
    >>> pre(np.full((2, 2, 3), 100, np.uint8))[0][0, 0, 0].tolist()
    [150, 100, 50]
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise InputError(f"{function!r} is no Python function; expected one of r, g, b") from None
    names = [parameter.name for parameter in parameters]
    positional = all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    wants_position = names[3:5] == ["x", "y"]
    rest = parameters[5 if wants_position else 3 :]
    if not isinstance(function, types.FunctionType) or not positional or names[:3] != ["r", "g", "b"]:
        raise InputError(f"the pixel function takes {names}; expected r, g, b, then x, y if wanted, then its numbers")
    without = [parameter.name for parameter in rest if parameter.default is inspect.Parameter.empty]
    if without:
        raise InputError(f"parameter {without[0]!r} of {function.__name__} has no default; give it a number")
    numbers = {
        parameter.name: finite(f"{parameter.name} of {function.__name__}", parameter.default) for parameter in rest
    }
    return PixelFunction(function, wants_position, numbers)


def as_pixel_functions(given: Any) -> tuple[PixelFunction, ...]:
    """One pixel function or several, checked."""
    functions = (given,) if isinstance(given, PixelFunction) or callable(given) else given
    if not isinstance(functions, Sequence):
        raise InputError(f"pixel is a {type(given).__name__}; expected a pixel function, or several of them")
    for function in functions:
        if not isinstance(function, PixelFunction):
            raise InputError(f"pixel has a {type(function).__name__}; decorate the function with @nbvision.pixel")
    return tuple(functions)


def chain_of(functions: Sequence[PixelFunction]) -> tuple[Chain | None, tuple[np.float32, ...]]:
    """What is compiled of pixel functions, and the numbers of its launch; None for no functions."""
    if not functions:
        return None, ()
    from nbvision_kernels.chain import Chain, Link

    links, digest = [], hashlib.sha256()
    for function in functions:
        shape = (function.wants_position, len(function.numbers))
        try:
            digest.update(f"{shape} {_fingerprint(function.function)};".encode())
        except RecursionError:
            raise InputError(f"{function.name} calls itself, which no pixel function can") from None
        links.append(Link(function.name, _compiled(function.function), *shape))
    numbers = tuple(np.float32(value) for function in functions for value in function.numbers.values())
    return Chain(digest.hexdigest()[:16], tuple(links)), numbers


# --- from the user's function to one that computes in float32 --------------------------------------------------------


@functools.cache
def _compiled(function: types.FunctionType) -> Callable[..., Any]:
    """A twin of the function for Numba, in which no constant makes float64 of a float32.

    Numba, as NumPy, makes float64 of a float32 and a Python number. Its constants are therefore replaced in the twin,
    whose code is the same, so errors show the user's own line.
    """
    from nbvision_kernels.pixel import pixel_function

    code = function.__code__.replace(co_consts=_narrowed(function.__code__.co_consts))
    used = {name: _narrowed(function.__globals__[name]) for name in _global_names(function)}
    cells = tuple(types.CellType(_narrowed(cell.cell_contents)) for cell in function.__closure__ or ())
    twin = types.FunctionType(code, function.__globals__ | used, function.__name__, function.__defaults__, cells)
    compiled: Callable[..., Any] = pixel_function(twin)
    return compiled


def _narrowed(value: Any) -> Any:
    """A constant in a type that leaves float32 as it is."""
    if isinstance(value, tuple):
        return tuple(map(_narrowed, value))
    if isinstance(value, float):
        return np.float32(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return np.int16(value) if -(2**15) <= value < 2**15 else np.float32(value)
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value.astype(np.float32)
    if isinstance(value, PixelFunction):
        return _compiled(value.function)
    return _compiled(value) if isinstance(value, types.FunctionType) else value


def _global_names(function: types.FunctionType) -> list[str]:
    """Names of its module that the function uses, in order."""
    return [name for name in function.__code__.co_names if name in function.__globals__]


def _fingerprint(function: types.FunctionType) -> str:
    """A digest of all that decides what is compiled, so that kernels on disk are found again and never mistaken."""
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = [code.co_code.hex(), *map(_description, code.co_consts), repr(code.co_names), repr(code.co_varnames)]
    parts += [f"{name}={_description(function.__globals__[name])}" for name in _global_names(function)]
    parts += map(_description, cells)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _description(value: Any) -> str:
    if isinstance(value, PixelFunction):
        value = value.function
    if isinstance(value, types.FunctionType):
        return _fingerprint(value)
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()}"
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType, type)):
        return f"{getattr(value, '__module__', '')}.{value.__name__}"
    if value is None or isinstance(value, (bool, int, float, str, tuple, np.generic)):
        return f"{type(value).__name__} {value!r}"
    raise InputError(
        f"a pixel function uses {value!r} of its module; expected numbers, NumPy arrays, modules and functions"
    )
