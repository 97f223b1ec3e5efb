"""Gradient checkpointing: less memory for activations, at the price of a second forward pass.

Not to be confused with the checkpoints of a run, which are files (minilora/training).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside the block, training stores only the inputs of the model's transformer blocks.

    Everything else is recomputed in the backward pass: less memory for about a third more time.
    Losses and gradients are bit-identical, with dropout too. No parameter changes its dtype, and
    the base may be frozen.

    Args:
        model: a transformers model.

    Raises:
        ValueError: the model does not support gradient checkpointing.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> model = LlamaForCausalLM(config).train()
        >>> with gradient_checkpointing(model):
        ...     loss = model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss
        ...     loss.backward()
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} does not support gradient checkpointing: "
            "leave it out with checkpointing=False"
        )
    enable, disable = _switches(model)
    config: Any = model.config
    use_cache = getattr(config, "use_cache", None)

    was_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    try:
        # Reentrant checkpointing passes no gradient to a block whose input needs none, which is
        # the case after a frozen embedding.
        enable({"use_reentrant": False})

        # A hook for reentrant checkpointing, which torch.compile cannot trace.
        model.disable_input_require_grads()  # type: ignore[operator]

        # The cache of keys and values is for generation; transformers warns if it has to ignore it.
        config.use_cache = False
        yield
    finally:
        config.use_cache = use_cache
        if not was_on:
            disable()


def _switches(model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """transformers' functions that enable and disable it, which were renamed in version 5."""
    if hasattr(model, "activation_checkpointing_enable"):
        return model.activation_checkpointing_enable, model.activation_checkpointing_disable
    return model.gradient_checkpointing_enable, model.gradient_checkpointing_disable
