"""What `FinetuneConfig` refuses, by name and before anything is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from minilora.files.text import shown_value

# Setting -> smallest and largest value. The largest are far above what makes sense, and keep a
# typing error from filling the memory.
_INTEGERS = {
    "r": (1, 1 << 16),
    "steps": (1, 1 << 40),
    "batch_size": (1, 1 << 16),
    "grad_accum": (1, 1 << 16),
    "max_length": (1, 1 << 24),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "eval_every": (0, 1 << 40),
    "samples": (0, 1 << 10),
    "log_every": (1, 1 << 40),
    "save_every": (0, 1 << 40),
    "keep": (1, 1 << 20),
}
# Setting -> what the message says of it, and whether a value is right.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "alpha": ("positive and at most 1e9", lambda x: 0 < x <= 1e9),
    "lr": ("positive and at most 1e30", lambda x: 0 < x <= 1e30),
    "epochs": ("positive and at most 1e6", lambda x: 0 < x <= 1e6),
    "clip": ("positive and at most 1e30", lambda x: 0 < x <= 1e30),
    "weight_decay": ("at least 0 and at most 1e6", lambda x: 0 <= x <= 1e6),
    "dropout": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "eval_fraction": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "timeout": ("at least 5 and at most 1e6", lambda x: 5 <= x <= 1e6),
}
_PATHS = ("model", "data", "out", "eval_data")

# Of one optimizer step.
_MOST_EXAMPLES = 1 << 20


def check_settings(config: Any) -> None:
    """Raises ValueError, which names the setting, if one has another type or is out of range.

    Args:
        config: a `FinetuneConfig`.
    """
    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    optional = {f.name for f in fields(config) if f.default is None}
    flags = {f.name for f in fields(config) if isinstance(f.default, bool)}
    given = {
        name: value for name, value in settings.items() if value is not None or name not in optional
    }

    for name in _PATHS:
        if name in given:
            _check_path(name, given[name])
    for name in sorted(given.keys() & {*flags, "quantize", "checkpointing"}):
        if not isinstance(given[name], bool):
            raise _wrong(name, given[name], "True or False")
    _check_numbers(given)
    _check_targets(given["targets"])
    if not isinstance(given.get("device", ""), str):
        raise _wrong("device", given["device"], "the name of a device, such as cpu")
    _check_together(given)


def _wrong(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{name}={shown_value(value)}: must be {expected}")


def _check_path(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise _wrong(name, value, "a path as a string")
    if not value.strip() or "\0" in value:
        raise _wrong(name, value, "a path that is not empty and has no NUL character")


def _check_numbers(given: Mapping[str, Any]) -> None:
    for name in sorted(given.keys() & _INTEGERS):
        least, most = _INTEGERS[name]
        if type(given[name]) is not int:
            raise _wrong(name, given[name], "a whole number")
        if given[name] < least:
            raise _wrong(name, given[name], f"at least {least}")
        if given[name] > most:
            raise _wrong(name, given[name], f"at most {most:,}")

    # Written so that NaN is refused too.
    for name in sorted(given.keys() & _NUMBERS):
        value = given[name]
        expected, is_right = _NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, value, "a number")
        if not is_right(value):
            raise _wrong(name, value, expected)


def _check_targets(targets: object) -> None:
    names: Any = [targets] if isinstance(targets, str) else targets
    listed = isinstance(names, list | tuple) and len(names) > 0
    if not listed or not all(isinstance(name, str) and name.strip() for name in names):
        raise _wrong("targets", targets, "'all-linear' or names of layers")


def _check_together(given: Mapping[str, Any]) -> None:
    examples = given["batch_size"] * given["grad_accum"]
    if examples > _MOST_EXAMPLES:
        raise ValueError(
            f"batch_size={given['batch_size']} times grad_accum={given['grad_accum']} is "
            f"{examples:,} examples per step: must be at most {_MOST_EXAMPLES:,}"
        )
    if given["eval_every"] and not given["eval_fraction"] and "eval_data" not in given:
        raise ValueError(
            f"eval_every={given['eval_every']} and eval_fraction=0 contradict each other: hold out "
            "a part of the data, or give eval_data"
        )
    if given["resume"] and given["overwrite"]:
        raise ValueError(
            "resume and overwrite contradict each other: resume the run in the output folder, or "
            "start over"
        )
