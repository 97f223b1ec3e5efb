"""The tensors of a checkpoint for which a model has no place.

transformers drops them and says so in its log. A classifier does without a language model's head on
purpose. The biases of another architecture, or the layers above `num_hidden_layers`, mean that the
config is not the checkpoint's, and that the model would compute something else.
"""

import copy
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any


def unplaced_tensors(model: Any, conversions: list[Any], stored: Collection[str]) -> list[str]:
    """Returns the names of stored tensors that belong in a block of the model that lacks them.

    What lies right below the model, below a transformers model inside it, or in a head other than a
    language model's, is another task's. That is left to transformers, and so is what a model's
    class ignores by name.

    Args:
        model: a transformers model, which may be on the meta device.
        conversions: those from stored names to the model's, as transformers applies them.
        stored: the names of a checkpoint's tensors.
    """
    names = _unplaced(model, conversions, stored)
    # As an object: transformers takes out of it what it ignores.
    found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names.values()))
    model._adjust_missing_and_unexpected_keys(found)
    # Masks and the like, which older versions stored and models compute today.
    computed = {name for name, _ in model.named_buffers()}
    return [
        key
        for key, name in names.items()
        if name in found.unexpected_keys - computed and _is_inside_block(model, name)
    ]


def _unplaced(model: Any, conversions: list[Any], stored: Collection[str]) -> dict[str, str]:
    """Stored name -> the name that the model would have to have, of tensors without a place."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    # Conversions remember that they were used, and are applied again when the model is saved.
    copies = copy.deepcopy(conversions)
    renamings = [c for c in copies if isinstance(c, WeightRenaming)]
    converters = [c for c in copies if isinstance(c, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    names: dict[str, str] = {}
    # In transformers' order: some renamings depend on names before.
    for key in sorted(stored, key=dot_natural_key):
        name, _ = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key not in own:
            names[key] = name
    return names


def _is_inside_block(model: Any, name: str) -> bool:
    """Whether the innermost module on the way to a parameter computes what any task needs."""
    from transformers import PreTrainedModel

    module = model
    for part in name.split("."):
        child = dict(module.named_children()).get(part)
        if child is None:
            break
        module = child
    if isinstance(module, PreTrainedModel):
        return False
    return module is model.get_output_embeddings() or module in model.base_model.modules()


def is_new_head(model: Any, name: str) -> bool:
    """Whether a parameter is a new task's head, which starts at random, as a classifier's.

    The head of a language model is no such one.
    """
    base = model.base_model_prefix
    if model.base_model is model or name.startswith(f"{base}."):
        return False
    output = model.get_output_embeddings()
    own = output.parameters() if output is not None else ()
    return all(p is not model.get_parameter_or_buffer(name) for p in own)
