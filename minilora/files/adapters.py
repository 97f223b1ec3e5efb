"""save_adapter and load_adapter: adapters as PEFT's two files, without peft.

Loading is strict. A key that is missing, unexpected or misshapen, a config option that minilora
does not support, an adapter that would change nothing: each raises an error with names, because
each has been a silent wrong result in other libraries.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files.adapter_folder import WEIGHTS, SavedAdapter, read_adapter, write_adapter
from minilora.files.names import canonical_name
from minilora.files.peft_config import alpha_of, dropout_of, make_config
from minilora.lora import LoRA
from minilora.surgery import Model, attach, check_bare, trained_whole
from minilora.targets import adapted_layers, adapter_names, linear_layers


def save_adapter(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Writes an adapter, and what `train_also` trained, as a folder that PEFT reads too.

    The write is atomic: a full disk or a kill leaves the old files. The weights carry a hash of
    their config and one of themselves.

    Args:
        model: an injected model. Adapters are written in float32, parameters of `train_also` in
            the dtype that they have.
        path: the folder; it is created if it does not exist.
        name: which adapter. Default: the only one that the model has.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no adapter, none of that name, or several and no name is given.
        OSError: the disk is full or the folder cannot be written to; existing files stay.

    Example:
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> sorted(p.name for p in save_adapter(model, tmp / "adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    name = _only_name(model) if name is None else name
    adapters = _adapters(model, name)
    whole = {canonical_name(path): p for path, p in trained_whole(model).items()}

    config = make_config(
        model,
        adapters={layer: adapter.config() for layer, adapter in adapters.items()},
        linear_layers=_linear_layers(model),
        modules_to_save={parameter.rpartition(".")[0] for parameter in whole} - {""},
    )
    tensors = {layer: adapter.tensors() for layer, adapter in adapters.items()}
    folder = Path(path)
    write_adapter(folder, SavedAdapter(name, config, tensors, whole))
    return folder


def load_adapter(
    model: Model,
    path: str | Path,
    name: str | None = None,
    *,
    allow_zero: bool = False,
    adapter: type[LoRA] = LoRA,
) -> Model:
    """Reads an adapter that `save_adapter` or PEFT wrote, and adds it unless the model has it.

    An adapter that is added becomes the active one, as with `inject`.

    Args:
        model: the base, dense or quantized. If it has an adapter of that name on the same layers
            with the same ranks, that adapter is overwritten.
        path: the folder.
        name: the adapter's name in the model. Default: the name that it was saved under, which is
            "default" for files of PEFT's.
        allow_zero: accept an adapter whose every B is zero (one that was never trained).
        adapter: the class of the adapter, as for `inject`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: one of the two files does not exist.
        ValueError: the config sets an option that the adapter does not have; the tensors do not
            fit the model (the first mismatches are named); a file is damaged, or the two do not
            belong together; every B is zero. The model stays unchanged.

    Example:
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> folder = save_adapter(minilora.inject(make(), r=4), tmp / "a")
        >>> load_adapter(make(), folder, allow_zero=True)[0].adapters["default"].r
        4
    """
    folder = Path(path)
    saved = read_adapter(folder, own_options=adapter(1, 1, r=1).config())
    if not allow_zero and not saved.changes_something():
        raise ValueError(
            f"every B in {folder / WEIGHTS} is zero: the adapter changes nothing "
            "(allow_zero=True to load it)"
        )

    name = saved.name if name is None else name
    names = adapter_names(model)
    if saved.whole and names not in ([], [name]):
        check_bare(model, "parameters trained as a whole belong to a single adapter")

    existing = _adapters(model, name) if name in names else {}
    try:
        adapters = existing or _new_adapters(model, saved, adapter)
        _check_fits(model, saved, adapters)
    except ValueError as error:
        kind = type(model).__name__
        raise ValueError(f"{folder} does not fit this {kind}: {error}") from error

    if not existing:
        paths = _paths(linear_layers(model))
        attach(model, {paths[layer]: made for layer, made in adapters.items()}, name=name)
    _copy(saved, adapters, _parameters(model))
    return model


def _only_name(model: nn.Module) -> str:
    names = adapter_names(model)
    if len(names) > 1:
        known = ", ".join(map(repr, names))
        raise ValueError(f"the model has several adapters, {known}: say which with name=")
    return names[0] if names else "default"


def _adapters(model: nn.Module, name: str) -> dict[str, LoRA]:
    """The adapters of that name, by the canonical names of their layers."""
    layers: dict[str, Any] = dict(adapted_layers(model, name))
    return {canonical_name(path): layer.adapters[name] for path, layer in layers.items()}


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers by their canonical names."""
    return {canonical_name(path): layer for path, layer in linear_layers(model).items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by each of its canonical names."""
    named = model.named_parameters(remove_duplicate=False)
    return {canonical_name(path): p for path, p in named}


def _paths(names: Mapping[str, Any]) -> dict[str, str]:
    """Canonical name -> the name that the model has for it."""
    return {canonical_name(path): path for path in names}


def _new_adapters(model: nn.Module, saved: SavedAdapter, kind: type[LoRA]) -> dict[str, LoRA]:
    """An adapter for each saved layer that the model has; the model is not changed.

    The ranks are those of the tensors, whatever the config says.
    """
    layers = _linear_layers(model)
    return {
        name: kind.for_layer(
            layers[name],
            saved.rank(name),
            alpha=alpha_of(saved.config, name),
            layer_name=name,
        )
        for name in saved.layers
        if name in layers
    }


def _check_fits(model: nn.Module, saved: SavedAdapter, adapters: Mapping[str, LoRA]) -> None:
    """Raises ValueError with the first mismatches between the files and the model."""
    problems = [
        *_layer_mismatches(model, saved, adapters),
        *_parameter_mismatches(_parameters(model), saved.whole),
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("; ".join(problems[:5]) + more)


def _layer_mismatches(
    model: nn.Module, saved: SavedAdapter, adapters: Mapping[str, LoRA]
) -> list[str]:
    """Where the saved layers and their tensors are not those of the model's adapters."""
    layers = _linear_layers(model)
    found = []
    for name, tensors in saved.layers.items():
        if name not in layers:
            found.append(f"the model has no linear layer {name}")
        elif name not in adapters:
            found.append(f"{name} has no adapter in the model")
        elif _shapes(tensors) != (expected := _shapes(adapters[name].tensors())):
            there, here = _describe(_shapes(tensors)), _describe(expected)
            found.append(f"{name}: the file has {there}, the model {here}")

    missing = sorted(adapters.keys() - saved.layers.keys())
    return found + [f"the file has nothing for {name}, which has an adapter" for name in missing]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {end: list(tensor.shape) for end, tensor in tensors.items()}


def _describe(shapes: Mapping[str, list[int]]) -> str:
    """A [8, 64] and B [32, 8]."""
    return " and ".join(
        f"{end.removeprefix('lora_').removesuffix('.weight')} {shape}"
        for end, shape in shapes.items()
    )


def _parameter_mismatches(
    parameters: Mapping[str, nn.Parameter], whole: Mapping[str, Tensor]
) -> list[str]:
    """Where the parameters that were trained as a whole are not those of the model."""
    found = []
    for name, tensor in whole.items():
        if name not in parameters:
            found.append(f"the model has no parameter {name}")
        elif parameters[name].shape != tensor.shape:
            there, here = list(tensor.shape), list(parameters[name].shape)
            found.append(f"{name}: the file has {there}, the model {here}")
        elif not tensor.is_floating_point():
            found.append(f"{name}: the file has {tensor.dtype}")
    return found


@torch.no_grad()
def _copy(
    saved: SavedAdapter, adapters: Mapping[str, LoRA], parameters: Mapping[str, nn.Parameter]
) -> None:
    for layer, adapter in adapters.items():
        adapter.alpha = alpha_of(saved.config, layer)
        adapter.dropout = dropout_of(saved.config)
        for end, parameter in adapter.tensors().items():
            parameter.copy_(saved.layers[layer][end])

    for name, tensor in saved.whole.items():
        parameters[name].copy_(tensor)
        parameters[name].requires_grad_(True)
