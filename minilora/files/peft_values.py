"""What a PEFT config says of each layer and parameter, and a check of every value that is used."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minilora.files.patterns import Patterns
from minilora.files.text import shown
from minilora.targets import is_named

# PEFT's, for a config that leaves them out.
_RANK, _ALPHA = 8, 8

# Above it, the scaling alpha / r is infinite in float32.
_LARGEST = torch.finfo(torch.float32).max


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _dict_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _names_or_pattern(value: Any) -> bool:
    return _is_name(value) or _list_of(_is_name)(value)


def _layer_indices(value: Any) -> bool:
    return type(value) is int or _list_of(lambda item: type(item) is int)(value)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


# Option -> its check, and what it has to be. None stands for the default.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1"),
    "lora_alpha": (_is_alpha, "a positive, finite number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a probability below 1"),
    "lora_bias": (_is_flag, "true or false"),
    "use_rslora": (_is_flag, "true or false"),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "rank_pattern": (_dict_of(_is_rank), "a dict of whole numbers from 1"),
    "alpha_pattern": (_dict_of(_is_alpha), "a dict of positive, finite numbers"),
    "modules_to_save": (_list_of(_is_name), "a list of names"),
    "target_modules": (_names_or_pattern, "a list of names, or a pattern"),
    "exclude_modules": (_names_or_pattern, "a list of names, or a pattern"),
    "layers_to_transform": (_layer_indices, "a whole number, or a list of them"),
    "layers_pattern": (_names_or_pattern, "a name, or a list of names"),
}


def check_values(config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError, which names the option, unless all options that are used are valid."""
    for option, (is_valid, expected) in _VALUES.items():
        value = config.get(option)
        if value is not None and value != [] and not is_valid(value):
            raise ValueError(f"{path}: {option} is {shown(repr(value))}, not {expected}")


class ConfigReader:
    """What a checked config says, as PEFT 0.21 would take it.

    Args:
        config: what `read_config` returned.
        path: the file, for errors about patterns.

    Raises:
        ValueError: the methods do, if a pattern is invalid or takes too long to match.
    """

    def __init__(self, config: Mapping[str, Any], path: str | Path = "adapter_config.json") -> None:
        self._patterns = Patterns(path)
        self._config = {option: value for option, value in config.items() if value is not None}

    @property
    def dropout(self) -> float:
        """The dropout on the adapters' input."""
        return float(self._config.get("lora_dropout", 0))

    @property
    def lora_bias(self) -> bool:
        """Whether B has a bias."""
        return bool(self._config.get("lora_bias", False))

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is alpha / sqrt(r) (arXiv:2312.03732)."""
        return bool(self._config.get("use_rslora", False))

    @property
    def bias(self) -> str:
        """Which biases of the model were trained: "none", "lora_only" or "all"."""
        return str(self._config.get("bias", "none"))

    @property
    def ties_weights(self) -> bool:
        """Whether what is tied to a module of `modules_to_save` was trained with it."""
        return bool(self._config.get("ensure_weight_tying", False))

    @property
    def modules_to_save(self) -> list[str]:
        """The modules, and parameters of the model itself, that were trained whole."""
        return list(self._config.get("modules_to_save", []))

    def rank(self, layer: str) -> int:
        """A layer's rank."""
        return int(self._usual_or_pattern("r", "rank_pattern", _RANK, layer))

    def alpha(self, layer: str) -> float:
        """A layer's alpha: that of the first pattern that matches, or the adapter's.

        A pattern matches a full name or a dotted end of it.
        """
        return float(self._usual_or_pattern("lora_alpha", "alpha_pattern", _ALPHA, layer))

    def _usual_or_pattern(self, option: str, patterns: str, default: int, layer: str) -> Any:
        for pattern, value in self._config.get(patterns, {}).items():
            if self._patterns.match_end(pattern, layer):
                return value
        return self._config.get(option, default)

    def names_targets(self) -> bool:
        """Whether the config says which layers have an adapter."""
        targets = self._config.get("target_modules", [])
        return targets != [] and not (isinstance(targets, str) and targets.lower() == "all-linear")

    def targets(self, layer: str) -> bool:
        """Whether `target_modules` means a layer, and no other option leaves it out."""
        target_modules = self._config["target_modules"]
        excluded = self._config.get("exclude_modules", [])
        if not self._is_meant(layer, target_modules) or self._is_meant(layer, excluded):
            return False
        # PEFT gives no adapter to what it saves whole.
        if any(f".{module}." in f".{layer}." for module in self.modules_to_save):
            return False
        if isinstance(target_modules, str) or layer in target_modules:
            return True
        return self._has_index(layer)

    def _is_meant(self, layer: str, names: str | list[str]) -> bool:
        if isinstance(names, str):
            return self._patterns.match_whole(names, layer)
        return any(is_named(layer, name) for name in names)

    def _has_index(self, layer: str) -> bool:
        """Whether the layer is in one of the blocks of `layers_to_transform`."""
        wanted = self._config.get("layers_to_transform", [])
        wanted = [wanted] if isinstance(wanted, int) else wanted
        if not wanted:
            return True
        patterns = self._config.get("layers_pattern") or [None]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (self._patterns.index_after(pattern, layer) for pattern in patterns)
        return next((index for index in found if index is not None), None) in wanted

    def saves(self, parameter: str) -> bool:
        """Whether `modules_to_save` means a parameter."""
        return any(saves(module, parameter) for module in self.modules_to_save)


def saves(module: str, parameter: str) -> bool:
    """Whether an entry of `modules_to_save` means a parameter: it, or a module that holds it.

    PEFT takes every module whose name *ends* in the entry: "norm" means "input_norm" too.
    """
    parts = parameter.split(".")
    holders = (".".join(parts[:i]) for i in range(1, len(parts)))
    return is_named(parameter, module) or any(holder.endswith(module) for holder in holders)
