"""What `quantize` and `inject` refuse, and what they warn of, before they change a model."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from minilora.guards import check_called
from minilora.layers import NF4Linear, adapter_class, check_quantizable
from minilora.lora import LoRA, LoRALayer
from minilora.sharded import sharding_of
from minilora.targets import (
    Targets,
    adapted_layers,
    adapter_names,
    tied_parameters,
    unreached_matrices,
)

# The share of a model from which it matters that something is left out.
_WORTH_A_WORD = 0.01


def check_bare(model: nn.Module, reason: str = "", name: str | None = None) -> None:
    """Raises ValueError if the model has an adapter (of this name), with the reason."""
    for found in adapter_names(model):
        if name in (None, found):
            layers = list(adapted_layers(model, found))
            on = f"on {len(layers)} layers already ({layers[0]}, ...)"
            way_out = "minilora.merge or minilora.eject it first" + (reason and f" ({reason})")
            raise ValueError(f"the model has the adapter {found!r} {on}: {way_out}")


def check_not_sharded(model: nn.Module, way_out: str) -> None:
    """Raises ValueError for a model that `fully_shard` has sharded: it keeps its parameters."""
    if sharding_of(model) is not None:
        raise ValueError(f"the model is sharded over several processes: {way_out}")


def check_can_be_adapted(model: nn.Module, layers: Mapping[str, Any], name: str) -> None:
    """Raises ValueError or TypeError unless the layers can get an adapter of this name."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name={name!r} cannot be an adapter's name: choose a word without dots")
    check_bare(model, "or choose another name", name)
    check_not_sharded(model, "add adapters before fully_shard, which would not train new ones")
    _check_native(model, layers)
    for path, layer in layers.items():
        if getattr(getattr(layer, "_hf_hook", None), "offload", False):
            kind = type(layer).__name__
            raise TypeError(f"{path} ({kind}) is offloaded by accelerate: load it on one device")
    _check_each(layers, adapter_class)
    check_called(model, layers)


# Packages whose layers take the place of a model's own -> the way out.
_FOREIGN = {
    "peft": "call merge_and_unload() or unload() on the PEFT model first; minilora.load_adapter "
    "reads its adapter",
    "bitsandbytes": "load the model with minilora.load, or with "
    "quantization_config=minilora.NF4Config(); both read its 4-bit folders",
}


def _check_native(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raises TypeError if another library has put its layers into the model, or in their place."""
    chosen = {id(layer) for layer in layers.values()}
    for path, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package in _FOREIGN and (package == "peft" or id(module) in chosen):
            kind = f"{path or 'the model'} ({type(module).__name__}) is of {package}"
            raise TypeError(f"{kind}: {_FOREIGN[package]}")


def _check_each(layers: Mapping[str, Any], check: Callable[[Any, str], Any]) -> None:
    """Raises the first layer's TypeError, with the names of all the others that have one."""
    first, others = None, list[str]()
    for path, layer in layers.items():
        try:
            check(layer, path)
        except TypeError as error:
            others += [path] if first else []
            first = first or error
    if first:
        raise TypeError(f"{first}{_also(others)}") from first


def _also(names: Sequence[str]) -> str:
    """More layers of which an error is true."""
    more = ", ..." if len(names) > 10 else ""
    return f" (and so with {', '.join(names[:10])}{more})" if names else ""


def check_can_be_quantized(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError, with the layer's name, unless all can be quantized."""
    check_not_sharded(model, "quantize it before fully_shard")
    _check_native(model, layers)
    tied = tied_parameters(model)
    for name, layer in layers.items():
        if isinstance(layer, LoRALayer):
            raise ValueError(f"{name} has an adapter: quantize first, inject afterwards")
        if isinstance(layer, NF4Linear):
            raise ValueError(f"{name} is quantized already: leave it out with exclude=")
    _check_each(layers, check_quantizable)
    if shared := [name for name, layer in layers.items() if id(layer.weight) in tied]:
        names = " and ".join(tied[id(layers[shared[0]].weight)])
        reason = f"{shared[0]} shares its weight with another layer ({names}) and would be untied"
        raise ValueError(f"{reason}: leave it out with exclude={_also(shared[1:])}")
    check_called(model, layers)


def check_unwrapped(path: str, layer: LoRALayer) -> None:
    """Raises TypeError if something else, such as fully_shard, has changed the class since."""
    kind = type(layer)
    if not {LoRALayer, kind.base_class} & {*kind.__bases__}:
        raise TypeError(f"{path} has become a {kind.__name__}: eject before it is wrapped")


def warn_of_ranks(adapters: Mapping[str, LoRA]) -> None:
    """Warns of ranks that an update of the layer's size cannot have."""
    sizes = {path: (adapter.B.shape[0], adapter.A.shape[-1]) for path, adapter in adapters.items()}
    found = [path for path, adapter in adapters.items() if adapter.r > min(sizes[path])]
    if found:
        name, more = found[0], f", and of {len(found) - 1} more layers" if len(found) > 1 else ""
        warnings.warn(
            f"r={adapters[name].r} is above the rank that an update of {name} can have, with "
            f"[out, in] = {list(sizes[name])}{more}: what is above is trained for nothing "
            "(rank_pattern= sets a lower one)",
            stacklevel=4,
        )


def warn_of_unreached(
    model: nn.Module, targets: Targets, strict: bool, done: str, *, stacklevel: int
) -> None:
    """Warns of what "all-linear" cannot reach, or refuses: experts may be most of a model."""
    found = unreached_matrices(model) if targets == "all-linear" else {}
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, NF4Linear)]
    dense = [p.numel() for p in model.parameters() if p.is_floating_point()]
    share = sum(p.numel() for p in found.values()) / max(1, sum(dense) + sum(weights))
    if share < _WORTH_A_WORD:
        return
    names = ", ".join([*found][:2]) + (", ..." if len(found) > 2 else "")
    text = (
        f"{share:.0%} of the parameters are matrices outside of linear layers (as the experts of a "
        f"mixture) and are not {done}: {names} ({len(found)} in all)"
    )
    if strict:
        raise ValueError(f"{text}. strict=False goes on without them")
    warnings.warn(text, stacklevel=stacklevel)
