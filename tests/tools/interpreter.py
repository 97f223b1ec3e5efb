"""Triton's interpreter, repaired so that it can test kernels: `repair()` before the first launch.

The interpreter (TRITON_INTERPRET=1) runs a kernel in numpy on CPU tensors. It keeps bfloat16 as
uint16 and then, on triton 3.6 to 3.9, truncates when it casts to it, does arithmetic and products
on the bit patterns, and knows no inline assembly. Repaired here:

* casts to bfloat16 round to nearest, ties to even; arithmetic, comparisons, reductions and `dot`
  widen to float32 and round once, as hardware does;
* inline PTX runs through the emulator of ptx.py;
* a float16 or bfloat16 `dot` sums in float32, and refuses sizes that tensor cores do not have;
* infinities and NaN arise as on hardware, without numpy's warnings;
* `for k in range(0, n)` with a run-time n works with numpy >= 2.4 on triton 3.6;
* a function that a kernel calls does not replace Triton's language again, which took a fifth of the
  time.

tests/kernels/test_interpreter.py compares all of it with PyTorch, over every bfloat16 number.
"""

import re
from typing import Any

import numpy as np
import triton.language as tl
from ptx import run_ptx
from ptx_values import narrow, widen
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
BF16 = tl.bfloat16

_cast = Builder.cast_impl
_binary = Builder.binary_op
_unary = Builder.unary_op
_ternary = Builder.ternary_op
_fp_to_fp = Builder.create_fp_to_fp
_reduce = interpreter.ReduceOps.apply_impl
_patch_lang = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor
_run = interpreter.GridExecutor.__call__

_FLOATS = {tl.float16, tl.float32, tl.float64}
_COMPARE = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def _wide(handle: Any) -> Any:
    """The numbers of a handle, bfloat16 as float32."""
    return widen(handle.data) if handle.dtype.scalar == BF16 else handle.data


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == BF16)


def cast(self: Any, source: Any, kind: Any) -> Any:
    to = kind.scalar
    if _is_bf16(source) and to != BF16:
        wide = Handle(widen(source.data), tl.float32)
        return wide if to == tl.float32 else _cast(self, wide, kind)
    if to == BF16 and not _is_bf16(source):
        return Handle(narrow(_cast(self, source, tl.float32).data), BF16)
    return _cast(self, source, kind)


def fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
    kinds = {source.dtype.scalar, kind.scalar}
    if BF16 in kinds and kinds & _FLOATS:
        return cast(self, source, kind)
    return _fp_to_fp(self, source, kind, rounding)


def binary(self: Any, a: Any, b: Any, operation: Any) -> Any:
    if not _is_bf16(a):
        return _binary(self, a, b, operation)
    result = operation(_wide(a), _wide(b))
    return Handle(result, tl.int1) if operation in _COMPARE else Handle(narrow(result), BF16)


def unary(self: Any, a: Any, operation: Any) -> Any:
    if not _is_bf16(a):
        return _unary(self, a, operation)
    return Handle(narrow(operation(widen(a.data))), BF16)


def ternary(self: Any, a: Any, b: Any, c: Any, operation: Any) -> Any:
    # A selection moves bits and computes nothing.
    if operation is np.where or not _is_bf16(c):
        return _ternary(self, a, b, c, operation)
    return Handle(narrow(operation(_wide(a), _wide(b), _wide(c))), BF16)


def fma(self: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c.

    float64 holds a product of two float32 exactly; the sum is rounded there, then once more.
    """
    exact = _wide(a).astype(np.float64) * _wide(b) + _wide(c)
    if _is_bf16(c):
        return Handle(narrow(exact), BF16)
    return Handle(exact.astype(c.data.dtype), c.dtype.scalar)


def dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
    sizes = *a.data.shape, *b.data.shape
    if a.data.shape[-1] < 16 or any(n & (n - 1) for n in sizes):
        raise ValueError(
            f"dot of {a.data.shape} and {b.data.shape}: "
            "sizes are powers of two, the inner one at least 16"
        )
    wide = acc.data.dtype
    product = np.matmul(_wide(a).astype(wide), _wide(b).astype(wide))
    return Handle(product + acc.data, acc.dtype.scalar)


def reduce(self: Any, arguments: Any) -> Any:
    first = arguments[0] if isinstance(arguments, tuple) else arguments
    if first.dtype != BF16 or (isinstance(arguments, tuple) and len(arguments) > 1):
        return _reduce(self, arguments)

    handle = Handle(widen(first.handle.data), tl.float32)
    wide = tl.core.tensor(handle, tl.block_type(tl.float32, list(first.shape)))
    result = _reduce(self, (wide,))
    result = result[0] if isinstance(result, list | tuple) else result

    kind = tl.block_type(BF16, list(result.shape)) if result.shape else BF16
    return tl.core.tensor(Handle(narrow(result.handle.data), BF16), kind)


class _Results(list[Any]):
    def get_result(self, i: int) -> Any:
        return self[i]


def inline_asm(
    self: Any, text: str, constraints: str, values: Any, kinds: Any, is_pure: bool, pack: int
) -> Any:
    """32-bit registers, one element each: what the kernels use."""
    kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
    registers = set(re.findall(r"[a-z]", constraints))
    if pack != 1 or registers != {"r"} or any(v.data.dtype.itemsize != 4 for v in values):
        raise NotImplementedError("inline assembly other than 32-bit registers with pack=1")

    inputs = [np.ascontiguousarray(v.data).view(np.uint32) for v in values]
    outputs = run_ptx(text, constraints.count("="), inputs)
    return _Results(
        Handle(np.ascontiguousarray(o).view(np.int32), kind.scalar)
        for o, kind in zip(outputs, kinds, strict=True)
    )


# The modules whose functions the running kernel has replaced by those of the interpreter.
_replaced: list[Any] = []


def run(self: Any, *args: Any, **kwargs: Any) -> None:
    _replaced.clear()
    with np.errstate(all="ignore"):
        _run(self, *args, **kwargs)


def patch_lang(function: Any) -> Any:
    """Replaces the language that a function sees, unless the running kernel has done it."""
    visible = [m for m in function.__globals__.values() if m is tl or m is tl.core]
    if visible and all(module in _replaced for module in visible):
        return interpreter._LangPatchScope()
    _replaced.extend(visible)
    return _patch_lang(function)


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
    Builder.cast_impl = cast
    Builder.binary_op = binary
    Builder.unary_op = unary
    Builder.ternary_op = ternary
    Builder.create_fp_to_fp = fp_to_fp
    Builder.create_fma = fma
    Builder.create_dot = dot
    Builder.create_inline_asm = inline_asm
    interpreter.ReduceOps.apply_impl = reduce
    interpreter._patch_lang = patch_lang
    interpreter._patch_lang_tensor = _with_index
    interpreter.GridExecutor.__call__ = run
