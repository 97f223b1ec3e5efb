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

from minilora.files.adapter_checks import check_base, check_none, mismatches, whole_values
from minilora.files.adapter_folder import (
    WEIGHTS,
    SavedAdapter,
    read_adapter,
    read_base,
    write_adapter,
)
from minilora.files.base import Base, base_of
from minilora.files.names import canonical_name
from minilora.files.peft_config import CONFIG, make_config, read_base_name
from minilora.files.peft_values import ConfigReader
from minilora.files.text import shown
from minilora.lora import LoRA
from minilora.surgery import Model, attach, check_bare, trained_whole
from minilora.targets import adapted_layers, adapter_names, linear_layers

_LONGEST_NAME = 100


def save_adapter(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Writes an adapter, and what `train_also` trained, as a folder that PEFT reads too.

    The write is atomic: a full disk or a kill leaves the old files. The weights carry a hash of
    their config, one of themselves, and a record of what the layers were: dense, or in 4 bits.

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
        modules_to_save={_module_to_save(parameter) for parameter in whole},
    )
    tensors = {layer: adapter.tensors() for layer, adapter in adapters.items()}
    base = base_of({layer: _linear_layers(model)[layer] for layer in adapters})
    folder = Path(path)
    write_adapter(folder, SavedAdapter(name, config, tensors, whole, base))
    return folder


def load_adapter(
    model: Model,
    path: str | Path,
    name: str | None = None,
    *,
    allow_zero: bool = False,
    adapter: type[LoRA] = LoRA,
    other_base: bool = False,
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
        other_base: accept an adapter that was trained on layers of another format, as one that was
            trained on a 4-bit base and is loaded on the dense one. Files of PEFT's do not say.

    Returns:
        The model.

    Raises:
        FileNotFoundError: one of the two files does not exist.
        ValueError: the config sets an option that the adapter does not have; the tensors do not
            fit the model or the config (the first mismatches are named); a file is damaged, or the
            two do not belong together; every B is zero; the adapter was trained on another base.
            The model stays unchanged.

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

    name = _checked_name(saved, folder) if name is None else name
    names = adapter_names(model)
    if saved.whole and names not in ([], [name]):
        check_bare(model, "parameters trained as a whole belong to a single adapter")

    # Everything is made and checked here, and the model is edited below.
    existing = _adapters(model, name) if name in names else {}
    config = ConfigReader(saved.config, folder / CONFIG)
    try:
        adapters = _new_adapters(model, saved, config, adapter)
        whole, problems = whole_values(model, saved, config)
        check_none(mismatches(model, saved, config, adapters, existing) + problems)
    except (ValueError, TypeError) as error:
        kind = type(model).__name__
        raise ValueError(f"{folder} does not fit this {kind}: {error}") from error
    if saved.base is not None and not other_base:
        check_base(folder, saved.base, {name: _linear_layers(model)[name] for name in adapters})

    if existing:
        _overwrite(existing, adapters)
    else:
        paths = _paths(linear_layers(model))
        attach(model, {paths[layer]: made for layer, made in adapters.items()}, name=name)
    _set_whole(whole)
    return model


def trained_on(path: str | Path) -> Base | None:
    """What the layers under a saved adapter were when it was saved; None: the file does not say.

    Raises:
        FileNotFoundError: one of the two files does not exist.
        ValueError: a file is damaged.

    Example:
        >>> model = minilora.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8)))
        >>> base = trained_on(save_adapter(minilora.inject(model, r=4), tmp / "in-4-bits"))
        >>> base.quantized, str(base.usual)
        (True, 'nf4 (blocks of 64, double-quantized)')
    """
    return read_base(Path(path))


def base_name(path: str | Path) -> str | None:
    """The name of the model that a saved adapter was trained on; None: its config does not say.

    A name is what the model was loaded from: a folder or a hub id. Anybody can write any name into
    an adapter's config.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the config is damaged.

    Example:
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> base_name(save_adapter(model, tmp / "of-no-name")) is None
        True
    """
    return read_base_name(Path(path))


def _only_name(model: nn.Module) -> str:
    names = adapter_names(model)
    if len(names) > 1:
        known = ", ".join(map(repr, names))
        raise ValueError(f"the model has several adapters, {known}: say which with name=")
    return names[0] if names else "default"


def _checked_name(saved: SavedAdapter, folder: Path) -> str:
    """The name that an adapter was saved under."""
    if not saved.name.isprintable() or len(saved.name) > _LONGEST_NAME:
        there = f"{folder / WEIGHTS} holds an adapter of the name {shown(saved.name)}"
        raise ValueError(f"{there}: choose another with name=")
    return saved.name


def _module_to_save(parameter: str) -> str:
    """The module that holds a parameter; the parameter itself if it is the model's own."""
    return parameter.rpartition(".")[0] or parameter


def _adapters(model: nn.Module, name: str) -> dict[str, LoRA]:
    """The adapters of that name, by the canonical names of their layers."""
    layers: dict[str, Any] = dict(adapted_layers(model, name))
    return {canonical_name(path): layer.adapters[name] for path, layer in layers.items()}


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers by their canonical names."""
    return {canonical_name(path): layer for path, layer in linear_layers(model).items()}


def _paths(names: Mapping[str, Any]) -> dict[str, str]:
    """Canonical name -> the name that the model has for it."""
    return {canonical_name(path): path for path in names}


@torch.no_grad()
def _new_adapters(
    model: nn.Module, saved: SavedAdapter, config: ConfigReader, kind: type[LoRA]
) -> dict[str, LoRA]:
    """An adapter with the file's values for each saved layer that the model has.

    The model is not changed. A tensor of another shape is left for `mismatches`.
    """
    layers = _linear_layers(model)
    adapters = {
        name: kind.for_layer(
            layers[name],
            saved.rank(name),
            alpha=config.alpha(name),
            dropout=config.dropout,
            layer_name=name,
        )
        for name in saved.layers
        if name in layers
    }
    for name, adapter in adapters.items():
        for end, parameter in adapter.tensors().items():
            value = saved.layers[name].get(end)
            if value is not None and value.shape == parameter.shape:
                parameter.copy_(value)
    return adapters


@torch.no_grad()
def _overwrite(existing: Mapping[str, LoRA], adapters: Mapping[str, LoRA]) -> None:
    """Gives adapters the values of others. An optimizer may hold their parameters, which stay."""
    for layer, new in adapters.items():
        old = existing[layer]
        old.alpha, old.dropout = new.alpha, new.dropout
        values = new.tensors()
        for end, parameter in old.tensors().items():
            parameter.copy_(values[end])


@torch.no_grad()
def _set_whole(values: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)
        parameter.requires_grad_(True)
