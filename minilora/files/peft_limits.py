"""What other programs do not make of a saved adapter, said when it is saved.

minilora reads its own files whatever they hold. PEFT has rules of its own for some architectures,
and vLLM and llama.cpp serve A and B alone, with one scaling. Nothing here is refused: the adapter
may be trained already, and what it is for is not known.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from minilora.files.saved_whole import SavedWhole
from minilora.files.text import shown

# What follows is PEFT 0.21's, with transformers 5.24; a test compares it with what is installed.

# In these models PEFT refuses layers of these names (`_check_lora_target_modules_mamba`).
STATE_SPACE_MODELS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
STATE_SPACE_LAYERS = frozenset({"out_proj", "conv1d"})

# In these models it takes the names for those of experts, which transformers 5 holds in parameters
# of three dimensions (`_MOE_TARGET_MODULE_MAPPING`), wherever the layer stands.
EXPERTS: Mapping[str, frozenset[str]] = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
MODELS_WITH_EXPERTS: Mapping[str, frozenset[str]] = {
    "mixtral": frozenset({"mixtral", "minimax", "minimax_m2"}),
    "qwen2_moe": frozenset(
        {
            *("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
            *("qwen3_omni_moe_text", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
            *("Dots3NoteTextModel", "afmoe", "beam", "cohere2_moe", "ernie4_5_moe", "exaone_moe"),
            *("flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa"),
            *("hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "sarvam_mla", "solar_open"),
            "UnlimitedOcrTextModel",
        }
    ),
}


def warn_of_limits(
    model: nn.Module,
    names: Mapping[str, str],
    layers: Mapping[str, Any],
    config: Mapping[str, Any],
    whole: SavedWhole,
) -> None:
    """Warns, with names, of what PEFT does not load and of what vLLM and llama.cpp do not serve.

    Args:
        model: the model that was saved.
        names: `canonical_names(model)`.
        layers: the adapted layers by name.
        config: the adapter's config.
        whole: the parameters that were trained whole.
    """
    reasons = _not_in_peft(model, names, layers)
    if whole.shared:
        reasons.append(f"with {_listed(whole.shared)} it changes what is tied to it")
    if reasons:
        message = f"PEFT does not load this adapter as minilora does: {'; '.join(reasons)}"
        warnings.warn(message, stacklevel=3)
    if reasons := _not_served(config, whole):
        message = (
            f"vLLM and llama.cpp do not serve everything of this adapter: {'; '.join(reasons)}. "
            "minilora.merge makes a model that they serve"
        )
        warnings.warn(message, stacklevel=3)


def _not_in_peft(model: Any, names: Mapping[str, str], layers: Mapping[str, Any]) -> list[str]:
    """What PEFT does otherwise: with layers that have several names, and in some architectures."""
    reasons = []
    if others := _other_names(model, names, layers):
        reasons.append(
            f"a layer with several names has an adapter under the first, not {others[0]}"
        )

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    in_model = f"in a model of type {shown(model_type)} it"
    if model_type in STATE_SPACE_MODELS and (refused := _called(layers, STATE_SPACE_LAYERS)):
        reasons.append(f"{in_model} refuses {refused}")
    for kind, types in MODELS_WITH_EXPERTS.items():
        if model_type in types and (taken := _called(layers, EXPERTS[kind])):
            reasons.append(f"{in_model} takes {taken} for experts")
    return reasons


def _other_names(
    model: nn.Module, names: Mapping[str, str], layers: Mapping[str, Any]
) -> list[str]:
    """Where adapted layers also stand. PEFT puts another layer into the first place alone."""
    modules = {names[path]: m for path, m in model.named_modules(remove_duplicate=False)}

    def place(name: str) -> tuple[int, str]:
        parent, _, child = name.rpartition(".")
        return id(modules[parent]), child

    # In a block that is shared a layer has several names, and one place.
    adapted, first = set(map(id, layers.values())), set(map(place, layers))
    return sorted(n for n, m in modules.items() if id(m) in adapted and place(n) not in first)


def _not_served(config: Mapping[str, Any], whole: SavedWhole) -> list[str]:
    reasons = []
    if patterns := [option for option in ("rank_pattern", "alpha_pattern") if config[option]]:
        reasons.append(f"{' and '.join(patterns)}, of which they know r and lora_alpha alone")
    if whole.tensors:
        where = "modules_to_save" if config["modules_to_save"] else f"bias={config['bias']!r}"
        reasons.append(f"parameters that were trained whole ({where}: {_listed(whole.trained)})")
    if config.get("lora_bias"):
        reasons.append("lora_bias")
    return reasons


def _called(layers: Collection[str], ends: Collection[str]) -> str:
    """The layers whose name ends so, as a text; "" for none."""
    return _listed([name for name in layers if name.rpartition(".")[2] in ends])


def _listed(names: Collection[str]) -> str:
    first, more = sorted(names)[:2], len(names) - 2
    return ", ".join(map(shown, first)) + (f" and {more} more" if more > 0 else "")
