r"""LoRA over a 4-bit base on a GPU: the functions of reference/lora.py that take a packed weight.

    y = x W^T + bias + s z B^T,   z = x A^T            dx = dy W + s u A,   u = dy B

The low-rank term is added in the accumulator of a tile, in the last sum of the skinny path, or, on
the dense path where y is wider than x, with W and s B multiplied side by side. A product of its own
reads and writes all of y once more, which at 4096 rows moves more bytes than dequantizing W; the
dense path pays that for a square W. z [M, r] and u [M, r] are small products that the gradients of
A and B need as well; cuBLAS multiplies.
"""

import torch.nn.functional as F
from torch import Tensor

from ..reference.lora import contract, in_dtype, project
from ..reference.nf4 import PackedWeight
from .matmul import backward, forward
from .runtime import LowRank

__all__ = ["contract", "nf4_inference", "nf4_lora_linear", "nf4_lora_linear_backward", "project"]


def nf4_lora_linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    z: Tensor,
    B: Tensor,
    scale: float,
) -> Tensor:
    """Returns x W^T + bias + scale z B^T, [.., O], in x's dtype."""
    return forward(x, w, bias, LowRank(z, B, scale))


def nf4_inference(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 0.0,
) -> Tensor:
    """Returns x W^T + bias + scale (x A^T) B^T, [.., O], in x's dtype; no gradient is needed."""
    if A is None or B is None:
        return forward(x, w, bias, None)

    if x.ndim > 2 and not x.is_contiguous():
        # PyTorch would multiply each sequence by a copy of A.
        y = nf4_inference(x.reshape(-1, x.shape[-1]), w, bias, A, B, scale)
        return y.view(*x.shape[:-1], y.shape[1])

    z = F.linear(x, in_dtype(A, x.dtype))
    return forward(x, w, bias, LowRank(z, in_dtype(B, x.dtype), scale))


def nf4_lora_linear_backward(
    dy: Tensor,
    w: PackedWeight,
    u: Tensor,
    A: Tensor,
    scale: float,
) -> Tensor:
    """Returns dx = dy W + scale u A, [.., I], in dy's dtype."""
    return backward(dy, w, LowRank(u, A.T, scale))
