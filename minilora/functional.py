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

# Dropout draws a seed below this from PyTorch's generator, in each forward.
_SEEDS = 1 << 62


def _without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Autocast may be on where `.backward()` is called; the products keep the forward's dtype."""

    def wrapped(ctx: Any, dy: Tensor) -> Any:
        device = dy.device.type
        if not (is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return backward(ctx, dy)
        with torch.autocast(device, enabled=False):
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
    """y = x W^T + b + s z B^T with z = drop(x) A^T; the gradients of kernels/reference/lora.py.

    The backward draws the mask of the dropout again, from its seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: NF4Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
    ) -> Tensor:
        # The optimizer's copies may be wider.
        ctx.dtypes = A.dtype, B.dtype
        A, B = A.to(x.dtype), B.to(x.dtype)
        z = ops.project(_drop(x, p, seed), A)  # x A^T [M, r]
        ctx.save_for_backward(x, A, B, z, seed)
        ctx.w, ctx.scale, ctx.p = w, scale, p
        return ops.nf4_lora_linear(x, w, bias, z, B, scale)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, A, B, z, seed = ctx.saved_tensors
        w, scale, p = ctx.w, ctx.scale, ctx.p
        needs_dx, _, needs_dbias, needs_dA, needs_dB, *_ = ctx.needs_input_grad

        u = ops.project(dy, B.T)  # dy B [M, r]
        dx = _input_gradient(dy, w, u, A, scale, p, seed) if needs_dx else None
        dbias = dy.sum(0) if needs_dbias else None
        dtype_A, dtype_B = ctx.dtypes
        dA = ops.contract(u, _drop(x, p, seed), scale).to(dtype_A) if needs_dA else None
        dB = ops.contract(z, dy, scale).T.to(dtype_B) if needs_dB else None
        return dx, None, dbias, dA, dB, None, None, None


def _drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else ops.dropout(x, p, seed)


def _input_gradient(
    dy: Tensor, w: NF4Weight, u: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None
) -> Tensor:
    """dx = dy W + drop(s u A)."""
    if seed is None:
        return ops.nf4_lora_linear_backward(dy, w, u, A, scale)
    update = _drop((u @ A).mul_(scale), p, seed)
    return ops.nf4_linear_backward(dy, w).add_(update)


def nf4_linear(
    x: Tensor, w: NF4Weight, bias: Tensor | None = None, *, training: bool = False
) -> Tensor:
    r"""Returns y = x W^T + bias with W in NF4, differentiable with respect to x and bias.

    Args:
        x: float32, bfloat16, float16 or float64 [..., I]; y [..., O] has its dtype, and so has the
            decoded W. Under autocast all follow autocast.
        w: a quantized weight of shape [O, I].
        bias: [O] or None.
        training: compute as a training step does. Otherwise, under `torch.no_grad`, few rows on the
            CPU take a kernel that is faster and rounds in another order.

    Raises:
        ValueError: the last size of x is not I, or `w` is not a matrix.
        TypeError: x is not floating point.

    Example:
        >>> w = minilora.quantize_nf4(torch.randn(32, 64))
        >>> nf4_linear(torch.randn(2, 5, 64), w).shape
        torch.Size([2, 5, 32])
    """
    x, bias = _prepared(x, w, bias)
    if torch.is_grad_enabled():
        return _by_rows(_NF4Linear, x, w, bias)
    return ops.nf4_linear(x, w, bias) if training else ops.nf4_inference(x, w, bias)


def lora_linear(
    x: Tensor,
    base: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    *,
    training: bool = False,
) -> Tensor:
    r"""Returns y = x W^T + bias + s (drop(x) A^T) B^T   (LoRA, arXiv:2106.09685, equation 3).

    Args:
        x: [..., I], floating point.
        base: W [O, I], dense or NF4.
        A: [r, I], B: [O, r]. Any float dtype: they compute in x's (under autocast: autocast's).
        scale: s = alpha / r.
        bias: [O] or None.
        dropout: probability of zeroing an element of x on the adapter's path; 0 when not training.
        training: see `nf4_linear`.

    Returns:
        y [..., O], in x's dtype.

    Example:
        >>> W, A, B = torch.randn(32, 64), torch.randn(8, 64), torch.zeros(32, 8)
        >>> x = torch.randn(5, 64)
        >>> bool((lora_linear(x, W, A, B, scale=2.0) == x @ W.T).all())  # B = 0: no update yet
        True
    """
    if isinstance(base, NF4Weight):
        x, bias = _prepared(x, base, bias)
        if not (training or dropout or torch.is_grad_enabled()):
            return ops.nf4_inference(x, base, bias, A, B, scale)
        seed = torch.randint(_SEEDS, (), device="cpu") if dropout else None
        return _by_rows(_NF4LoRALinear, x, base, bias, A, B, scale, dropout, seed)

    y = F.linear(x, base, bias)
    z = F.dropout(x, dropout) @ A.to(x.dtype).T
    return y + scale * z @ B.to(x.dtype).T


def _prepared(x: Tensor, w: NF4Weight, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checks x, and returns it and the bias in the dtype that F.linear would compute in."""
    if len(w.shape) != 2 or x.ndim == 0 or x.shape[-1] != w.shape[1]:
        sizes = f"x {tuple(x.shape)} does not fit an NF4 weight {tuple(w.shape)}"
        raise ValueError(f"{sizes}: x must be [..., in], the weight [out, in]")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}: it must be float32, bfloat16, float16 or float64")
    if _is_autocast(x):
        x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
    return x, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    # To ask for the name of a device takes as long as all the rest.
    if x.is_cuda or x.is_cpu:
        return torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
    device = x.device.type
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def _by_rows(function: Any, x: Tensor, *rest: Any) -> Tensor:
    """Applies an autograd function to the rows of x, [M, I]."""
    y: Tensor = function.apply(x.reshape(-1, x.shape[-1]), *rest)
    return y.view(*x.shape[:-1], y.shape[-1])
