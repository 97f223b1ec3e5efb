"""The loss of a causal language model without the logits of the whole batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from minilora.huggingface.output_head import find_output_head, hidden_states
from minilora.losses import linear_cross_entropy
from minilora.sharded import is_sharded


def causal_lm_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Returns the cross-entropy of each token given those before it, as the model's own loss.

    The model runs without its output head; head and loss are computed a chunk of tokens at a time,
    and for those tokens alone whose label is not ignored (`linear_cross_entropy`). An adapter on
    the head takes part.

    Args:
        model: a causal language model from transformers, or a wrapper of one (DDP, torch.compile).
        inputs: the arguments of a forward, without labels.
        labels: int64 [batch, length], as transformers has them: that of a position is its own
            token, and the shift is made here.
        reduction: "mean" or "sum" over the labels that are not ignored.
        ignore_index: the label of tokens that are not learned.

    Raises:
        UnknownHeadError: a ValueError, as of `find_output_head`: use the model's own loss.
        ValueError: as `linear_cross_entropy`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> loss = causal_lm_loss(model, {"input_ids": ids}, labels=ids)
        >>> torch.allclose(loss, model(input_ids=ids, labels=ids).loss)
        True
    """
    head = find_output_head(unwrapped(model))
    hidden = hidden_states(model, head, inputs)

    # The logits at position i predict token i + 1.
    with _gathered(unwrapped(model), head.layer):
        return linear_cross_entropy(
            hidden[:, :-1],
            head.layer,
            labels[:, 1:].to(hidden.device),
            ignore_index=ignore_index,
            reduction=reduction,
            scale=head.scale,
            softcap=head.softcap,
        )


@contextmanager
def _gathered(model: Any, layer: nn.Module) -> Iterator[None]:
    """Inside the block the output head of a sharded model is whole.

    A forward pass that is followed by a backward leaves it so; after any other one it is freed.
    """
    if not any(map(is_sharded, layer.parameters())):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and not hasattr(model, "get_output_embeddings"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
