"""NF4Config: from_pretrained quantizes what it reads, exactly as `quantize` would afterwards."""

import copy
import gc
import json
import pickle
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import nn

import minilora

pytest.importorskip("transformers", reason="the quantizer is transformers'")
pytest.importorskip("accelerate", reason="transformers places layers with it")

import transformers
from transformers_folders import MODELS, logits, make_folder, make_model

from minilora.huggingface import quantizer
from minilora.huggingface.quantizer import NF4Config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    made = {name: make_folder(root / str(i), name) for i, name in enumerate(MODELS)}
    made["llama, shards"] = make_folder(root / "shards", "llama", shards=True)
    return made


def read(folder: Path, kind: str = "llama", **options: Any) -> Any:
    """The model, in 4 bits unless options say otherwise."""
    cls = getattr(transformers, MODELS[kind.replace(", shards", "")][0])
    options.setdefault("quantization_config", NF4Config())
    return cls.from_pretrained(folder, **options)


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [k for k in states[0] if not same_bits(states[0][k], states[1][k])] == []


# As `quantize` afterwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*MODELS, "llama, shards"])
def test_weights_are_those_of_a_model_that_is_quantized_afterwards(
    kind: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    found = read(folders[kind], kind, dtype=dtype)
    expected = minilora.quantize(read(folders[kind], kind, dtype=dtype, quantization_config=None))
    assert_same_state(found, expected)
    assert same_bits(logits(found), logits(expected))
    kinds = [[(n, type(m)) for n, m in model.named_modules()] for model in (found, expected)]
    assert kinds[0] == kinds[1]
    assert not found.training and all(p.device.type == "cpu" for p in found.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"quant_type": "fp4", "block_size": 128},
        {"double_quant": False, "block_size": 32},
        {"compute_dtype": torch.bfloat16},
        {"compute_dtype": "float16"},
        {"targets": ["q_proj", "mlp.up_proj"]},
        {"targets": re.compile(r"layers\.0\..*proj")},
        {"targets": lambda name, module: name.endswith("down_proj")},
        {"exclude": ["v_proj"]},
    ],
    ids=["fp4", "plain", "bfloat16", "float16", "names", "regex", "callable", "exclude"],
)
def test_every_option_means_what_it_means_to_quantize(
    options: dict[str, Any], folders: dict[str, Path]
) -> None:
    found = read(folders["llama"], quantization_config=NF4Config(**options))
    if isinstance(options.get("compute_dtype"), str):
        options = {"compute_dtype": getattr(torch, options["compute_dtype"])}
    expected = minilora.quantize(read(folders["llama"], quantization_config=None), **options)
    assert_same_state(found, expected)
    assert same_bits(logits(found), logits(expected))


@pytest.mark.parametrize("options", [{"dtype": "auto"}, {"torch_dtype": torch.bfloat16}], ids=str)
def test_the_dtype_is_given_as_to_any_model(
    options: dict[str, Any], folders: dict[str, Path]
) -> None:
    model = read(folders["llama"], **options)
    assert model.dtype == options.get("torch_dtype", torch.float32)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == model.dtype


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str
)
def test_layers_are_quantized_where_the_device_map_places_them(
    device_map: Any, folders: dict[str, Path]
) -> None:
    model = read(folders["llama"], device_map=device_map)
    assert_same_state(model, read(folders["llama"]))


def test_a_layer_is_not_placed_on_the_disk(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on the disk"):
        read(folders["llama"], device_map={"": "disk"}, offload_folder=tmp_path)


def test_a_hub_id_is_read_from_the_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    """As huggingface_hub lays it out; without a network that is all there is."""
    repository = tmp_path / "models--owner--name"
    shutil.copytree(folders["llama, shards"], repository / "snapshots" / "0a1b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")
    model = read("owner/name", cache_dir=tmp_path)  # type: ignore[arg-type]
    assert_same_state(model, read(folders["llama"]))


def test_one_config_loads_several_models(folders: dict[str, Path]) -> None:
    config = NF4Config(block_size=128)
    first = read(folders["llama"], quantization_config=config)
    second = read(folders["gpt_neox, embed_out"], "gpt_neox, embed_out", quantization_config=config)
    assert first.config.quantization_config is not second.config.quantization_config
    assert repr(config) == repr(NF4Config(block_size=128))


def test_what_a_model_keeps_in_float32_stays_dense_and_in_float32(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from minilora.huggingface.pretrained import load

    model = read(folders["t5"], "t5", dtype=torch.float16)
    model.save_pretrained(tmp_path / "saved")
    for each in (model, load(tmp_path / "saved")[0]):
        dtypes = {name: p.dtype for name, p in each.named_parameters() if p.is_floating_point()}
        kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert kept == {name for name in dtypes if name.endswith(".wo.weight")} and len(kept) == 4


def test_experts_are_counted_or_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    model.save_pretrained(tmp_path / "model")
    cls = transformers.MixtralForCausalLM
    with pytest.warns(UserWarning, match=r"\d+% of the parameters .* are not quantized"):
        cls.from_pretrained(tmp_path / "model", quantization_config=NF4Config())
    with pytest.raises(ValueError, match=r"are not quantized.*strict=False goes on"):
        cls.from_pretrained(tmp_path / "model", quantization_config=NF4Config(strict=True))


class OwnLinear(nn.Linear):
    """Computes what an nn.Linear does."""


class OwnLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.up_proj = OwnLinear(config.hidden_size, config.intermediate_size, bias=False)


def test_a_subclass_of_a_linear_layer_is_quantized_as_quantize_does(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from minilora.huggingface.pretrained import load

    found = OwnLlama.from_pretrained(folders["llama"], quantization_config=NF4Config())
    assert_same_state(found, minilora.quantize(OwnLlama.from_pretrained(folders["llama"])))
    found.save_pretrained(tmp_path / "saved")
    edited = tmp_path / "saved" / "config.json"
    edited.write_text(edited.read_text().replace("OwnLlama", "LlamaForCausalLM"))
    assert_same_state(load(tmp_path / "saved")[0], found)


def test_a_tied_head_stays_tied_and_dense(folders: dict[str, Path]) -> None:
    model = read(folders["llama, tied"], "llama, tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = NF4Config(targets=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head shares its weight .* exclude="):
        read(folders["llama, tied"], "llama, tied", quantization_config=config)


class SharedLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Two of its layers have one weight, which transformers ties when it has been read."""

    _tied_weights_keys = {  # noqa: RUF012
        **transformers.LlamaForCausalLM._tied_weights_keys,
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }


def test_layers_that_share_a_weight_are_refused_and_can_be_left_out(tmp_path: Path) -> None:
    SharedLlama(make_model("llama, tied").config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj shares its weight .* exclude="):
        SharedLlama.from_pretrained(tmp_path / "model", quantization_config=NF4Config())
    config = NF4Config(exclude=["up_proj"])
    model = SharedLlama.from_pretrained(tmp_path / "model", quantization_config=config)
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight is layers[1].mlp.up_proj.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight


class EmbeddedLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A layer in its middle has the weight of the embedding."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight": "model.embed_tokens.weight",
    }


def test_a_layer_that_has_an_embeddings_weight_is_left_out(tmp_path: Path) -> None:
    EmbeddedLlama(make_model("llama, tied").config).save_pretrained(tmp_path / "model")
    found = EmbeddedLlama.from_pretrained(tmp_path / "model", quantization_config=NF4Config())
    assert_same_state(found, minilora.quantize(EmbeddedLlama.from_pretrained(tmp_path / "model")))
    assert found.model.layers[1].mlp.up_proj.weight is found.model.embed_tokens.weight


def test_only_one_dense_weight_is_in_memory_at_a_time(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def quantize(weight: torch.Tensor, *form: Any) -> Any:
        assert not any(earlier() is not None for earlier in seen)
        seen.append(weakref.ref(weight))
        return minilora.quantize_nf4(weight, *form)

    monkeypatch.setattr(quantizer, "quantize_nf4", quantize)
    read(folders["llama, shards"], dtype=torch.bfloat16)
    assert len(seen) == 14


def test_pages_of_the_files_are_let_go_while_they_are_read(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their real paths: the files of the hub's cache are links."""
    link = tmp_path / "link"
    link.symlink_to(folders["llama, shards"])
    dropped: list[set[str]] = []
    monkeypatch.setattr(quantizer, "drop_pages", dropped.append)
    monkeypatch.setattr(quantizer, "_DROP_EVERY", 2 * 64 * 128 * 4)
    read(link)
    assert len(dropped) == 4
    files = {str(path.resolve()) for path in link.glob("*.safetensors")}
    assert all(found == files for found in dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_model_lies_in_the_file_that_it_was_read_from(
    dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    model = read(folders["llama"], dtype=dtype)
    assert all(p.untyped_storage().resizable() for p in (*model.parameters(), *model.buffers()))


# Training


def test_trainer_may_train_a_model_with_adapters_alone(folders: dict[str, Path]) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    model = read(folders["llama"])
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    minilora.inject(model, r=2)
    validate_quantization_for_training(model)
    minilora.eject(model)
    assert not model.hf_quantizer.is_qat_trainable


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_has_a_quantizer_of_its_own(
    copied: Any, folders: dict[str, Path]
) -> None:
    model = read(folders["llama"])
    other = copied(model)
    minilora.inject(other, r=2)
    assert other.hf_quantizer.is_qat_trainable and not model.hf_quantizer.is_qat_trainable
    assert same_bits(logits(other), logits(model))


def test_a_model_is_freed_as_soon_as_nothing_holds_it(folders: dict[str, Path]) -> None:
    model = read(folders["llama"])
    # What holds transformers' models in a cycle is not the quantizer.
    held = weakref.ref(model.hf_quantizer)
    gc.collect()
    gc.disable()
    try:
        vars(model).pop("hf_quantizer")
        assert held() is None
    finally:
        gc.enable()


# Files


@pytest.mark.parametrize("kind", ["llama, tied", "qwen2, with biases", "llama, shards"])
def test_save_pretrained_writes_a_folder_that_bitsandbytes_loads(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="the reader").functional
    model = read(folders[kind], kind, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes" and said["load_in_4bit"] is True
    assert said["bnb_4bit_compute_dtype"] == "bfloat16"

    theirs = read(tmp_path / "saved", kind, quantization_config=None)
    for name, layer in model.named_modules():
        if isinstance(layer, minilora.NF4Linear):
            weight = theirs.get_submodule(name).weight
            decoded = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert same_bits(decoded, layer.weight.dequantize())
    # In eval mode bitsandbytes takes another path on the CPU.
    assert same_bits(logits(theirs.train()), logits(model))


def test_a_merged_model_is_an_ordinary_one_again(folders: dict[str, Path], tmp_path: Path) -> None:
    model = minilora.inject(read(folders["llama"]), r=2)
    minilora.merge(model)
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    again = read(tmp_path / "merged", quantization_config=None)
    assert same_bits(logits(again), logits(model))


def test_a_partly_merged_model_is_saved_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    from minilora.huggingface.pretrained import load

    model = minilora.inject(read(folders["llama"]), r=2, targets=["q_proj", "v_proj"])
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    minilora.merge(model)
    model.save_pretrained(tmp_path / "partly")
    again, _ = load(tmp_path / "partly")
    assert type(again.model.layers[1].self_attn.q_proj) is nn.Linear
    assert_same_state(again, model)
    assert same_bits(logits(again), logits(model))


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 100}, ValueError, "block_size=100: choose one of"),
        ({"quant_type": "nf5"}, ValueError, "quant_type='nf5'"),
        ({"compute_dtype": "int8"}, TypeError, "compute_dtype='int8': choose one of"),
        ({"compute_dtype": torch.uint8}, TypeError, "compute_dtype=torch.uint8: choose one of"),
        ({"bits": 4}, TypeError, "bits"),
        ({"quant_type": ["nf4"]}, TypeError, r"quant_type=\['nf4'\]: must be a string"),
        ({"block_size": 64.0}, TypeError, "block_size=64.0: must be an integer"),
        ({"block_size": "64"}, TypeError, "block_size='64': must be an integer"),
        ({"double_quant": "yes"}, TypeError, "double_quant='yes': must be True or False"),
        ({"double_quant": 1}, TypeError, "double_quant=1: must be True or False"),
        ({"strict": "False"}, TypeError, "strict='False': must be True or False"),
        ({"strict": None}, TypeError, "strict=None: must be True or False"),
        ({"targets": 3}, TypeError, "targets=3: must be a name, a list of names"),
        ({"targets": None}, TypeError, "targets=None: must be a name, a list of names"),
        ({"targets": ["q_proj", 3]}, TypeError, "a list holds names, not 3"),
        ({"exclude": b"lm_head"}, TypeError, "exclude=b'lm_head': must be a name"),
        ({"exclude": [None]}, TypeError, "a list holds names, not None"),
    ],
)
def test_there_is_no_such_format(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NF4Config(**options)


@pytest.mark.parametrize(
    "targets", ["q_proj", ("q_proj",), {"q_proj"}, re.compile("q_proj"), lambda name, _: True]
)
def test_targets_are_given_as_to_quantize(targets: Any) -> None:
    config = NF4Config(targets, exclude=targets)
    assert config.targets is targets and config.exclude is targets


def test_a_config_that_is_saved_before_loading_is_taken_for_no_quantized_models(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = NF4Config(["q_proj"], compute_dtype="bfloat16")
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert saved["double_quant"] is True and saved["block_size"] == 64
    assert "minilora" not in (folder / "config.json").read_text()
    for load in (read, minilora.load):
        with pytest.raises(ValueError, match="quantiz"):
            load(folder)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["query"], "target 'query' matches no linear layer"), (["norm"], "not an nn.Linear")],
)
def test_targets_are_looked_up_before_anything_is_read(
    targets: list[str], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["llama"], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    # The header alone: a read weight would be an error of its own.
    with file.open("r+b") as opened:
        opened.seek(-64, 2)
        opened.write(b"\xff" * 64)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "model", quantization_config=NF4Config(targets=targets))


def test_a_new_task_starts_with_a_new_head(folders: dict[str, Path]) -> None:
    """As in transformers, which reports it: the head of a classifier, on a language model."""
    cls = transformers.LlamaForSequenceClassification
    model = cls.from_pretrained(folders["llama"], quantization_config=NF4Config())
    assert type(model.model.layers[0].mlp.up_proj) is minilora.NF4Linear
    assert type(model.score) is nn.Linear


def test_an_unknown_variant_is_refused_by_its_name(folders: dict[str, Path]) -> None:
    with pytest.raises(OSError, match="nope"):
        read(folders["llama"], variant="nope")


def test_a_tiny_model_is_what_it_was() -> None:
    """The folders of these tests do not depend on what ran before them."""
    assert same_bits(logits(make_model()), logits(make_model()))


def test_a_model_is_cast_by_to_alone_as_transformers_rules(folders: dict[str, Path]) -> None:
    """docs/how-to/dtypes.md says so."""
    model = read(folders["llama"], quantization_config=NF4Config())
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="is not supported for quantized model"):
            cast()
    model.to(torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
