"""A dense folder that is quantized file by file is what loading and saving it makes."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits

import minilora
from minilora.files.tensors import read_tensors

pytest.importorskip("transformers", reason="the folders are those of transformers models")


def tensors_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= read_tensors(path)[0]
    return found


@pytest.mark.parametrize("size", ["1GB", "100KB"], ids=["one file", "several"])
def test_the_tensors_are_those_of_loading_and_saving(
    size: str, folder: Path, tmp_path: Path
) -> None:
    from minilora.huggingface.dense_folder import quantize_folder

    model, tokenizer = minilora.load(folder)
    dense = tmp_path / "dense"
    model.save_pretrained(dense, max_shard_size=size)
    tokenizer.save_pretrained(dense)
    files = {path.name for path in dense.glob("*.safetensors")}
    assert (len(files) > 1) == (size == "100KB")

    found = quantize_folder(dense, tmp_path / "found")
    whole, _ = minilora.load(dense, quantization_config=minilora.NF4Config())
    expected = minilora.save_quantized(whole, tmp_path / "expected")
    tensors, theirs = tensors_of(found), tensors_of(expected)
    assert tensors.keys() == theirs.keys()
    assert [name for name, t in tensors.items() if not same_bits(t, theirs[name])] == []
    assert {path.name for path in found.glob("*.safetensors")} == files

    configs = [json.loads((at / "config.json").read_text()) for at in (found, expected)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again, its_tokenizer = minilora.load(found)
    assert its_tokenizer is not None
    assert all(same_bits(t, whole.state_dict()[name]) for name, t in again.state_dict().items())


def test_an_existing_target_is_left_alone(folder: Path, tmp_path: Path) -> None:
    from minilora.huggingface.dense_folder import quantize_folder

    with pytest.raises(ValueError, match=r"exists: choose another folder, or remove it"):
        quantize_folder(folder, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_quantized_in_the_dtype_that_was_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    from minilora.huggingface.dense_folder import quantize_folder

    half = torch.bfloat16
    found, _ = minilora.load(quantize_folder(folder, tmp_path / "found", dtype=half))
    config = minilora.NF4Config(compute_dtype=half)
    expected, _ = minilora.load(folder, quantization_config=config, dtype=half)
    state = expected.state_dict()
    assert [name for name, t in found.state_dict().items() if not same_bits(t, state[name])] == []
    # It matters: in float32 other weights are stored.
    full, _ = minilora.load(folder, quantization_config=minilora.NF4Config())
    name = "model.layers.0.mlp.up_proj.absmax2"
    assert not torch.equal(full.state_dict()[name], state[name])


def test_a_full_disk_is_not_taken_for_a_damaged_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minilora.huggingface import dense_folder

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dense_folder, "write_tensors", full)
    with pytest.raises(OSError, match=r"No space left"):
        dense_folder.quantize_folder(folder, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_tensors_transformers_converts_is_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from minilora.huggingface.dense_folder import quantize_folder

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "experts")
    message = r"transformers converts model\.layers\.0.*experts.*: load the whole model"
    with pytest.raises(ValueError, match=message):
        quantize_folder(tmp_path / "experts", tmp_path / "target")
    assert not (tmp_path / "target").exists()
