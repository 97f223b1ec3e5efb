r"""The product in a gated MLP, with SiLU as its activation.

    y = silu(g) * u,   silu(g) = g s,   s = 1 / (1 + exp(-g))

    du = dy * silu(g),   dg = dy * u * s (1 + g (1 - s))

In bfloat16, silu(g) and dy * u are rounded as well as the results, as by PyTorch's operations.

Shazeer 2020, "GLU Variants Improve Transformer".
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """Returns y; all three have one shape and dtype."""
    return F.silu(g) * u


def swiglu_backward(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (dg, du)."""
    return torch.ops.aten.silu_backward(dy * u, g), dy * F.silu(g)
