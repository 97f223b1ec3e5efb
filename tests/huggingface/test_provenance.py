"""What a base was is written down and read: merged models, and what an adapter was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import NF4, shared

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
    choice = choose_base(shared() / adapter if adapter else None, asked)
    assert choice.quantize == expected
    assert noted in choice.note and bool(noted) == bool(choice.note)


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        choose_base(tmp_path, None)
