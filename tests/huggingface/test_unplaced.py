"""What a checkpoint has and a model has not is refused, or the head of another task."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits

import minilora

pytest.importorskip("transformers", reason="the quantizer is transformers'")
pytest.importorskip("accelerate", reason="transformers places layers with it")

import transformers
from safetensors.torch import load_file, save_file
from transformers_folders import MODELS, logits, make_folder

from minilora.huggingface.quantizer import NF4Config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    kinds = ("llama", "qwen2, with biases", "gpt_neox, embed_out", "llava, renamed")
    made = {name: make_folder(root / str(i), name) for i, name in enumerate(kinds)}
    made["llama, shards"] = make_folder(root / "shards", "llama", shards=True)
    return made


def read(folder: Path, kind: str = "llama", **options: Any) -> Any:
    cls = getattr(transformers, MODELS[kind][0])
    return cls.from_pretrained(folder, quantization_config=NF4Config(), **options)


def add(path: Path, **tensors: torch.Tensor) -> None:
    file = path / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.up_proj.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_without_a_place_in_a_block_is_refused(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    add(folder, **{name: torch.ones(64)})
    with pytest.raises(ValueError, match=rf"no place for {name} of the checkpoint"):
        read(folder)


def test_another_architectures_biases_and_surplus_layers_are_refused(
    folders: dict[str, Path],
) -> None:
    llama = transformers.AutoConfig.from_pretrained(folders["llama"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.bias \(and 5 more\)"):
        read(folders["qwen2, with biases"], config=llama)
    llama.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"no place for model\.layers\.1\..* \(and 8 more\)"):
        read(folders["llama, shards"], config=llama)


def test_biases_of_renamed_layers_are_refused_by_their_names_in_the_file(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["llava, renamed"], tmp_path / "model"))
    name = "language_model.model.layers.0.mlp.up_proj.bias"
    assert name.replace("bias", "weight") in load_file(folder / "model.safetensors")
    add(folder, **{name: torch.ones(128)})
    with pytest.raises(ValueError, match=f"no place for {name} of the checkpoint"):
        read(folder, "llava, renamed")


@pytest.mark.parametrize("cls", ["LlamaModel", "LlamaForSequenceClassification"])
def test_the_head_of_another_task_is_left_out(cls: str, folders: dict[str, Path]) -> None:
    model = getattr(transformers, cls).from_pretrained(
        folders["llama"], quantization_config=NF4Config()
    )
    assert any(isinstance(m, minilora.NF4Linear) for m in model.modules())


def test_a_part_of_another_tasks_head_is_left_out(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "is_decoder": True}
    made = transformers.BertForPreTraining(transformers.BertConfig(**sizes, **heads))
    made.save_pretrained(tmp_path / "model")
    assert "cls.seq_relationship.bias" in load_file(tmp_path / "model" / "model.safetensors")
    cls = transformers.BertLMHeadModel
    model = cls.from_pretrained(tmp_path / "model", quantization_config=NF4Config())
    expected = made.cls.predictions.transform.dense.weight
    assert same_bits(model.cls.predictions.transform.dense.weight, expected)


def test_what_transformers_ignores_or_computes_is_left_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    add(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert same_bits(logits(read(folder)), logits(read(folders["llama"])))

    cls = transformers.GPTNeoXForCausalLM
    kind = "gpt_neox, embed_out"
    folder = Path(shutil.copytree(folders[kind], tmp_path / "neox"))
    add(folder, **{"gpt_neox.layers.0.attention.masked_bias": torch.ones(())})
    assert type(read(folder, kind)) is cls

    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    types = [[["global"], 2]]
    neo = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**sizes, attention_types=types, max_position_embeddings=32)
    )
    neo.save_pretrained(tmp_path / "neo")
    mask = "transformer.h.0.attn.attention.bias"
    assert mask in dict(neo.named_buffers()) and mask not in neo.state_dict()
    add(tmp_path / "neo", **{mask: torch.ones(1, 1, 32, 32)})
    type(neo).from_pretrained(tmp_path / "neo", quantization_config=NF4Config())


# What a model has, and the checkpoint has not


def test_a_new_head_is_trained_and_saved_with_train_also(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    cls = transformers.LlamaForSequenceClassification

    def classifier(seed: int) -> Any:
        torch.manual_seed(seed)
        return cls.from_pretrained(folders["llama"], quantization_config=NF4Config())

    frozen = minilora.inject(classifier(1), r=2)
    assert not any(p.requires_grad for p in frozen.score.parameters())
    model = minilora.inject(classifier(1), r=2, train_also=["score"])
    assert all(p.requires_grad for p in model.score.parameters())
    with pytest.warns(UserWarning, match=r"trained whole \(modules_to_save: score\.weight\)"):
        minilora.save_adapter(model, tmp_path / "adapter")
    again = classifier(2)
    assert not same_bits(again.score.weight, model.score.weight)
    minilora.load_adapter(again, tmp_path / "adapter")
    assert same_bits(again.score.weight, model.score.weight)
