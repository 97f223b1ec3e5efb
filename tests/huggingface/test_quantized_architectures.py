"""Quantized models of many architectures: transformers with bitsandbytes reads all their tensors.

`make test` takes one architecture of each kind; `make soak` all of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import nn

pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("accelerate", reason="transformers loads 4-bit folders with it")

import transformers
from architectures import ARCHITECTURES, tiny_model
from safetensors.torch import load_file

import minilora
from minilora.huggingface.pretrained import load
from minilora.huggingface.quantized_folder import save_quantized, state_dict_of
from minilora.huggingface.quantizer import NF4Config
from minilora.targets import heads, kept_in_float32

# Of each kind the first, and those whose files have other names or splits than the model.
SAMPLE = {architecture.kind: name for name, architecture in reversed(ARCHITECTURES.items())}
RENAMED = ("DeepseekV3ForCausalLM", "Wav2Vec2ForCTC", "PaliGemmaForConditionalGeneration")


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    module = pytest.importorskip("bitsandbytes", reason="transformers loads 4-bit folders with it")
    with torch.compiler.set_stance("force_eager"):
        yield module


def check(name: str, bnb: Any, path: Path) -> int:
    """Saves the model in 4 bits and loads it again. Returns how many layers are in 4 bits."""
    model, _ = tiny_model(name)
    dense = heads(model) | kept_in_float32(model)
    model.requires_grad_(False)

    def is_chosen(layer: str, module: nn.Module) -> bool:
        return type(module) is nn.Linear and layer not in dense

    if not any(is_chosen(*item) for item in model.named_modules()):
        return 0
    minilora.quantize(model, is_chosen)
    loaded, found = type(model).from_pretrained(
        save_quantized(model, path / name), output_loading_info=True
    )
    assert not any(found.values()), (name, found)

    expected, state = state_dict_of(model), loaded.state_dict()
    assert state.keys() == expected.keys(), name
    for key, tensor in expected.items():
        # The text of a state may differ in its spaces.
        assert ".quant_state." in key or torch.equal(state[key], tensor), (name, key)

    layers = [n for n, m in model.named_modules() if isinstance(m, minilora.NF4Linear)]
    theirs = [n for n, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert theirs == layers, name
    return len(layers)


@pytest.mark.filterwarnings("ignore:.*matrices outside of linear layers")
@pytest.mark.parametrize("name", sorted({*SAMPLE.values(), *RENAMED}))
def test_a_sample_is_read_by_transformers_with_bitsandbytes(
    name: str, bnb: Any, tmp_path: Path
) -> None:
    assert check(name, bnb, tmp_path)


VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize("writer", ["save_pretrained", "save_quantized", "bitsandbytes"])
def test_4_bit_layers_that_have_other_names_in_the_files_are_read(
    writer: str, bnb: Any, tmp_path: Path
) -> None:
    """A ViT's files say vit.encoder.layer.0..., the model vit.layers.0...."""
    cls = transformers.ViTForImageClassification
    torch.manual_seed(0)
    cls(transformers.ViTConfig(**VIT)).save_pretrained(tmp_path / "dense")
    theirs_config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = writer == "bitsandbytes"
    config = theirs_config if theirs else NF4Config()
    made = cls.from_pretrained(tmp_path / "dense", quantization_config=config)
    if writer == "save_quantized":
        minilora.save_quantized(made, tmp_path / "saved")
    else:
        made.save_pretrained(tmp_path / "saved")
    files = load_file(tmp_path / "saved" / "model.safetensors")
    assert any(key.startswith("vit.encoder.layer.0.") for key in files)

    ours, _ = load(tmp_path / "saved")
    expected = cls.from_pretrained(tmp_path / "saved")
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, minilora.NF4Linear)}
    # bitsandbytes takes the head, too.
    assert len(layers) == (13 if theirs else 12) and "vit.layers.0.mlp.fc1" in layers
    for name, layer in layers.items():
        weight = expected.get_submodule(name).weight
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert same_bits(layer.weight.dequantize(), decoded)
    dense = {n: p for n, p in ours.named_parameters() if n.rpartition(".")[0] not in layers}
    assert all(same_bits(p, expected.get_parameter(n)) for n, p in dense.items()) and dense


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*matrices outside of linear layers")
def test_every_architecture_is_read_by_transformers_with_bitsandbytes(
    bnb: Any, tmp_path: Path
) -> None:
    layers = {name: check(name, bnb, tmp_path) for name in ARCHITECTURES}
    nothing = {name for name, count in layers.items() if not count}
    # Conv1D, and a linear layer of its own.
    assert nothing <= {"GPT2LMHeadModel", "GPT2ForSequenceClassification", "FalconForCausalLM"}
