r"""LoRA (Hu et al. 2021, arXiv:2106.09685) in closed form: what autograd has to agree with.

    y = x W^T + s (x A^T) B^T      x [M, I]   W [O, I] frozen   A [r, I]   B [O, r]   s = alpha / r

The layer acts as if its weight were W + s B A. Training starts from W: A is Gaussian and B zero.
Over a 4-bit W, the caller passes z = x A^T and u = dy B, which the gradients of B and A need too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .matmul import nf4_linear, nf4_linear_backward
from .nf4 import PackedWeight

# What `in_dtype` returned inside `frozen_adapters`, with the factors whose ids stand in the keys.
_rounded: ContextVar[dict[Any, tuple[Tensor, Tensor]] | None] = ContextVar("rounded", default=None)


@contextmanager
def frozen_adapters() -> Iterator[None]:
    """Inside, `nf4_inference` rounds A and B once, not in each call: nothing may change them.

    Adapters are float32, and generation multiplies one row of bfloat16 after the other by them.
    """
    token = _rounded.set({})
    try:
        yield
    finally:
        _rounded.reset(token)


def in_dtype(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns A or B in the dtype of x; inside `frozen_adapters` the same tensor every time."""
    if factor.dtype == dtype:
        return factor
    held = _rounded.get()
    if held is None:
        return factor.to(dtype)

    key = id(factor), dtype
    if key not in held:
        held[key] = factor, factor.to(dtype)
    return held[key][1]


def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns y [M, O]."""
    z = x @ A.T
    return x @ W.T + scale * z @ B.T


def gradients(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns (dx [M, I], dA [r, I], dB [O, r]) from dy [M, O], the gradient with respect to y.

        dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)

    Training starts with B = 0 and so dA = 0: the first step changes B alone.
    """
    dx = dy @ W + scale * (dy @ B) @ A
    dA = scale * (dy @ B).T @ x
    dB = scale * dy.T @ (x @ A.T)
    return dx, dA, dB


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns W + s B A [O, I], computed in the dtype of A and rounded once to the dtype of W."""
    merged = W.to(A.dtype) + scale * (B @ A)
    return merged.to(W.dtype)


def project(x: Tensor, A: Tensor) -> Tensor:
    """Returns z = x A^T, [.., r]; or u = dy B, from dy and B^T."""
    return x @ A.T


def contract(u: Tensor, x: Tensor, scale: float) -> Tensor:
    """Returns dA = scale u^T x, [r, I], from u [M, r] and x [M, I]; or dB^T, from z and dy."""
    return scale * (u.T @ x)


def nf4_lora_linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    z: Tensor,
    B: Tensor,
    scale: float,
) -> Tensor:
    """Returns x W^T + bias + scale z B^T, [.., O], in x's dtype."""
    y = nf4_linear(x, w, bias)
    return y + scale * (z @ B.T)


def nf4_inference(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 0.0,
) -> Tensor:
    """Returns x W^T + bias + scale (x A^T) B^T, [.., O], in x's dtype; no gradient is needed."""
    if A is None or B is None:
        return nf4_linear(x, w, bias)
    z = project(x, in_dtype(A, x.dtype))
    return nf4_lora_linear(x, w, bias, z, in_dtype(B, x.dtype), scale)


def nf4_lora_linear_backward(
    dy: Tensor, w: PackedWeight, u: Tensor, A: Tensor, scale: float
) -> Tensor:
    """Returns dx = dy W + scale u A, [.., I], in dy's dtype."""
    return nf4_linear_backward(dy, w) + scale * (u @ A)
