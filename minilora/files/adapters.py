"""save_adapter and load_adapter: adapters as PEFT's two files, without peft.

Loading is strict. A key that is missing, unexpected or misshapen, a config option that minilora
does not support, an adapter that would change nothing: each raises an error with names, because
each has been a silent wrong result in other libraries.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.checks import check_bare, check_not_sharded
from minilora.files.adapter_checks import check_base, check_none, mismatches
from minilora.files.adapter_folder import (
    WEIGHTS,
    SavedAdapter,
    read_adapter,
    read_base,
    write_adapter,
)
from minilora.files.base import Base, base_of
from minilora.files.collective import assign, check_same, gathered, together, writes
from minilora.files.names import canonical_names
from minilora.files.peft_config import CONFIG, make_config, read_base_name
from minilora.files.peft_limits import warn_of_limits
from minilora.files.peft_targets import base_modules
from minilora.files.peft_values import ConfigReader
from minilora.files.saved_whole import saved_whole
from minilora.files.text import shown
from minilora.files.whole_values import WholeValues
from minilora.lora import LoRA, LoRALayer
from minilora.sharded import sharding_of
from minilora.surgery import Model, attach, undone_on_error
from minilora.targets import adapted_layers, adapter_names, linear_layers
from minilora.whole import add_whole, new_parameters, place_whole, whole_parameters

_LONGEST_NAME = 100


def save_adapter(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Writes an adapter, and what `train_also` trained, as a folder that PEFT reads too.

    The write is atomic: a full disk or a kill leaves the old files. The weights carry a hash of
    their config, one of themselves, and a record of what the layers were: dense, or in 4 bits.
    A warning says what PEFT, vLLM or llama.cpp would not make of the files.

    A model that `fully_shard` has sharded is gathered: every process has to call, and the first one
    writes the same files that one process would. With DistributedDataParallel, call it in one.

    Args:
        model: an injected model. Adapters are written in float32, parameters of `train_also` in
            the dtype that they have.
        path: the folder; it is created if it does not exist.
        name: which adapter. Default: the only one that the model has.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no adapter, none of that name, or several and no name is given;
            without wrappers two modules have one name, or the model is itself the layer; the
            layers' adapters differ in an option that a config says once.
        OSError: the disk is full or the folder cannot be written to; existing files stay. Of a
            sharded model, in every process.

    Example:
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> sorted(p.name for p in save_adapter(model, tmp / "adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    mesh = sharding_of(model)
    name = _only_name(model) if name is None else name
    names = canonical_names(model)
    layers: dict[str, Any] = {names[p]: m for p, m in adapted_layers(model, name).items()}
    if "" in layers:
        reason = f"the {type(layers['']).__name__} is the model itself, and a file needs its name"
        raise ValueError(f"{reason}: save and load torch.nn.Sequential(model), where it is '0'")
    adapters: dict[str, LoRA] = {layer: m.adapters[name] for layer, m in layers.items()}
    modules = [names[path] for path in base_modules(model)]
    whole = saved_whole(model, names, adapters)

    config = make_config(
        model,
        adapters={layer: adapter.config() for layer, adapter in adapters.items()},
        modules=modules,
        modules_to_save=whole.modules_to_save,
        bias=whole.bias,
    )
    tensors = {layer: gathered(adapter.tensors(), mesh) for layer, adapter in adapters.items()}
    values = gathered(whole.tensors, mesh)
    folder = Path(path)
    saved = SavedAdapter(name, config, tensors, values, base_of(layers), whole.trained)
    with together(mesh):
        if writes(mesh):
            write_adapter(folder, saved)
    if writes(mesh):
        warn_of_limits(model, names, layers, config, whole)
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

    An adapter that is added becomes the active one, as with `inject`. One that is replaced stays
    active, or inactive.

    In a sharded model (`fully_shard`) an adapter can be replaced, by one of the same rank. Every
    process has to call and reads the same files; an error in one is an error in all.

    Args:
        model: the base, dense or quantized. If it has an adapter of that name on the same layers,
            that adapter is replaced; its parameters stay those that an optimizer holds, unless
            the rank is another one.
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
        FileNotFoundError: one of the two files does not exist; adapter_model.bin, a pickle, is not
            read.
        ValueError: the config sets an option that the adapter does not have; the tensors do not
            fit the model or the config (the first mismatches are named); a file is damaged, or the
            two do not belong together; every B is zero; the adapter was trained on another base;
            a sharded model would get new parameters. The model stays unchanged.

    Example:
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> folder = save_adapter(minilora.inject(make(), r=4), tmp / "a")
        >>> load_adapter(make(), folder, allow_zero=True)[0].adapters["default"].r
        4
    """
    mesh = sharding_of(model)
    folder, names = Path(path), canonical_names(model)
    own_options = adapter(1, 1, r=1).config()
    with together(mesh):
        saved = read_adapter(folder, own_options, known=set(names.values()))
    check_same(mesh, saved.fingerprint() if mesh else "", str(folder))
    if not allow_zero and not saved.changes_something():
        raise _changes_nothing(folder)

    name = _checked_name(saved, folder) if name is None else name
    others = adapter_names(model)
    if saved.whole and others not in ([], [name]):
        check_bare(model, "parameters trained as a whole belong to a single adapter")

    # Everything is made and checked here, and the model is edited below.
    paths = {names[path]: path for path in linear_layers(model)}
    layers: dict[str, Any] = {names[path]: m for path, m in linear_layers(model).items()}
    existing = {n: m.adapters[name] for n, m in layers.items() if name in _adapters(m)}
    config = ConfigReader(saved.config, folder / CONFIG)
    try:
        adapters = _new_adapters(layers, saved, config, adapter, own_options)
        whole = WholeValues(model, names, saved, config, swapped=bool(existing))
        problems = mismatches(layers, saved, config, adapters, existing)
        check_none(problems + whole.problems)
    except (ValueError, TypeError) as error:
        kind = type(model).__name__
        raise ValueError(f"{folder} does not fit this {kind}: {error}") from error
    if not allow_zero and not saved.trains_adapters() and not whole.changed:
        raise _changes_nothing(folder)
    if saved.base is not None and not other_base:
        check_base(folder, saved.base, {layer: layers[layer] for layer in adapters})

    if existing:
        _swap(model, name, {layers[layer]: made for layer, made in adapters.items()}, whole.values)
    else:
        attach(
            model,
            {paths[layer]: made for layer, made in adapters.items()},
            name=name,
            whole=whole.values,
        )
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


def _changes_nothing(folder: Path) -> ValueError:
    reason = f"every B in {folder / WEIGHTS} is zero"
    return ValueError(f"{reason}: the adapter changes nothing (allow_zero=True to load it)")


def _checked_name(saved: SavedAdapter, folder: Path) -> str:
    """The name that an adapter was saved under."""
    if not saved.name.isprintable() or len(saved.name) > _LONGEST_NAME:
        there = f"{folder / WEIGHTS} holds an adapter of the name {shown(saved.name)}"
        raise ValueError(f"{there}: choose another with name=")
    return saved.name


def _adapters(layer: nn.Module) -> Collection[str]:
    """The names of a layer's adapters."""
    return layer.adapters.keys() if isinstance(layer, LoRALayer) else ()


@torch.no_grad()
def _new_adapters(
    layers: Mapping[str, Any],
    saved: SavedAdapter,
    config: ConfigReader,
    kind: type[LoRA],
    own_options: Collection[str],
) -> dict[str, LoRA]:
    """An adapter with the file's values for each saved layer that the model has.

    The model is not changed. A tensor of another shape is left for `mismatches`.
    """
    options = {"dropout": config.dropout} | ({"bias": True} if config.lora_bias else {})
    adapters = {}
    for name in saved.layers:
        if name in layers:
            r, alpha = saved.rank(name), config.alpha(name)
            if config.use_rslora and "use_rslora" not in own_options:
                # alpha / sqrt(r), as the scaling alpha / r of an adapter that knows this one alone.
                alpha *= math.sqrt(r)
            adapters[name] = kind.for_layer(
                layers[name], r, alpha=alpha, layer_name=name, **options
            )

    for name, adapter in adapters.items():
        for end, parameter in adapter.tensors().items():
            value = saved.layers[name].get(end)
            if value is not None and value.shape == parameter.shape:
                parameter.copy_(value)
    return adapters


@torch.no_grad()
def _swap(
    model: nn.Module, name: str, adapters: Mapping[Any, LoRA], values: Mapping[str, Tensor]
) -> None:
    """Gives the adapter of that name other values.

    An optimizer may hold its parameters, which stay unless the rank is another one.
    """
    trained = whole_parameters(model)
    added = {path: value for path, value in values.items() if path not in trained}
    other_ranks = {id(m) for m, new in adapters.items() if not _fits(m.adapters[name], new)}
    if other_ranks or added:
        check_not_sharded(model, "load an adapter with other parameters before fully_shard")
    new_whole = new_parameters(model, added)
    with undone_on_error(model):
        for layer, new in adapters.items():
            old = layer.adapters[name]
            values_of_new = new.tensors()
            if id(layer) not in other_ranks:
                old.alpha, old.dropout = new.alpha, new.dropout
                for end, parameter in old.tensors().items():
                    assign(parameter, values_of_new[end])
            else:
                new.requires_grad_(old.A.requires_grad)
                layer.adapters[name] = new.train(layer.training)
        for path, value in values.items():
            if path in trained:
                assign(trained[path], value)
        add_whole(model, new_whole)
        # An adapter that is not active stays so.
        place_whole(model, trained=any(m.active for m in adapted_layers(model).values()))


def _fits(old: LoRA, new: LoRA) -> bool:
    """Whether the values of `new` fit into the parameters of `old`."""
    shapes = [{end: t.shape for end, t in adapter.tensors().items()} for adapter in (old, new)]
    return shapes[0] == shapes[1]
