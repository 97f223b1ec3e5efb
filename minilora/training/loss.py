"""The loss of a causal language model on the tokens to be learned, and its mean over a hold-out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.distributed.processes import Processes
from minilora.huggingface.causal_loss import causal_lm_loss
from minilora.huggingface.output_head import UnknownHeadError, find_output_head
from minilora.training.batches import PAD_TO_MULTIPLE, collate, move_to
from minilora.training.data import IGNORE, Example


def token_losses(model: nn.Module, batch: dict[str, Tensor], *, other_terms: bool = True) -> Tensor:
    """Returns the sum of -log p(token | the tokens before it) over the learned tokens, in float32.

    Logits are computed for the learned tokens alone, and for a chunk of them at a time. A model
    whose output head is not recognised computes its own loss (`explain_loss`).

    Args:
        model: a causal language model from transformers.
        batch: see `collate`; whatever it holds beside the labels is passed to the model.
        other_terms: keep the other terms of a model's own loss, such as the router's in a mixture
            of experts. They are trained, and are no part of an evaluation.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    try:
        return causal_lm_loss(model, inputs, labels, reduction="sum", ignore_index=IGNORE)
    except UnknownHeadError:
        learned = labels[:, 1:] != IGNORE

    if other_terms:
        # Its own loss is a mean over the learned tokens.
        loss: Tensor = model(**inputs, labels=labels).loss
        return loss.float() * learned.sum()
    logits = model(**inputs).logits[:, :-1][learned]
    return F.cross_entropy(logits.float(), labels[:, 1:][learned], reduction="sum")


def explain_loss(model: nn.Module) -> str | None:
    """Returns one line that says why a model computes its own loss; None: it does not."""
    try:
        find_output_head(model)
    except UnknownHeadError as reason:
        kind = type(model).__name__
        return f"{kind} computes its own loss, with the logits of all tokens at once: {reason}"
    return None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    pad: int = 0,
    processes: Processes | None = None,
) -> float:
    """Returns the mean loss over all examples (nats per completion token).

    The model is left in the mode, training or evaluation, that it was in. Several processes share
    the batches; the result is that of one, bit for bit, if their models are.

    Args:
        model: a causal language model.
        examples: what to measure it on.
        batch_size: number of sequences per forward pass.
        pad: the id of the padding token.
        processes: the processes of the run. Default: this one alone.
    """
    processes = processes or Processes()
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device

    # Similar lengths together: less padding.
    ordered = sorted(examples, key=lambda example: len(example.ids))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    losses = []
    for first in range(0, len(batches), processes.size):
        # Every process makes the same number of forward passes, the last one again if need be.
        chosen = batches[min(first + processes.rank, len(batches) - 1)]
        batch = move_to(device, collate(chosen, pad, PAD_TO_MULTIPLE))
        losses.append(token_losses(model, batch, other_terms=False).item())
    model.train(was_training)

    # Not in the collective, which waits no longer than its timeout.
    processes.share("the hold-out is evaluated")
    with processes.explained("the losses on the hold-out are exchanged"):
        found = processes.exchange(*losses)
    # In the order of the batches: the first of each process, the second of each, and so on.
    in_order = [loss for together in zip(*found, strict=True) for loss in together]
    total = 0.0
    for loss in in_order[: len(batches)]:
        total += loss
    return total / sum(example.learned for example in examples)
