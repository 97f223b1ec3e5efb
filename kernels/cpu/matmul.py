"""The products with a 4-bit weight on the CPU: the functions of reference/matmul.py.

Both few and many rows of x are multiplied by weights that are decoded on the way, in few_rows.py
and many_rows.py. What is here is for processors and sizes that many_rows.py does not take: W is
dequantized into scratch memory that the thread keeps, and BLAS multiplies. The page faults of a new
dense W would take longer than dequantizing it (7 ms against 1.5 ms for 4096 x 4096 in bfloat16).
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.nf4 import PackedWeight
from . import many_rows, nf4
from .few_rows import few_rows
from .runtime import empty

# A larger weight is processed in tiles: one of 4096 x 4096 fits whole in float32.
_SCRATCH_BYTES = 64 << 20

# Scratch memory is never shared by two threads.
_local = threading.local()


def _scratch(n: int, dtype: torch.dtype) -> Tensor:
    """Returns n elements of this thread's scratch memory."""
    nbytes = n * dtype.itemsize
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.nbytes < nbytes:
        # Free the old memory before allocating more.
        _local.scratch = None
        _local.scratch = held = empty((nbytes,), torch.uint8)
    return held[:nbytes].view(dtype)


def _is_tiled(w: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether the compiled loops apply: they write this dtype, and no block crosses a row."""
    is_written = dtype in (torch.float32, torch.bfloat16)
    return is_written and w.shape[1] % w.block_size == 0


def nf4_linear(x: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
    """Returns x W^T + bias, [.., O], in x's dtype."""
    if many_rows.is_fast(x, w, forward=True):
        out = many_rows.product(x, w, forward=True)
        return out if bias is None else out.add_(bias)
    if not _is_tiled(w, x.dtype):
        W = nf4.dequantize(w, x.dtype)
        return F.linear(x, W, bias)

    O, I = w.shape
    if x.numel() == I:
        out = few_rows(x, w)
    else:
        out = x.new_empty((*x.shape[:-1], O))
        _tiled_product(x.reshape(-1, x.shape[-1]), w, out.view(-1, O))
    return out if bias is None else out.add_(bias)


def _tiled_product(x: Tensor, w: PackedWeight, y: Tensor) -> None:
    """y = x W^T. Tiles are rows of W: each gives some columns of y."""
    O, I = w.shape
    blocks = I // w.block_size
    bytes_per_row = I * x.dtype.itemsize
    step = max(1, _SCRATCH_BYTES // bytes_per_row)

    for first in range(0, O, step):
        last = min(O, first + step)
        tile = _scratch((last - first) * I, x.dtype)
        nf4.dequantize_tile(w, tile, (first, last), (0, blocks), blocks)

        W = tile.view(-1, I)
        torch.mm(x, W.T, out=y[:, first:last])


def nf4_linear_backward(dy: Tensor, w: PackedWeight) -> Tensor:
    """Returns dx = dy W, [.., I], in dy's dtype."""
    if many_rows.is_fast(dy, w, forward=False):
        return many_rows.product(dy, w, forward=False)
    if not _is_tiled(w, dy.dtype):
        return dy @ nf4.dequantize(w, dy.dtype)

    I = w.shape[1]
    rows = dy.reshape(-1, dy.shape[-1])
    out = dy.new_empty((*dy.shape[:-1], I))
    _tiled_product_backward(rows, w, out.view(-1, I))
    return out


def _tiled_product_backward(dy: Tensor, w: PackedWeight, dx: Tensor) -> None:
    """dx = dy W. Tiles are columns of W: no sum is split, so none is rounded twice."""
    O, I = w.shape
    blocks = I // w.block_size
    bytes_per_block = O * w.block_size * dy.dtype.itemsize
    step = max(1, _SCRATCH_BYTES // bytes_per_block)

    for first in range(0, blocks, step):
        last = min(blocks, first + step)
        start, stop = first * w.block_size, last * w.block_size
        tile = _scratch(O * (stop - start), dy.dtype)
        nf4.dequantize_tile(w, tile, (0, O), (first, last), blocks)

        W = tile.view(O, -1)
        torch.mm(dy, W, out=dx[:, start:stop])
