"""How parameters that were trained whole (`train_also`) stand in an adapter's files.

PEFT has two places for them. A module that `modules_to_save` names is a copy beside the base's: the
file has to hold all of it, and no layer inside has an adapter. Any other parameter of the file
replaces the base's own. The first is what `train_also` means, and is used wherever it can be.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from minilora.lora import LoRALayer
from minilora.whole import untied_names, whole_parameters


@dataclass(frozen=True)
class SavedWhole:
    """What the files hold of parameters that were trained whole.

    Attributes:
        tensors: name in the file, without PEFT's prefix -> value. Some are the base's, of a module
            of which not all was trained.
        trained: the canonical names of the parameters.
        modules_to_save, bias: as in a config.
        shared: names of parameters that replace the base's in PEFT, where they are tied to others
            that were not trained with them.
    """

    tensors: Mapping[str, Tensor]
    trained: Collection[str]
    modules_to_save: Collection[str]
    bias: str
    shared: Collection[str]


def saved_whole(model: nn.Module, names: Mapping[str, str], adapted: Collection[str]) -> SavedWhole:
    """What to write of the model's whole parameters.

    Args:
        model: the injected model.
        names: `canonical_names(model)`.
        adapted: canonical names of the layers with an adapter.
    """
    trained = {names[path]: p for path, p in whole_parameters(model).items()}
    if not trained:
        return SavedWhole({}, (), (), "none", ())

    state = {names[path]: tensor for path, tensor in _state(model)}
    modules = {names[path] for path, _ in model.named_modules(remove_duplicate=False)}
    biases = {name for name in state if _last(name) == "bias"}
    # PEFT trains the biases themselves, and no copies, if it trains them all.
    every_bias = biases if biases.issubset(trained) else set()
    copied = _copied_modules(modules, state, trained, adapted, every_bias)

    tensors: dict[str, Tensor] = {}
    seen = set()
    held = {name for module in copied for name in state if name.startswith(f"{module}.")}
    for name in sorted({*trained, *held}):
        p = trained.get(name, state[name])
        module, _, end = name.rpartition(".")
        # A file cannot hold one tensor under two names.
        value = p.detach().clone() if id(p) in seen else p.detach()
        seen.add(id(p))
        tensors[f"{module}.base_layer.{end}" if module in adapted else name] = value

    in_place = {name for name in trained if name not in held}
    # PEFT finds no module of such a name. It says that the model's own parameter was trained.
    own = {name for name in in_place if "." not in name and not _ending_in(name, modules)}
    untied = {names[path] for path in untied_names(model)}
    return SavedWhole(
        tensors,
        sorted(trained),
        copied | own,
        _bias(in_place & biases, bool(every_bias), adapted),
        sorted(in_place & untied),
    )


def _copied_modules(
    modules: Collection[str],
    state: Mapping[str, Tensor],
    trained: Collection[str],
    adapted: Collection[str],
    every_bias: Collection[str],
) -> set[str]:
    """The modules that `modules_to_save` can name, with all that PEFT takes for each entry."""

    def can_be(module: str) -> bool:
        inside = {name for name in state if name.startswith(f"{module}.")}
        theirs = inside.intersection(trained)
        all_trained = theirs == inside
        # The rest of a layer comes along; that of a block would be too much.
        part = bool(theirs.difference(every_bias)) and all(_parent(n) == module for n in inside)
        return (
            (all_trained or part)
            and all(isinstance(state[name], nn.Parameter) for name in inside)
            and not any(f"{layer}.".startswith(f"{module}.") for layer in adapted)
        )

    owners = {_parent(name) for name in trained} - {""}
    possible = {module for module in owners if can_be(module)}
    # PEFT cannot read a module that it saves inside of another one.
    outermost = {m for m in possible if not any(m.startswith(f"{other}.") for other in possible)}
    return {m for m in outermost if outermost.issuperset(_ending_in(m, modules))}


def _ending_in(entry: str, modules: Collection[str]) -> set[str]:
    """The modules that PEFT takes for an entry of `modules_to_save`."""
    return {module for module in modules if module.endswith(entry)}


def _bias(in_place: Collection[str], every: bool, adapted: Collection[str]) -> str:
    """The option `bias`, by which PEFT goes on training biases of the model itself."""
    if in_place and every:
        return "all"
    return "lora_only" if any(_parent(name) in adapted for name in in_place) else "none"


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the model's state dict holds, without adapters, by the names of `named_parameters`.

    A wrapper's state dict has other names.
    """
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
    ours = {id(p) for layer in layers for p in layer.adapters.parameters()}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            kept = tensor is not None and name not in module._non_persistent_buffers_set
            if kept and id(tensor) not in ours:
                yield (f"{path}.{name}" if path else name), tensor


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
