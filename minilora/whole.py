"""Parameters that are trained whole, beside an adapter (`train_also`): norms, embeddings, a head.

An adapter leaves its base alone; a parameter that is trained in place would not. So a new parameter
takes its place while the adapter is active, and the base's own is put aside, unchanged. It comes
back with `disabled`, `use` and `eject`: the same object, tied to what it was tied to.

A parameter may have several names, as that of a head which is tied to the embedding. The new one
takes its place under each of them. A file may also hold a value for one name alone, or different
ones: then they are untied while the adapter is active.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.lora import LoRALayer
from minilora.sharded import is_sharded
from minilora.targets import did_you_mean

_RECORDS = "_minilora_whole"  # an attribute of a module: name of a parameter -> Whole


class Whole(NamedTuple):
    """The base's parameter, and the one that is trained in its place."""

    base: nn.Parameter
    trained: nn.Parameter


def places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module that holds a parameter, and its name there, by each full name of the parameter."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, p in module._parameters.items()
        if p is not None
    }


def select_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that `names` means, by every name that they have in the model.

    `names` are parameters, or modules with all that is in them. Raises ValueError for a name that
    matches nothing, with near misses; for one of a layer in 4 bits; and for a module with running
    statistics, which change in training and are in no adapter's file.
    """
    names = (names,) if isinstance(names, str) else names
    parameters = {path: getattr(m, name) for path, (m, name) in places(model).items()}
    buffers = {path: t for path, t in model.named_buffers() if t.is_floating_point()}

    found: set[int] = set()
    for wanted in names:
        inside = {path: p for path, p in parameters.items() if f".{wanted}." in f".{path}."}
        if not inside:
            hint = did_you_mean(wanted, [n for n, _ in model.named_modules() if n])
            raise ValueError(f"train_also={wanted!r} matches no floating-point parameter.{hint}")
        for path, p in inside.items():
            if not p.is_floating_point():
                reason = f"train_also={wanted!r} means {path}, a part of a weight in 4 bits"
                raise ValueError(f"{reason}: name what is dense, such as a norm or a bias")
        for path in buffers:
            if f".{wanted}." in f".{path}." and path.endswith(("running_mean", "running_var")):
                reason = f"train_also={wanted!r} means {path}, which no adapter's file holds"
                raise ValueError(
                    f"{reason}: name the parameters beside it, and keep it in eval mode"
                )
        found |= {id(p) for p in inside.values()}
    return {path: p for path, p in parameters.items() if id(p) in found}


def new_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Parameters to be trained, with these values, by full name. The model is not changed.

    Names of one parameter of the base share a new one if their values are equal.
    """
    found = places(model)
    made: dict[str, nn.Parameter] = {}
    same: dict[int, list[tuple[Tensor, nn.Parameter]]] = {}
    for path, value in values.items():
        module, name = found[path]
        base = getattr(module, name)
        others = same.setdefault(id(base), [])
        p = next((p for v, p in others if v is value or torch.equal(v, value)), None)
        if p is None:
            p = nn.Parameter(value.detach().to(base.device, base.dtype, copy=True))
            others.append((value, p))
        made[path] = p
    return made


def add_whole(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Puts each of these in the place of the base's, by full name."""
    found = places(model)
    for path, trained in parameters.items():
        module, name = found[path]
        # A module that has two names comes twice.
        if name not in _records(module):
            whole = Whole(getattr(module, name), trained)
            vars(module)[_RECORDS] = {**_records(module), name: whole}
            module._parameters[name] = trained


def remove_whole(model: nn.Module, keep: bool = False) -> None:
    """Gives the base its own parameters back, or lets it keep the trained ones for good, frozen."""
    place_whole(model, trained=keep)
    for module in model.modules():
        for whole in vars(module).pop(_RECORDS, {}).values():
            whole.trained.requires_grad_(False)


def place_whole(model: nn.Module, trained: bool) -> None:
    """Lets the model compute with its trained parameters, or with those of its base.

    Raises TypeError if neither is there any more.
    """
    places_now = [(m, name, w) for m in model.modules() for name, w in _records(m).items()]
    for module, name, whole in places_now:
        if trained and _is_sharded_in_training(getattr(module, name)):
            continue
        if not any(getattr(module, name) is p for p in whole):
            reason = f"the {name} of a {type(module).__name__} that is trained whole was replaced"
            raise TypeError(f"{reason}, as fully_shard and to_empty do: eject the adapter before")
    for module, name, whole in places_now:
        old, new = getattr(module, name), whole.trained if trained else whole.base
        if _is_sharded_in_training(old):
            continue
        # What was put aside has missed what `model.to` did since.
        if old is not new and not old.is_meta:
            new.data = new.data.to(old.device, old.dtype)
        module._parameters[name] = new


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an injected model trains beside its adapters, by each full name; active or not.

    Also what the caller has made trainable since: a parameter of the base, which stays what it is.
    """
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
    ours = {id(p) for layer in layers for p in layer.adapters.parameters()}
    found = {}
    for path, (module, name) in places(model).items():
        whole, now = _records(module).get(name), getattr(module, name)
        if whole or (layers and now.requires_grad and id(now) not in ours):
            found[path] = whole.trained if whole and not _is_sharded_in_training(now) else now
    return found


def _is_sharded_in_training(p: nn.Parameter) -> bool:
    """Whether `fully_shard` has put this parameter in the place of one that is trained."""
    return is_sharded(p) and p.requires_grad


def untied_names(model: nn.Module) -> list[str]:
    """The names that one parameter of the base has, and different ones in its place."""
    groups: dict[int, dict[str, int]] = {}
    for path, (module, name) in places(model).items():
        whole, now = _records(module).get(name), getattr(module, name)
        base = whole.base if whole else now
        groups.setdefault(id(base), {})[path] = id(now)
    return [path for group in groups.values() if len({*group.values()}) > 1 for path in group]


def _records(module: nn.Module) -> dict[str, Whole]:
    found: dict[str, Whole] = vars(module).get(_RECORDS, {})
    return found
