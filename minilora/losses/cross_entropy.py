r"""The cross-entropy behind a language model's output head, without the logits of a whole batch.

    z_n = W h_n + b      loss_n = log sum_v exp z_nv - z_n,y      dloss_n/dz_nv = p_nv - [v = y]

with p = softmax(z). For 2,048 tokens and a vocabulary of 49,152 the logits take 403 MB in float32.
Computed the usual way, z, log p and a gradient of each exist at the same time: more than everything
else in a training step of a small model. But the loss of a token, and its gradient, need the logits
of that token alone. Here the head is applied to a few hundred tokens at a time, the gradient with
respect to z overwrites z, and what is kept of a chunk is its losses and the gradient with respect
to its hidden states.

Both are computed in the forward pass. Computing the logits again in the backward pass would cost a
third product, and the gradient that is kept is no larger than the hidden states; the backward pass
only scales it.

PyTorch 2.13 has an `F.linear_cross_entropy` that works in chunks too. It takes a weight and nothing
else: an adapter on the head would be bypassed.

Dimension letters: N tokens, H hidden size, V vocabulary size.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd.function import once_differentiable

from minilora.functional import nf4_linear
from minilora.losses.heads import LayerHead, Options, WeightHead, losses_in_chunks
from minilora.nf4 import DTYPES, NF4Weight

REDUCTIONS = ("mean", "sum", "none")

# A chunk has at most 2^24 logits, 32 MB in bfloat16, and more than 512 tokens gain nothing. With
# fewer than 64 the products wait for the weight to be read from memory.
MOST_LOGITS, MOST_TOKENS, FEWEST_TOKENS = 2**24, 512, 64

# What an int of an operator can be.
_INT64 = range(-(2**63), 2**63)


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
    chunk of tokens at a time. The gradients with respect to `hidden`, and to everything in the head
    that requires one, are computed in the forward pass, unless gradients are disabled
    (`torch.no_grad`). A token whose label is ignored is not multiplied by the weight at all.

    Args:
        hidden: float32, bfloat16, float16 or float64 [..., H]: the input of the output head.
        weight: W [V, H], dense or NF4; or the head itself, a module [n, H] -> [n, V]. A module is
            called chunk by chunk, so its adapters, 4-bit weights and hooks take part.
        labels: int64 [...], the correct class of each token, 0 ... V - 1. They are not shifted.
        bias: [V] or None. A module has its own.
        ignore_index: the label of tokens that are ignored.
        reduction: "mean" over the tokens that are not ignored (NaN if there are none), "sum", or
            "none".
        scale: a of z -> a z, as in Cohere and Granite.
        softcap: c of z -> c tanh(z / c), after the scale, as in Gemma 2.
        chunk: number of tokens whose logits exist at a time. Default: 512, or fewer if the
            vocabulary (a module's `out_features`) is larger than 32,768.

    Returns:
        The loss, in float32 (float64 for inputs in float64). With "none": [...], zero for tokens
        that are ignored.

    The products are computed in the wider dtype of `hidden` and `weight`, under autocast in
    autocast's. Softmax, losses, and the sums over chunks are in float32 or wider. There is no
    second derivative. With a dense weight it works under `torch.compile(fullgraph=True)`; a module
    or an NF4 weight breaks the graph.

    Raises:
        ValueError: sizes or devices do not match; a label is outside the vocabulary; an option is
            out of range; reduction="none" and the head requires a gradient.
        TypeError: an argument has a type or dtype that is not listed above; a module does not
            return logits.

    Example:
        >>> hidden, W = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16)
        >>> labels = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, -100, -100]])
        >>> loss = linear_cross_entropy(hidden, W, labels)
        >>> logits = hidden @ W.T
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits.mT, labels))
        True
    """
    if bias is None and _is_plain_linear(weight):
        bias, weight = weight.bias, weight.weight
    _check_tensors(hidden, weight, labels, bias)
    _check_options(ignore_index, reduction, scale, softcap, chunk)

    y = labels.reshape(-1)  # [N]
    x = hidden.reshape(len(y), hidden.shape[-1])  # [N, H]
    chunk = chunk or _default_chunk(weight)
    options = Options(ignore_index, float(scale), softcap, chunk)
    apply_head = _through_weight if isinstance(weight, Tensor) else _through_layer
    loss = apply_head(x, weight, bias, y, options, per_token=reduction == "none")

    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss
    count = (y != ignore_index).sum()
    # The mean of nothing is NaN; its gradients are zero.
    return torch.where(count > 0, loss / count.clamp(min=1), torch.nan)


def _through_weight(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    y: Tensor,
    options: Options,
    per_token: bool,
) -> Tensor:
    # Autograd casts the gradients back.
    dtype = _product_dtype(x, weight)
    x, weight = x.to(dtype), weight.to(dtype)
    inputs = (x, weight, None if bias is None else bias.to(dtype))
    enabled = torch.is_grad_enabled()
    needs = [enabled and t is not None and t.requires_grad for t in inputs]
    _check_frozen(per_token, any(needs[1:]))

    with torch.no_grad():
        losses, *gradients = _weight_losses(*inputs, y, needs, *options)
    pairs = zip(inputs, gradients, needs, strict=True)
    known = [(t, g) for t, g, needed in pairs if t is not None and needed]
    return _attach(losses if per_token else losses.sum(), known)


@torch.library.custom_op("minilora::linear_cross_entropy", mutates_args=())
def _weight_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    needs: list[bool],
    ignore_index: int,
    scale: float,
    softcap: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, dx, dW and db; of the last three, those that are not needed are empty.

    An operator, since torch.compile cannot follow the selection of tokens. An operator takes plain
    numbers, so here the `Options` are spelled out.
    """
    options = Options(ignore_index, scale, softcap, chunk)
    rows = min(chunk, len(y))
    head = WeightHead(weight, bias, rows, any(needs), needs[1], needs[2])
    with _without_autocast(x.device.type):
        losses, dx = losses_in_chunks(head, x, y, options)
    return losses, dx, head.dW.to(weight.dtype), head.db.to(weight.dtype)


@_weight_losses.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    needs: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(len(y), dtype=wide)
    dx = torch.empty_like(x) if any(needs) else x.new_empty(0)
    dW = torch.empty_like(weight) if needs[1] else weight.new_empty(0)
    return losses, dx, dW, weight.new_empty(len(weight) if needs[2] else 0)


@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason="linear_cross_entropy calls an output head chunk by chunk"
)
def _through_layer(
    x: Tensor,
    layer: Any,
    bias: Tensor | None,
    y: Tensor,
    options: Options,
    per_token: bool,
) -> Tensor:
    if isinstance(layer, NF4Weight):
        call: Callable[[Tensor], Tensor] = partial(nf4_linear, w=layer, bias=bias)
        parameters = [] if bias is None else [bias]
    else:
        call, parameters = layer, list(layer.parameters())

    enabled = torch.is_grad_enabled()
    parameters = [p for p in parameters if enabled and p.requires_grad]
    _check_frozen(per_token, bool(parameters))

    gradient = enabled and (x.requires_grad or bool(parameters))
    head = LayerHead(call, parameters, gradient)
    with torch.no_grad():
        losses, dx = losses_in_chunks(head, x, y, options)
    known = [(x, dx)] if x.requires_grad else []
    known += [(p, total.to(p.dtype)) for p, total in zip(parameters, head.sums, strict=True)]
    loss = losses if per_token else losses.sum()
    return _attach(loss, known) if head.gradient else loss


class _KnownGradients(torch.autograd.Function):
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


def _attach(loss: Tensor, known: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss as a function of `known`: the inputs that require a gradient, each with it.

    Args:
        loss: a scalar; or the loss of each row, [N], if the only input has N rows.
    """
    if not known:
        return loss
    inputs, gradients = zip(*known, strict=True)
    apply: Any = _KnownGradients.apply
    attached: Tensor = apply(loss, len(inputs), *inputs, *gradients)
    return attached


def _default_chunk(head: Any) -> int:
    """The number of tokens at a time for a weight [V, H], or a module with V `out_features`."""
    shape = getattr(head, "shape", None)
    V = shape[0] if shape else getattr(head, "out_features", 1)
    return max(FEWEST_TOKENS, min(MOST_TOKENS, MOST_LOGITS // max(1, V)))


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


def _check_tensors(hidden: Any, weight: Any, labels: Any, bias: Any) -> None:
    """Raises TypeError or ValueError, with the argument's name, for what cannot be computed."""
    given = {"hidden": hidden, "labels": labels}
    if bias is not None:
        given["bias"] = bias
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a tensor")
    if not isinstance(weight, Tensor | NF4Weight | nn.Module):
        kind = type(weight).__name__
        raise TypeError(f"weight is a {kind}: it must be a tensor, an NF4Weight or a module")

    _check_dtype_and_device("hidden", hidden, hidden.device)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}: they must be torch.int64 (labels.long())")
    if hidden.dim() < 1 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit hidden {tuple(hidden.shape)}: there is one "
            "label for each row of hidden"
        )
    _check_device("labels", labels, hidden.device)

    if isinstance(weight, nn.Module):
        if bias is not None:
            raise ValueError("bias: a head that is a module has its own")
        return
    if len(weight.shape) != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}: hidden "
            "must be [..., H], the weight [V, H]"
        )
    _check_dtype_and_device("weight", weight, hidden.device)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {tuple(bias.shape)} must be [V] = [{weight.shape[0]}]")
        _check_dtype_and_device("bias", bias, hidden.device)


def _check_dtype_and_device(name: str, tensor: Tensor | NF4Weight, device: torch.device) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}: it must be one of {DTYPES}")
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor | NF4Weight, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} on {tensor.device}, hidden on {device}: move both to one device")


def _check_options(
    ignore_index: Any,
    reduction: Any,
    scale: Any,
    softcap: Any,
    chunk: Any,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: must be one of {', '.join(REDUCTIONS)}")
    if not isinstance(ignore_index, int) or ignore_index not in _INT64:
        raise ValueError(f"ignore_index={ignore_index!r}: must be a whole number of 64 bits")
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: must be a finite number")
    is_cap = isinstance(softcap, int | float) and 0 < softcap < math.inf
    if softcap is not None and not is_cap:
        raise ValueError(f"softcap={softcap!r}: must be a positive number, or None for no cap")
    is_count = isinstance(chunk, int) and chunk >= 1 and chunk in _INT64
    if chunk is not None and not is_count:
        raise ValueError(f"chunk={chunk!r}: must be a whole number of tokens, at least 1")


def _check_frozen(per_token: bool, head_requires_grad: bool) -> None:
    if per_token and head_requires_grad:
        raise ValueError(
            'reduction="none": the gradient of the head is a sum over tokens. Use "sum" or "mean", '
            "or freeze the head"
        )
