"""How vLLM and llama.cpp read a PEFT adapter, rule by rule, without either of them.

Written from their sources: vllm/lora/peft_helper.py, utils.py and lora_model.py; and
convert_lora_to_gguf.py of llama.cpp, with the scale that llama.cpp then applies. Each reader
returns what it would add to the weights, and refuses what its original refuses.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Module name -> the update of its weight [out, in], float64.
Updates = dict[str, Tensor]

PREFIX = "base_model.model."

# The linear layers of vLLM's Llama, and the parts of those that it fuses (its packed modules).
VLLM_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

# vLLM's default of --max-lora-rank.
VLLM_MAX_RANK = 16

# The tensors of a layer that llama.cpp's converter has a name for, in a Llama.
LLAMA_CPP_LINEAR = VLLM_LINEAR


class RefusedError(Exception):
    """The original would raise, or exit, with this message."""


def read_as_vllm(folder: Path) -> Updates:
    config = _config(folder)
    missing = {"r", "lora_alpha", "target_modules"} - config.keys()
    if missing:
        raise RefusedError(f"missing required configuration fields: {missing}")
    if config.get("modules_to_save"):
        raise RefusedError("only modules_to_save being None is supported")
    if config.get("use_dora"):
        raise RefusedError("DoRA is not supported")
    if config.get("bias", "none") != "none":
        raise RefusedError("adapter bias is not supported")
    if config["r"] > VLLM_MAX_RANK:
        raise RefusedError(f"rank {config['r']} is greater than max_lora_rank")

    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise RefusedError(f"{name} is an unsupported LoRA weight")
        # "base_model.model." is two parts, wherever in the name it stands.
        module = ".".join(parts[2 if PREFIX in name else 0 : -2])
        if module.rpartition(".")[2] not in VLLM_LINEAR:
            raise RefusedError(f"unexpected target module {module}")
        found.setdefault(module, {})[parts[-2]] = tensor.double()

    # One scale for all layers: rank_pattern and alpha_pattern are not among the fields it reads.
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    for module, pair in found.items():
        if pair["lora_A"].shape[0] > config["r"]:
            raise RefusedError(f"{module} does not fit the buffer of rank {config['r']}")
    scale = config["lora_alpha"] / root
    return {m: scale * pair["lora_B"] @ pair["lora_A"] for m, pair in found.items()}


def read_as_llama_cpp(folder: Path, base: Any) -> Updates:
    """`base` is the config of the model: with tied weights there is no output tensor."""
    config = _config(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        kinds = [k for k in ("lora_A", "lora_B") if f".{k}.weight" in name]
        if not kinds:
            raise RefusedError(f"unexpected name {name}: neither lora_A nor lora_B")
        module = name.replace(PREFIX, "").replace(f".{kinds[0]}.weight", "")
        found.setdefault(module, {})[kinds[0]] = tensor.double()

    updates = {}
    for module, pair in found.items():
        if pair.keys() != {"lora_A", "lora_B"}:
            raise RefusedError(f"{module} has only one of lora_A and lora_B")
        if module == "lm_head" and base.tie_word_embeddings:
            raise RefusedError(
                "lm_head is present in the adapter, but is ignored in the base model"
            )
        last = module.rpartition(".")[2]
        if module != "lm_head" and (
            not module.startswith("model.layers.") or last not in VLLM_LINEAR
        ):
            raise RefusedError(f"can not map tensor {module}.weight")
        # The rank of each tensor, and one alpha for all: use_rslora is not read.
        scale = config["lora_alpha"] / pair["lora_B"].shape[-1]
        updates[module] = scale * pair["lora_B"] @ pair["lora_A"]
    return updates


READERS: dict[str, Callable[[Path, Any], Updates]] = {
    "vLLM": lambda folder, base: read_as_vllm(folder),
    "llama.cpp": read_as_llama_cpp,
}


@torch.no_grad()
def apply(model: nn.Module, updates: Updates) -> nn.Module:
    """The model with the updates added to its weights."""
    for module, update in updates.items():
        weight = model.get_submodule(module).weight
        weight.copy_((weight.double() + update).to(weight.dtype))
    return model


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found
