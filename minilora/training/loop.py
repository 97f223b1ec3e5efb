"""The training loop: ordinary PyTorch, one optimizer step after another.

`train` yields a `Step` after each optimizer step. Whatever accompanies the training (progress bar,
metrics, checkpoints) consumes these steps from outside: see callbacks.py.

To add a metric, add a field to `Step` and its value at the end of `train`. metrics.jsonl, the
checkpoints and `Result.history` contain every field.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from torch import nn

from minilora.huggingface.bypassed import check_gradients, refuse_bypassed
from minilora.optim.adamw import PagedAdamW
from minilora.optim.retry import retry_on_oom
from minilora.surgery import adapter_parameters
from minilora.training.batches import Picked, micro_batches, move_to, pick_examples
from minilora.training.checks import check_finite
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example
from minilora.training.loss import token_losses
from minilora.training.packing import check_packing, without_cache

WARMUP_FRACTION = 0.03


@dataclass(frozen=True)
class Step:
    """The metrics of one optimizer step; a line of metrics.jsonl.

    Attributes:
        step: the number of the step, counted from 1.
        loss: mean loss (nats per completion token) before the update.
        lr: the learning rate.
        grad_norm: norm of all gradients together, before clipping.
        learned: number of tokens in the loss.
        tokens: number of tokens, without padding.
        seconds: wall time.
        eval_loss: mean loss (nats per completion token) on the hold-out after the update, whose
            time is not counted; None: it was not evaluated.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    learned: int
    tokens: int
    seconds: float
    eval_loss: float | None = None


def schedule(step: int, steps: int) -> float:
    """Returns the fraction of the peak learning rate at step 0, 1, ...

    Linear warm-up over 3 % of the steps (at least one), then half a cosine down to zero.
    """
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> PagedAdamW:
    """Returns AdamW over the adapters' parameters."""
    return PagedAdamW(adapter_parameters(model), lr=config.lr, weight_decay=config.weight_decay)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: FinetuneConfig,
    *,
    pad: int,
    optimizer: PagedAdamW | None = None,
    done: int = 0,
) -> Iterator[Step]:
    """Trains an injected model and yields a `Step` after each optimizer step.

    Only the adapters' parameters change. If forward or backward runs out of device memory, it is
    run again with the optimizer's states moved to the host.

    Args:
        model: a causal language model with adapters.
        examples: the training data.
        config: learning rate, batch size, number of steps, seed.
        pad: the id of the padding token.
        optimizer: default: `make_optimizer`.
        done: number of steps already taken. Given the model, the optimizer and the random states
            as they were then, `train` continues bit for bit.

    Raises:
        ValueError: an adapter got no gradient in the first step; or `packing` is on and the model
            cannot take packed sequences.
        TypeError: the model reads the weight of an adapted layer without calling the layer.
        FloatingPointError: a loss or a gradient is NaN or infinite. The message names the batch;
            the parameters are those before the step.
    """
    parameters = adapter_parameters(model)
    optimizer = optimizer or make_optimizer(model, config)
    steps = config.steps_for(len(examples))
    if config.packing:
        check_packing(model)
    model.train()

    for step in range(done, steps):
        start = time.perf_counter()
        lr = config.lr * schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        picked = pick_examples(examples, config, step)
        backward = partial(forward_backward, model, picked, config, step, pad=pad)
        with refuse_bypassed(model) if step == done else nullcontext():
            loss = retry_on_oom(backward, optimizer)
            if step == done:
                check_gradients(model)

        norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
        check_finite(norm, "the norm of the gradients", step, picked)
        optimizer.step()
        optimizer.zero_grad()

        yield Step(
            step=step + 1,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            learned=sum(example.learned for _, example in picked),
            tokens=sum(len(example.ids) for _, example in picked),
            seconds=time.perf_counter() - start,
        )


def forward_backward(
    model: nn.Module, picked: Picked, config: FinetuneConfig, step: int, *, pad: int
) -> float:
    """Accumulates the gradients of a step's examples over micro-batches; returns the mean loss."""
    device = adapter_parameters(model)[0].device

    # The number of learned tokens of the whole step: a token weighs the same in any micro-batch.
    learned = sum(example.learned for _, example in picked)

    total = 0.0
    for micro, batch in micro_batches(picked, config, pad):
        with without_cache(model):
            loss = token_losses(model, move_to(device, batch)) / learned
        if not loss.requires_grad:
            # No adapter has a gradient. The error of `backward` would name none of them.
            check_gradients(model)
        loss.backward()  # type: ignore[no-untyped-call]

        check_finite(loss.item(), "the loss", step, micro)
        total += loss.item()
    return total
