"""Arguments of operations: each is what was expected, or an error says so."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from nbvision.errors import InputError

__all__ = ["finite", "number", "one_of", "three_numbers", "whole"]


def number(name: str, value: float) -> float:
    """A number; infinite ones too, which is no limit at all."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.nan
    if math.isnan(result):
        raise InputError(f"{name} is {value!r}; expected a number")
    return result


def finite(name: str, value: float) -> float:
    """A number that is not infinite."""
    result = number(name, value)
    if math.isinf(result):
        raise InputError(f"{name} is {value!r}; expected a finite number")
    return result


def whole(name: str, value: int, *, least: int) -> int:
    """An integer of at least ``least``."""
    try:
        result = operator.index(value)
    except TypeError:
        result = least - 1
    if result < least:
        raise InputError(f"{name} is {value!r}; expected an integer, {least} or more")
    return result


def three_numbers(name: str, value: float | Sequence[float]) -> tuple[float, float, float]:
    """One number for every channel, or three."""
    try:
        values = np.broadcast_to(np.asarray(value, np.float64).reshape(-1), 3)
    except (TypeError, ValueError):
        values = np.array([])
    if values.size != 3 or not np.isfinite(values).all():
        raise InputError(f"{name} is {value}; expected one finite number, or three, one per channel")
    first, second, third = values.tolist()
    return first, second, third


def one_of(name: str, value: str, choices: Any) -> Any:
    """One of the strings of a ``Literal``."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise InputError(f"{name} is {value!r}; expected one of {get_args(choices)}")
    return value
