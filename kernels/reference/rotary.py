r"""Rotary position embeddings, which turn pairs of elements by an angle that grows with position.

    y = x * cos + rotate(x) * sin,    rotate([a, b]) = [-b, a]

with x [..., D] in two halves a and b. The gradient turns back, by the transpose:

    dx = dy * cos - rotate(dy * sin) = dy * cos + rotate(dy) * sin',    sin' = -sin, halves swapped

In bfloat16 both products are rounded as well as their sum, as by PyTorch's operations.

Su et al. 2021, "RoFormer", arXiv:2104.09864, equation 34, in the order of elements of GPT-NeoX.
"""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns y [B, heads, L, D]; x has this shape, cos and sin are [B or 1, L, D]."""
    a, b = x.chunk(2, -1)
    rotated = torch.cat([-b, a], -1)
    return x * cos[:, None] + rotated * sin[:, None]


def turned_back(sin: Tensor) -> Tensor:
    """The sin' of the gradient, which is `rotary(dy, cos, sin')`."""
    return -sin.roll(sin.shape[-1] // 2, -1)
