"""Which layers of a model a call means: names, patterns, and what to say when nothing matches."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from minilora.layers import NF4Linear
from minilora.lora import LoRALayer

Targets = str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]

DEFAULT_EXCLUDE = ("lm_head",)
LINEAR = (nn.Linear, NF4Linear)  # with adapters or without


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers of a model by name, in its order; one that is shared has its first name."""
    return {name: m for name, m in model.named_modules() if name and isinstance(m, LINEAR)}


def adapted_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoRALayer]:
    """The layers that carry the adapter of this name, or any. Raises ValueError for none."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}
    if not found:
        raise ValueError("the model has no adapter: minilora.inject or minilora.load_adapter first")
    having = {n: layer for n, layer in found.items() if adapter in (None, *layer.adapters)}
    if not having:
        names = ", ".join(map(repr, adapter_names(model)))
        raise ValueError(f"the model has no adapter {adapter!r}; it has {names}")
    return having


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, [] if it has none."""
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


def is_named(name: str, wanted: str) -> bool:
    """Whether `wanted` is the name, or a dotted end of it: "q_proj", "self_attn.q_proj"."""
    return name == wanted or name.endswith("." + wanted)


def select_layers(
    model: nn.Module, targets: Targets, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> dict[str, Any]:
    """The linear layers that `targets` means and `exclude` does not, by name, in the model's order.

    The default `exclude` applies to "all-linear" only: whoever names the head means it. Raises
    ValueError, with near misses, for a target that matches no linear layer.
    """
    if isinstance(model, LINEAR):
        kind = type(model).__name__
        raise ValueError(f"the model is itself a {kind}: make a LoRALinear or NF4Linear of it")
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    if exclude is DEFAULT_EXCLUDE and targets != "all-linear":
        exclude = ()

    layers = linear_layers(model)
    chosen = _matches(model, targets, layers)
    chosen = {n for n in chosen if not any(is_named(n, left_out) for left_out in exclude)}
    if not chosen:
        raise ValueError(f"{_no_match(model, [str(targets)])} exclude={tuple(exclude)}.")
    return {name: layer for name, layer in layers.items() if name in chosen}


def _matches(model: nn.Module, targets: Targets, layers: Mapping[str, nn.Module]) -> set[str]:
    if isinstance(targets, re.Pattern):
        return {name for name in layers if targets.search(name)}
    if callable(targets):
        return {name for name, layer in layers.items() if targets(name, layer)}
    if targets == "all-linear":
        return set(layers)

    wanted = [targets] if isinstance(targets, str) else list(targets)
    hits = {w: {name for name in layers if is_named(name, w)} for w in wanted}
    missed = [w for w in wanted if not hits[w]]
    if missed or not wanted:
        raise ValueError(_no_match(model, missed))
    return set().union(*hits.values())


def select_parameters(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The floating-point parameters that `names` means: parameters, or all those of modules.

    Raises ValueError, with near misses, for a name that matches nothing.
    """
    names = (names,) if isinstance(names, str) else names
    parameters = dict(model.named_parameters(remove_duplicate=False))

    found: dict[int, nn.Parameter] = {}
    for wanted in names:
        inside = [p for name, p in parameters.items() if f".{wanted}." in f".{name}."]
        floats = [p for p in inside if p.is_floating_point()]
        if not floats:
            hint = _did_you_mean(wanted, [n for n, _ in model.named_modules() if n])
            raise ValueError(f"train_also={wanted!r} matches no floating-point parameter.{hint}")
        found |= {id(p): p for p in floats}
    return list(found.values())


def tied_parameters(model: nn.Module) -> dict[int, str]:
    """Parameters that have more than one name: id -> their names."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
    return {key: " and ".join(found) for key, found in names.items() if len(found) > 1}


def _did_you_mean(wanted: str, names: Iterable[str]) -> str:
    """Up to three names, or last parts of names, that look like `wanted`."""
    candidates = {part for name in names for part in (name, name.rpartition(".")[2])}
    near = difflib.get_close_matches(wanted, sorted(candidates, key=len), n=3, cutoff=0.6)
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""


def _no_match(model: nn.Module, missed: Sequence[str]) -> str:
    """What to say of targets that match no linear layer."""
    layers, text = linear_layers(model), ""
    for wanted in missed or ["[]"]:
        text += f"target {wanted!r} matches no linear layer of {type(model).__name__}."
        text += _did_you_mean(wanted, layers)
        for name, module in model.named_modules():
            if name and name not in layers and is_named(name, wanted):
                text += f" {name!r} is a {type(module).__name__}, not an nn.Linear."
                break
        text += " "

    counts = Counter(name.rpartition(".")[2] for name in layers)
    there = ", ".join(f"{name} ({n})" for name, n in counts.most_common(12)) or "none"
    return f"{text}Linear layers in the model: {there}."
