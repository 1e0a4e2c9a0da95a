"""How a pixel function is made, and the two conversions every target needs.

A pixel function takes scalars and a flat byte buffer.  The same source compiles into a parallel CPU loop, into a
Numba CUDA kernel, and to LTO-IR that is linked into a CUDA C frame.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

# Inlined into Numba's IR: 2.5 times faster on the CPU than a call, and the form CUDA compiles without a driver.
# error_model "numpy": a division needs no test for zero.
pixel_function = njit(inline="always", error_model="numpy")


def numba_type(name: str) -> Any:
    """Of the catalogue's name for it, such as ``"float32"`` or ``"uint8*"``."""
    plain = getattr(types, name.rstrip("*"))
    return types.CPointer(plain) if name.endswith("*") else plain


def compiled_apart(function: Any) -> Any:
    """A function for CPU loops that is called, not inlined: one that makes a line, or that has several callers.

    Numba's passes for parallel loops take seconds for what they go through, and a call costs a line nothing.
    """
    return njit(error_model="numpy")(getattr(function, "py_func", function))


def linked_function(name: str, function: Any, arguments: tuple[str, ...]) -> Any:
    """A pixel function without a result that CUDA kernels call, not inline: the linker puts it in, under ``name``.

    Numba compiles what it inlines again at each level, and in each kernel: this halves the time of a large one.
    """
    from numba import cuda

    declared = cuda.declare_device(name, numba_type("void")(*map(numba_type, arguments)), abi="c")
    return declared or function  # the simulator declares nothing


@intrinsic
def pointer_from_address(typing_context: Any, address: Any) -> Any:
    """A flat byte buffer that starts at ``address`` (int64). CPU only: CUDA kernels get pointers as arguments."""
    signature = types.CPointer(types.uint8)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def words_from_address(typing_context: Any, address: Any) -> Any:
    """The same in whole words: ``words[address >> 2]`` is the one with the byte at ``address``. CPU only."""
    signature = types.CPointer(types.uint32)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def halves_from_address(typing_context: Any, address: Any) -> Any:
    """The same in half floats, as their bits: ``halves[address >> 1]``. CPU only."""
    signature = types.CPointer(types.uint16)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def floats_from_address(typing_context: Any, address: Any) -> Any:
    """The same in floats: ``floats[address >> 2]``. CPU only."""
    signature = types.CPointer(types.float32)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def fma32(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of float32 rounded once, on both targets: what OpenCV's vector kernels compute."""
    signature = types.float32(types.float32, types.float32, types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return signature, generate


@intrinsic
def bits_to_float(typing_context: Any, bits: Any) -> Any:
    """The float32 of an int32's bits, on both targets; CUDA compiles ``view`` with a driver only."""
    signature = types.float32(types.int32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def float_to_bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as an int32, likewise."""
    signature = types.int32(types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@pixel_function
def clamp(value, low, high):
    """``value`` limited to low..high, both included."""
    return min(max(value, low), high)


@pixel_function
def rint32(value):
    """A float32 of at most 2**22 in size rounded half to even.

    Adding 1.5 * 2**23 leaves no bits behind the point, so the addition itself rounds. Neither target has a cheaper way
    that both compile: CUDA knows no ``np.rint``, and its ``round`` goes through int64.
    """
    magic = np.float32(12582912.0)
    return (np.float32(value) + magic) - magic


@pixel_function
def rint64(value):
    """A float64 of any size rounded half to even."""
    magic = np.float64(6755399441055744.0)
    result = np.float64(value)
    if abs(result) < np.float64(2251799813685248.0):
        result = (result + magic) - magic
    return result


@pixel_function
def round_to_u8(value):
    """A float rounded half to even and saturated to 0..255."""
    return np.uint8(rint32(clamp(value, np.float32(0), np.float32(255))))


@pixel_function
def round_to_i8(value):
    """A float rounded half to even and saturated to -128..127."""
    return np.int8(rint32(clamp(value, np.float32(-128), np.float32(127))))


@pixel_function
def half_bits(value):
    """The bits of a float32 as IEEE half precision, rounded half to even: for CPUs, where Numba has no float16.

    Below half's smallest normal number the float is scaled so that its own rounding does the work.
    """
    bits = np.float32(value).view(np.int32)
    sign = np.int32((bits >> 16) & 0x8000)
    magnitude = np.int32(bits & 0x7FFFFFFF)
    if magnitude >= np.int32(0x7F800000):  # infinity, or NaN, which stays one
        half = np.int32(0x7C00) if magnitude == np.int32(0x7F800000) else np.int32(0x7E00)
    elif magnitude >= np.int32(0x477FF000):  # rounds to 65520 or more
        half = np.int32(0x7C00)
    elif magnitude < np.int32(0x38800000):  # below 2**-14: steps of 2**-24
        half = np.int32(rint32(np.float32(abs(value)) * np.float32(16777216.0)))
    else:
        half = np.int32((magnitude - np.int32(0x38000000) + np.int32(0xFFF) + ((magnitude >> 13) & 1)) >> 13)
    return np.uint16(sign | half)


@pixel_function
def half_value(bits):
    """The float32 of a half's bits. Scaling is exact, also of the smallest; CPU only, as GPUs may flush those to 0."""
    magnitude = np.int32(np.int32(bits) & np.int32(0x7FFF))
    shifted = np.int32(magnitude << 13)
    value = shifted.view(np.float32) * np.float32(5.192296858534828e33)  # 2**112, the exponents' distance
    if magnitude >= np.int32(0x7C00):  # infinity or NaN
        value = np.int32(shifted | np.int32(0x7F800000)).view(np.float32)
    if np.int32(bits) & np.int32(0x8000):
        value = -value
    return value


@pixel_function
def bfloat_bits(value):
    """The bits of a float32 as bfloat16, rounded half to even; every NaN is the same one."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        rounded = np.uint32(0x7FFF0000)
    return np.uint16(rounded >> np.uint32(16))
