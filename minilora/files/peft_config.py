"""adapter_config.json, PEFT's description of an adapter: what is written, read and refused."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files.json_file import read_json
from minilora.files.peft_targets import target_modules
from minilora.files.peft_values import check_values
from minilora.files.text import shown, shown_value

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
        "lora_bias",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "ensure_weight_tying",
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

# What an adapter of any class may say of itself. What else it says makes it a variant.
_PLAIN = frozenset({"r", "lora_alpha", "lora_dropout", "lora_bias"})

# Initializations that leave the base's weights as they are. Others (pissa, olora, corda, loftq,
# lora_ga) move a part of them into the adapter: on the unchanged base such an A and B compute a
# different model.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_CONVERT = (
    " (save it from PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which writes a plain LoRA for the unchanged base)"
)


def make_config(
    model: nn.Module,
    adapters: Mapping[str, Mapping[str, Any]],
    modules: Collection[str],
    modules_to_save: Collection[str] = (),
    bias: str = "none",
) -> dict[str, Any]:
    """Returns the contents of adapter_config.json.

    Args:
        model: the adapted model, for its class and the name that it was loaded from.
        adapters: layer name -> what the layer's adapter says of itself in PEFT's options. Ranks
            and alphas that differ from those of the first one become patterns.
        modules: the names of all modules of the model without adapters.
        modules_to_save: modules that were trained whole, and parameters of the model itself.
        bias: which biases were trained: "none", "lora_only" or "all".

    Raises:
        ValueError: the adapters differ in what a config says once for all of them.
    """
    shared = next(iter(adapters.values()))
    _check_alike(adapters)
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    causal = type(model).__name__.endswith("ForCausalLM")

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": source or None,
        "target_modules": target_modules(adapters, modules),
        "modules_to_save": sorted(modules_to_save) or None,
        "bias": bias,
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


def _check_alike(adapters: Mapping[str, Mapping[str, Any]]) -> None:
    (first, expected), *others = adapters.items()
    for name, config in others:
        for option in sorted({*expected, *config} - {"r", "lora_alpha"}):
            if config.get(option) != expected.get(option):
                values = f"{option} is {config.get(option)} for {name}"
                raise ValueError(
                    f"{values} and {expected.get(option)} for {first}: an adapter's files say it "
                    "once for all layers. Save the layers as two adapters"
                )


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

    variant = {option: own_options[option] for option in own_options if option not in _PLAIN}
    missing = {option: value for option, value in variant.items() if config.get(option) != value}
    if missing:
        raise ValueError(f"{path} is not of that class of adapter: no {_listed(missing)}")
    if refused := _refused_options(config, variant):
        raise ValueError(
            f"{path} sets options that minilora does not support: {_listed(refused)}"
            + (_CONVERT if "init_lora_weights" in refused else "")
        )
    return config


def _refused_options(config: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    # A plain adapter can have any scaling; what a variant makes of it is not known.
    understood = (_READ - ({"use_rslora"} if variant else set())) | _HARMLESS | variant.keys()
    refused = {
        option: value for option, value in config.items() if option not in understood and value
    }
    start = config.get("init_lora_weights")
    known = isinstance(start, str | bool | None) and (
        (start.lower() if isinstance(start, str) else start) in _INITIALIZATIONS
    )
    if start and not known:
        refused["init_lora_weights"] = start
    return refused


def _listed(options: Mapping[str, Any]) -> str:
    listed = [f"{shown(option)}={shown(repr(value))}" for option, value in options.items()]
    more = f", and {len(listed) - 10} more" if len(listed) > 10 else ""
    return ", ".join(listed[:10]) + more
