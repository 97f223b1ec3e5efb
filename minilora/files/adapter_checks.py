"""Whether an adapter's files fit a model and agree with each other, before anything is changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files.adapter_folder import SavedAdapter
from minilora.files.base import Base, base_of
from minilora.files.names import canonical_name
from minilora.files.peft_values import ConfigReader, saves
from minilora.files.text import shown
from minilora.lora import LoRA, LoRALayer
from minilora.surgery import trained_whole
from minilora.targets import linear_layers

Shapes = Mapping[str, list[int]]


def mismatches(
    model: nn.Module,
    saved: SavedAdapter,
    config: ConfigReader,
    adapters: Mapping[str, LoRA],
    existing: Mapping[str, LoRA],
) -> list[str]:
    """Where the files disagree with each other, or do not fit the model.

    Args:
        model: the model, not changed so far.
        saved: what the files hold.
        config: what the config says.
        adapters: the adapters made of the files.
        existing: those that they will overwrite, or none.
    """
    layers = {canonical_name(path) for path in linear_layers(model)}
    found = []
    for name in saved.layers:
        if name not in layers:
            found.append(f"the model has no linear layer {shown(name)}")
        elif existing and name not in existing:
            found.append(f"{shown(name)} has no adapter in the model")
        else:
            found += _tensor_mismatches(
                name, saved, adapters[name], existing.get(name, adapters[name])
            )
            found += _contradictions(name, saved, config)

    for name in sorted(existing.keys() - saved.layers.keys()):
        found.append(f"the file has nothing for {name}, which has an adapter")
    for name in sorted(layers - saved.layers.keys() - existing.keys()):
        # PEFT gives no adapter to what it saves as a whole.
        if config.names_targets() and config.targets(name) and not config.saves(name + ".weight"):
            found.append(f"the file has nothing for {name}, which target_modules means")
    return found + _missing_whole(model, saved, config, existing)


def _tensor_mismatches(name: str, saved: SavedAdapter, made: LoRA, there: LoRA) -> list[str]:
    """Where a layer's tensors, or the class of its adapter, are not those of the model."""
    shapes, expected = _shapes(saved.layers[name]), _shapes(there.tensors())
    if shapes != expected:
        return [f"{name}: the file has {_describe(shapes)}, the model {_describe(expected)}"]
    if type(made) is not type(there):
        kinds = f"the file has a {type(made).__name__}, the model a {type(there).__name__}"
        return [f"{name}: {kinds} (adapter= says which to read)"]
    tensors = made.tensors()
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return [f"{name}: a value of the file is infinite in {tensors['lora_A.weight'].dtype}"]
    if any(parameter.is_meta for parameter in there.tensors().values()):
        return [f"{name} is on the meta device and has no values: load the model first"]
    return []


def _contradictions(name: str, saved: SavedAdapter, config: ConfigReader) -> list[str]:
    """Where the config says something else of a layer than the tensors."""
    if config.rank(name) != saved.rank(name):
        ranks = f"r={config.rank(name)} in the config and r={saved.rank(name)} in the tensors"
        return [f"{name} has {ranks}"]
    if config.names_targets() and not config.targets(name):
        return [f"the file has an adapter for {name}, which target_modules does not mean"]
    return []


def _missing_whole(
    model: nn.Module, saved: SavedAdapter, config: ConfigReader, existing: Mapping[str, LoRA]
) -> list[str]:
    """Parameters that the config or the model trains as a whole, and the file does not have."""
    found = []
    for module in config.modules_to_save:
        # PEFT names the usual heads, whether the model has them or not.
        here = any(saves(module, name) for name in _parameters(model))
        if here and not any(saves(module, name) for name in saved.whole):
            found.append(f"the file has nothing for {shown(module)}, which modules_to_save names")
    trained = {canonical_name(path) for path in trained_whole(model)} if existing else set()
    for name in sorted(trained - saved.whole.keys()):
        found.append(f"the file has nothing for {name}, which the model trains as a whole")
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {end: list(tensor.shape) for end, tensor in tensors.items()}


def _describe(shapes: Shapes) -> str:
    """A [8, 64] and B [32, 8]."""
    return " and ".join(
        f"{shown(end.removeprefix('lora_').removesuffix('.weight'))} {shape}"
        for end, shape in shapes.items()
    )


def whole_values(
    model: nn.Module, saved: SavedAdapter, config: ConfigReader
) -> tuple[list[tuple[nn.Parameter, Tensor]], list[str]]:
    """The parameters that were trained as a whole, with values to be copied; and what is wrong.

    Wrong is one that is not in the model, that the config does not name, that has another shape, or
    that has a value which the model's parameter cannot take.
    """
    parameters = _parameters(model)
    adapters = [m.adapters for m in model.modules() if isinstance(m, LoRALayer)]
    ours = {id(p) for held in adapters for p in held.parameters()}

    values: dict[int, tuple[nn.Parameter, Tensor]] = {}
    found = []
    for name, tensor in saved.whole.items():
        problem = _parameter_mismatch(name, tensor, parameters, config, ours)
        if problem is None:
            p = parameters[name]
            value = tensor.to(device=p.device, dtype=p.dtype, copy=True)
            if not bool(value.isfinite().all()):
                problem = f"{name}: the file has NaN, or what is infinite in {p.dtype}"
            elif not torch.equal(values.setdefault(id(p), (p, value))[1], value):
                problem = f"{name} is shared, and the file has two values for it"
        if problem is not None:
            found.append(problem)
    return list(values.values()), found


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by each of its canonical names."""
    named = model.named_parameters(remove_duplicate=False)
    return {canonical_name(path): p for path, p in named}


def _parameter_mismatch(
    name: str,
    tensor: Tensor,
    parameters: Mapping[str, nn.Parameter],
    config: ConfigReader,
    ours: set[int],
) -> str | None:
    if name not in parameters:
        return f"the model has no parameter {shown(name)}"
    p = parameters[name]
    if id(p) in ours:
        return f"{name} is a parameter of an adapter, not of the model"
    if not p.is_floating_point():
        return f"{name} is a part of a quantized weight, and cannot be trained as a whole"
    if not config.saves(name):
        return f"the file has {name}, which modules_to_save does not name"
    if p.shape != tensor.shape:
        return f"{name}: the file has {list(tensor.shape)}, the model {list(p.shape)}"
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        return f"{name}: the file has {tensor.dtype}"
    if p.is_meta:
        return f"{name} is on the meta device and has no values: load the model first"
    return None


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
