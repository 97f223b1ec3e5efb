r"""The cross-entropy of a few rows of logits, and its gradient in their place.

    f = c tanh(a z / c)                 a: scale, c: soft cap; without a cap f = a z
    loss = log sum_v exp f_v - f_y
    dloss/dz = (p - onehot(y)) f'(z)    p = softmax(f), f'(z) = a (1 - tanh^2(a z / c))

Dimension letters: N tokens, V vocabulary size.
"""

import torch
from torch import Tensor

# Logits that are worked on at once on a CPU: 4 MB in float32 pass through its caches.
_BLOCK = 2**20


def softmax_cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Returns the loss of each row [N], in float32 or float64; `logits` then holds the gradient.

    logits are z [N, V], of any floating dtype, and labels y [N], each in 0 ... V - 1. Softmax is
    computed in the dtype of the losses, and the gradient of their sum is rounded once.
    """
    on_cpu = logits.device.type == "cpu"
    rows = max(1, _BLOCK // logits.shape[-1]) if on_cpu else max(1, len(logits))
    blocks = zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)
    losses = [_block(z, y, scale, softcap) for z, y in blocks]
    return torch.cat(losses)


def _block(z: Tensor, y: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The function above for a few rows, in which each line is one pass over z."""
    wide = torch.promote_types(z.dtype, torch.float32)
    target = y[:, None]

    f = z.to(wide)
    if scale != 1.0:
        f *= scale
    slope = None
    if softcap is not None:
        f /= softcap
        f.tanh_()
        slope = 1.0 - f.square()
        f *= softcap

    # log sum_v exp f_v = max f - log max p, since max p = exp(max f) / sum_v exp f_v.
    highest = f.amax(-1)
    f_target = f.gather(1, target).squeeze(1)
    p = torch.softmax(f, -1, out=f)
    losses = highest - p.amax(-1).log() - f_target

    minus_one = torch.full_like(target, -1.0, dtype=wide)
    gradient = p.scatter_add_(1, target, minus_one)
    if slope is not None:
        gradient *= slope
    if scale != 1.0:
        gradient *= scale
    if gradient is not z:
        z.copy_(gradient)
    return losses
