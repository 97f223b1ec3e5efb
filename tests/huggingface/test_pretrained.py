"""load: dense folders and bitsandbytes' 4-bit folders; what is damaged is refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import nn

import minilora

pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("accelerate", reason="transformers places layers with it")

import transformers
from safetensors.torch import load_file, save_file
from transformers_folders import MODELS, logits, make_folder

from minilora.huggingface.pretrained import load
from minilora.huggingface.quantizer import NF4Config

FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    """What save_pretrained writes of a model that was quantized while it was read."""
    path = tmp_path_factory.mktemp("quantized") / "model"
    load(dense, quantization_config=NF4Config())[0].save_pretrained(path)
    return path


@pytest.fixture
def model(tmp_path: Path, in_4_bits: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(in_4_bits, tmp_path / "model"))


def class_of(kind: str) -> Any:
    return getattr(transformers, MODELS[kind][0])


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_state(tensors: dict[str, torch.Tensor], layer: str, **values: Any) -> None:
    """Changes the JSON that bitsandbytes stores of a layer."""
    key = f"{layer}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    tensors[key] = torch.tensor(list(json.dumps({**state, **values}).encode()), dtype=torch.uint8)


# Reading


@pytest.mark.parametrize("kind", MODELS)
def test_a_dense_folder_is_read_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", kind)
    model, tokenizer = load(folder)
    expected = class_of(kind).from_pretrained(folder)
    assert type(model) is type(expected) and tokenizer is None
    assert same_bits(logits(model), logits(expected))
    assert model.config._name_or_path == str(folder)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_read_as_it_was_saved_in_4_bits(kind: str, shards: bool, tmp_path: Path) -> None:
    made, _ = load(make_folder(tmp_path / "dense", kind), quantization_config=NF4Config())
    made.save_pretrained(tmp_path / "saved", max_shard_size="30KB" if shards else "5GB")
    model, _ = load(tmp_path / "saved")
    assert [type(m) for m in model.modules()] == [type(m) for m in made.modules()]
    states = model.state_dict(), made.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(map(same_bits, states[0].values(), states[1].values()))
    assert same_bits(logits(model), logits(made))

    # And again: what was read is saved as it was.
    model.save_pretrained(tmp_path / "again", max_shard_size="30KB" if shards else "5GB")
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in (name for name in files if name.endswith(".safetensors")):
        first, second = (load_file(tmp_path / folder / name) for folder in ("saved", "again"))
        assert first.keys() == second.keys() and all(same_bits(first[k], second[k]) for k in first)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_what_transformers_and_bitsandbytes_saved_is_read_exactly(
    quant_type: str, double_quant: bool, compute_dtype: torch.dtype, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="the writer").functional
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    folder = make_folder(tmp_path / "dense", "qwen2, with biases")
    read = class_of("qwen2, with biases").from_pretrained
    theirs = read(folder, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")

    ours, _ = load(tmp_path / "theirs")
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, minilora.NF4Linear)}
    assert len(layers) == 14 and ours.dtype == torch.bfloat16
    for name, layer in layers.items():
        weight = theirs.get_submodule(name).weight
        decoded = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert same_bits(layer.weight.dequantize(), decoded)
        assert layer.weight.quant_type == quant_type and layer.compute_dtype == compute_dtype
        assert layer.weight.double_quantized is double_quant
    # In eval mode both take other paths for a few tokens on the CPU.
    assert same_bits(logits(ours.train()), logits(theirs.train()))

    found = ours.config.quantization_config
    assert (found.quant_type, found.double_quant) == (quant_type, double_quant)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_that_are_stored_as_floats_are_not_cast(
    storage: torch.dtype, model: Path, in_4_bits: Path
) -> None:
    """bnb_4bit_quant_storage, which FSDP needs: the same bytes under another dtype."""

    def store(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key.removesuffix(".absmax") for key in tensors if key.endswith("t.absmax")]:
            tensors[key] = tensors[key].view(-1).view(storage).view(-1, 1)

    edit_tensors(model, store)
    found, _ = load(model, dtype=torch.float16)
    expected, _ = load(in_4_bits, dtype=torch.float16)
    assert all(map(same_bits, found.state_dict().values(), expected.state_dict().values()))


def test_dense_parts_have_the_dtype_asked_for_and_4_bit_parts_their_bits(in_4_bits: Path) -> None:
    model, _ = load(in_4_bits, dtype=torch.bfloat16, compute_dtype=torch.float16)
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {torch.bfloat16}
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, minilora.NF4Linear)
    # What it decodes to by default is what it was made from.
    assert layer.compute_dtype == torch.float16 and layer.weight.dtype == torch.float32
    assert all(p.untyped_storage().resizable() for p in model.parameters())


def test_a_quantized_model_trains_saves_an_adapter_and_merges(
    in_4_bits: Path, tmp_path: Path
) -> None:
    model = minilora.inject(load(in_4_bits)[0], r=2)
    before = logits(model)
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    minilora.save_adapter(model, tmp_path / "adapter")
    again = minilora.load_adapter(load(in_4_bits)[0], tmp_path / "adapter")
    assert same_bits(logits(again), logits(model)) and not same_bits(logits(again), before)
    with pytest.raises(ValueError, match="save_adapter"):
        model.save_pretrained(tmp_path / "model")

    minilora.merge(model)
    model.save_pretrained(tmp_path / "merged")
    merged, _ = load(tmp_path / "merged")
    assert type(merged.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
    assert same_bits(logits(merged), logits(model))


def test_a_tokenizer_is_read_where_there_is_one(folder: Path) -> None:
    model, tokenizer = load(folder, quantization_config=NF4Config())
    assert tokenizer.chat_template and isinstance(model, transformers.LlamaForCausalLM)


def test_a_hub_id_is_read_from_the_cache(
    in_4_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--name"
    shutil.copytree(in_4_bits, repository / "snapshots" / "0a1b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")
    (repository / "snapshots" / "0a1b" / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("minilora.huggingface.pretrained.read_tokenizer", lambda *_: None)
    model, _ = load("owner/name")
    assert same_bits(logits(model), logits(load(in_4_bits)[0]))


def test_a_damaged_model_of_the_hub_is_named_as_a_folder_is(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0a1b"
    shutil.copytree(dense, snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0a1b")
    (snapshot / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("minilora.huggingface.pretrained.read_tokenizer", lambda *_: None)
    assert same_bits(logits(load("owner/name")[0]), logits(load(dense)[0]))

    edit_tensors(snapshot, lambda t: t.update({"model.norm.weight": torch.ones(64).char()}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8"):
        load("owner/name")
    file = snapshot / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load("owner/name")


# What is refused

UP = "model.layers.0.mlp.up_proj"


def shorten(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key][:-1].clone()


DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no absmax": (lambda t: t.pop(f"{UP}.weight.absmax"), UP),
    "no state": (lambda t: t.pop(f"{UP}.weight.quant_state.bitsandbytes__nf4"), UP),
    "codes alone": (lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{UP}.weight.")], UP),
    "no codes": (lambda t: t.pop(f"{UP}.weight"), UP),
    "a layer is missing": (lambda t: [t.pop(k) for k in list(t) if UP in k], UP),
    "a norm is missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "short codes": (lambda t: shorten(t, f"{UP}.weight"), UP),
    "short absmax": (lambda t: shorten(t, f"{UP}.weight.absmax"), UP),
    "wrong block size": (lambda t: edit_state(t, UP, blocksize=128), UP),
    "no block size": (lambda t: edit_state(t, UP, blocksize=48), UP),
    "another shape": (lambda t: edit_state(t, UP, shape=[64, 128]), UP),
    "another norm": (lambda t: shorten(t, "model.norm.weight"), "model.norm.weight"),
    "one more": (lambda t: t.update(other=torch.ones(2)), "other"),
    "one more layer": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)}),
        "model.layers.2.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_4_bit_folder_is_refused_by_the_layer(damage: str, model: Path) -> None:
    change, name = DAMAGED[damage]
    edit_tensors(model, change)
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load(model)
    assert name in str(error.value) and str(model) in str(error.value)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("cut", [8, 100, 5000])
def test_a_truncated_file_is_refused_by_its_name(
    cut: int, quantized: bool, dense: Path, in_4_bits: Path, tmp_path: Path
) -> None:
    shutil.copytree(in_4_bits if quantized else dense, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    config = None if quantized else NF4Config()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load(tmp_path / "model", quantization_config=config)
    if not quantized:
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            class_of("llama").from_pretrained(tmp_path / "model", quantization_config=config)


def test_a_missing_shard_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", shards=True)
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    for read in (load, class_of("llama").from_pretrained):
        with pytest.raises((ValueError, OSError), match=gone.name):
            read(folder, quantization_config=NF4Config())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(f"{UP}.weight"),
        lambda t: t.pop("model.norm.weight"),
        lambda t: t.pop("model.embed_tokens.weight"),
        lambda t: t.pop("lm_head.weight"),
        lambda t: [t.update({"x." + k: t.pop(k)}) for k in list(t)],
        lambda t: [t.update({k.replace("mlp", "feed_forward"): t.pop(k)}) for k in list(t)],
    ],
    ids=["a layer", "a norm", "the embedding", "the head", "another prefix", "another model"],
)
def test_weights_that_a_checkpoint_lacks_are_never_made_up(
    change: Any, dense: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    edit_tensors(folder, change)
    for read in (load, class_of("llama").from_pretrained):
        with pytest.raises(ValueError, match=r"the checkpoint has no \S+\.weight"):
            read(folder, quantization_config=NF4Config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[f"{UP}.weight"].fill_(float("nan")),
            f"{UP}.weight: the weight holds NaN or infinity",
        ),
        (lambda t: shorten(t, f"{UP}.weight"), rf"{UP}.weight: it has the shape \(127, 64\)"),
        (
            lambda t: t.update({f"{UP}.weight": torch.ones(128, 64, dtype=torch.int32)}),
            f"{UP}.weight is stored as I32: the checkpoint is quantized already",
        ),
    ],
    ids=["NaN", "shape", "integers"],
)
def test_a_weight_that_cannot_be_quantized_is_named_in_the_error(
    change: Any, message: str, dense: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    edit_tensors(folder, change)
    for read in (load, class_of("llama").from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(folder, quantization_config=NF4Config())


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "nobody-knows"},
        {"quant_method": "minilora"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": "yes"},
        {},
    ],
    ids=str,
)
def test_a_folder_that_is_quantized_in_another_way_is_refused_by_its_method(
    config: dict[str, Any], model: Path
) -> None:
    edit_config(model, quantization_config=config)
    with pytest.raises(ValueError, match=r"is quantized already .* bitsandbytes' 4 bits"):
        load(model)


def test_an_unregistered_method_is_no_way_to_random_weights(model: Path) -> None:
    """transformers takes such a folder for a dense one."""
    edit_config(model, quantization_config={"quant_method": "nobody-knows"})
    with pytest.raises(ValueError, match=r"model\.layers\.0"):
        class_of("llama").from_pretrained(model, quantization_config=NF4Config())


def test_what_says_that_it_is_in_4_bits_and_is_not(dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match="says that it is in 4 bits, but no layer is"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "contradicts itself"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "is no llama"),
        ({"architectures": ["BertForNothing"]}, "no model of"),
        ({"architectures": ["pipeline"]}, "architectures"),
        ({"architectures": ["TrainingArguments"]}, "no model of"),
        ({"model_type": "mistral"}, "contradicts itself"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_config_of_another_model_is_refused(
    values: dict[str, Any], message: str, model: Path
) -> None:
    edit_config(model, **values)
    with pytest.raises(ValueError, match=message):
        load(model)


def test_options_that_do_not_fit_the_folder_are_refused(dense: Path, in_4_bits: Path) -> None:
    with pytest.raises(ValueError, match="in 4 bits already: leave out quantization_config"):
        load(in_4_bits, quantization_config=NF4Config())
    with pytest.raises(ValueError, match=r"NF4Config\(compute_dtype="):
        load(dense, compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="device='cuda"):
        load(dense, device="cuda:99")
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        class_of("llama").from_pretrained(in_4_bits, quantization_config=NF4Config())
