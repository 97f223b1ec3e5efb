"""Whether an adapter's files fit a model and agree with each other, before anything is changed."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.files.adapter_folder import SavedAdapter
from minilora.files.base import Base, base_of
from minilora.files.peft_values import ConfigReader
from minilora.files.text import shown
from minilora.lora import LoRA

Shapes = Mapping[str, list[int]]


def mismatches(
    layers: Collection[str],
    saved: SavedAdapter,
    config: ConfigReader,
    adapters: Mapping[str, LoRA],
    existing: Mapping[str, LoRA],
) -> list[str]:
    """Where the files disagree with each other, or their adapters do not fit the model.

    Args:
        layers: the names of the model's linear layers.
        saved: what the files hold.
        config: what the config says.
        adapters: the adapters made of the files.
        existing: those whose place they will take, or none.
    """
    found = []
    for name in saved.layers:
        if name not in layers:
            found.append(f"the model has no linear layer {shown(name)}")
        elif existing and name not in existing:
            found.append(f"{shown(name)} has no adapter in the model")
        else:
            found += _tensor_mismatches(name, saved, adapters[name], existing.get(name))
            found += _contradictions(name, saved, config)

    for name in sorted(existing.keys() - saved.layers.keys()):
        found.append(f"the file has nothing for {name}, which has an adapter")
    for name in sorted(set(layers) - saved.layers.keys() - existing.keys()):
        if config.names_targets() and config.targets(name):
            found.append(f"the file has nothing for {name}, which target_modules means")
    return found


def _tensor_mismatches(name: str, saved: SavedAdapter, made: LoRA, there: LoRA | None) -> list[str]:
    """Where a layer's tensors, or the class of its adapter, are not those of the model."""
    shapes, expected = _shapes(saved.layers[name]), _shapes(made.tensors())
    if shapes != expected:
        return [f"{name}: the file has {_describe(shapes)}, the model {_describe(expected)}"]
    if there is not None and type(made) is not type(there):
        kinds = f"the file has a {type(made).__name__}, the model a {type(there).__name__}"
        return [f"{name}: {kinds} (adapter= says which to read)"]
    if any(p.is_meta for adapter in (made, there or made) for p in adapter.parameters()):
        return [f"{name} is on the meta device and has no values: load the model first"]
    tensors = made.tensors()
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return [f"{name}: a value of the file is infinite in {tensors['lora_A.weight'].dtype}"]
    return []


def _contradictions(name: str, saved: SavedAdapter, config: ConfigReader) -> list[str]:
    """Where the config says something else of a layer than the tensors."""
    if config.rank(name) != saved.rank(name):
        ranks = f"r={config.rank(name)} in the config and r={saved.rank(name)} in the tensors"
        return [f"{name} has {ranks}"]
    if config.names_targets() and not config.targets(name):
        return [f"the file has an adapter for {name}, which target_modules does not mean"]
    return []


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {end: list(tensor.shape) for end, tensor in tensors.items()}


def _describe(shapes: Shapes) -> str:
    """A [8, 64] and B [32, 8]."""
    return " and ".join(
        f"{shown(end.removeprefix('lora_').removesuffix('.weight'))} {shape}"
        for end, shape in shapes.items()
    )


def check_none(problems: list[str]) -> None:
    """Raises ValueError with the first problems and the number of the others, if there are any."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("; ".join(problems[:5]) + more)


def check_base(folder: Path, base: Base, layers: Mapping[str, Any]) -> None:
    """Raises ValueError unless the layers are in the formats that the adapter was trained on."""
    now = base_of(layers)
    for name in layers:
        if now.format(name) != base.format(name):
            raise ValueError(
                f"{folder} was trained on another base: {name} was {base.format(name)}, and is "
                f"{now.format(name)} in this model. Quantize the model as it was (or do not), or "
                "pass other_base=True"
            )
