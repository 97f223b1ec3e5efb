"""The products of many rows with a large dense weight, as that of an output head.

z = h W^T       h [M, H]    W [V, H]
g W             g [M, V]
"""

import torch
from torch import Tensor


def product(h: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """out = h W^T, [M, V]; returns it."""
    return torch.mm(h, W.T, out=out)


def product_backward(g: Tensor, W: Tensor) -> Tensor:
    """Returns g W, [M, H]."""
    return g @ W
