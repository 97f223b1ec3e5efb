"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors, written and read without peft.

Loading is strict. A key that is missing, left over or misshapen, an option in the config that is not ours, an adapter that
would change nothing: each is an error with names, because each has been a silent wrong result elsewhere.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files.atomic import atomic, partial
from minilora.files.tensors import read_tensors, write_tensors
from minilora.layers import LoRALinear
from minilora.surgery import AdapterSpec, Model, adapters, attach
from minilora.targets import LINEAR, is_named, sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HASH, _SUM, _NAME = "adapter_config_sha256", "tensors_sha256", "minilora_name"

# PEFT's LoraConfig (0.21): what is read here, and what says nothing about the function that the saved tensors compute.
# Any other option that is set means a variant that we do not have.
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
}
_HARMLESS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
    ),
    *(
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
    ),
    *(
        "runtime_config",
        "target_modules",
        "task_type",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),
}

# These starts take a part of the base's weights into the adapter: on the base as it was, A and B compute another model.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def canonical(name: str) -> str:
    """Returns a module's or parameter's name without what compile, DDP, FSDP and PEFT put around it."""
    name = name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
    while True:
        for prefix in (_PREFIX, "module."):
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        else:
            return name


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Writes the adapter, and what `train_also` trained, as a folder that PEFT and `load_adapter` read.

    Both files are written under another name first: a full disk or a kill leaves the old ones whole. The weights carry a
    hash of their config and one of themselves.

    Args:
        model: an injected model. What is trained is written in the dtype that it has, the adapters in float32.
        path: the folder; it is made if it is not there.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no adapter.
        OSError: the disk is full or the folder cannot be written to; files that were there stay.

    Example:
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> sorted(p.name for p in save_adapter(model, tmp / "adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    layers = {canonical(n): layer for n, layer in adapters(model).items()}
    if not layers:
        raise ValueError("the model has no adapter to save: minilora.inject first")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    whole = _trained_whole(model)
    tensors |= {_PREFIX + name: p for name, p in whole.items()}
    config = _config(model, layers, sorted({name.rpartition(".")[0] for name in whole} - {""}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / CONFIG, folder / WEIGHTS) as (config_file, weights_file):
        config_file.write_text(text)
        name = next(iter(layers.values())).adapter_name
        write_tensors(
            weights_file,
            tensors,
            {_HASH: _sha256(text.encode()), _SUM: _checksum(tensors), _NAME: name},
        )
    return folder


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """safetensors has none of its own: a flipped bit in a weight would load without a word.

    Of copies: `tensor.numpy()` makes the storage it shares non-resizable for good, which FSDP2 does not survive.
    """
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(
            tensors[key]
            .detach()
            .cpu()
            .contiguous()
            .clone()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    return total.hexdigest()


def _trained_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters that are no adapter's: those of `train_also`."""
    ours = {id(p) for layer in adapters(model).values() for p in (layer.lora_A, layer.lora_B)}
    return {
        canonical(n): p
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in ours
    }


def _config(model: nn.Module, layers: dict[str, LoRALinear], whole: list[str]) -> dict[str, Any]:
    first = next(iter(layers.values()))
    last_parts = sorted({name.rpartition(".")[2] for name in layers})
    linear = {canonical(n) for n in sites(model, LINEAR)}
    exact = {n for n in linear if any(is_named(n, part) for part in last_parts)} == set(layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None)
        or None,
        "r": first.r,
        "lora_alpha": first.alpha,
        "rank_pattern": {
            "^" + re.escape(n): layer.r for n, layer in layers.items() if layer.r != first.r
        },
        "alpha_pattern": {
            "^" + re.escape(n): layer.alpha
            for n, layer in layers.items()
            if layer.alpha != first.alpha
        },
        "lora_dropout": first.dropout,
        "target_modules": last_parts if exact else "|".join(map(re.escape, sorted(layers))),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def load_adapter(model: Model, path: str | Path, *, allow_zero: bool = False) -> Model:
    """Reads an adapter that `save_adapter` or PEFT wrote, injecting it first where the model has none.

    Args:
        model: the base, dense or quantized; or a model with an adapter of the same layers and ranks, which is overwritten.
        path: the folder.
        allow_zero: accept an adapter whose every B is zero (one that was never trained).

    Returns:
        The model.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: the config asks for what minilora does not have; the tensors do not fit the model (the first mismatches are
            named); a file is damaged, or the two do not belong together; every B is zero. The model is as it was.

    Example:
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> folder = save_adapter(minilora.inject(make(), r=4), tmp / "a")
        >>> load_adapter(make(), folder, allow_zero=True)[0].r
        4
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG)
    tensors, metadata = read_tensors(folder / WEIGHTS)
    config_hash, unfinished = _sha256((folder / CONFIG).read_bytes()), partial(folder / WEIGHTS)
    if (
        metadata.get(_HASH, config_hash) != config_hash and unfinished.is_file()
    ):  # killed between the two renames
        tensors, metadata = read_tensors(unfinished)
    if metadata.get(_SUM, None) not in (None, _checksum(tensors)):
        raise ValueError(
            f"{folder / WEIGHTS} is damaged: its weights are not those that were saved; copy or save it again"
        )
    if metadata.get(_HASH, config_hash) != config_hash:
        raise ValueError(
            f"{folder / CONFIG} is not the config that {WEIGHTS} was saved with: restore it, or save the adapter again"
        )
    A, B, whole = _sort(tensors, folder / WEIGHTS)
    if B and not allow_zero and not any(bool(b.any()) for b in B.values()):
        raise ValueError(
            f"every B in {folder / WEIGHTS} is zero: the adapter changes nothing (allow_zero=True to load it)"
        )
    actual = {canonical(n): n for n, _ in model.named_modules()}
    problems = _mismatches(model, A, B, whole)
    if problems:
        shown = "; ".join(problems[:5]) + (
            f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise ValueError(f"{folder} does not fit this {type(model).__name__}: {shown}")
    held = {canonical(n): layer for n, layer in adapters(model).items()}
    if not held:
        dropout = float(config.get("lora_dropout") or 0)
        attach(
            model,
            {actual[n]: AdapterSpec(a.shape[0], _alpha(config, n), dropout) for n, a in A.items()},
        )
        held = {canonical(n): layer for n, layer in adapters(model).items()}
    parameters = {canonical(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, layer in held.items():
            layer.alpha = _alpha(config, name)
            layer.scale = layer.alpha / layer.r
            layer.dropout = float(config.get("lora_dropout") or 0)
            layer.adapter_name = metadata.get(_NAME, "default")
            layer.lora_A.copy_(A[name])
            layer.lora_B.copy_(B[name])
        for name, tensor in whole.items():
            parameters[name].copy_(tensor)
            parameters[name].requires_grad_(True)
    return model


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {path.parent} holds no adapter")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no peft_type: it is no adapter's config")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, minilora reads 'LORA'")
    foreign = {
        k: v
        for k, v in config.items()
        if k not in _READ | _HARMLESS and v and not (k == "bias" and v == "none")
    }
    if str(config.get("init_lora_weights")).startswith(_MOVES_THE_BASE):
        foreign["init_lora_weights"] = config["init_lora_weights"]
    if foreign:
        raise ValueError(
            f"{path} asks for what minilora does not have: "
            + ", ".join(f"{k}={v!r}" for k, v in foreign.items())
        )
    return config


def _alpha(config: dict[str, Any], name: str) -> float:
    """A layer's alpha: the first of the patterns, which match the end of its name, or the alpha of all."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(config.get("lora_alpha", 8))


def _sort(
    tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Returns (A by layer, B by layer, whole parameters by name)."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = canonical(key)
        for suffix, kind in ((".lora_A.weight", A), (".lora_B.weight", B)):
            if name.endswith(suffix):
                kind[name.removesuffix(suffix)] = tensor
                break
        else:
            whole[name.replace(".base_layer.", ".")] = (
                tensor  # PEFT saves a copy of an embedding that has an adapter
            )
    if not A or A.keys() != B.keys():
        odd = sorted(A.keys() ^ B.keys())
        raise ValueError(
            f"{path} is no LoRA adapter: "
            + (f"A without B, or B without A, for {odd[0]}" if odd else "it has no A and B")
        )
    return A, B, whole


def _mismatches(
    model: nn.Module, A: dict[str, Tensor], B: dict[str, Tensor], whole: dict[str, Tensor]
) -> list[str]:
    found: list[str] = []
    layers = {canonical(n): site.layer for n, site in sites(model, LINEAR).items()}
    held = {n for n, layer in layers.items() if isinstance(layer, LoRALinear)}
    for name in A:
        layer = layers.get(name)
        if layer is None:
            found.append(f"the model has no linear layer {name}")
        elif held and name not in held:
            found.append(f"{name} has no adapter in the model")
        else:
            r = layer.r if isinstance(layer, LoRALinear) else A[name].shape[0]
            want = (r, layer.in_features), (layer.out_features, r)
            if (tuple(A[name].shape), tuple(B[name].shape)) != want:
                found.append(
                    f"{name}: the file has A {list(A[name].shape)} and B {list(B[name].shape)}, the model's layer is {layer}"
                )
    found += [
        f"the file has nothing for {name}, which has an adapter" for name in sorted(held - A.keys())
    ]
    parameters = {canonical(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    for name, tensor in whole.items():
        if name not in parameters:
            found.append(f"the model has no parameter {name}")
        elif parameters[name].shape != tensor.shape:
            found.append(
                f"{name}: the file has {list(tensor.shape)}, the model {list(parameters[name].shape)}"
            )
    return found
