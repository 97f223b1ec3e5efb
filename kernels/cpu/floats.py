"""Single float32 and bfloat16 numbers in the loops of a kernel, which LLVM then vectorises.

NumPy has no bfloat16: its numbers are uint16 bits here, and arithmetic is in float32. Each function
is an intrinsic of a few instructions for any processor.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .vectors import F32, I16, I32, call_llvm


def _constant(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


@intrinsic  # type: ignore[untyped-decorator]
def float32_of_bits(typing: Any, bits: Any) -> Any:
    """The float32 number with the given 32 bits, an integer."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], F32)

    return types.float32(types.int32), build


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float32(typing: Any, value: Any) -> Any:
    """The 32 bits of a float32 number, as int32."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], I32)

    return types.int32(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z in float32: rounded once where the processor can, else twice."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return call_llvm(b, "llvm.fmuladd.f32", *args)

    return types.float32(*[types.float32] * 3), build


@intrinsic  # type: ignore[untyped-decorator]
def widened(typing: Any, element: Any) -> Any:
    """An element of a float32 array, or of an array of bfloat16 bits, as float32."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        bits = b.shl(b.zext(args[0], I32), _constant(16))
        return b.bitcast(bits, F32)

    assert element in (types.float32, types.uint16)
    return types.float32(element), build


@intrinsic  # type: ignore[untyped-decorator]
def rounded(typing: Any, value: Any, array: Any) -> Any:
    """A float32 number as an element of `array`: float32, or bits in bfloat16, ties to even.

    A NaN stays one if it was computed from bfloat16 numbers.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if signature.return_type == types.float32:
            return args[0]
        bits = b.bitcast(args[0], I32)
        odd = b.and_(b.lshr(bits, _constant(16)), _constant(1))
        bits = b.add(b.add(bits, _constant(0x7FFF)), odd)
        return b.trunc(b.lshr(bits, _constant(16)), I16)

    assert array.dtype in (types.float32, types.uint16)
    return array.dtype(types.float32, array), build
