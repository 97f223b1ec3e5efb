r"""Attention for training on the CPU, in matrix products over blocks of queries.

    S = scale q k^T + mask,   P = softmax(S),   out = P v

    dv = P^T dout,   dP = scale dout v^T,   dS = P * (dP - rowsum(dP * P))
    dq = dS k,       dk = dS^T q

PyTorch's kernel for the CPU keeps the matrices of one head in cache, but multiplies them in small
tiles, at a fraction of the processor's speed. Here a block of queries meets all of its keys in one
product of the matrix library. P exists one block at a time and is computed again in the backward:
only q, k and v are kept. Keys that no query of a block attends to, those after it under a causal
mask or in other examples of a packed row, are skipped. Heads that share their keys (grouped-query
attention) are rows of one product: k and v are not repeated.

Scores, softmax and dP are computed in float32, and so is the forward's product with v. In bfloat16
P and dS are rounded for the three products of the backward that they enter.

Dimension letters: B batch, H query heads, K key heads, G = H / K, L length, D head size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The name under which transformers finds it.
NAME = "minilora_blocks"

# Elements of one block of scores: 1 MB of float32, which stays in a core's cache.
_BLOCK_ELEMENTS = 1 << 18

# dP -> dS = P * (dP - rowsum(dP * P)), in one pass.
_softmax_backward = torch.ops.aten._softmax_backward_data.out

# Shorter sequences are left to PyTorch: a block would be smaller than its bookkeeping.
MIN_LENGTH = 16


class _Block(NamedTuple):
    """One block of the scores: slices of the queries [B K, L G, D] and of the keys [B K, L, D].

    Attributes:
        heads: some key heads of one batch row, or all of several.
        rows: some positions, with all the query heads that share the keys.
        keys: what any of these rows attends to.
        shape: (batch rows, key heads, positions, G, keys).
        bias: what to add to the scores, 0 or -inf, [batch rows or 1, 1, positions, 1, keys]; None:
            nothing.
        empty: which rows attend to no key, [batch rows or 1, 1, positions, 1, 1]; None: no row.
    """

    heads: slice
    rows: slice
    keys: slice
    shape: tuple[int, int, int, int, int]
    bias: Tensor | None
    empty: Tensor | None


def _blocks(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> Iterator[_Block]:
    """Divides the scores into blocks, without the keys that no row of a block attends to."""
    B, H, L, _ = q.shape
    _, K, length, _ = k.shape
    G = H // K

    step = max(16, min(64, 256 // G))
    fitting = max(1, _BLOCK_ELEMENTS // (step * G * length))
    batches, heads = max(1, fitting // K), min(fitting, K)

    for positions in _ranges(L, step):
        allowed = _allowed(positions, mask, causal)
        keys = slice(0, length)
        bias = empty = None
        if allowed is not None:
            keys = _used(allowed)
            bias, empty = _bias(allowed[..., keys])

        for batch in _ranges(B, batches):
            for head in _ranges(K, heads):
                yield _Block(
                    heads=slice(batch.start * K + head.start, (batch.stop - 1) * K + head.stop),
                    rows=slice(positions.start * G, positions.stop * G),
                    keys=keys,
                    shape=(_size(batch), _size(head), _size(positions), G, _size(keys)),
                    bias=_of_batch(bias, batch),
                    empty=_of_batch(empty, batch),
                )


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _size(part: slice) -> int:
    return part.stop - part.start  # type: ignore[no-any-return]


def _of_batch(t: Tensor | None, batch: slice) -> Tensor | None:
    if t is None or len(t) == 1:
        return t
    return t[batch]


def _allowed(positions: slice, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which keys these positions attend to, bool [B or 1, positions, keys]; None: to all."""
    if mask is not None:
        return mask[:, 0, positions]
    if not causal:
        return None
    square = torch.ones(1, _size(positions), positions.stop, dtype=torch.bool)
    return square.tril(positions.start)


def _used(allowed: Tensor) -> slice:
    """From the first key that any row attends to, to the last."""
    used = allowed.flatten(0, 1).any(0).nonzero().flatten().tolist()
    return slice(used[0], used[-1] + 1) if used else slice(0, 1)


def _bias(allowed: Tensor) -> tuple[Tensor, Tensor | None]:
    """See `_Block`."""
    allowed = allowed[:, None, :, None, :]
    bias = torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
    empty = ~allowed.any(-1, keepdim=True)
    return bias, empty if bool(empty.any()) else None


def _rows(heads: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """[B, H, L, D] -> [B K, L G, D]: the queries that share their keys are rows of one matrix."""
    B, _, L, D = heads.shape
    by_key = heads.view(B, K, -1, L, D).transpose(2, 3)  # [B, K, L, G, D]
    by_key = by_key.to(dtype, memory_format=torch.contiguous_format)
    return by_key.flatten(2, 3).flatten(0, 1)


def _heads(rows: Tensor, B: int, L: int, dtype: torch.dtype) -> Tensor:
    """[B K, L G, D] -> [B, H, L, D], in memory [B, L, H, D] as the layers around it want it."""
    K, D = len(rows) // B, rows.shape[-1]
    by_position = rows.view(B, K, L, -1, D).transpose(1, 2)  # [B, L, K, G, D]
    by_position = by_position.to(dtype, memory_format=torch.contiguous_format)
    return by_position.flatten(2, 3).transpose(1, 2)


class _Buffer:
    """Memory for one block after another, which grows if it has to."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.memory = torch.empty(0, dtype=dtype)

    def of(self, block: _Block) -> Tensor:
        """Uninitialised memory for the block's scores, [heads, rows, keys]."""
        b, k, length, G, keys = block.shape
        size = b * k * length * G * keys
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(b * k, length * G, keys)


def _probabilities(q: Tensor, k: Tensor, block: _Block, buffer: _Buffer) -> Tensor:
    """P = softmax(q k^T + bias) of one block, in float32; k is scaled already."""
    block_q, block_k = q[block.heads, block.rows], k[block.heads, block.keys]
    S = torch.bmm(block_q, block_k.mT, out=buffer.of(block))
    if block.bias is not None:
        S.view(block.shape).add_(block.bias)

    P = torch.softmax(S, -1, out=S)
    if block.empty is not None:
        # The softmax of nothing but -inf is NaN; the output of such a query is 0, as PyTorch's.
        P.view(block.shape).masked_fill_(block.empty, 0)
    return P


class _BlockAttention(torch.autograd.Function):
    """out = softmax(scale q k^T + mask) v; a second derivative raises."""

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
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal, ctx.scale = causal, scale

        B, _, L, _ = q.shape
        K = k.shape[1]
        q32 = _rows(q, K, torch.float32)
        k32 = _rows(k, K, torch.float32) * scale
        v32 = _rows(v, K, torch.float32)

        out = torch.empty_like(q32)
        scores = _Buffer(torch.float32)
        for block in _blocks(q, k, mask, causal):
            P = _probabilities(q32, k32, block, scores)
            torch.bmm(P, v32[block.heads, block.keys], out=out[block.heads, block.rows])
        return _heads(out, B, L, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, mask = ctx.saved_tensors
        blocks = _blocks(q, k, mask, ctx.causal)
        # The products are in the dtypes of their factors, whatever autocast would choose.
        with torch.autocast(dout.device.type, enabled=False):
            return (*_gradients(blocks, q, k, v, dout, ctx.scale), None, None, None)


def _gradients(
    blocks: Iterator[_Block],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; what ends in 32 is float32, everything else in the dtype of q."""
    B, _, L, _ = q.shape
    _, K, length, _ = k.shape
    dtype = q.dtype
    rounds = dtype != torch.float32

    q_rows, k_rows = _rows(q, K, dtype), _rows(k, K, dtype)
    dout_rows = _rows(dout, K, dtype)
    q32, dout32 = q_rows.float(), dout_rows.float()
    k32 = k_rows.float() * scale
    # A scaled v makes dP scaled, and dS.
    v32 = _rows(v, K, torch.float32) * scale

    dq = torch.empty_like(q_rows)
    dk32, dv32 = torch.zeros_like(k32), torch.zeros_like(v32)
    scores, products = _Buffer(torch.float32), _Buffer(torch.float32)
    rounded = _Buffer(dtype)
    for block in blocks:
        heads, rows, keys = block.heads, block.rows, block.keys

        P32 = _probabilities(q32, k32, block, scores)
        P = rounded.of(block).copy_(P32) if rounds else P32
        dv32[heads, keys] += torch.bmm(P.mT, dout_rows[heads, rows])

        dP32 = products.of(block)
        torch.bmm(dout32[heads, rows], v32[heads, keys].mT, out=dP32)
        dS32 = _softmax_backward(dP32, P32, -1, torch.float32, grad_input=dP32)
        dS = rounded.of(block).copy_(dS32) if rounds else dS32
        torch.bmm(dS, k_rows[heads, keys], out=dq[heads, rows])
        dk32[heads, keys] += torch.bmm(dS.mT, q_rows[heads, rows])

    return (
        _heads(dq, B, L, dtype),
        _heads(dk32, B, length, dtype),
        _heads(dv32, B, length, dtype),
    )


def block_attention(
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
        k, v: of q's dtype [B, K, length, D]; query head h reads key head h // G.
        mask: bool [B or 1, 1, L, length], True where a query attends to a key. A query that attends
            to nothing has an output of 0.
        causal: query i attends to keys 0 ... i; length is L, and there is no mask.
        scale: what the scores are multiplied by, usually D ** -0.5.

    Returns:
        [B, H, L, D], in q's dtype.

    Example:
        >>> q, k, v = torch.randn(2, 9, 32, 8), torch.randn(2, 3, 32, 8), torch.randn(2, 3, 32, 8)
        >>> block_attention(q, k, v, causal=True, scale=8**-0.5).shape
        torch.Size([2, 9, 32, 8])
    """
    apply: Any = _BlockAttention.apply
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
    """Whether `block_attention` computes this; otherwise PyTorch's attention does.

    It does for bfloat16 and float32 on the CPU, without dropout of the probabilities, for a causal
    mask or a boolean one that all heads share, from MIN_LENGTH queries on. Not under autocast,
    which chooses dtypes by the operation, and not while torch.compile traces: it makes kernels of
    its own.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype:
        return False
    if q.dtype not in (torch.bfloat16, torch.float32) or dropout:
        return False

    B, H, L, D = q.shape
    _, K, length, _ = k.shape
    keys = (B, K, length, D)
    if k.shape != keys or v.shape != keys or H % K or L < MIN_LENGTH:
        return False
    if mask is None:
        return not causal or length == L
    shared = mask.shape in [(B, 1, L, length), (1, 1, L, length)]
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
    """The attention function of a transformers layer: `block_attention` where it covers the call.

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
    out = block_attention(*inputs, causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Makes the attention known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    # The masks of "sdpa": None for a causal mask without padding, boolean otherwise.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
