"""adapter_config.json, PEFT's description of an adapter: what is written, read and refused."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files.json_file import read_json
from minilora.files.peft_values import check_values
from minilora.files.text import shown, shown_value
from minilora.targets import is_named

CONFIG = "adapter_config.json"

# Of a base: a path may be as long on Linux.
_LONGEST_NAME = 4096

# The options of PEFT 0.21's LoraConfig that `load_adapter` honours.
_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)

# Options that do not change the function computed by the saved tensors: how A and B were
# initialized, what the base model was. Any other option that is set belongs to a variant of LoRA
# and is refused.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

# These initializations move a part of the base's weights into the adapter. On the unchanged base
# such an A and B compute a different model.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def make_config(
    model: nn.Module,
    adapters: Mapping[str, Mapping[str, Any]],
    linear_layers: Collection[str],
    modules_to_save: Collection[str],
) -> dict[str, Any]:
    """Returns the contents of adapter_config.json.

    Args:
        model: the adapted model, for its class and the name that it was loaded from.
        adapters: layer name -> what the layer's adapter says of itself in PEFT's options. What
            most layers share with the first one is written once; ranks and alphas that differ
            from it become patterns.
        linear_layers: the names of all linear layers of the model.
        modules_to_save: modules that were trained whole, and parameters of the model itself.
    """
    shared = next(iter(adapters.values()))
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    causal = type(model).__name__.endswith("ForCausalLM")

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": source or None,
        "target_modules": _target_modules(adapters, linear_layers),
        "modules_to_save": sorted(modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **shared,
        "rank_pattern": _exceptions(adapters, "r", shared["r"]),
        "alpha_pattern": _exceptions(adapters, "lora_alpha", shared["lora_alpha"]),
    }


def _exceptions(
    adapters: Mapping[str, Mapping[str, Any]], option: str, usual: float
) -> dict[str, Any]:
    """The layers whose option differs from the usual value, as patterns that match nothing else."""
    return {
        "^" + re.escape(name): config[option]
        for name, config in adapters.items()
        if config[option] != usual
    }


def _target_modules(adapted: Collection[str], linear_layers: Collection[str]) -> list[str] | str:
    """Short names if they mean exactly the adapted layers, otherwise a pattern of full names."""
    short = sorted({name.rpartition(".")[2] for name in adapted})
    meant = {name for name in linear_layers if any(is_named(name, part) for part in short)}
    if meant == set(adapted):
        return short
    return "|".join(map(re.escape, sorted(adapted)))


def config_file(folder: Path) -> Path:
    """Returns the path of the config of the adapter in a folder.

    Raises:
        FileNotFoundError: it does not exist; the message says what there is instead of an adapter.
    """
    path, name = folder / CONFIG, shown(folder, _LONGEST_NAME)
    if path.is_file():
        return path
    if folder.is_dir():
        raise FileNotFoundError(
            f"{shown(path, _LONGEST_NAME)} does not exist: {name} holds no adapter"
        )
    if folder.exists():
        raise FileNotFoundError(f"'{name}' is a file: an adapter is the folder that holds {CONFIG}")
    raise FileNotFoundError(
        f"there is no folder '{name}': an adapter is loaded from a local folder (--adapter), not "
        "by a hub id"
    )


def read_base_name(folder: Path) -> str | None:
    """Returns the name of the base of the adapter in a folder; None: the config does not say.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the config is damaged, or what it names is no name.
    """
    path = config_file(folder)
    name = read_json(path).get("base_model_name_or_path")
    if name is None or name == "":
        return None
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"{path}: base_model_name_or_path is {shown_value(name)}, no model's name")
    return name


def read_config(path: Path, own_options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of an adapter_config.json, after a check of every value that is used.

    Args:
        path: the file.
        own_options: what an adapter of the expected class says of itself. A variant of LoRA has
            options that a plain adapter does not have, and the config must set them alike.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a LoRA adapter's config, has a value of another type or out of range,
            or sets an option that would change the function and that the adapter does not have.
    """
    config = read_json(config_file(path.parent))
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type is {shown(repr(kind))}, minilora reads 'LORA'")
    check_values(config, path)

    variant = {option: own_options[option] for option in own_options if option not in _READ}
    missing = {option: value for option, value in variant.items() if config.get(option) != value}
    if missing:
        raise ValueError(f"{path} is not of that class of adapter: no {_listed(missing)}")
    if refused := _refused_options(config, variant):
        raise ValueError(f"{path} sets options that minilora does not support: {_listed(refused)}")
    return config


def _refused_options(config: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    understood = _READ | _HARMLESS | variant.keys()
    refused = {
        option: value for option, value in config.items() if option not in understood and value
    }
    if refused.get("bias") == "none":
        del refused["bias"]

    initialization = config.get("init_lora_weights")
    if str(initialization).startswith(_MOVES_THE_BASE):
        refused["init_lora_weights"] = initialization
    return refused


def _listed(options: Mapping[str, Any]) -> str:
    listed = [f"{shown(option)}={shown(repr(value))}" for option, value in options.items()]
    more = f", and {len(listed) - 10} more" if len(listed) > 10 else ""
    return ", ".join(listed[:10]) + more
