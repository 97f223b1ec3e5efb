"""Triton's interpreter, made faithful enough to test kernels by: `repair()` before the first launch.

The interpreter (TRITON_INTERPRET=1) runs a kernel in numpy on CPU tensors. It keeps bfloat16 as uint16 and then, on triton 3.6 to
3.9, truncates when it casts to it, does arithmetic and products on the bit patterns, and knows no inline assembly. Repaired here:

* casts to bfloat16 round to nearest, ties to even; arithmetic, comparisons, reductions and `dot` widen to float32 and round once,
  as hardware does;
* inline PTX runs through a small emulator of the instructions that the kernels use;
* a float16 or bfloat16 `dot` sums in float32, and refuses sizes that tensor cores do not have;
* infinities and NaN arise as on hardware, without numpy's warnings;
* `for k in range(0, n)` with a run-time n works with numpy >= 2.4 on triton 3.6.

tests/kernels/test_interpreter.py holds all of it to PyTorch, over every bfloat16 number.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
BF16 = tl.bfloat16


def widen(bits: Any) -> Any:
    """bfloat16 bit patterns (uint16) to float32: the upper half of its bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(x: Any) -> Any:
    """float32 to bfloat16 bit patterns, rounded to nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _wide(handle: Any) -> Any:
    """A handle's numbers, bfloat16 as float32."""
    return widen(handle.data) if handle.dtype.scalar == BF16 else handle.data


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == BF16)


# ---- bfloat16

_cast, _binary, _unary, _ternary = (
    Builder.cast_impl,
    Builder.binary_op,
    Builder.unary_op,
    Builder.ternary_op,
)
_fp_to_fp, _reduce = Builder.create_fp_to_fp, interpreter.ReduceOps.apply_impl
_FLOATS = {tl.float16, tl.float32, tl.float64}
_COMPARE = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def cast(self: Any, source: Any, kind: Any) -> Any:
    to = kind.scalar
    if _is_bf16(source) and to != BF16:
        wide = Handle(widen(source.data), tl.float32)
        return wide if to == tl.float32 else _cast(self, wide, kind)
    if to == BF16 and not _is_bf16(source):
        return Handle(narrow(_cast(self, source, tl.float32).data), BF16)
    return _cast(self, source, kind)


def fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
    if BF16 in (source.dtype.scalar, kind.scalar) and {source.dtype.scalar, kind.scalar} & _FLOATS:
        return cast(self, source, kind)
    return _fp_to_fp(self, source, kind, rounding)


def binary(self: Any, a: Any, b: Any, operation: Any) -> Any:
    if not _is_bf16(a):
        return _binary(self, a, b, operation)
    result = operation(_wide(a), _wide(b))
    return Handle(result, tl.int1) if operation in _COMPARE else Handle(narrow(result), BF16)


def unary(self: Any, a: Any, operation: Any) -> Any:
    return (
        Handle(narrow(operation(widen(a.data))), BF16)
        if _is_bf16(a)
        else _unary(self, a, operation)
    )


def ternary(self: Any, a: Any, b: Any, c: Any, operation: Any) -> Any:
    if operation is np.where or not _is_bf16(c):  # a selection moves bits and computes nothing
        return _ternary(self, a, b, c, operation)
    return Handle(narrow(operation(_wide(a), _wide(b), _wide(c))), BF16)


def fma(self: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c. float64 holds a product of two float32 exactly; the sum is rounded there, then once more."""
    exact = _wide(a).astype(np.float64) * _wide(b) + _wide(c)
    return (
        Handle(narrow(exact), BF16)
        if _is_bf16(c)
        else Handle(exact.astype(c.data.dtype), c.dtype.scalar)
    )


def dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
    if a.data.shape[-1] < 16 or any(n & (n - 1) for n in (*a.data.shape, *b.data.shape)):
        raise ValueError(
            f"dot of {a.data.shape} and {b.data.shape}: sizes are powers of two, the inner one at least 16"
        )
    wide = acc.data.dtype
    return Handle(
        np.matmul(_wide(a).astype(wide), _wide(b).astype(wide)) + acc.data, acc.dtype.scalar
    )


def reduce(self: Any, arguments: Any) -> Any:
    first = arguments[0] if isinstance(arguments, tuple) else arguments
    if first.dtype != BF16 or (isinstance(arguments, tuple) and len(arguments) > 1):
        return _reduce(self, arguments)
    shape = list(first.shape)
    result = _reduce(
        self,
        (
            tl.core.tensor(
                Handle(widen(first.handle.data), tl.float32), tl.block_type(tl.float32, shape)
            ),
        ),
    )
    result = result[0] if isinstance(result, list | tuple) else result
    kind = tl.block_type(BF16, list(result.shape)) if result.shape else BF16
    return tl.core.tensor(Handle(narrow(result.handle.data), BF16), kind)


# ---- PTX


def prmt(a: Any, b: Any, selector: Any) -> Any:
    """Byte i of the result is byte (nibble i of the selector) & 7 of b:a, or its sign eight times where the nibble has bit 3."""
    a, b, selector = (np.asarray(v, np.uint32) for v in (a, b, selector))
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (
            eight >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)
        ).astype(np.uint32)
        byte = np.where(nibble & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        result |= byte << np.uint32(8 * i)
    return result


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "prmt.b32": prmt,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.u32": np.right_shift,
}


def run_ptx(text: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """Runs `{ .reg ...; op to, from, ...; }` on uint32 arrays: $0 ... are the outputs, then come the inputs."""
    registers: dict[str, Any] = {
        f"${outputs + i}": np.asarray(v, np.uint32) for i, v in enumerate(inputs)
    }

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in re.sub(r"[{}]", " ", text).split(";"):
        words = statement.split(None, 1)
        if not words or words[0] == ".reg":
            continue
        to, *operands = (operand.strip() for operand in words[1].split(","))
        if words[0] not in INSTRUCTIONS:
            raise NotImplementedError(
                f"PTX {words[0]}: the emulator knows {', '.join(INSTRUCTIONS)}"
            )
        registers[to] = INSTRUCTIONS[words[0]](*map(value, operands))
    return [registers[f"${i}"] for i in range(outputs)]


class _Results(list[Any]):
    def get_result(self, i: int) -> Any:
        return self[i]


def inline_asm(
    self: Any, text: str, constraints: str, values: Any, kinds: Any, is_pure: bool, pack: int
) -> Any:
    """32-bit registers, one element each: what the kernels use."""
    kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
    if (
        pack != 1
        or any(v.data.dtype.itemsize != 4 for v in values)
        or set(re.findall(r"[a-z]", constraints)) != {"r"}
    ):
        raise NotImplementedError("inline assembly other than 32-bit registers with pack=1")
    inputs = [np.ascontiguousarray(v.data).view(np.uint32) for v in values]
    outputs = run_ptx(text, constraints.count("="), inputs)
    return _Results(
        Handle(np.ascontiguousarray(o).view(np.int32), kind.scalar)
        for o, kind in zip(outputs, kinds, strict=True)
    )


# ---- all together

_patch_tensor, _run = interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__


def run(self: Any, *args: Any, **kwargs: Any) -> None:
    with np.errstate(all="ignore"):
        _run(self, *args, **kwargs)


def _with_index(tensor: Any, *scope: Any) -> None:
    _patch_tensor(tensor, *scope)

    def index(self: Any) -> int:
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    if scope:
        scope[0].set_attr(tensor, "__index__", index)
    else:
        tensor.__index__ = index


def repair() -> None:
    """Replaces the interpreter's operations by those above, for this process."""
    Builder.cast_impl, Builder.binary_op, Builder.unary_op, Builder.ternary_op = (
        cast,
        binary,
        unary,
        ternary,
    )
    Builder.create_fp_to_fp, Builder.create_fma, Builder.create_dot, Builder.create_inline_asm = (
        fp_to_fp,
        fma,
        dot,
        inline_asm,
    )
    interpreter.ReduceOps.apply_impl = reduce
    interpreter._patch_lang_tensor = _with_index
    interpreter.GridExecutor.__call__ = run
