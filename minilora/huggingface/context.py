"""How long a sequence a model was made for, from its config alone."""

import math
from typing import Any

# The names under which configs state it. Most have the first.
_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)


def context_length(model_config: Any) -> int | None:
    """Returns the largest number of tokens in a sequence; None: the config does not say.

    Rotary positions may be scaled: a model trained on `original_max_position_embeddings` positions
    is then made for `factor` times as many.

    Args:
        model_config: a config of transformers, which may nest that of the text model.
    """
    text = getattr(model_config, "get_text_config", lambda: model_config)()
    stated = (getattr(text, name, None) for name in _NAMES)
    length = next((n for n in stated if isinstance(n, int) and n > 0), None)
    if length is None:
        return None

    # One set of parameters, or one for each kind of attention layer.
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict):
        return length
    nested = [values for values in rope.values() if isinstance(values, dict)]
    return max(_scaled(length, values) for values in nested or [rope])


def _scaled(length: int, rope: dict[str, Any]) -> int:
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        return length
    trained = original if isinstance(original, int) else length
    return max(length, int(trained * factor))


def check_max_length(model_config: Any, max_length: int, model: str) -> None:
    """Raises ValueError if sequences of this length are longer than the model's context.

    Beyond it the positions are ones that the model never saw. It computes something, or fails with
    an index that is out of range.

    Args:
        model_config: see `context_length`.
        max_length: maximum number of tokens per sequence.
        model: what the error calls the model.
    """
    context = context_length(model_config)
    if context is not None and max_length > context:
        raise ValueError(
            f"max_length={max_length} is more than the context of {model}, {context} tokens: set "
            f"max_length={context} (--max-length {context}) or less"
        )
