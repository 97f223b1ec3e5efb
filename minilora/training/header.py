"""What a run is going to do, shown before it does it: the lines of the header, and the time.

The report repeats the lines.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilora.files.text import shown
from minilora.reports.formatting import format_bytes
from minilora.reports.planning import Plan
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example
from minilora.training.hold_out import count_trained_on
from minilora.training.loop import Step
from minilora.training.progress import announce, format_duration
from minilora.training.tensorboard import TENSORBOARD, EventFormat

# A training step costs so many times its forward pass. The base is frozen, so the backward pass
# computes no gradients of its weights; but it dequantizes them again and computes those of A and B,
# and clipping and the optimizer come on top. Measured on the demo, in NF4 on two CPU cores: 70 s,
# where three forward passes per step take 72 s. Gradient checkpointing adds a fourth.
STEP_COST = 3
STEP_COST_CHECKPOINTING = 4


def describe_run(
    config: FinetuneConfig, plan: Plan, training: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, str]:
    """Returns what a run trains, on what, for how long, and in how much memory.

    Args:
        config: the settings.
        plan: what `minilora.plan` says of the model, quantized if it is to be.
        training: the training examples.
        held_out: the examples of the hold-out.
    """
    base = "in NF4" if plan.bytes["quantized"] else "dense"
    alpha = 2 * config.r if config.alpha is None else config.alpha
    share = f"{100 * plan.trainable / plan.parameters:.2f} %"
    held = f"{len(held_out):,} held out"
    if config.eval_data is not None:
        held = f"{len(held_out):,} of {shown(config.eval_data)} held out"
        if known := count_trained_on(training, held_out):
            held += f" ({known:,} of them also in the training data)"

    steps, per_step = config.steps_for(len(training)), config.batch_size * config.grad_accum
    epochs = f"{steps * per_step / len(training):.3g}"
    weights = plan.bytes["quantized"] + plan.bytes["dense"]
    return {
        "model": f"{shown(config.model)}, {plan.parameters:,} parameters, {base}",
        "adapters": f"r={config.r}, alpha={alpha:g} in {len(plan.rows)} layers",
        "trainable": f"{plan.trainable:,} parameters ({share})",
        "data": f"{shown(config.data)}: {len(training):,} examples to train on, {held}",
        "steps": (
            f"{_counted(steps, 'step')} of {_counted(per_step, 'example')} each "
            f"({epochs} {'epoch' if epochs == '1' else 'epochs'})"
        ),
        "memory": (
            f"{format_bytes(plan.total_bytes)} for weights, adapters, gradients and optimizer "
            f"states (the base: {format_bytes(weights)}), plus activations"
        ),
    }


def describe_processes(config: FinetuneConfig, plan: Plan, count: int) -> dict[str, str]:
    """Returns what each of several processes has of a step and of the model; {} for one alone.

    Args:
        config, plan: see `describe_run`.
        count: number of processes.
    """
    if count == 1:
        return {}
    share = _counted(config.batch_size * config.grad_accum // count, "example")
    part = "the whole model (DDP)"
    if config.shard:
        held = sum(plan.on_gpus(count).sharded.held.values())
        part = f"a part of the model (FSDP2): {format_bytes(held)}, including what it gathers"
    return {"processes": f"{count}, each with {share} of a step and {part}"}


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def describe_time(
    config: FinetuneConfig,
    training: Sequence[Example],
    held_out: Sequence[Example],
    history: Sequence[Step],
    evaluation: float | None,
    checkpointing: bool,
) -> str:
    """Returns how long the remaining steps will take, and how that is known.

    Args:
        config, training, held_out: see `describe_run`.
        history: the steps before a resume.
        evaluation: seconds of an evaluation of the hold-out; None: it was not measured.
        checkpointing: whether gradient checkpointing is on.
    """
    left = config.steps_for(len(training)) - len(history)
    if history:
        per_step = sum(step.seconds for step in history) / len(history)
        duration = format_duration(left * per_step)
        return f"the remaining steps take about {duration} (at the speed of those so far)"
    if evaluation is None:
        return "a time estimate follows with the first step (no hold-out to time)"

    per_token = evaluation / _tokens(held_out)
    per_example = _tokens(training) / len(training) * per_token
    cost = STEP_COST_CHECKPOINTING if checkpointing else STEP_COST
    expected = left * config.batch_size * config.grad_accum * per_example * cost
    if config.eval_every:
        expected += -(-left // config.eval_every) * evaluation
    return f"training takes about {format_duration(expected)} (at the speed of the evaluation)"


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)


def where_to_watch(out: Path, tensorboard: EventFormat | None) -> dict[str, str]:
    """Returns the command that shows the curves while they grow, if TensorBoard writes them."""
    if tensorboard is None:
        return {}
    return {"watch": f"tensorboard --logdir {shlex.quote(shown(out / TENSORBOARD, 1000))}"}


def print_header(lines: Mapping[str, str]) -> None:
    """Prints one aligned line for each name."""
    width = max(map(len, lines))
    announce("\n".join(f"{name:<{width}}  {text}" for name, text in lines.items()))
