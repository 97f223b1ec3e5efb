"""Checks that stop a run before it wastes time: adapters without a gradient, NaN and infinity."""

import math

from torch import nn

from minilora.surgery import audit
from minilora.training.batches import Picked

MOST_NAMES_SHOWN = 8


def check_finite(value: float, what: str, step: int, picked: Picked) -> None:
    """Raises FloatingPointError, which names the examples, if a value is NaN or infinite.

    Args:
        value: the value to check.
        what: what to call it.
        step: the optimizer step (0, 1, ...) that has not been taken yet.
        picked: the examples that the value was computed from.
    """
    if math.isfinite(value):
        return

    examples = []
    for i, example in picked:
        tokens = ", ".join(map(str, example.ids[:8]))
        examples.append(f"example {i} ({example.where or 'ids'}: {tokens}, ...)")
    raise FloatingPointError(
        f"step {step + 1}: {what} is {value}. The parameters are those after step {step}; lower "
        "the learning rate, or check the examples of the batch (with their first token ids): "
        f"{'; '.join(examples)}."
    )


def check_gradients(model: nn.Module) -> None:
    """Raises ValueError, which names the adapters, if some got no gradient in the first backward.

    Such an adapter would never learn.
    """
    missing = audit(model)
    if not missing:
        return

    shown = ", ".join(missing[:MOST_NAMES_SHOWN])
    if len(missing) > MOST_NAMES_SHOWN:
        shown += f" and {len(missing) - MOST_NAMES_SHOWN} more"
    raise ValueError(
        f"adapters got no gradient in the first step and would never learn ({len(missing)} of "
        f"them): {shown}. Likely reasons: reentrant gradient checkpointing (the input of a frozen "
        "base requires no gradient); a fused loss that reads lm_head.weight and bypasses the "
        "layer; a part of the model that this data does not reach, or whose output is detached. "
        "Exclude those layers with targets, or fix the path of the gradient"
    )
