"""LoRA over a 4-bit base on the CPU: the functions of reference/lora.py that take a packed weight.

many_rows.py adds the low-rank term before it rounds. Where BLAS multiplies, the term is added to y
in place: in bfloat16 what is smaller than the rounding of y is lost.
"""

from torch import Tensor

from ..reference.nf4 import PackedWeight
from . import many_rows
from .few_rows import few_rows, is_faster
from .low_rank import contract, project
from .matmul import nf4_linear, nf4_linear_backward

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
    if many_rows.is_fast(x, w, z, B, forward=True):
        y = many_rows.product(x, w, z, B, scale, forward=True)
        return y if bias is None else y.add_(bias)
    O, r = B.shape
    y = nf4_linear(x, w, bias)
    y.view(-1, O).addmm_(z.reshape(-1, r), B.T, alpha=scale)
    return y


def nf4_inference(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 0.0,
) -> Tensor:
    """Returns x W^T + bias + scale (x A^T) B^T, [.., O], in x's dtype; no gradient is needed."""
    if is_faster(x.numel() // w.shape[1], w, x.dtype):
        y = few_rows(x, w, A, B, scale)
        return y if bias is None else y.add_(bias)
    if A is None or B is None:
        return nf4_linear(x, w, bias)
    A, B = A.to(x.dtype), B.to(x.dtype)
    return nf4_lora_linear(x, w, bias, project(x, A), B, scale)


def nf4_lora_linear_backward(
    dy: Tensor,
    w: PackedWeight,
    u: Tensor,
    A: Tensor,
    scale: float,
) -> Tensor:
    """Returns dx = dy W + scale u A, [.., I], in dy's dtype."""
    if many_rows.is_fast(dy, w, u, A, forward=False):
        return many_rows.product(dy, w, u, A, scale, forward=False)
    r, I = A.shape
    dx = nf4_linear_backward(dy, w)
    dx.view(-1, I).addmm_(u.reshape(-1, r), A, alpha=scale)
    return dx
