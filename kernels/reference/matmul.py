r"""The products with an NF4 weight, in plain PyTorch: dequantize, then multiply.

With W [O, I] frozen, a linear layer needs two products and no third (W gets no gradient):

    y = x W^T + bias    [.., O]        forward
    dx = dy W           [.., I]        backward
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .nf4 import dequantize


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
    """Returns x W^T + bias, [.., O], in x's dtype; W is rounded to that dtype first."""
    return F.linear(
        x, dequantize(packed, absmax, absmax2, offset, shape, x.dtype, block_size), bias
    )


def nf4_linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns dx = dy W, [.., I], in dy's dtype."""
    return dy @ dequantize(packed, absmax, absmax2, offset, shape, dy.dtype, block_size)
