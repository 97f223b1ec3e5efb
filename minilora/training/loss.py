"""The loss of a causal language model on the tokens to be learned, and its mean over a hold-out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.training.batches import PAD_TO_MULTIPLE, collate, move_to
from minilora.training.data import IGNORE, Example


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the sum of -log p(token | the tokens before it) over the learned tokens, in float32.

    Args:
        model: a causal language model from transformers.
        batch: see `collate`.
    """
    # The logits at position i predict token i + 1.
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE

    with _head_sees_only(learned, model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    # A model without an output head to hook computes the logits of every token.
    if logits.dim() == 3:
        logits = logits[:, :-1][learned]
    return F.cross_entropy(logits.float(), labels[learned], reduction="sum")


@contextmanager
def _head_sees_only(learned: Tensor, model: nn.Module) -> Iterator[None]:
    """Inside the block the output head gets the hidden states of the learned tokens alone.

    They are [learned, hidden] instead of [batch, length, hidden]. With a vocabulary of 49,152 the
    logits are the largest tensor of a small model's step, and most tokens are not learned.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        return (hidden[:, :-1][learned], *rest)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 8, pad: int = 0
) -> float:
    """Returns the mean loss over all examples (nats per completion token).

    The model is left in the mode, training or evaluation, that it was in.

    Args:
        model: a causal language model.
        examples: what to measure it on.
        batch_size: number of sequences per forward pass.
        pad: the id of the padding token.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device

    # Similar lengths together: less padding.
    ordered = sorted(examples, key=lambda example: len(example.ids))
    total = 0.0
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad, PAD_TO_MULTIPLE)
        total += token_losses(model, move_to(device, batch)).item()

    model.train(was_training)
    return total / sum(example.learned for example in examples)
