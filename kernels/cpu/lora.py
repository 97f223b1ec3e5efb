"""LoRA over a 4-bit base on the CPU: the functions of reference/lora.py that take a packed weight.

The low-rank term is added in place: y is read and written once more, not copied.
"""

from torch import Tensor

from ..reference.nf4 import PackedWeight
from .matmul import nf4_linear, nf4_linear_backward


def nf4_lora_linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    z: Tensor,
    B: Tensor,
    scale: float,
) -> Tensor:
    """Returns x W^T + bias + scale z B^T, [.., O], in x's dtype."""
    O, r = B.shape
    y = nf4_linear(x, w, bias)
    y.view(-1, O).addmm_(z.reshape(-1, r), B.T, alpha=scale)
    return y


def nf4_lora_linear_backward(
    dy: Tensor,
    w: PackedWeight,
    u: Tensor,
    A: Tensor,
    scale: float,
) -> Tensor:
    """Returns dx = dy W + scale u A, [.., I], in dy's dtype."""
    r, I = A.shape
    dx = nf4_linear_backward(dy, w)
    dx.view(-1, I).addmm_(u.reshape(-1, r), A, alpha=scale)
    return dx
