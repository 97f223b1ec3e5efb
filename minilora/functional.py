r"""The two differentiable products. Both keep the packed weight for the backward, never a dense one.

Dimension letters: M rows of x (batch times length), I in_features, O out_features, r rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora import ops
from minilora.nf4 import DTYPES, NF4Weight


def _without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Autocast, if it is on where `.backward()` is called, does not reach the products: they have the dtype of the forward's."""

    def wrapped(ctx: Any, dy: Tensor) -> Any:
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)

    return wrapped


class _NF4Linear(torch.autograd.Function):
    """y = x W^T; dx = dy W. W is frozen: it has no gradient, so x need not be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        shape: Any,
        block_size: int,
        *weight: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.layout = shape, block_size
        return ops.nf4_linear(x, *weight, bias, shape, block_size)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # the kernels have no gradient of their own: asking for one raises, and is not left out
    @_without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = ops.nf4_linear_backward(dy, *ctx.saved_tensors, *ctx.layout)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dbias, None, None, None, None, None, None


class _NF4LoRALinear(torch.autograd.Function):
    """y = x W^T + bias + s z B^T with z = x A^T: reference/lora.py's forward and gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scale: float, *weight: Any
    ) -> Tensor:
        *tensors, shape, block_size = weight
        z = x @ A.T  # [M, r]
        ctx.save_for_backward(x, A, B, z, *tensors)
        ctx.layout = scale, shape, block_size
        return ops.nf4_lora_linear(x, *tensors, bias, z, B, *ctx.layout)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, A, B, z, *tensors = ctx.saved_tensors
        scale = ctx.layout[0]
        dx = dA = dB = dbias = None
        u = dy @ B if any(ctx.needs_input_grad[:2]) else None  # [M, r]
        if ctx.needs_input_grad[0]:
            dx = ops.nf4_lora_linear_backward(dy, *tensors, u, A, *ctx.layout)
        if ctx.needs_input_grad[1] and u is not None:
            dA = (u.T @ x).mul_(scale)
        if ctx.needs_input_grad[2]:
            dB = (dy.T @ z).mul_(scale)
        if ctx.needs_input_grad[3]:
            dbias = dy.sum(0)
        return dx, dA, dB, dbias, None, None, None, None, None, None, None


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that a matrix product has under the autocast in force, as nn.functional.linear does."""
    if (
        torch.is_autocast_enabled(x.device.type)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _check(x: Tensor, w: NF4Weight) -> None:
    if len(w.shape) != 2 or x.shape[-1:] != w.shape[1:]:
        raise ValueError(
            f"x {tuple(x.shape)} does not fit an NF4 weight {tuple(w.shape)}: x must be [.., in], the weight [out, in]"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x is {x.dtype}: a product with an NF4 weight takes float32, bfloat16, float16 or float64"
        )


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    r"""Returns y = x W^T + bias with W in NF4, differentiable by x and bias.

    Args:
        x: float32, bfloat16, float16 or float64 [.., I]. W is decoded to this dtype (on the CPU for a
            single row to float32, in registers); under autocast both follow autocast.
        w: a quantized weight of shape [O, I].
        bias: [O] or None.

    Returns:
        y [.., O], in x's dtype.

    Raises:
        ValueError: the last size of x is not I, or `w` is not a matrix.
        TypeError: x is not floating point.

    Example:
        >>> w = minilora.quantize_nf4(torch.randn(32, 64))
        >>> nf4_linear(torch.randn(2, 5, 64), w).shape
        torch.Size([2, 5, 32])
    """
    _check(x, w)
    x = _autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])  # [M, I]
    y = _NF4Linear.apply(rows, bias, w.shape, w.block_size, *w.tensors)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + bias for a dense or a quantized weight."""
    if isinstance(weight, NF4Weight):
        return nf4_linear(x, weight, bias)
    return F.linear(x, weight, bias)


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
        x: [.., I], floating point.
        base: W [O, I], dense or NF4.
        A: [r, I], B: [O, r]. Any float dtype: they compute in x's (under autocast: autocast's).
        scale: s = alpha / r.
        bias: [O] or None.
        dropout: probability with which an element of x is dropped on the adapter's path; 0 when not training.

    Returns:
        y [.., O], in x's dtype.

    Example:
        >>> W, A, B = torch.randn(32, 64), torch.randn(8, 64), torch.zeros(32, 8)
        >>> x = torch.randn(5, 64)
        >>> bool((lora_linear(x, W, A, B, scale=2.0) == x @ W.T).all())      # B = 0: nothing is changed yet
        True
    """
    if isinstance(base, NF4Weight):
        _check(x, base)
    x = _autocast(x)
    A, B = A.to(x.dtype), B.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])  # [M, I]
    if isinstance(base, NF4Weight) and not dropout:
        bias = None if bias is None else bias.to(x.dtype)
        weight = *base.tensors, base.shape, base.block_size
        y = _NF4LoRALinear.apply(rows, A, B, bias, scale, *weight)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]
    flat = x.is_contiguous() or isinstance(base, NF4Weight)
    y = linear(
        rows if flat else x, base, bias
    )  # a dense product's last bits depend on x's strides: x as the bare layer gets it
    z = F.linear(F.dropout(rows, dropout) if dropout else rows, A)  # [M, r]
    if flat:
        y.addmm_(z, B.T, alpha=scale)  # in place: y is read and written once more, not copied
    else:
        y = torch.addmm(y.reshape(-1, y.shape[-1]), z, B.T, alpha=scale)
    return y.view(*x.shape[:-1], y.shape[-1])
