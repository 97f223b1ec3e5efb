"""The LoRA layer over an NF4 base on the CPU: the functions of reference/lora.py that take a packed weight.

The low-rank term is added to the base product where it lies: y is read and written once more, not copied.
"""

from collections.abc import Sequence

from torch import Tensor

from .matmul import nf4_linear, nf4_linear_backward


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    B: Tensor,
    scale: float,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns x W^T + bias + scale z B^T, [.., O], in x's dtype."""
    y = nf4_linear(x, packed, absmax, absmax2, offset, bias, shape, block_size)
    y.view(-1, shape[0]).addmm_(z.reshape(-1, z.shape[-1]), B.T, alpha=scale)
    return y


def nf4_lora_linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    u: Tensor,
    A: Tensor,
    scale: float,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns dx = dy W + scale u A, [.., I], in dy's dtype."""
    dx = nf4_linear_backward(dy, packed, absmax, absmax2, offset, shape, block_size)
    dx.view(-1, shape[1]).addmm_(u.reshape(-1, u.shape[-1]), A, alpha=scale)
    return dx
