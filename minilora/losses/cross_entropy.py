r"""The cross-entropy behind a language model's output head, without the logits of a whole batch.

    z_n = W h_n + b      loss_n = log sum_v exp z_nv - z_n,y      dloss_n/dz_nv = p_nv - [v = y]

with p = softmax(z). For 2,048 tokens and 49,152 words the logits are 403 MB in float32. Computed as
usual, z, log p and a gradient of each exist at the same time: more than all else that a step of a
small model holds. But a token's loss and its gradient need the logits of that token alone. Here a
few hundred tokens pass the head at a time, the gradient with respect to z overwrites z, and what
remains of a chunk is its losses and the gradient of its hidden states.

Both come from the forward. Computing the logits again in the backward would cost a third product,
and the gradient that is kept is no larger than the hidden states; the backward only scales it.

PyTorch 2.13 has an `F.linear_cross_entropy` that goes by chunks too. It takes a weight and nothing
else: an adapter on the head would be bypassed.

Dimension letters: N tokens, H hidden size, V words of the vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd.function import once_differentiable

from minilora.functional import nf4_linear
from minilora.losses.heads import LayerHead, WeightHead, losses_by_chunks
from minilora.nf4 import DTYPES, NF4Weight

REDUCTIONS = ("mean", "sum", "none")

# A chunk has at most 2^24 logits, 32 MB in bfloat16, and more than 512 tokens gain nothing. With
# fewer than 64 the products wait for the weight to be read from memory.
MOST_LOGITS, MOST_TOKENS, FEWEST_TOKENS = 2**24, 512, 64


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | NF4Weight | nn.Module,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    r"""Returns the cross-entropy of the labels and the logits z = hidden W^T + bias.

    The same as `F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)`, computed for a
    chunk of tokens at a time. The gradients of `hidden` and of whatever requires one in the head
    are computed in the forward, unless gradients are disabled (`torch.no_grad`). A token whose
    label is ignored is not multiplied by the weight at all.

    Args:
        hidden: float32, bfloat16, float16 or float64 [..., H]: what the output head gets.
        weight: W [V, H], dense or NF4; or the head itself, a module [n, H] -> [n, V]. A module is
            called chunk by chunk, so that its adapters, 4-bit weights and hooks take part.
        labels: int64 [...], the right word for each token. They are not shifted.
        bias: [V] or None. A module has its own.
        ignore_index: the label of tokens that are left out.
        reduction: "mean" over the tokens that are not left out (NaN if there are none), "sum", or
            "none".
        scale: a of z -> a z, as Cohere and Granite have it.
        softcap: c of z -> c tanh(z / c), after the scale, as Gemma 2 has it.
        chunk: number of tokens whose logits exist at a time. Default: 512, or fewer if the
            vocabulary has more than 32,768 words.

    Returns:
        The loss, in float32 (float64 for inputs in float64). With "none": [...], zero for tokens
        that are left out.

    The products are computed in the wider dtype of `hidden` and `weight`, under autocast in
    autocast's. Softmax, losses, and the sums over chunks are in float32 or wider. There is no
    second derivative. With a dense weight it works under `torch.compile(fullgraph=True)`; a module
    or an NF4 weight breaks the graph.

    Raises:
        ValueError: sizes do not fit; a label is no word of the vocabulary; `reduction`, `softcap`
            or `chunk` is invalid; reduction="none" and the head requires a gradient.
        TypeError: hidden or weight is of a dtype or kind that is not listed above.

    Example:
        >>> hidden, W = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16)
        >>> labels = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, -100, -100]])
        >>> loss = linear_cross_entropy(hidden, W, labels)
        >>> logits = hidden @ W.T
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits.mT, labels))
        True
    """
    _check(hidden, weight, labels, bias, reduction, softcap, chunk)
    if _is_plain_linear(weight):
        bias, weight = weight.bias, weight.weight

    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)  # [N, H], [N]
    options = (reduction == "none", ignore_index, float(scale), softcap, chunk)
    if isinstance(weight, Tensor):
        loss = _through_weight(x, weight, bias, y, *options)
    else:
        loss = _through_layer(x, weight, bias, y, *options)

    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss
    count = (y != ignore_index).sum()
    # The mean of nothing is NaN; its gradients are zero.
    return torch.where(count > 0, loss / count.clamp(min=1), torch.nan)


def _through_weight(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    per_token: bool,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    chunk: int | None,
) -> Tensor:
    # Autograd casts the gradients back.
    dtype = _product_dtype(x, weight)
    x, weight = x.to(dtype), weight.to(dtype)
    inputs = (x, weight, None if bias is None else bias.to(dtype))
    enabled = torch.is_grad_enabled()
    needs = [enabled and t is not None and t.requires_grad for t in inputs]

    chunk = chunk or _default_chunk(len(weight))
    with torch.no_grad():
        losses, *gradients = _weight_losses(*inputs, y, ignore_index, scale, softcap, chunk, needs)
    pairs = zip(inputs, gradients, needs, strict=True)
    known = [(t, g) for t, g, needed in pairs if t is not None and needed]
    return _attach(losses, known, x, per_token)


@torch.library.custom_op("minilora::linear_cross_entropy", mutates_args=())
def _weight_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, dx, dW and db; of the last three those that are not needed are empty.

    An operator, since torch.compile cannot follow the selection of tokens.
    """
    head = WeightHead(weight, bias, min(chunk, len(y)), any(needs), needs[1], needs[2])
    with _without_autocast(x.device.type):
        losses, dx = losses_by_chunks(
            head,
            x,
            y,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            chunk=chunk,
        )
    return losses, dx, head.dW.to(weight.dtype), head.db.to(weight.dtype)


@_weight_losses.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = options[-1]
    losses = x.new_empty(len(y), dtype=torch.promote_types(x.dtype, torch.float32))
    dx = torch.empty_like(x) if any(needs) else x.new_empty(0)
    dW = torch.empty_like(weight) if needs[1] else weight.new_empty(0)
    return losses, dx, dW, weight.new_empty(len(weight) if needs[2] else 0)


@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason="linear_cross_entropy calls an output head chunk by chunk"
)
def _through_layer(
    x: Tensor,
    layer: NF4Weight | nn.Module,
    bias: Tensor | None,
    y: Tensor,
    per_token: bool,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    chunk: int | None,
) -> Tensor:
    if isinstance(layer, NF4Weight):
        call: Callable[[Tensor], Tensor] = partial(nf4_linear, w=layer, bias=bias)
        parameters = [] if bias is None else [bias]
        words = layer.shape[0]
    else:
        call, parameters = layer, list(layer.parameters())
        words = getattr(layer, "out_features", 1)

    enabled = torch.is_grad_enabled()
    parameters = [p for p in parameters if enabled and p.requires_grad]
    gradient = enabled and (x.requires_grad or bool(parameters))
    head = LayerHead(call, parameters, gradient)
    with torch.no_grad():
        losses, dx = losses_by_chunks(
            head,
            x,
            y,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            chunk=chunk or _default_chunk(words),
        )
    known = [(x, dx)] if x.requires_grad else []
    known += [(p, total.to(p.dtype)) for p, total in zip(parameters, head.sums, strict=True)]
    return _attach(losses, known if head.gradient else [], x, per_token)


class _Known(torch.autograd.Function):
    """A loss, or one per row of its single input, whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        # First the inputs, then the gradient of each.
        gradients = tensors[count:]
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        per_row = dloss.dim() == 1
        factor = dloss[:, None] if per_row else dloss
        scaled = [(g * factor).to(g.dtype) for g in ctx.saved_tensors]
        return None, None, *scaled, *(None for _ in scaled)


def _attach(
    losses: Tensor, known: Sequence[tuple[Tensor, Tensor]], x: Tensor, per_token: bool
) -> Tensor:
    """The losses of all tokens, or their sum, as what `known` is the gradient of.

    Args:
        losses: [N].
        known: the inputs that require a gradient, each with that of the sum of the losses.
        x: the input with one row per token.
        per_token: False: return the sum.
    """
    if per_token and any(t is not x for t, _ in known):
        raise ValueError(
            'reduction="none": a gradient of the head is a sum over the tokens. Use "sum" or '
            '"mean", or freeze the head'
        )
    loss = losses if per_token else losses.sum()
    if not known:
        return loss
    inputs, gradients = zip(*known, strict=True)
    apply: Any = _Known.apply
    attached: Tensor = apply(loss, len(inputs), *inputs, *gradients)
    return attached


def _default_chunk(words: int) -> int:
    return max(FEWEST_TOKENS, min(MOST_TOKENS, MOST_LOGITS // max(1, words)))


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in, were hidden and weight cast to the wider one."""
    dtype, device = torch.promote_types(x.dtype, weight.dtype), x.device.type
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        return dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
    return dtype


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    if not is_autocast_available(device):  # the meta device
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _is_plain_linear(layer: Any) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is the product with its weight, and nothing else."""
    if type(layer) is not nn.Linear:
        return False
    held = vars(layer)
    hooks = any(value for name, value in held.items() if name.endswith("_hooks"))
    return "forward" not in held and not hooks


def _check(
    hidden: Tensor,
    weight: Any,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    softcap: float | None,
    chunk: int | None,
) -> None:
    """Raises TypeError or ValueError, with the argument's name, for what cannot be computed."""
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden is {hidden.dtype}: it must be one of {DTYPES}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}: they must be torch.int64")
    if hidden.dim() < 1 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit hidden {tuple(hidden.shape)}: there is one "
            "label for each row of hidden"
        )

    if isinstance(weight, nn.Module):
        if bias is not None:
            raise ValueError("bias: a head that is a module has its own")
    elif isinstance(weight, Tensor | NF4Weight):
        if len(weight.shape) != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}: hidden "
                "must be [..., H], the weight [V, H]"
            )
        if weight.dtype not in DTYPES:
            raise TypeError(f"weight is {weight.dtype}: it must be one of {DTYPES}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {tuple(bias.shape)} must be [V] = [{weight.shape[0]}]")
    else:
        raise TypeError(
            f"weight is a {type(weight).__name__}: it must be a tensor, an NF4Weight or a module"
        )

    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: must be one of {', '.join(REDUCTIONS)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: must be positive, or None for no cap")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: at least one token at a time")
