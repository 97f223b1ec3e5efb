r"""The products with a 4-bit weight, in plain PyTorch: dequantize, then multiply.

W [O, I] is frozen and gets no gradient, so a linear layer needs only these two products.
"""

import torch.nn.functional as F
from torch import Tensor

from .nf4 import PackedWeight, dequantize


def nf4_linear(x: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
    """Returns y = x W^T + bias, [.., O], in x's dtype; W is rounded to that dtype first."""
    return F.linear(x, dequantize(w, x.dtype), bias)


def nf4_linear_backward(dy: Tensor, w: PackedWeight) -> Tensor:
    """Returns dx = dy W, [.., I], in dy's dtype."""
    return dy @ dequantize(w, dy.dtype)
