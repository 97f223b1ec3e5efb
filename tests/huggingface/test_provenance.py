"""What a base was is written down and read: merged models, and what an adapter was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import NF4, name_base, shared
from torch import nn

from minilora.files import load_adapter
from minilora.huggingface.loading import load_dense
from minilora.huggingface.provenance import (
    Merged,
    choose_base,
    decide_quantize,
    mark_merged,
    merged_from,
)


def test_a_merged_model_says_so_after_every_round_trip(tmp_path: Path) -> None:
    model: Any = load_dense(shared() / "model")[0]
    merged = Merged("a/base", "my-adapter", quantized=True)
    mark_merged(model, merged)
    tokenizer = load_dense(shared() / "model")[1]
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        model = load_dense(tmp_path / name)[0]
        contents = json.loads((tmp_path / name / "config.json").read_text())
        assert merged_from(model.config) == merged_from(contents) == merged


def test_a_merged_model_is_not_quantized_unless_asked_for() -> None:
    config = {"minilora": {"merged": True, "base": "b", "adapter": "a", "quantized": True}}
    with pytest.raises(ValueError, match=r"my-model is a merged model .*--no-quantize"):
        decide_quantize(None, config, "my-model")
    assert decide_quantize(True, config, "m") and not decide_quantize(False, config, "m")
    assert decide_quantize(None, {}, "m") and not decide_quantize(False, {}, "m")


@pytest.mark.parametrize("record", [3, [], {}, {"merged": True}, {"merged": False, "base": "x"}])
def test_a_record_that_minilora_does_not_write_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match=r"config.json: minilora="):
        merged_from({"minilora": record})


@pytest.mark.parametrize(
    ("adapter", "asked", "expected", "noted"),
    [
        (None, None, None, ""),
        (None, True, {}, ""),
        ("on-nf4", None, NF4, ""),
        ("on-nf4", True, NF4, ""),
        ("on-nf4", False, None, "trained on a quantized base, and this one is dense"),
        ("on-dense", None, None, ""),
        ("on-dense", False, None, ""),
        ("on-dense", True, {}, "trained on a dense base, and this one is quantized"),
        ("says-nothing", None, None, "does not say whether its base was quantized"),
        ("says-nothing", True, {}, ""),
    ],
)
def test_the_base_is_what_the_adapter_was_trained_on(
    adapter: str | None, asked: bool | None, expected: Any, noted: str
) -> None:
    choice = choose_base("m", str(shared() / adapter) if adapter else None, asked)
    assert choice.name == "m" and choice.quantize == expected
    assert len(choice.notes) == bool(noted) and noted in "".join(choice.notes)


@pytest.mark.parametrize("model", ["m", None])
def test_a_folder_that_holds_no_adapter_is_named(model: str | None, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for adapter, said in (
        (tmp_path, f"{tmp_path}/adapter_config.json does not exist: {tmp_path} holds no adapter"),
        (file, f"'{file}' is a file: an adapter is the folder that holds adapter_config.json"),
        ("org/name", "there is no folder 'org/name': an adapter is loaded from a local folder"),
    ):
        with pytest.raises(FileNotFoundError, match=said):
            choose_base(model, str(adapter), None)
        # The same from Python.
        with pytest.raises(FileNotFoundError, match=said):
            load_adapter(nn.Linear(2, 2), adapter)


def adapter_of(base: Any, path: Path) -> str:
    return str(name_base(shutil.copytree(shared() / "says-nothing", path), base))


def test_an_adapter_names_the_base_that_it_was_trained_on() -> None:
    for adapter in ("on-nf4", "on-dense", "says-nothing"):
        choice = choose_base(None, str(shared() / adapter), None)
        assert choice.name == str(shared() / "model")
        file = shared() / adapter / "adapter_config.json"
        assert f"base model: {choice.name} (from {file})" in choice.notes


@pytest.mark.parametrize("base", ["smollm2", "owner/name", "name", "."])
def test_a_name_may_be_of_the_bundled_model_of_the_hub_or_of_a_folder_here(
    base: str, tmp_path: Path
) -> None:
    assert choose_base(None, adapter_of(base, tmp_path / "a"), None).name == base


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (..., "a does not name its base: give --model"),
        (None, "a does not name its base: give --model"),
        ("", "a does not name its base: give --model"),
        ("/nowhere/model", "a was trained on /nowhere/model, which does not exist here: give --mo"),
        ("../nowhere", "a was trained on ../nowhere, which does not exist here: give --model"),
        ("a/b/c", "a was trained on a/b/c, which does not exist here: give --model"),
        ("https://x.org/m", "a was trained on https://x.org/m, which does not exist here"),
        ("//tmp", "a was trained on //tmp, which does not exist here"),
        ("\\\\host\\share", "which does not exist here"),
        (7, "base_model_name_or_path is 7, no model's name"),
        (["x"], r"base_model_name_or_path is \['x'\], no model's name"),
        ("a\x1b[2J", r"base_model_name_or_path is 'a\\x1b\[2J', no model's name"),
        ("x" * 5000, "base_model_name_or_path is 'xxx"),
    ],
)
def test_an_adapter_that_names_no_base_says_to_give_one(
    base: Any, said: str, tmp_path: Path
) -> None:
    adapter = adapter_of(base, tmp_path / "a")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        choose_base(None, adapter, None)
    assert choose_base("m", adapter, None).name == "m"


def test_code_of_a_base_runs_only_if_its_name_is_given() -> None:
    adapter = str(shared() / "on-dense")
    with pytest.raises(ValueError, match=r"--trust-remote-code would run code of .*--model"):
        choose_base(None, adapter, None, trust_remote_code=True)
    assert choose_base("m", adapter, None, trust_remote_code=True).name == "m"


def test_nothing_is_loaded_without_a_model_or_an_adapter() -> None:
    with pytest.raises(ValueError, match="no model given: pass --model, or an --adapter"):
        choose_base(None, None, None)
