"""A quantized model as a folder: transformers with bitsandbytes loads the same bits from it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, snapshot
from torch import Tensor, nn

import minilora
from minilora.huggingface.quantized_folder import (
    quantization_config_of,
    save_quantized,
    state_dict_of,
)
from minilora.nf4 import NF4Weight

transformers = pytest.importorskip("transformers", reason="it writes and reads the folders")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# bitsandbytes' CPU build dequantizes rows of whole blocks alone: all sizes are multiples of 64.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
IDS = torch.arange(3, 37).view(2, 17)


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    module = pytest.importorskip("bitsandbytes", reason="transformers loads 4-bit folders with it")
    pytest.importorskip("accelerate", reason="transformers loads 4-bit folders with it")
    with torch.compiler.set_stance("force_eager"):
        yield module


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Any]:
    """Returns a function that makes a small Llama, as `from_pretrained` loads it in that dtype."""

    def make(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        config = transformers.LlamaConfig(**SIZES | options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "dense")
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)

    return make


def load(model: Any, folder: Path) -> Any:
    """The model that transformers and bitsandbytes load, of the class of the one that was saved."""
    loaded, found = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return loaded


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    """In training mode: in the other, bitsandbytes rounds absmax to bfloat16 on some CPUs."""
    out: Tensor = model.train()(**inputs or {"input_ids": IDS}).logits
    return out


def assert_same_layers(ours: nn.Module, theirs: nn.Module, bnb: Any) -> None:
    """The same layers are in 4 bits, with the same weights; the others are dense in both."""
    for name, layer in ours.named_modules():
        other = theirs.get_submodule(name)
        is_quantized = isinstance(layer, minilora.NF4Linear)
        assert isinstance(other, bnb.nn.Linear4bit) == is_quantized, name
        if isinstance(layer, minilora.NF4Linear):
            weight: Any = other.weight
            found = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(found, layer.weight.dequantize()), name


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def entry(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied, in shards"])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers_with_bitsandbytes_loads_the_same_weights_and_logits(
    dtype: torch.dtype,
    quant_type: str,
    double: bool,
    tied: bool,
    llama: Callable[..., Any],
    bnb: Any,
    tmp_path: Path,
) -> None:
    model = llama(dtype, tie_word_embeddings=tied)
    minilora.quantize(model, quant_type=quant_type, double_quant=double)
    size = "20KB" if tied else "5GB"
    folder = save_quantized(model, tmp_path / "quantized", max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) == 1 or tied

    loaded = load(model, folder)
    assert loaded.dtype == dtype
    assert_same_layers(model, loaded, bnb)
    assert torch.equal(logits(model), logits(loaded))

    config = entry(folder)
    assert config["bnb_4bit_quant_type"] == quant_type
    assert config["bnb_4bit_use_double_quant"] == double
    assert config["bnb_4bit_compute_dtype"] == str(dtype).removeprefix("torch.")
    assert config["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_every_block_size_is_read_back(
    block_size: int, llama: Callable[..., Any], bnb: Any, tmp_path: Path
) -> None:
    model = minilora.quantize(llama(), ["q_proj", "down_proj"], block_size=block_size)
    loaded = load(model, save_quantized(model, tmp_path / "quantized"))
    layer, other = (m.get_submodule("model.layers.0.mlp.down_proj") for m in (model, loaded))
    state: Any = other.weight.quant_state
    assert state.blocksize == block_size

    # Its CPU build dequantizes no block that is longer than a row.
    ours = layer.weight
    scales = state.absmax, state.state2.absmax, state.offset
    again = NF4Weight(other.weight.data.flatten(), *scales, ours.shape, ours.dtype, block_size)
    assert torch.equal(again.dequantize(), ours.dequantize())


def merged_in_part(model: Any) -> None:
    minilora.quantize(model)
    minilora.inject(model, r=4, targets=["q_proj", "v_proj"])
    randomize(model, size=0.1)
    minilora.merge(model)


def mixed(model: Any) -> None:
    minilora.quantize(model, ["q_proj", "k_proj", "gate_proj"])
    minilora.quantize(model, ["v_proj"], quant_type="fp4", double_quant=False)
    minilora.quantize(model, ["up_proj"], block_size=32, double_quant=False)


def with_head(model: Any) -> None:
    minilora.quantize(model, ["lm_head", "o_proj", "model.layers.1.mlp.up_proj"])


def in_bfloat16(model: Any) -> None:
    minilora.quantize(model, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("edit", [merged_in_part, mixed, with_head, in_bfloat16])
def test_models_that_are_quantized_in_part_or_in_several_ways(
    edit: Callable[[Any], None], llama: Callable[..., Any], bnb: Any, tmp_path: Path
) -> None:
    model = llama(tie_word_embeddings=False, attention_bias=True)
    edit(model)
    loaded = load(model, save_quantized(model, tmp_path / "quantized"))
    assert_same_layers(model, loaded, bnb)
    assert torch.equal(logits(model), logits(loaded))


def t5() -> Any:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(
        **sizes, vocab_size=128, decoder_start_token_id=0, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def bert() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout))


@pytest.mark.filterwarnings("ignore:.*experts")
@pytest.mark.parametrize("make", [t5, mixtral, bert])
def test_other_architectures(make: Callable[[], Any], bnb: Any, tmp_path: Path) -> None:
    """T5 has layers in float32, Mixtral renamed experts, BERT biases and a tied head."""
    torch.manual_seed(0)
    model = minilora.quantize(make())
    loaded = load(model, save_quantized(model, tmp_path / "quantized"))
    assert_same_layers(model, loaded, bnb)
    names = ("input_ids", "decoder_input_ids") if make is t5 else ("input_ids",)
    inputs = dict.fromkeys(names, IDS)
    assert torch.equal(logits(model, **inputs), logits(loaded, **inputs))


def test_an_adapter_computes_the_same_in_peft_over_the_folder(
    llama: Callable[..., Any], bnb: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="an adapter is used by it")
    model = minilora.quantize(llama())
    folder = save_quantized(model, tmp_path / "quantized")
    randomize(minilora.inject(model, r=4), size=0.1)
    adapter = minilora.save_adapter(model, tmp_path / "adapter")

    theirs = peft.PeftModel.from_pretrained(load(model, folder), adapter)
    found, expected = logits(theirs), logits(model)
    # The adapter's term is summed in another order.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with theirs.disable_adapter():
        assert not torch.allclose(found, logits(theirs), rtol=0.01)


def test_a_dense_layer_is_not_named_by_a_pattern_that_means_a_quantized_one() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    def layers(*names: str) -> dict[str, nn.Module]:
        return {name: nn.Linear(64, 64) for name in names}

    inner = nn.ModuleDict(layers("fc", "fc2", "1", "11"))
    model = nn.ModuleDict({**layers("fc", "xfc", "1", "fc2"), "inner": inner})
    chosen = ["inner.fc", "xfc", "inner.11"]
    minilora.quantize(model, chosen, compute_dtype=torch.float32)

    patterns = quantization_config_of(model)["llm_int8_skip_modules"]
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | minilora.NF4Linear)]
    assert {n for n in linear if should_convert_module(n, patterns)} == set(chosen)


def test_saving_changes_neither_the_model_nor_its_config(
    llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.quantize(llama(torch.bfloat16))
    # What guards an in-place quantized model from an ordinary save.
    model.save_pretrained = lambda *_, **__: pytest.fail("this one refuses")
    config, before, text = model.config, snapshot(model), repr(model.config)
    save_quantized(model, tmp_path / "quantized")
    assert model.config is config and repr(config) == text
    assert snapshot(model) == before
    assert not hasattr(config, "quantization_config")


def test_the_generation_config_and_the_architecture_are_saved(
    llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.quantize(llama())
    model.generation_config.max_new_tokens = 7
    folder = save_quantized(model, tmp_path / "quantized")
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")


def test_a_state_dict_holds_every_tensor_once_and_copies_none(llama: Callable[..., Any]) -> None:
    model = minilora.quantize(llama(attention_bias=True), ["q_proj"])
    state = state_dict_of(model)
    assert "model.layers.0.self_attn.q_proj.weight.quant_map" in state
    assert "model.layers.0.self_attn.q_proj.bias" in state
    assert not any(key.endswith(("packed", "absmax2", "nf4_layout", "offset")) for key in state)
    layer = model.model.layers[0].self_attn.q_proj
    found = state["model.layers.0.self_attn.q_proj.weight"]
    assert found.data_ptr() == layer.packed.data_ptr()
    assert len(state) == len(model.state_dict()) + 2 * (6 - 5)


def test_a_folder_that_exists_gets_the_new_model_and_keeps_other_files(
    llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.quantize(llama())
    folder = tmp_path / "quantized"
    save_quantized(model, folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "tokenizer.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_text("another")

    save_quantized(model, folder)
    expected = {"checkpoints", "config.json", "generation_config.json", "tokenizer.json"}
    assert names_in(folder) == {*expected, "model.safetensors"}
    assert (folder / "checkpoints" / "model.safetensors").read_text() == "another"
    assert names_in(tmp_path) == {"dense", "quantized"}


def test_a_write_that_fails_leaves_the_folder_as_it_was(
    llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = minilora.quantize(llama())
    folder = save_quantized(model, tmp_path / "quantized")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)
    with pytest.raises(OSError, match=r"quantized could not be written: No space left"):
        save_quantized(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names_in(tmp_path) == {"dense", "quantized"}


def test_files_without_a_weight_are_not_put_in_place(
    llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.quantize(llama())
    name = "model.layers.1.mlp.up_proj"
    model._keys_to_ignore_on_save = {f"{name}.weight.absmax"}
    with pytest.raises(ValueError, match=f"{name}: not a 4-bit weight.*has no weight.absmax"):
        save_quantized(model, tmp_path / "quantized")
    model._keys_to_ignore_on_save = {key for key in state_dict_of(model) if name in key}
    with pytest.raises(ValueError, match=r"wrote 13 of 14 4-bit weights"):
        save_quantized(model, tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


def test_without_bitsandbytes_the_folder_is_refused_and_never_random(
    llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = minilora.quantize(llama())
    folder = save_quantized(model, tmp_path / "quantized")
    where = "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available"
    monkeypatch.setattr(where, lambda: False)
    with pytest.raises(ImportError, match="bitsandbytes"):
        type(model).from_pretrained(folder)


def test_what_cannot_be_saved_is_refused_by_name(
    llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "quantized"
    with pytest.raises(TypeError, match=r"Sequential is not a transformers model.*state_dict"):
        save_quantized(minilora.quantize(nn.Sequential(nn.Linear(64, 64))), path)

    model = llama()
    with pytest.raises(ValueError, match=r"no quantized layer: minilora.quantize"):
        save_quantized(model, path)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no quantized layer"):
        quantization_config_of(model)
    with pytest.raises(TypeError, match=r"DataParallel is not .*pass the model inside"):
        save_quantized(nn.DataParallel(model), path)

    minilora.quantize(model)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        for here in (".", tmp_path, tmp_path.parent):
            with pytest.raises(ValueError, match="is the current folder, or holds it"):
                save_quantized(model, here)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file is a file"):
        save_quantized(model, tmp_path / "file")

    minilora.inject(model, r=4, name="mine")
    with pytest.raises(ValueError, match=r"adapters \('mine'\).*save_adapter.*eject.*merge"):
        save_quantized(model, path)
    minilora.eject(model)

    model.model.layers[1].self_attn.k_proj.compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"bfloat16 \(model.layers.1.self_attn.k_proj\)"):
        save_quantized(model, path)
    model.model.layers[1].self_attn.k_proj.compute_dtype = None

    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj is a quantized layer.*another name"
    ):
        save_quantized(model, path)

    with pytest.raises(ValueError, match="float64"):
        save_quantized(minilora.quantize(llama(torch.float64)), path)
    with pytest.raises(
        ValueError, match=r"always reads \S*wo as a dense layer in float32.*exclude"
    ):
        save_quantized(minilora.quantize(t5(), "wo"), path)
    assert not path.exists()
