"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), one step on one tensor."""

from torch import Tensor


def step(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns (p, m, v) after step t = 1, 2, ...; nothing is changed in place.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    The decay acts on p directly and not through g: that is the W (weight decay) in AdamW.
    """
    b1, b2 = betas
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad * grad

    m_hat = m / (1 - b1**t)
    v_hat = v / (1 - b2**t)
    update = lr * m_hat / (v_hat.sqrt() + eps)
    return p - lr * weight_decay * p - update, m, v
