r"""Attention for training on the CPU, under transformers' interface.

    out = softmax(scale q k^T + mask) v

The kernels are in kernels/cpu/attention.py. q, k and v are kept for the backward, the output, which
the next layer keeps anyway, and one number per query.

Dimension letters: B batch, H query heads, K key heads, L queries, J keys, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The name under which transformers finds it.
NAME = "minilora_attention"

# Shorter sequences are left to PyTorch: a block of scores is 64 x 64.
MIN_LENGTH = 16


class _Attention(torch.autograd.Function):
    """See kernels/reference/attention.py; a second derivative raises."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        from minilora.kernels.cpu.attention import attention

        out, lse = attention(q, k, v, mask, causal, scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        from minilora.kernels.cpu.attention import attention_backward

        q, k, v, mask, out, lse = ctx.saved_tensors
        causal, scale = ctx.causal, ctx.scale
        # The sum over query heads is in float32, whatever autocast would choose.
        with torch.autocast(dout.device.type, enabled=False):
            gradients = attention_backward(dout, q, k, v, mask, causal, scale, out, lse)
        return *gradients, None, None, None


def is_supported(dtype: torch.dtype) -> bool:
    """Whether this processor computes attention in a dtype: see `covers`."""
    from minilora.kernels.cpu.attention import supports

    return supports(dtype)


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
) -> Tensor:
    r"""Returns softmax(scale q k^T + mask) v for tensors on the CPU; differentiable.

    Args:
        q: bfloat16 or float32 [B, H, L, D].
        k, v: of q's dtype [B, K, J, D]; query head h reads key head h // (H / K).
        mask: bool [B or 1, 1, L, J], True where a query attends to a key. A query that attends
            to nothing has an output of 0.
        causal: query i attends to keys 0 ... i; J is L, and there is no mask.
        scale: what the scores are multiplied by, usually D ** -0.5.

    Returns:
        [B, H, L, D], in q's dtype.

    Raises:
        TypeError: this processor has no instructions for the dtype.

    Example:
        >>> q, k, v = torch.randn(2, 9, 32, 8), torch.randn(2, 3, 32, 8), torch.randn(2, 3, 32, 8)
        >>> cpu_attention(q, k, v, causal=True, scale=8**-0.5).shape
        torch.Size([2, 9, 32, 8])
    """
    if not is_supported(q.dtype):
        raise TypeError(
            f"q is {q.dtype}: this takes float32 on processors with AVX-512, and bfloat16 on those "
            "with AVX512-BF16; use torch.nn.functional.scaled_dot_product_attention"
        )
    apply: Any = _Attention.apply
    return apply(q, k, v, mask, causal, scale)  # type: ignore[no-any-return]


def covers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    dropout: float,
) -> bool:
    """Whether `cpu_attention` computes this; otherwise PyTorch's attention does.

    It does for float32 on processors with AVX-512, and for bfloat16 on those with AVX512-BF16:
    without dropout of the probabilities, for a causal mask or a boolean one that all heads share,
    from MIN_LENGTH queries on. Not under autocast, which chooses dtypes by the operation, and not
    while torch.compile traces: it makes kernels of its own.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype:
        return False
    B, H, L, D = q.shape
    _, K, J, _ = k.shape
    keys = (B, K, J, D)
    if k.shape != keys or v.shape != keys or H % K or L < MIN_LENGTH:
        return False
    if dropout or not is_supported(q.dtype):
        return False
    if mask is None:
        return not causal or J == L
    shared = mask.shape in [(B, 1, L, J), (1, 1, L, J)]
    return shared and mask.dtype == torch.bool


# What a layer may ask for beside the products: "sdpa" does it, or says that it cannot.
_OPTIONS = ("position_bias", "softcap", "s_aux", "output_attentions")


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of a transformers layer: `cpu_attention` where it covers the call.

    Everything else goes to transformers' own "sdpa" function, with the arguments as they came.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None
    inputs = (query, key, value, attention_mask)

    kwargs["position_bias"] = position_bias
    special = any(kwargs.get(option) is not None for option in _OPTIONS)
    if special or not covers(*inputs, causal=causal, dropout=dropout):
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, *inputs, **kwargs)  # type: ignore[no-any-return]

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = cpu_attention(*inputs, causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Makes the attention known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    # The masks of "sdpa": None for a causal mask without padding, boolean otherwise.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
