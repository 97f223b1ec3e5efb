"""Names of modules and parameters without what wrappers add to them.

torch.compile, DDP, FSDP and others put a module around a model, and with it a part in front of
every name. In a model a wrapper is known by its type, so that a child which happens to be called
"module" keeps its name. In a file there are only names: there a part is a wrapper's where wrappers
put it, and only if what is left is a name of the model.
"""

import sys
from collections.abc import Collection, Iterable, Iterator

from torch import nn

# PEFT's model around the base model, the beginning of each key that it writes.
PEFT_PREFIX = "base_model.model."

# Wrappers: the module that defines the class, the class, the child that is wrapped. A class whose
# module was never imported has no instances, so nothing is imported to look for them.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("peft.peft_model", "PeftModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
)

# Nothing but a wrapper calls its only child so, a module with children of its own.
_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# What may stand before the names of a file, in any order and number.
_PREFIXES = (PEFT_PREFIX, "module.", *(f"{part}." for part in _PRIVATE))


def canonical_names(model: nn.Module) -> dict[str, str]:
    """The name without wrappers of each module and parameter, by its name in the model.

    Raises:
        ValueError: two modules or parameters would have the same name; both are named.

    Example:
        >>> model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 2)))
        >>> canonical_names(model)["module.0.weight"]
        '0.weight'
    """
    names: dict[str, str] = {}
    distinct: list[str] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    wrapped = {name: _wrapped_child(module) for name, module in modules.items()}
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        inside = path != "" and wrapped[parent] == child
        names[path] = names[parent] if inside else _join(names.get(parent, ""), child)
        held = {
            _join(path, n): _join(names[path], n) for n in (*module._parameters, *module._buffers)
        }
        names |= held
        if wrapped[path] is None:
            distinct += [path, *held]

    found: dict[str, str] = {}
    for path in distinct:
        first = found.setdefault(names[path], path)
        if first != path:
            both = f"{first} and {path} are both {names[path]!r}"
            raise ValueError(f"without the model's wrappers {both}: rename one of them")
    return names


def _wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that a wrapper wraps; None: the module is no wrapper."""
    for where, kind, child in _WRAPPERS:
        cls = getattr(sys.modules.get(where), kind, None)
        if cls is not None and isinstance(module, cls) and child in module._modules:
            return child
    if len(module._modules) != 1:
        return None
    ((only, inner),) = module._modules.items()
    return only if only in _PRIVATE and inner is not None and inner._modules else None


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def names_in_file(keys: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The canonical name that each key of a file means.

    Args:
        keys: names of modules and parameters, as they stand in the file.
        known: the canonical names that the model has. A key that means none of them loses PEFT's
            prefix alone.

    Example:
        >>> names_in_file(["base_model.model.module.up"], {"module.up", "up"})
        {'base_model.model.module.up': 'module.up'}
    """
    keys, known = list(keys), set(known)
    # One prefix for the whole file if there is one that fits, otherwise one for each key.
    for prefix in _prefixes(keys):
        names = {key: _name(key.removeprefix(prefix), known) for key in keys}
        if known.issuperset(names.values()):
            return names
    return {key: _name_of_key(key, known) for key in keys}


def _name_of_key(key: str, known: Collection[str]) -> str:
    for prefix in _prefixes([key]):
        if (name := _name(key.removeprefix(prefix), known)) in known:
            return name
    return _name(key.removeprefix(PEFT_PREFIX), known)


def _prefixes(keys: list[str]) -> Iterator[str]:
    """What may stand before all these keys: first with PEFT's prefix in it, shorter ones first."""
    found = [""]
    while more := [found[-1] + p for p in _PREFIXES if keys and _all_begin(keys, found[-1] + p)]:
        found += more
    yield from sorted(found, key=lambda p: PEFT_PREFIX not in p)


def _all_begin(keys: list[str], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def _name(name: str, known: Collection[str]) -> str:
    """A name of the model as it is; without what stands inside it if that makes no name of it."""
    if name in known:
        return name
    parts = [part for part in name.split(".") if part not in _PRIVATE]
    # In PEFT's models a layer with an adapter is the child of what took its place.
    if parts[-2:-1] == ["base_layer"] and ".".join(parts) not in known:
        del parts[-2]
    return ".".join(parts)
