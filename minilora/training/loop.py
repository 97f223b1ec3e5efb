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

from torch import Tensor, nn

from minilora.distributed.processes import Processes
from minilora.huggingface.bypassed import check_gradients, refuse_bypassed
from minilora.optim.adamw import PagedAdamW
from minilora.optim.retry import retry_on_oom
from minilora.sharded import full
from minilora.surgery import adapter_parameters
from minilora.training.batches import Picked, forward_passes, make_batch, move_to, pick_examples
from minilora.training.checks import check_finite
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example
from minilora.training.interrupts import StopRequest
from minilora.training.loss import token_losses
from minilora.training.packing import check_packing, without_cache
from minilora.training.passes import ForwardPasses
from minilora.training.random_state import seed_step

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
    processes: Processes | None = None,
    stop: StopRequest | None = None,
) -> Iterator[Step]:
    """Trains an injected model and yields a `Step` after each optimizer step.

    Only the adapters' parameters change. If forward or backward runs out of device memory, it is
    run again with the optimizer's states moved to the host.

    Several processes share the examples of each step, and every one yields the same `Step`. None of
    them runs a step again, in which the others would take no part.

    Args:
        model: a causal language model with adapters.
        examples: the training data.
        config: learning rate, batch size, number of steps, seed.
        pad: the id of the padding token.
        optimizer: default: `make_optimizer`.
        done: number of steps already taken. Given the model, the optimizer and the random states
            as they were then, `train` continues bit for bit.
        processes: the processes of the run. Default: this one alone.
        stop: the processes agree in each step whether one of them was asked to stop.

    Raises:
        ProcessError: another process failed, was killed or hangs.
        ValueError: an adapter got no gradient in the first step; or `packing` is on and the model
            cannot take packed sequences.
        TypeError: the model reads the weight of an adapted layer without calling the layer.
        FloatingPointError: a loss or a gradient is NaN or infinite. The message names the batch;
            the parameters are those before the step.
    """
    parameters = adapter_parameters(model)
    optimizer = optimizer or make_optimizer(model, config)
    processes, stop = processes or Processes(), stop or StopRequest()
    steps = config.steps_for(len(examples))
    if config.packing:
        check_packing(model)
    forward = ForwardPasses(model, _loss, processes)
    model.train()

    for step in range(done, steps):
        start = time.perf_counter()
        lr = config.lr * schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        picked = pick_examples(examples, config, step)
        backward = partial(
            forward_backward,
            model,
            picked,
            config,
            step,
            pad=pad,
            forward=forward,
            processes=processes,
        )
        if processes.size > 1:
            seed_step(config.seed, step, processes.rank)
        with (
            processes.explained(f"step {step + 1}"),
            refuse_bypassed(model) if step == done else nullcontext(),
        ):
            share = retry_on_oom(backward, optimizer) if processes.size == 1 else backward()
            if step == done:
                check_gradients(model)
            found = processes.exchange(share, stop.signal or 0)
        loss = sum(share for share, _ in found)
        stop.agreed = int(max(signal for _, signal in found)) or None

        norm = full(nn.utils.clip_grad_norm_(parameters, config.clip)).item()
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
    model: nn.Module,
    picked: Picked,
    config: FinetuneConfig,
    step: int,
    *,
    pad: int,
    forward: ForwardPasses | None = None,
    processes: Processes | None = None,
) -> float:
    """Accumulates the gradients of a step's examples over micro-batches; returns the mean loss.

    Of several processes, each returns its part of the mean loss: the sum is that of the step. The
    gradients are those of the whole step in every process.
    """
    processes = processes or Processes()
    forward = forward or ForwardPasses(model, _loss, processes)
    device = adapter_parameters(model)[0].device

    # The number of learned tokens of the whole step: a token weighs the same in any micro-batch.
    # The gradients of several processes are averaged, and their sum is wanted.
    learned = sum(example.learned for _, example in picked) / processes.size

    total = 0.0
    passes = forward_passes(picked, config, rank=processes.rank, ranks=processes.size)
    for number, rows in enumerate(passes, start=1):
        batch = move_to(device, make_batch(rows, config, pad))
        with forward.accumulating(last=number == len(passes)):
            loss = forward(batch) / learned
            if not loss.requires_grad:
                # No adapter has a gradient. The error of `backward` would name none of them.
                check_gradients(model)
            loss.backward()  # type: ignore[no-untyped-call]

        micro = [pair for row in rows for pair in row]
        check_finite(loss.item(), "the loss", step, micro)
        total += loss.item() / processes.size
    return total


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with without_cache(model):
        return token_losses(model, batch)
