r"""RMSNorm with a frozen weight.

    y = w n,   n = x r,   r = 1 / sqrt(mean(x^2) + eps)

    dx = r (dn - n mean(dn n)),   dn = w dy

The means are over the last dimension, and everything is computed in float32. What models differ in
is where n is rounded to their dtype: see `Weighting`.

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from enum import IntEnum

import torch
from torch import Tensor


class Weighting(IntEnum):
    """How the weight w [I] is applied to n [..., I]."""

    # Llama, Mistral, Qwen, T5: n is rounded, and the product again.
    AFTER_ROUNDING = 0
    # OLMo 2: the product alone is rounded.
    BEFORE_ROUNDING = 1
    # Gemma: likewise, and the weight is stored as its difference from 1.
    ONE_PLUS = 2


def rms_norm(
    x: Tensor,
    w: Tensor,
    eps: float,
    weighting: Weighting,
) -> tuple[Tensor, Tensor]:
    """Returns y [..., I] in the dtype of x, and r [..., 1] in float32.

    x [..., I] and w [I] have one dtype.
    """
    x32 = x.float()
    r = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    n = x32 * r

    if weighting is Weighting.AFTER_ROUNDING:
        return w * n.to(x.dtype), r
    if weighting is Weighting.ONE_PLUS:
        w = 1.0 + w.float()
    return (w * n).to(x.dtype), r


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    weighting: Weighting,
) -> Tensor:
    """Returns dx [..., I] from dy [..., I], both in the dtype of x, and the r of the forward."""
    n = x.float() * r
    w32 = w.float() + (weighting is Weighting.ONE_PLUS)

    dn = dy * w32
    mean = (dn * n).mean(-1, keepdim=True)
    return dn.sub_(n.mul_(mean)).mul_(r).to(x.dtype)
