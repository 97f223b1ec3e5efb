r"""LoRA (Hu et al. 2021, arXiv:2106.09685) in closed form: what autograd has to agree with.

    y = x W^T + s (x A^T) B^T        x [M, I]   W [O, I] frozen   A [r, I]   B [O, r]   s = alpha / r

W + s B A is the weight that the layer behaves as; A starts Gaussian and B zero, so training starts from W itself.
"""

from collections.abc import Sequence

from torch import Tensor

from .matmul import nf4_linear, nf4_linear_backward


def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns y [M, O]."""
    return x @ W.T + scale * (x @ A.T) @ B.T


def gradients(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns (dx [M, I], dA [r, I], dB [O, r]) for the gradient dy [M, O] of the loss by y.

    dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)

    At the start B = 0, so dA = 0 too: the first step moves B alone.
    """
    dx = dy @ W + scale * (dy @ B) @ A
    dA = scale * (dy @ B).T @ x
    dB = scale * dy.T @ (x @ A.T)
    return dx, dA, dB


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns W + s B A [O, I], summed in float32 (float64 for float64) and rounded once to W's dtype."""
    wide = W.to(A.dtype)
    return (wide + scale * (B @ A)).to(W.dtype)


# Over an NF4 base, with what the gradients need as well computed outside: z = x A^T [.., r] and u = dy B [.., r].


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    B: Tensor,
    scale: float,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns x W^T + bias + scale z B^T, [.., O], in x's dtype."""
    return nf4_linear(x, packed, absmax, absmax2, offset, bias, shape, block_size) + scale * (
        z @ B.T
    )


def nf4_lora_linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    u: Tensor,
    A: Tensor,
    scale: float,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns dx = dy W + scale u A, [.., I], in dy's dtype."""
    return nf4_linear_backward(dy, packed, absmax, absmax2, offset, shape, block_size) + scale * (
        u @ A
    )
