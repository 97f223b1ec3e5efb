"""The cross-entropy of a few rows of logits, and its gradient in their place.

The equations are in kernels/reference/softmax.py, and a kernel of fewer passes in kernels/cpu.
"""

from torch import Tensor

from minilora.losses.kernels import kernels_for


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
        scale: a of z -> a z.
        softcap: c of z -> c tanh(z / c), after the scale; None: no cap.

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
    _check_labels(labels, logits.shape[-1])
    found: Tensor = kernels_for("softmax", logits).softmax_cross_entropy_(
        logits, labels, scale, softcap
    )
    return found


def _check_labels(labels: Tensor, V: int) -> None:
    lowest, highest = labels.aminmax()
    for label in (lowest.item(), highest.item()):
        if not 0 <= label < V:
            raise ValueError(
                f"label {label} is outside the vocabulary of {V}: labels are 0 ... {V - 1}, or "
                "ignore_index for tokens that are ignored"
            )
