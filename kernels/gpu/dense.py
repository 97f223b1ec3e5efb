r"""The dense path of the products on a GPU: W is dequantized once and cuBLAS multiplies.

Adding a low-rank term afterwards reads and writes the result y [M, O] once more. Where y is wider
than x [M, I] it is cheaper to copy x, with the term's factors side by side with x and W:

    y = [x | left] [W | s right]^T        dx = [dy | left] [W ; s right^T]

The scratch for W is a block of PyTorch's caching allocator: reused from call to call, never shared
between streams, and allowed in a CUDA graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.nf4 import PackedWeight
from .nf4 import dequantize, dequantize_into
from .runtime import LowRank


def _folding_pays(x: Tensor, N: int) -> bool:
    """Whether to fold the low-rank term into the product of x that has N columns."""
    return x.shape[1] < N and x.shape[1] % 8 == 0 and x.dtype != torch.float64


def _side_by_side(x: Tensor, low: LowRank) -> Tensor:
    """Returns [x | left | zeros], its width a multiple of 8.

    cuBLAS is fast where 16 bytes divide a row.
    """
    M, I = x.shape
    r = low.left.shape[1]
    wide = torch.empty(M, I + -(-r // 8) * 8, dtype=x.dtype, device=x.device)
    wide[:, :I] = x
    wide[:, I : I + r] = low.left
    wide[:, I + r :] = 0
    return wide


def dense_forward(x: Tensor, w: PackedWeight, bias: Tensor | None, low: LowRank | None) -> Tensor:
    """Returns x W^T + bias + scale * left right^T, [M, O]."""
    O, I = w.shape
    if low is None:
        return F.linear(x, dequantize(w, x.dtype), bias)
    if not _folding_pays(x, O):
        y = F.linear(x, dequantize(w, x.dtype), bias)
        return y.addmm_(low.left, low.right.T, alpha=low.scale)

    wide = _side_by_side(x, low)
    r = low.left.shape[1]
    W = torch.empty(O, wide.shape[1], dtype=x.dtype, device=x.device)
    dequantize_into(W[:, :I], w)
    W[:, I : I + r] = low.scale * low.right
    W[:, I + r :] = 0
    return F.linear(wide, W, bias)


def dense_backward(dy: Tensor, w: PackedWeight, low: LowRank | None) -> Tensor:
    """Returns dy W + scale * left right^T, [M, I]."""
    O, I = w.shape
    if low is None:
        return dy @ dequantize(w, dy.dtype)
    if not _folding_pays(dy, I):
        dx = dy @ dequantize(w, dy.dtype)
        return dx.addmm_(low.left, low.right.T, alpha=low.scale)

    wide = _side_by_side(dy, low)
    r = low.left.shape[1]
    W = torch.empty(wide.shape[1], I, dtype=dy.dtype, device=dy.device)
    dequantize_into(W[:O], w)
    W[O : O + r] = low.scale * low.right.T
    W[O + r :] = 0
    return wide @ W
