"""Which layers of a model a call means: names, patterns, and what to say when nothing matches.

"all-linear" means every linear layer but the heads, which turn the last hidden state into the
model's answer: their errors are not corrected by any later layer, and their weight is often that of
the embedding.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from minilora.layers import NF4Linear
from minilora.lora import LoRALayer

Targets = str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]

LINEAR = (nn.Linear, NF4Linear)  # with adapters or without

# Wrappers: by their type, and by what torch.compile, FSDP and checkpointing call what they wrap.
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


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


def heads(model: nn.Module) -> set[str]:
    """The names of the linear layers that "all-linear" leaves out.

    They are a layer called lm_head; one that shares its weight with an embedding; and of a
    transformers model its output embedding, and what stands outside its base, as a classifier does.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    told = {m for outermost in _transformers_models(model) for m in _told_heads(outermost)}
    return {
        name
        for name, layer in linear_layers(model).items()
        if layer in told
        or is_named(name, "lm_head")
        or id(layer._parameters.get("weight")) in embeddings
    }


def _transformers_models(model: nn.Module) -> Iterator[Any]:
    """The model itself, or those inside its wrappers."""
    if hasattr(model, "get_output_embeddings"):
        yield model
    else:
        for child in model.children():
            yield from _transformers_models(child)


def _told_heads(model: Any) -> set[nn.Module]:
    """What the parts of a transformers model say of which its heads are."""
    output = model.get_output_embeddings()
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if isinstance(base, nn.Module):
        return {output} | ({*model.modules()} - {*base.modules()})
    # A model for a task, as WhisperForAudioClassification, whose base has no name.
    task = output is None and "For" in type(model).__name__
    return {output, *model.children()} if task else {output}


def kept_in_float32(model: nn.Module) -> set[str]:
    """The names of the linear layers that a transformers model keeps in float32, as T5's `wo`."""
    kept = {
        part
        for module in model.modules()
        for option in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for part in getattr(module, option, None) or ()
    }
    return {name for name in linear_layers(model) if not kept.isdisjoint(name.split("."))}


def unreached_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices by name that belong to no linear layer.

    They are stacks [n, out, in], the experts of a mixture, and the weights of transformers' Conv1D.
    """
    convs = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    left_out = {id(p) for conv in convs for p in conv.parameters()}
    found = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        dimensions = 2 if kind == "Conv1D" or "expert" in f"{path} {kind}".lower() else 3
        if isinstance(module, (*LINEAR, nn.Embedding)):
            continue
        for name, p in module._parameters.items():
            if p is None or not p.is_floating_point() or name.endswith("bias"):
                continue
            if p.ndim >= dimensions and min(p.shape) > 1 and id(p) not in left_out:
                found[f"{path}.{name}" if path else name] = p
    return found


def shortest_end(name: str, names: Iterable[str]) -> str:
    """The shortest dotted end of a name that means this one of the names alone."""
    parts, others = name.split("."), {*names} - {name}
    ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    alone = (end for end in ends if not any(is_named(other, end) for other in others))
    return next(alone, name)


def select_layers(
    model: nn.Module, targets: Targets, exclude: Targets = (), kept: Container[str] = ()
) -> dict[str, Any]:
    """The linear layers that `targets` means and `exclude` does not, by name, in the model's order.

    "all-linear" leaves out the heads, and what is in `kept`: whoever names a layer means it. Raises
    ValueError, with near misses, for a target or an exclusion that matches no linear layer.
    """
    if isinstance(inside := _inside_wrappers(model), LINEAR):
        kind = type(inside).__name__
        raise ValueError(f"the model is itself a {kind}: make a LoRALinear or NF4Linear of it")

    layers = linear_layers(model)
    chosen = _matches(model, targets, layers)
    if isinstance(targets, str) and targets == "all-linear":
        out = heads(model)
        chosen = {name for name in chosen if name not in out and name not in kept}
    left_out = _matches(model, exclude, layers, "exclude") if exclude else set()
    if not chosen - left_out:
        text = _no_match(model, [str(targets)])
        raise ValueError(f"{text} exclude={exclude!r}." if exclude else text)
    return {name: layer for name, layer in layers.items() if name in chosen - left_out}


def _inside_wrappers(model: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel and the like stand around; a model without them is itself.

    A layer has no name there: `save_adapter` takes a wrapper's part out of each name.
    """
    match list(model.named_children()):
        case [(name, inside)] if name in WRAPPED or isinstance(model, PARALLEL):
            return _inside_wrappers(inside)
    return model


def _matches(
    model: nn.Module, targets: Targets, layers: Mapping[str, nn.Module], option: str = "target"
) -> set[str]:
    if isinstance(targets, str) and targets == "all-linear":
        return set(layers)
    if isinstance(targets, re.Pattern) or callable(targets):
        pattern = targets if isinstance(targets, re.Pattern) else None
        test: Any = (lambda name, _: pattern.search(name)) if pattern else targets
        if found := {name for name, layer in layers.items() if test(name, layer)}:
            return found
        raise ValueError(_no_match(model, [str(targets)], option))

    wanted = [targets] if isinstance(targets, str) else list(targets)
    for name in wanted:
        if not isinstance(name, str):
            alone = "a compiled regular expression or a callable is given alone"
            raise TypeError(f"{option} {name!r}: a list holds names; {alone}")
    hits = {w: {name for name in layers if is_named(name, w)} for w in wanted}
    missed = [w for w in wanted if not hits[w]]
    if missed or not wanted:
        raise ValueError(_no_match(model, missed, option))
    return set().union(*hits.values())


def in_blocks(layers: Mapping[str, Any], indices: int | Sequence[int]) -> dict[str, Any]:
    """The layers in the repeated blocks of these indices: layers.3.q_proj is in block 3.

    Raises ValueError for an index that no layer has.
    """
    wanted = {indices} if isinstance(indices, int) else {*indices}
    if not wanted:
        raise ValueError("layers_to_transform=[] means no layer: leave it out, or name a block")
    parts = {name: name.split(".")[:-1] for name in layers}
    index = {name: next((int(p) for p in parts[name] if p.isdigit()), None) for name in layers}
    if missed := sorted(wanted - {*index.values()}):
        there = sorted({i for i in index.values() if i is not None})
        known = f"from {there[0]} to {there[-1]}" if there else "without blocks"
        raise ValueError(f"layers_to_transform: no block {missed[0]}; the layers are {known}")
    return {name: layer for name, layer in layers.items() if index[name] in wanted}


def by_pattern(
    layers: Mapping[str, Any], patterns: Mapping[Any, Any] | None, option: str
) -> dict[str, Any]:
    """The value that `patterns` has for a layer, by the layer's name: that of the first match.

    A pattern is a name, matched on the last part or a dotted end, or a compiled regular expression,
    searched in the full name. Raises ValueError for one that matches none of the layers.
    """
    if not isinstance(patterns, Mapping | None):
        raise TypeError(f"{option}={patterns!r}: it is a dict, from a name or pattern to a number")
    values: dict[str, Any] = {}
    for pattern, value in (patterns or {}).items():
        is_regex = isinstance(pattern, re.Pattern)
        hits = [n for n in layers if (pattern.search(n) if is_regex else is_named(n, pattern))]
        if not hits:
            hint = did_you_mean(str(pattern), layers)
            raise ValueError(f"{option}: {str(pattern)!r} matches no layer with an adapter.{hint}")
        values = dict.fromkeys(hits, value) | values
    return values


def tied_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that have more than one name: id -> their names."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def did_you_mean(wanted: str, names: Iterable[str]) -> str:
    """Up to three names, or last parts of names, that look like `wanted`."""
    candidates = {part for name in names for part in (name, name.rpartition(".")[2])}
    near = difflib.get_close_matches(wanted, sorted(candidates, key=len), n=3, cutoff=0.6)
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""


def _no_match(model: nn.Module, missed: Sequence[str], option: str = "target") -> str:
    """What to say of targets, or exclusions, that match no linear layer."""
    layers, text = linear_layers(model), ""
    for wanted in missed or ["[]"]:
        text += f"{option} {wanted!r} matches no linear layer of {type(model).__name__}."
        text += did_you_mean(wanted, layers)
        if re.search(r"[*+?^$|()\[\]\\]", wanted) and not wanted.startswith("re.compile"):
            text += " A string is a name: for a regular expression, pass re.compile(...)."
        for name, module in model.named_modules():
            if name and name not in layers and is_named(name, wanted):
                text += f" {name!r} is a {type(module).__name__}, not an nn.Linear."
                break
        text += " "

    counts = Counter(name.rpartition(".")[2] for name in layers)
    there = ", ".join(f"{name} ({n})" for name, n in counts.most_common(12)) or "none"
    text += f"Linear layers in the model: {there}."
    if out := heads(model):
        text += f" 'all-linear' leaves out the heads ({', '.join(sorted(out))})."
    return text
