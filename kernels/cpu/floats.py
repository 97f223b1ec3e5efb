"""Single float32 and bfloat16 numbers in the loops of a kernel, which LLVM then vectorises.

NumPy has no bfloat16: its numbers are uint16 bits here, and arithmetic is in float32. Each function
is an intrinsic of a few instructions for any processor.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder, Value
from numba.core import types
from numba.extending import intrinsic

from .vectors import F32, I16, I32, call_llvm

_FLOAT = types.float32


def _constant(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


def _code(build: Callable[..., Value]) -> Callable[..., Value]:
    """What Numba calls for an intrinsic's instructions, from a function of its arguments."""

    def generate(context: Any, b: IRBuilder, signature: Any, args: Any) -> Value:
        return build(b, *args)

    return generate


def _unchanged(b: IRBuilder, value: Value, *others: Value) -> Value:
    return value


def _widened(b: IRBuilder, bits: Value) -> Value:
    bits = b.zext(bits, I32)
    bits = b.shl(bits, _constant(16))
    return b.bitcast(bits, F32)


def _rounded_bits(b: IRBuilder, value: Value) -> Value:
    """The float32 bits of a value, of which the upper half is its bfloat16: ties to even."""
    bits = b.bitcast(value, I32)
    odd = b.lshr(bits, _constant(16))
    odd = b.and_(odd, _constant(1))
    bits = b.add(bits, _constant(0x7FFF))
    return b.add(bits, odd)


def _rounded(b: IRBuilder, value: Value, array: Value) -> Value:
    bits = _rounded_bits(b, value)
    bits = b.lshr(bits, _constant(16))
    return b.trunc(bits, I16)


def _as_stored(b: IRBuilder, value: Value, array: Value) -> Value:
    bits = _rounded_bits(b, value)
    bits = b.and_(bits, _constant(-1 << 16))
    return b.bitcast(bits, F32)


@intrinsic  # type: ignore[untyped-decorator]
def float32_of_bits(typing: Any, bits: Any) -> Any:
    """The float32 number with the given 32 bits, an integer."""
    return _FLOAT(types.int32), _code(lambda b, bits: b.bitcast(bits, F32))


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float32(typing: Any, value: Any) -> Any:
    """The 32 bits of a float32 number, as int32."""
    return types.int32(_FLOAT), _code(lambda b, value: b.bitcast(value, I32))


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z in float32: rounded once where the processor can, else twice."""
    build = _code(lambda b, *factors: call_llvm(b, "llvm.fmuladd.f32", *factors))
    return _FLOAT(_FLOAT, _FLOAT, _FLOAT), build


@intrinsic  # type: ignore[untyped-decorator]
def widened(typing: Any, element: Any) -> Any:
    """An element of a float32 array, or of an array of bfloat16 bits, as float32."""
    assert element in (types.float32, types.uint16)
    build = _unchanged if element == _FLOAT else _widened
    return _FLOAT(element), _code(build)


@intrinsic  # type: ignore[untyped-decorator]
def rounded(typing: Any, value: Any, array: Any) -> Any:
    """A float32 number as an element of `array`, which holds float32 or the bits of bfloat16.

    A NaN stays one if it was computed from bfloat16 numbers.
    """
    assert array.dtype in (types.float32, types.uint16)
    build = _unchanged if array.dtype == _FLOAT else _rounded
    return array.dtype(_FLOAT, array), _code(build)


@intrinsic  # type: ignore[untyped-decorator]
def as_stored(typing: Any, value: Any, array: Any) -> Any:
    """widened(rounded(value, array)): what a later operation reads from `array`."""
    assert array.dtype in (types.float32, types.uint16)
    build = _unchanged if array.dtype == _FLOAT else _as_stored
    return _FLOAT(_FLOAT, array), _code(build)
