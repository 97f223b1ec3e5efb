r"""The two differentiable products. Both save the packed weight for the backward, not a dense one.

    y = x W^T + b                                   dx = dy W
    y = x W^T + b + s z B^T,    z = x A^T           dx = dy W + s u A,    u = dy B
                                                    dA = s u^T x          dB = s dy^T z

W is frozen and has no gradient, so x is saved only where dA needs it, and z [M, r]. The backward
computes the dense weight again, a tile at a time or in a buffer that is reused.

Dimension letters: M rows of x (batch times length), I in_features, O out_features, r rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd.function import once_differentiable

from minilora import ops
from minilora.nf4 import DTYPES, NF4Weight


def _without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Autocast may be on where `.backward()` is called; the products keep the forward's dtype."""

    def wrapped(ctx: Any, dy: Tensor) -> Any:
        if not is_autocast_available(dy.device.type):  # the meta device
            return backward(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)

    return wrapped


class _NF4Linear(torch.autograd.Function):
    """y = x W^T + b; dx = dy W. The kernels have no gradient of their own: a second one raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.w = w
        return ops.nf4_linear(x, w, bias)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs_dx, _, needs_dbias = ctx.needs_input_grad
        dx = ops.nf4_linear_backward(dy, ctx.w) if needs_dx else None
        dbias = dy.sum(0) if needs_dbias else None
        return dx, None, dbias


class _NF4LoRALinear(torch.autograd.Function):
    """y = x W^T + b + s z B^T with z = x A^T; the gradients of kernels/reference/lora.py."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: NF4Weight, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        z = x @ A.T  # [M, r]
        ctx.save_for_backward(x, A, B, z)
        ctx.w, ctx.scale = w, scale
        return ops.nf4_lora_linear(x, w, bias, z, B, scale)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, A, B, z = ctx.saved_tensors
        w, scale = ctx.w, ctx.scale
        needs_dx, _, needs_dbias, needs_dA, needs_dB, _ = ctx.needs_input_grad

        u = dy @ B  # [M, r]
        dx = ops.nf4_lora_linear_backward(dy, w, u, A, scale) if needs_dx else None
        dbias = dy.sum(0) if needs_dbias else None
        dA = (u.T @ x).mul_(scale) if needs_dA else None
        dB = (dy.T @ z).mul_(scale) if needs_dB else None
        return dx, None, dbias, dA, dB, None


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    r"""Returns y = x W^T + bias with W in NF4, differentiable with respect to x and bias.

    Args:
        x: float32, bfloat16, float16 or float64 [..., I]; y [..., O] has its dtype. W is decoded to
            it (on the CPU, for a single row, to float32). Under autocast all follow autocast.
        w: a quantized weight of shape [O, I].
        bias: [O] or None.

    Raises:
        ValueError: the last size of x is not I, or `w` is not a matrix.
        TypeError: x is not floating point.

    Example:
        >>> w = minilora.quantize_nf4(torch.randn(32, 64))
        >>> nf4_linear(torch.randn(2, 5, 64), w).shape
        torch.Size([2, 5, 32])
    """
    return _product(_NF4Linear, x, w, bias)


def lora_linear(
    x: Tensor,
    base: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    r"""Returns y = x W^T + bias + s (drop(x) A^T) B^T   (LoRA, arXiv:2106.09685, equation 3).

    Args:
        x: [..., I], floating point.
        base: W [O, I], dense or NF4.
        A: [r, I], B: [O, r]. Any float dtype: they compute in x's (under autocast: autocast's).
        scale: s = alpha / r.
        bias: [O] or None.
        dropout: probability of zeroing an element of x on the adapter's path; 0 when not training.

    Returns:
        y [..., O], in x's dtype.

    Example:
        >>> W, A, B = torch.randn(32, 64), torch.randn(8, 64), torch.zeros(32, 8)
        >>> x = torch.randn(5, 64)
        >>> bool((lora_linear(x, W, A, B, scale=2.0) == x @ W.T).all())  # B = 0: no update yet
        True
    """
    if isinstance(base, NF4Weight) and not dropout:
        return _product(_NF4LoRALinear, x, base, bias, A, B, scale)

    y = nf4_linear(x, base, bias) if isinstance(base, NF4Weight) else F.linear(x, base, bias)
    z = F.dropout(x, dropout) @ A.to(x.dtype).T
    return y + scale * z @ B.to(x.dtype).T


def _product(function: Any, x: Tensor, w: NF4Weight, *rest: Any) -> Tensor:
    """Applies the function to the rows of x, in the dtype that F.linear would compute in."""
    if len(w.shape) != 2 or x.shape[-1:] != w.shape[1:]:
        sizes = f"x {tuple(x.shape)} does not fit an NF4 weight {tuple(w.shape)}"
        raise ValueError(f"{sizes}: x must be [..., in], the weight [out, in]")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}: it must be float32, bfloat16, float16 or float64")
    device = x.device.type
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))

    rows = x.reshape(-1, x.shape[-1])  # [M, I]
    rest = tuple(t.to(x.dtype) if isinstance(t, Tensor) else t for t in rest)
    y: Tensor = function.apply(rows, w, *rest)
    return y.view(*x.shape[:-1], y.shape[-1])
