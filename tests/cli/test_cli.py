"""The commands, from data to a merged model; options that come from the config; errors."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_page
import pytest
import torch
import typer
from command_line import run_main

import minilora
from minilora.cli import app, attribute_texts, options_of, parse_targets
from minilora.training import FinetuneConfig, Interrupted

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def minilora_command(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "minilora", *args],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    line = '{"prompt": "say %s", "completion": "%s"}\n'
    path.write_text("".join(line % (word, word.upper()) for word in ("yes", "no") * 10))
    return path


def test_the_commands_from_data_to_a_merged_model(
    folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, merged, model = str(tmp_path / "run"), str(tmp_path / "merged"), str(folder)

    options = ["--model", model, "--data", str(data), "--out", run, "--steps", "3", "--lr", "0.01"]
    done = minilora_command("finetune", *options)
    assert done.returncode == 0, done.stderr
    assert "hold-out (before, after)" in done.stdout

    # No progress bar where the output is not a terminal.
    assert "%|" not in done.stderr

    options = ["--adapter", run, "--prompt", "say yes", "--max-new-tokens", "3"]
    done = minilora_command("generate", "--model", model, *options)
    assert done.returncode == 0, done.stderr

    options = ["--adapter", run, "--out", merged]
    done = minilora_command("merge", "--model", model, *options)
    assert done.returncode == 0, done.stderr

    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(merged)
    adapted = AutoModelForCausalLM.from_pretrained(folder, dtype=whole.dtype)
    expected = minilora.merge(minilora.load_adapter(minilora.quantize(adapted), run)).state_dict()
    found = whole.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    code, err = run_main(capsys, monkeypatch, "merge", "--model", model, *options)
    assert code == 1 and f"minilora: {merged} already exists" in err


def test_an_error_is_one_line(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--model", str(folder), "--data", "nowhere.jsonl", "--out", str(tmp_path / "run")]
    code, err = run_main(capsys, monkeypatch, "finetune", *options)
    assert code == 1 and "Traceback" not in err
    assert "minilora: nowhere.jsonl does not exist" in err


def flags(command: str) -> list[str]:
    return sorted(o for p in COMMANDS[command].params for o in (*p.opts, *p.secondary_opts))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("demo", "task --out --seed --steps"),
        (
            "finetune",
            "--model --data --out --r --rank --alpha --targets --dropout --lr --steps --epochs "
            "--batch-size --grad-accum --max-length --packing --no-packing --group-by-length "
            "--no-group-by-length --weight-decay --clip --quantize --no-quantize "
            "--learn-prompt --no-learn-prompt --eval-fraction --eval-data --eval-every --samples "
            "--seed --device --checkpointing --no-checkpointing --log-every --save-every --keep "
            "--resume --no-resume --overwrite --no-overwrite --trust-remote-code "
            "--no-trust-remote-code --shard --no-shard --timeout",
        ),
        (
            "generate",
            "--model --prompt --prompts --out --adapter --max-new-tokens --batch-size "
            "--temperature --top-p --seed --quantize --no-quantize --device --trust-remote-code "
            "--no-trust-remote-code",
        ),
        (
            "chat",
            "--model --adapter --system --max-new-tokens --temperature --top-p --seed --quantize "
            "--no-quantize --device --trust-remote-code --no-trust-remote-code",
        ),
        (
            "merge",
            "--model --adapter --out --quantize --no-quantize --trust-remote-code "
            "--no-trust-remote-code",
        ),
        (
            "plan",
            "--model --r --rank --targets --quantize --no-quantize --batch-size --length "
            "--checkpointing --no-checkpointing --dropout --grad-accum --gpu --gpus --bandwidth "
            "--trust-remote-code --no-trust-remote-code",
        ),
    ],
)
def test_the_flags_are_frozen(command: str, expected: str) -> None:
    assert flags(command) == sorted(expected.split())


def test_there_are_no_other_commands() -> None:
    assert set(COMMANDS) == {"demo", "finetune", "generate", "chat", "merge", "plan"}


def test_every_field_of_the_config_is_an_option_with_its_text_and_default() -> None:
    texts = attribute_texts(FinetuneConfig)
    options = {option.name: option for option in COMMANDS["finetune"].params}
    fields = dataclasses.fields(FinetuneConfig)
    assert [f.name for f in fields] == list(texts) == list(options)
    for field in fields:
        option = options[field.name]
        assert option.help == texts[field.name] and texts[field.name].endswith(".")
        assert option.required == (field.default is dataclasses.MISSING)
        assert option.required or option.default == field.default
        assert field.default is not None or "(default: " in option.help


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {}),
        (["--targets", "q_proj, v_proj"], {"targets": ["q_proj", "v_proj"]}),
        (["--targets", "q_proj"], {"targets": "q_proj"}),
        (["--no-quantize", "--checkpointing"], {"quantize": False, "checkpointing": True}),
        (["--clip", "0.5", "--weight-decay", "0.1"], {"clip": 0.5, "weight_decay": 0.1}),
        (["--alpha", "3", "--steps", "7", "--resume"], {"alpha": 3.0, "steps": 7, "resume": True}),
    ],
)
def test_options_become_the_config(
    given: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[FinetuneConfig] = []
    monkeypatch.setattr("minilora.training.finetune", configs.append)
    required = ["--model", "m", "--data", "d", "--out", "o"]
    app(["finetune", *required, *given], standalone_mode=False)
    assert configs == [FinetuneConfig("m", "d", "o", **expected)]


def test_a_new_field_is_a_new_option_and_nothing_else_is_edited() -> None:
    @dataclass
    class Config:
        """One more.

        Attributes:
            name: A name.
            warm: Whether it is warm, in a text that goes on
                in a second line.

        Raises:
            ValueError: never: this is no attribute.
        """

        name: str
        warm: bool = True

    assert attribute_texts(Config) == {
        "name": "A name.",
        "warm": "Whether it is warm, in a text that goes on in a second line.",
    }
    found: list[dict[str, Any]] = []
    other = typer.Typer()

    @other.command()
    @options_of(Config)
    def command(**options: Any) -> None:
        found.append(options)

    other(["--name", "x", "--no-warm"], standalone_mode=False)
    assert found == [{"name": "x", "warm": False}]


def test_targets_are_split_at_commas() -> None:
    assert parse_targets("all-linear") == "all-linear"
    assert parse_targets("a, b,") == ["a", "b"] and parse_targets("") == []


def test_the_page_of_the_command_line_is_current() -> None:
    assert command_page.PAGE.read_text() == command_page.render(), (
        "python tests/tools/command_page.py"
    )


def test_the_list_of_commands_is_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["--help"], prog_name="minilora")
    printed = capsys.readouterr().out
    listed = printed.partition("Commands:")[2].strip().splitlines()
    assert len(listed) == len(COMMANDS) and all(line.endswith(".") for line in listed)
    assert "..." not in printed.partition("Commands:")[2]


@pytest.mark.parametrize("memory", [0, 1_500_000_000])
def test_the_peak_memory_is_shown_where_it_is_known(
    memory: int,
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("minilora.training.finetune", lambda _: "the result")
    monkeypatch.setattr("minilora.training.progress.peak_memory", lambda: memory)
    options = ["--model", str(folder), "--data", str(data), "--out", str(tmp_path / "run")]
    app(["finetune", *options], standalone_mode=False)
    printed = capsys.readouterr().out
    assert ("peak memory: 1.50 GB\n" in printed) == bool(memory)
    assert ("peak memory" in printed) == bool(memory) and "\nnext steps:\n" in printed


@pytest.mark.parametrize("command", ["demo", "finetune"])
def test_an_interrupted_run_is_one_line_and_the_code_of_its_signal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise Interrupted(15, "stopped after step 3")

    monkeypatch.setattr("minilora.training.finetune", interrupted)
    monkeypatch.setattr("minilora.demo.run.run_demo", interrupted)
    options = ["--model", "m", "--data", "d", "--out", "o"] if command == "finetune" else []
    assert app([command, *options], standalone_mode=False) == 143
    assert capsys.readouterr().err == "minilora: stopped after step 3\n"
