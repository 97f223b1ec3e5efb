"""Which names in a PEFT config mean exactly the layers that have an adapter."""

import re
from collections.abc import Collection, Iterator

from torch import nn

from minilora.lora import LoRALayer


def base_modules(model: nn.Module) -> list[str]:
    """The names of all modules that the model has without adapters, as PEFT walks them.

    Example:
        >>> from minilora import inject
        >>> base_modules(inject(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), r=1))
        ['0', '1']
    """
    layers = [path for path, m in model.named_modules() if path and isinstance(m, LoRALayer)]
    adapters = tuple(f"{path}.adapters" for path in layers)
    inside = tuple(f"{path}." for path in adapters)
    return [
        path
        for path, _ in model.named_modules()
        if path and path not in adapters and not path.startswith(inside)
    ]


def target_modules(adapted: Collection[str], modules: Collection[str]) -> list[str] | str:
    r"""What `target_modules` has to be so that PEFT adapts exactly these layers.

    PEFT adapts every module, of any kind, whose name is an entry of the list or ends in "." and the
    entry. Each layer gets the shortest ending of its name that no other module has. If even the
    full name is the ending of another one, the result is a pattern, which PEFT matches with the
    whole name.

    Args:
        adapted: names of the adapted layers.
        modules: names of all modules of the model.

    Example:
        >>> target_modules(["a.up", "b.up"], ["a", "a.up", "b", "b.up"])
        ['up']
        >>> target_modules(["a.up"], ["a", "a.up", "b", "b.up"])
        ['a.up']
        >>> target_modules(["up"], ["up", "b", "b.up"])
        'up'
    """
    others = {ending for name in set(modules).difference(adapted) for ending in _endings(name)}
    found = set()
    for name in adapted:
        ending = next((ending for ending in _endings(name) if ending not in others), None)
        if ending is None:
            return "|".join(map(re.escape, sorted(adapted)))
        found.add(ending)
    return sorted(found)


def _endings(name: str) -> Iterator[str]:
    """The dotted ends of a name, the shortest first."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        yield ".".join(parts[i:])
