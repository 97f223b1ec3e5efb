"""An adapter's folder is served by vLLM and by llama.cpp as it was trained, or a warning says not.

By the letter of their readers, which `adapter_readers` follows rule by rule.
"""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_readers import READERS, RefusedError, apply
from helpers import randomize
from torch import Tensor, nn

import minilora

IDS = torch.arange(24).reshape(2, 12) * 7 % 128

# As against PEFT: the update is added to the weight and not to the output.
TOLERANCE = 1e-5

SERVED: dict[str, dict[str, Any]] = {
    "all linear layers": {"r": 4, "alpha": 6},
    "the default": {},
    "attention": {"r": 16, "targets": ["q_proj", "v_proj"]},
    "one layer": {"r": 3, "targets": ["layers.1.mlp.down_proj"]},
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def trained(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return randomize(minilora.inject(model, **options), size=0.1)


def compare(reader: str, folder: Path, base: nn.Module, model: nn.Module) -> None:
    served = apply(copy.deepcopy(base), READERS[reader](folder, base.config))
    off = (logits(served) - logits(model)).abs().max()
    assert off < TOLERANCE * logits(model).abs().max(), reader
    assert (logits(base) - logits(model)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", SERVED)
def test_an_adapter_is_served_as_it_was_trained(
    case: str, tied: bool, reader: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama(tie_word_embeddings=tied)
    model = trained(copy.deepcopy(base), SERVED[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minilora.save_adapter(model, tmp_path / "adapter")
    compare(reader, tmp_path / "adapter", base, model)


@pytest.mark.parametrize("reader", READERS)
def test_an_adapter_of_a_quantized_base_is_served_on_the_dense_one(
    reader: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.quantize(tiny_llama())
    base = tiny_llama()
    for name, layer in model.named_modules():
        if isinstance(layer, minilora.NF4Linear):
            base.get_submodule(name).weight.data.copy_(layer.weight.dequantize())
    trained(model, {"r": 4})
    minilora.save_adapter(model, tmp_path / "adapter")
    compare(reader, tmp_path / "adapter", base, model)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_wrapped_model_gives_the_same_names(
    compiled: bool, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama()
    model = trained(copy.deepcopy(base), {"r": 4})
    wrapped = torch.compile(model, backend="eager") if compiled else nn.DataParallel(model)
    minilora.save_adapter(wrapped, tmp_path / "adapter")
    for reader in READERS:
        compare(reader, tmp_path / "adapter", base, model)


def test_the_config_says_what_the_readers_require(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = trained(tiny_llama(), {"r": 4, "alpha": 6})
    minilora.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 6, "none")
    # llama.cpp's converter finds the base by this key, if no --base is given.
    assert "base_model_name_or_path" in config
    assert not config.get("modules_to_save") and not config.get("use_dora")


@pytest.mark.parametrize(
    ("change", "reader", "message"),
    [
        ({"modules_to_save": ["norm"]}, "vLLM", "modules_to_save"),
        ({"use_dora": True}, "vLLM", "DoRA"),
        ({"bias": "all"}, "vLLM", "bias"),
        ({"r": 64}, "vLLM", "max_lora_rank"),
        ({"r": 2}, "vLLM", "buffer"),
        ({"lora_alpha": None}, "vLLM", "required"),
    ],
)
def test_the_readers_refuse_what_their_originals_refuse(
    change: dict[str, Any],
    reader: str,
    message: str,
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = trained(tiny_llama(), {"r": 4})
    minilora.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(RefusedError, match=message):
        READERS[reader](tmp_path / "adapter", model.config)
