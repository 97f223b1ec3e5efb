"""A check that stops a run before it wastes time: NaN and infinity."""

import math

from minilora.training.batches import Picked


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
