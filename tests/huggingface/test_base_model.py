"""load_base: the bits of quantizing afterwards, without the memory; 4-bit folders as they are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers_folders import make_folder, store_in_4bit

import minilora
from minilora.huggingface import load_dense
from minilora.huggingface.base_model import load_base, local_folder, stored_in_4bit
from minilora.huggingface.provenance import decide_quantize

OPTIONS: list[dict[str, Any]] = [{}, {"quant_type": "fp4", "double_quant": False}]


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits, with its tokenizer."""
    return store_in_4bit(folder, tmp_path_factory.mktemp("4bit") / "model")


def same_state(found: Any, expected: Any) -> bool:
    a, b = found.state_dict(), expected.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("options", OPTIONS, ids=["nf4", "fp4"])
def test_a_base_quantized_while_it_is_read_has_the_bits_of_one_quantized_afterwards(
    folder: Path, options: dict[str, Any]
) -> None:
    dense, _ = load_dense(folder)
    model, tokenizer = load_base(folder, quantize=options)
    assert same_state(model, minilora.quantize(dense, **options))
    assert not model.training and tokenizer is not None
    assert model.config._name_or_path == dense.config._name_or_path
    kinds = {type(m) for m in model.model.layers.modules() if hasattr(m, "in_features")}
    assert kinds == {minilora.NF4Linear}


def test_without_options_a_base_is_as_it_is_stored(folder: Path, stored: Path) -> None:
    dense = load_dense(folder)[0]
    assert not stored_in_4bit(folder) and stored_in_4bit(stored)
    assert same_state(load_base(folder, quantize=None)[0], dense)
    expected = minilora.quantize(dense)
    for options in (None, *OPTIONS):
        assert same_state(load_base(stored, quantize=options)[0], expected)


def test_a_dense_base_that_is_stored_in_4_bits_is_refused(stored: Path) -> None:
    with pytest.raises(ValueError, match=r"stored in 4 bits.*--no-quantize"):
        load_base(stored, quantize=None, dense=True)


def test_no_layer_is_dense_while_another_one_is_quantized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minilora.huggingface.quantizer import NF4Quantizer

    quantize, seen = NF4Quantizer.quantize_tensors, []

    def spy(self: Any, model: Any, tensors: Any, missing: Any) -> Any:
        layers = [m for m in model.model.layers.modules() if type(m) is nn.Linear]
        seen.append(sum(not m.weight.is_meta for m in layers))
        return quantize(self, model, tensors, missing)

    monkeypatch.setattr(NF4Quantizer, "quantize_tensors", spy)
    load_base(folder, quantize={})
    assert seen == [0] * 14


@pytest.mark.parametrize("name", ["t5", "bert, two labels", "llava, renamed"])
def test_what_is_no_causal_language_model_is_refused(name: str, tmp_path: Path) -> None:
    path = make_folder(tmp_path / "model", name)
    for quantize in (None, {}):
        with pytest.raises(ValueError, match="as a causal language model"):
            load_base(path, quantize=quantize)


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "model")
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_base(path, quantize={})


def test_a_merged_model_that_was_quantized_since_needs_no_choice() -> None:
    record = {"merged": True, "base": "b", "adapter": "a", "quantized": True}
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert decide_quantize(None, {"minilora": record, **quantized}, "m")
    with pytest.raises(ValueError, match="is a merged model"):
        decide_quantize(None, {"minilora": record}, "m")


# Loads a base in a process of its own, and says how much its memory grew at most, in MB.
_GROWTH = """
import gc, sys, torch
import transformers.models.llama.modeling_llama
import minilora, minilora.huggingface.quantizer
from minilora.huggingface import load_dense
from minilora.huggingface.base_model import load_base
from torch import nn

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024

minilora.quantize(nn.Sequential(nn.Linear(64, 64)))
path, way = sys.argv[1:]
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model, _ = load_base(path, quantize={}) if way == "base" else load_dense(path)
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_base_never_takes_the_memory_of_the_dense_model(folder: Path, tmp_path: Path) -> None:
    """Of 144 MB in bfloat16, 24 layers of 6 MB: 41 MB in 4 bits, and one dense layer in float32."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=258)
    path = tmp_path / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    config_file = path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"dtype": "bfloat16"}))

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _GROWTH, str(path), "base"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, held = map(float, done.stdout.split())
    dense = 2 * 6 * (4 * 1024 * 1024 + 3 * 1024 * 3072) / 2**20
    assert held < 0.35 * dense
    # What is kept, 64 MB of the file's pages, a layer in float32 and its codes before packing, and
    # the allocator's slack.
    layer = 1024 * 3072 / 2**20
    assert peak < held + 64 + (4 + 1 + 2) * layer + 24 < dense + held


def test_the_folder_of_a_model_is_on_this_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_folder(folder) == folder
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0a1b"
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_folder("owner/name").samefile(snapshot)
    with pytest.raises(ValueError, match=r"^owner/other cannot be loaded as a causal language mod"):
        local_folder("owner/other")
