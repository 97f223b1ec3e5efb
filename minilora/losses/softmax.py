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
    r"""Returns the loss of each row; afterwards `logits` holds the gradient of their sum.

    Args:
        logits: z [N, V], of any floating dtype; it is overwritten.
        labels: y [N], each in 0 ... V - 1.
        scale, softcap: see above.

    Returns:
        The losses [N], in float32 or float64. Softmax is computed in that dtype too, and the
        gradient is rounded once.

    Raises:
        ValueError: a label is outside the vocabulary.

    Example:
        >>> z = torch.zeros(2, 4)
        >>> softmax_cross_entropy_(z, torch.tensor([0, 1]))
        tensor([1.3863, 1.3863])
        >>> z
        tensor([[-0.7500,  0.2500,  0.2500,  0.2500],
                [ 0.2500, -0.7500,  0.2500,  0.2500]])
    """
    V = logits.shape[-1]
    _check_labels(labels, V)

    on_cpu = logits.device.type == "cpu"
    rows = max(1, _BLOCK // V) if on_cpu else max(1, len(logits))
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


def _check_labels(labels: Tensor, V: int) -> None:
    lowest, highest = labels.aminmax()
    for label in (lowest.item(), highest.item()):
        if not 0 <= label < V:
            raise ValueError(
                f"label {label} is outside the vocabulary of {V}: labels are 0 ... {V - 1}, or "
                "ignore_index for tokens that are ignored"
            )
