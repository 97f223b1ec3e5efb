"""A model's folder is data: it runs no code, brings no adapter, and its weights fit its config."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folder import make_model_folder

import minilora
from minilora.huggingface.loading import empty_model, load_dense


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


PLANTED = "import pathlib; pathlib.Path({!r}).write_text('ran')\n" + (
    "from transformers import LlamaConfig, LlamaForCausalLM\n"
    "class C(LlamaConfig): model_type = 'planted'\n"
    "class M(LlamaForCausalLM): config_class = C\n"
)


@pytest.fixture
def planted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The marker that code in the model's folder writes; standard input answers "y"."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "home")
    )
    (model / "planted.py").write_text(PLANTED.format(str(tmp_path / "marker")))
    auto = {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}
    edit(model / "config.json", model_type="planted", architectures=["M"], auto_map=auto)
    return tmp_path / "marker"


@pytest.mark.parametrize("call", [load_dense, minilora.plan, empty_model])
def test_code_in_the_folder_is_not_run_whatever_standard_input_says(
    call: Callable[[Any], Any], planted: Path, model: Path
) -> None:
    assert str(model) in refusal(lambda: call(str(model)))
    assert not planted.exists()


def test_code_in_the_folder_is_run_if_it_is_allowed(planted: Path, model: Path) -> None:
    loaded, _ = load_dense(model, trust_remote_code=True)
    assert type(loaded).__name__ == "M" and planted.read_text() == "ran"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation", "nobody/kernel"),
        ("attn_implementation", {"": "nobody/kernel@main"}),
        ("experts_implementation", "nobody/kernel"),
        ("text_config", {"attn_implementation": "flash_attention_2"}),
    ],
)
def test_a_kernel_that_the_config_names_is_not_fetched(model: Path, key: str, value: Any) -> None:
    edit(model / "config.json", **{key: value})
    for call in (load_dense, minilora.plan):
        said = refusal(lambda call=call: call(str(model)))  # type: ignore[misc]
        assert str(model) in said and "--trust-remote-code" in said


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "x\x1b[31m"])
def test_a_quantized_folder_is_refused_by_its_method(model: Path, method: str) -> None:
    edit(model / "config.json", quantization_config={"quant_method": method})
    said = refusal(lambda: load_dense(model))
    shown = method.replace("\x1b", r"\x1b")
    assert f": {shown})" in said and "16-bit original" in said


def test_pickled_weights_are_refused_by_name(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    said = refusal(lambda: load_dense(model))
    assert "pytorch_model.bin is a pickle" in said and "convert it" in said


def test_an_adapter_in_the_folder_is_refused_and_not_loaded(model: Path) -> None:
    """transformers loads it silently if peft is installed."""
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    said = refusal(lambda: load_dense(model))
    assert "holds an adapter" in said and "--adapter" in said


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "model.bin", "gone.safetensors"]
)
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    model = make_model_folder(tmp_path / "model", shards=True)
    index = model / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**places, "model.norm.weight": name})
    assert name in refusal(lambda: load_dense(model))


def test_a_missing_or_an_unexpected_tensor_is_named(model: Path) -> None:
    """transformers fills what is missing with random numbers, and drops what is left over."""
    path = model / "model.safetensors"
    whole = load_file(path)
    for changed in (
        {k: v for k, v in whole.items() if k != "model.norm.weight"},
        {**whole, "model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)},
    ):
        save_file(changed, path, metadata={"format": "pt"})
        (name,) = set(changed) ^ set(whole)
        assert name in refusal(lambda: load_dense(model))


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["MistralForCausalLM"]},
        {"model_type": "t5"},
        {"model_type": "nothing"},
        {"num_hidden_layers": 2**63},
        {"hidden_size": "64"},
        {"sliding_window": "x"},
    ],
)
def test_a_config_that_is_of_no_such_model_is_refused(model: Path, values: dict[str, Any]) -> None:
    edit(model / "config.json", **values)
    assert str(model) in refusal(lambda: load_dense(model))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ufeff{}"])
def test_a_config_that_is_no_json_object_is_named(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert str(model / "config.json") in refusal(lambda: load_dense(model))


def every_reader(folder: Path) -> list[str]:
    return [refusal(lambda read=read: read(folder)) for read in (load_dense, minilora.load)]  # type: ignore[misc]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_file_is_named(left: int, shards: bool, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", shards=shards)
    file = sorted(model.glob("model*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:left])
    for said in every_reader(model):
        assert f"{file} cannot be read, it is missing, damaged or incomplete" in said


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_tensor_of_another_shape_is_named_and_not_made_up(model: Path, name: str) -> None:
    path = model / "model.safetensors"
    whole = load_file(path)
    needed = tuple(whole[name].shape)
    for shape in ((needed[0] - 1, *needed[1:]), (*needed, 1), needed[:-1]):
        save_file({**whole, name: torch.ones(shape)}, path, metadata={"format": "pt"})
        for said in every_reader(model):
            assert f"needs another shape of {name}: {needed} instead of {shape}" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_codes_in_the_place_of_a_dense_weight_are_named(
    model: Path, name: str, dtype: torch.dtype
) -> None:
    path = model / "model.safetensors"
    whole = load_file(path)
    save_file({**whole, name: whole[name].to(dtype)}, path, metadata={"format": "pt"})
    for said in every_reader(model):
        assert f"{name} is stored as " in said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_size_are_loaded(model: Path, dtype: torch.dtype) -> None:
    path = model / "model.safetensors"
    whole = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(whole, path, metadata={"format": "pt"})
    loaded, _ = load_dense(model, dtype=torch.float32)
    assert loaded.state_dict()["model.norm.weight"].equal(whole["model.norm.weight"].float())


def test_a_single_file_beside_shards_of_another_model_is_refused(tmp_path: Path) -> None:
    """save_pretrained leaves it, and every reader would take it for the model."""
    for part in ("values", "names", "shape"):
        model = make_model_folder(tmp_path / part, shards=True)
        old = make_model_folder(tmp_path / f"old-{part}") / "model.safetensors"
        tensors = load_file(old)
        if part == "values":
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
        elif part == "shape":
            tensors["model.norm.weight"] = torch.ones(64)
        else:
            del tensors["model.norm.weight"]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        for said in every_reader(model):
            assert f"{model / 'model.safetensors'} and model-000" in said
            assert "model.norm.weight differs" in said and "Remove the older" in said


def test_a_model_that_is_published_both_whole_and_in_shards_is_loaded(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", shards=True)
    whole = make_model_folder(tmp_path / "whole") / "model.safetensors"
    (model / "model.safetensors").write_bytes(whole.read_bytes())
    load_dense(model)
    # Of a hub repository, only what is needed may have been downloaded.
    for shard in model.glob("model-*.safetensors"):
        shard.unlink()
    load_dense(model)
    index = model / "model.safetensors.index.json"
    edit(index, weight_map=dict.fromkeys(load_file(whole), "model.safetensors"))
    load_dense(model)


def test_weights_that_are_not_finite_are_refused(model: Path) -> None:
    whole = load_file(model / "model.safetensors")
    whole["model.norm.weight"][0] = float("nan")
    save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in refusal(lambda: load_dense(model))


def test_a_file_and_a_folder_without_config_are_named(model: Path, tmp_path: Path) -> None:
    assert "is a file" in refusal(lambda: load_dense(model / "config.json"))
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in refusal(lambda: load_dense(tmp_path / "empty"))
