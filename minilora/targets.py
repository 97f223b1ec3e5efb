"""Which linear layers of a model a call means: names, patterns, and what to say when nothing fits."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from minilora.layers import LoRALinear, NF4Linear

Targets = str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]

DEFAULT_EXCLUDE = ("lm_head",)
LINEAR = (nn.Linear, NF4Linear, LoRALinear)


@dataclass
class Site:
    """A layer, and every place where the model holds it: a layer that two parents share is one site with two places."""

    name: str
    layer: Any  # one of LINEAR
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def replace(self, new: nn.Module) -> None:
        for parent, attribute in self.places:
            setattr(parent, attribute, new)


def sites(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LINEAR) -> dict[str, Site]:
    """Returns every layer of one of `kinds`, by the first name it has in the model."""
    found = {
        id(m): Site(name, m) for name, m in model.named_modules() if name and isinstance(m, kinds)
    }
    for parent in model.modules():
        for (
            attribute,
            layer,
        ) in parent._modules.items():  # not named_children, which names a layer once
            if id(layer) in found:
                found[id(layer)].places.append((parent, attribute))
    return {site.name: site for site in found.values()}


def is_named(name: str, wanted: str) -> bool:
    """True where `wanted` is the name, or a dotted end of it: "q_proj", "self_attn.q_proj"."""
    return name == wanted or name.endswith("." + wanted)


def resolve(
    model: nn.Module,
    targets: Targets,
    exclude: Sequence[str],
    kinds: tuple[type[nn.Module], ...] = LINEAR,
) -> dict[str, Site]:
    """Returns the sites that `targets` names and `exclude` does not, in the model's order.

    The default `exclude` speaks for "all-linear" alone: whoever names the head means it.

    Raises:
        ValueError: a target matches no linear layer. The message shows what comes near, and what there is.
    """
    if isinstance(model, kinds):
        raise ValueError(
            f"the model is itself a {type(model).__name__}: there is no parent to put a new layer into; wrap it directly"
        )
    if isinstance(exclude, str):
        exclude = (exclude,)
    if exclude is DEFAULT_EXCLUDE and targets != "all-linear":
        exclude = ()
    everything = sites(model, kinds)
    if targets == "all-linear":
        chosen = set(everything)
    elif isinstance(targets, re.Pattern):
        chosen = {name for name in everything if targets.search(name)}
    elif callable(targets):
        chosen = {name for name, site in everything.items() if targets(name, site.layer)}
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        hits = {w: {name for name in everything if is_named(name, w)} for w in wanted}
        missed = [w for w in wanted if not hits[w]]
        if missed or not wanted:
            raise ValueError(_nothing_matches(model, missed, everything))
        chosen = set().union(*hits.values())
    chosen = {name for name in chosen if not any(is_named(name, e) for e in exclude)}
    if not chosen:
        raise ValueError(
            _nothing_matches(model, [str(targets)], everything) + f" exclude={tuple(exclude)}."
        )
    return {name: site for name, site in everything.items() if name in chosen}


def near_misses(wanted: str, names: Iterable[str]) -> list[str]:
    """Returns up to three names, or last parts of names, that look like `wanted`."""
    candidates = {name for n in names for name in (n, n.rpartition(".")[2])}
    return difflib.get_close_matches(wanted, sorted(candidates, key=len), n=3, cutoff=0.6)


def _nothing_matches(model: nn.Module, missed: list[str], everything: dict[str, Site]) -> str:
    lines = []
    others = {n: m for n, m in model.named_modules() if n and not isinstance(m, LINEAR)}
    for wanted in missed or ["[]"]:
        line = f"target {wanted!r} matches no linear layer of {type(model).__name__}."
        if near := near_misses(wanted, everything):
            line += f" Did you mean {', '.join(map(repr, near))}?"
        if other := [n for n in others if is_named(n, wanted)]:
            line += f" {other[0]!r} is a {type(others[other[0]]).__name__}, not an nn.Linear."
        lines.append(line)
    counts = Counter(name.rpartition(".")[2] for name in everything)
    here = ", ".join(f"{name} ({n})" for name, n in counts.most_common(12)) or "none"
    return " ".join(lines) + f" Linear layers here: {here}."
