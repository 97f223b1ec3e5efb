r"""The LoRA layer over an NF4 base on a GPU: the functions of reference/lora.py that take a packed weight.

    y = x W^T + bias + s z B^T,   z = x A^T            dx = dy W + s u A,   u = dy B

The low-rank term is added in the accumulator of a tile, in the last sum of the skinny path, or, on the dense path where y is wider
than x, with W and s B multiplied side by side. A product of its own reads and writes all of y once more, which at 4096 rows moves
more bytes than decoding W; the dense path pays that for a square W. z [M, r] and u [M, r] are small products that the gradients of
A and B need as well.
"""

from collections.abc import Sequence

from torch import Tensor

from .matmul import backward, forward
from .runtime import LowRank


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
    return forward(
        x, (packed, absmax, absmax2, offset), bias, LowRank(z, B, scale), shape, block_size
    )


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
    return backward(
        dy, (packed, absmax, absmax2, offset), LowRank(u, A.T, scale), shape, block_size
    )
