"""The products with an NF4 weight on the CPU: the functions of reference/matmul.py.

Many rows of x: W is dequantized into a scratch that the thread keeps and the BLAS multiplies, because a fresh dense W costs
more in page faults than its dequantization (7 ms against 1.5 for 4096 x 4096 in bfloat16). One row (decoding token by token):
no dense W at all, each block is looked up and summed in registers, so only the packed bytes cross the memory bus.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from . import nf4
from .runtime import array, empty, jit, run

GROUP, AVX512, _CODE, _MAP8 = nf4.GROUP, nf4.AVX512, nf4.CODE, nf4.MAP8
_SCRATCH_BYTES = (
    64 << 20
)  # a larger weight is worked off in tiles: one of 4096 x 4096 fits whole in float32
_GRAIN = 64  # rows of W that are worth a thread of their own

_local = threading.local()  # a scratch is never shared by two threads


def _scratch(n: int, dtype: torch.dtype) -> Tensor:
    """Returns n elements of this thread's scratch memory."""
    nbytes = n * dtype.itemsize
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.nbytes < nbytes:
        _local.scratch = None  # free the old one before asking for more
        _local.scratch = held = empty((nbytes,), torch.uint8)
    return held[:nbytes].view(dtype)


@intrinsic  # type: ignore[untyped-decorator]
def _dot64(
    typing: Any,
    packed: Any,
    byte: Any,
    code: Any,
    even: Any,
    odd: Any,
    first: Any,
    scale: Any,
    sums: Any,
) -> Any:
    """sums[0:16] += scale * (code[high nibbles] * even[first:] + code[low nibbles] * odd[first:]) over 32 bytes."""
    signature = types.void(packed, byte, code, even, odd, first, scale, sums)

    def build(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        i32x16, f32x16 = ir.VectorType(ir.IntType(32), 16), ir.VectorType(ir.FloatType(), 16)

        def load(which: int, index: ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
            data = context.make_array(signature.args[which])(context, b, args[which]).data
            return b.load(b.bitcast(b.gep(data, [index]), kind.as_pointer()), align=align)

        zero = ir.Constant(args[1].type, 0)
        table = load(2, zero, f32x16)
        look_up = ir.FunctionType(f32x16, [f32x16, i32x16])
        permute = cgutils.get_or_insert_function(
            b.module, look_up, "llvm.x86.avx512.permvar.sf.512"
        )
        fma = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(f32x16, [f32x16] * 3), "llvm.fma.v16f32"
        )
        dot = ir.Constant(f32x16, [0.0] * 16)
        for half in (0, 16):
            two = b.zext(
                load(
                    0,
                    b.add(args[1], ir.Constant(args[1].type, half)),
                    ir.VectorType(ir.IntType(8), 16),
                    1,
                ),
                i32x16,
            )
            at = b.add(args[5], ir.Constant(args[5].type, half))
            high = b.call(permute, [table, b.lshr(two, ir.Constant(i32x16, [4] * 16))])
            dot = b.call(fma, [high, load(3, at, f32x16), dot])
            dot = b.call(fma, [b.call(permute, [table, two]), load(4, at, f32x16), dot])
        scales = b.insert_element(
            ir.Constant(f32x16, ir.Undefined), args[6], ir.Constant(ir.IntType(32), 0)
        )
        scales = b.shuffle_vector(scales, scales, ir.Constant(i32x16, [0] * 16))
        data = context.make_array(signature.args[7])(context, b, args[7]).data
        b.store(
            b.call(fma, [dot, scales, load(7, zero, f32x16)]),
            b.bitcast(data, f32x16.as_pointer()),
            align=4,
        )
        return context.get_dummy_value()

    return signature, build


@jit
def _scale(b: int, absmax: Any, absmax2: Any, offset: np.float32) -> Any:
    """The absmax of block b, as in nf4.py (a kernel and its helpers share a file: see runtime.jit)."""
    return (
        _MAP8[int(absmax[b])] * absmax2[b // GROUP] + offset
        if absmax2.size
        else np.float32(absmax[b])
    )


@jit
def _row_product(
    packed: Any,
    absmax: Any,
    absmax2: Any,
    offset: np.float32,
    even: Any,
    odd: Any,
    y: Any,
    block: int,
    start: int,
    stop: int,
) -> None:
    """y[o] = sum over blocks of absmax * (code . x), for o in [start, stop)."""
    blocks = 2 * even.size // block
    sums = np.zeros(16, np.float32)
    for o in range(start, stop):
        sums[:] = 0
        for k in range(blocks):
            scale = _scale(o * blocks + k, absmax, absmax2, offset)
            first, byte, half = k * block // 2, (o * blocks + k) * block // 2, block // 2
            if AVX512 and half % 32 == 0:
                for i in range(0, half, 32):
                    _dot64(packed, byte + i, _CODE, even, odd, first + i, scale, sums)
            else:
                dot = np.float32(0)
                for i in range(half):
                    two = packed[byte + i]
                    dot += _CODE[two >> 4] * even[first + i] + _CODE[two & 15] * odd[first + i]
                sums[0] += scale * dot
        y[o] = sums.sum()


def _one_row(
    x: Tensor,
    w: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    packed, absmax, absmax2, offset = w
    even, odd = (
        x.reshape(-1, 2).float().T.contiguous()
    )  # the high nibbles multiply the even columns
    y = torch.empty(shape[0], dtype=torch.float32)
    run(
        _row_product,
        array(packed),
        array(absmax),
        nf4.NO_FLOATS if absmax2 is None else array(absmax2),
        np.float32(0 if offset is None else offset.item()),
        array(even),
        array(odd),
        array(y),
        block_size,
        rows=(0, shape[0]),
        grain=_GRAIN,
    )
    return y.to(x.dtype)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns x W^T + bias, [.., O], in x's dtype."""
    O, I = shape
    w = packed, absmax, absmax2, offset
    rows = x.reshape(-1, I)
    if I % block_size or x.dtype not in (
        torch.float32,
        torch.bfloat16,
    ):  # blocks cross rows of W; or a dtype no kernel writes
        return F.linear(x, nf4.dequantize(*w, shape, x.dtype, block_size), bias)
    out = x.new_empty((*x.shape[:-1], O))
    y = out.view(-1, O)
    if rows.shape[0] == 1:
        y[0] = _one_row(rows, w, shape, block_size)
        return out if bias is None else out.add_(bias)
    step = max(1, _SCRATCH_BYTES // (I * x.dtype.itemsize))
    for o in range(0, O, step):
        top = min(O, o + step)
        W = _scratch((top - o) * I, x.dtype)
        nf4.dequantize_tile(
            *w, W, (O * I, block_size, I // block_size), (o, top), (0, I // block_size)
        )
        torch.mm(rows, W.view(-1, I).T, out=y[:, o:top])
    return out if bias is None else out.add_(bias)


def nf4_linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns dx = dy W, [.., I], in dy's dtype. Tiles are columns of W: no sum is split, so none is rounded twice."""
    O, I = shape
    w = packed, absmax, absmax2, offset
    if I % block_size or dy.dtype not in (torch.float32, torch.bfloat16):
        return dy @ nf4.dequantize(*w, shape, dy.dtype, block_size)
    rows = dy.reshape(-1, O)
    out = dy.new_empty((*dy.shape[:-1], I))
    dx = out.view(-1, I)
    blocks = I // block_size
    step = max(1, _SCRATCH_BYTES // (O * block_size * dy.dtype.itemsize))
    for k in range(0, blocks, step):
        end = min(blocks, k + step)
        W = _scratch(O * (end - k) * block_size, dy.dtype)
        nf4.dequantize_tile(*w, W, (O * I, block_size, blocks), (0, O), (k, end))
        torch.mm(rows, W.view(O, -1), out=dx[:, k * block_size : end * block_size])
    return out
