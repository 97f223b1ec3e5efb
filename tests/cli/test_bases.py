"""generate and merge take a base as its adapter was trained on it, and a folder as it is."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import shared

import minilora
from minilora.cli import app
from minilora.files.adapters import base_name
from minilora.huggingface import generate, load_dense
from minilora.huggingface.provenance import choose_base, merged_from
from minilora.training import FinetuneConfig, finetune

PROMPT = ["--prompt", "say yes", "--max-new-tokens", "12"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, str]:
    app([str(argument) for argument in arguments], standalone_mode=False)
    said = capsys.readouterr()
    return said.out, said.err


def answer(model: Any, tokenizer: Any) -> str:
    return generate(model, tokenizer, "say yes", limit=12) + "\n"


def prepared(adapter: str, quantize: bool) -> tuple[Any, Any]:
    model, tokenizer = load_dense(shared() / "model")
    if quantize:
        minilora.quantize(model)
    return minilora.load_adapter(model, shared() / adapter, other_base=True), tokenizer


@pytest.mark.parametrize(("adapter", "quantized"), [("on-nf4", True), ("on-dense", False)])
def test_the_base_is_as_the_adapter_was_trained(
    adapter: str, quantized: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--model", shared() / "model", "--adapter", shared() / adapter]
    found, notes = run(capsys, "generate", *here, *PROMPT)
    assert (found, notes) == (answer(*prepared(adapter, quantized)), "")

    run(capsys, "merge", *here, "--out", tmp_path / "merged")
    expected = minilora.merge(prepared(adapter, quantized)[0]).state_dict()
    merged, _ = load_dense(tmp_path / "merged")
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected[name]), name
    record = merged_from(merged.config)
    assert record is not None and record.quantized == quantized


@pytest.mark.parametrize("adapter", ["on-nf4", "on-dense"])
def test_another_base_is_taken_if_it_is_asked_for_and_a_note_says_so(
    adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize = adapter == "on-dense"
    flag = "--quantize" if quantize else "--no-quantize"
    here = ["--model", shared() / "model", "--adapter", shared() / adapter, flag]
    found, notes = run(capsys, "generate", *here, *PROMPT)
    assert found == answer(*prepared(adapter, quantize))
    assert notes.count("\n") == 1 and "as requested" in notes


@pytest.mark.parametrize("adapter", ["on-nf4", "on-dense"])
def test_the_base_is_read_from_the_adapter_and_a_note_says_so(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--adapter", shared() / adapter]
    file = shared() / adapter / "adapter_config.json"
    note = f"minilora: note: base model: {shared() / 'model'} (from {file})\n"
    found, notes = run(capsys, "generate", *here, *PROMPT)
    assert (found, notes) == (answer(*prepared(adapter, adapter == "on-nf4")), note)

    _, notes = run(capsys, "merge", *here, "--out", tmp_path / "merged")
    assert notes == note
    record = merged_from(load_dense(tmp_path / "merged")[0].config)
    assert record is not None and record.base == str(shared() / "model")


def test_a_folder_is_recorded_by_its_full_path_and_found_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared())
    model, tokenizer = load_dense("model")
    expected = answer(model, tokenizer)
    adapter = minilora.save_adapter(minilora.inject(model, r=1), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    choice = choose_base(None, str(adapter), None)
    assert choice.name == str(shared() / "model")
    assert run(capsys, "generate", "--model", choice.name, *PROMPT)[0] == expected


def test_the_bundled_model_is_recorded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "minilora.huggingface.loading.bundled_model_folder", lambda: shared() / "model"
    )
    model, _ = load_dense("smollm2")
    adapter = minilora.save_adapter(minilora.inject(model, r=1), tmp_path / "adapter")
    assert base_name(adapter) == "smollm2"


def test_an_adapter_of_another_model_is_refused_in_one_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--model", folder, "--adapter", shared() / "on-dense"]
    with pytest.raises(ValueError, match=f"{shared() / 'on-dense'} does not fit this LlamaFor"):
        run(capsys, "generate", *here, *PROMPT)


def test_a_merged_folder_answers_as_it_is_and_is_not_quantized_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--model", shared() / "model", "--adapter", shared() / "on-nf4"]
    folder = tmp_path / "merged"
    run(capsys, "merge", *here, "--out", folder)
    with_adapter, _ = run(capsys, "generate", *here, *PROMPT)

    merged, tokenizer = load_dense(folder)
    found, notes = run(capsys, "generate", "--model", folder, *PROMPT)
    assert (found, notes) == (answer(merged, tokenizer), "")
    quantized, _ = run(capsys, "generate", "--model", folder, "--quantize", *PROMPT)
    assert found == with_adapter or found != quantized

    config = FinetuneConfig(str(folder), str(shared() / "data.jsonl"), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is a merged model"):
        finetune(config)
    with pytest.raises(ValueError, match="is a merged model"):
        run(capsys, "plan", "--model", folder)
    assert not (tmp_path / "run").exists()


def test_a_prompt_is_read_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"say yes")))
    options = ["--prompt", "-", "--max-new-tokens", "12"]
    found, _ = run(capsys, "generate", "--model", shared() / "model", *options)
    assert found == answer(*load_dense(shared() / "model"))
