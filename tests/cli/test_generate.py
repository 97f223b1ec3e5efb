"""generate for one prompt or a file of them, and chat through a pipe."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import shared

from minilora.cli import app, main
from minilora.files import load_adapter
from minilora.huggingface import Sampling, generate, generate_batch, load_dense

MODEL = ["--model", str(shared() / "model")]
SHORT = ["--max-new-tokens", "8"]


def run(*arguments: Any) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("say yes\n\nsay no, please\nGrüße\n", encoding="utf-8")
    return path


GIVEN = ["say yes", "say no, please", "Grüße"]


def test_the_answers_to_a_file_are_json_lines(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate", *MODEL, *SHORT, "--prompts", prompts, "--batch-size", 2)
    said = capsys.readouterr()
    answers = generate_batch(*load_dense(shared() / "model"), GIVEN, limit=8, batch_size=2)
    assert [json.loads(line) for line in said.out.splitlines()] == [
        {"prompt": prompt, "answer": answer} for prompt, answer in zip(GIVEN, answers, strict=True)
    ]
    assert said.err == ""


def test_the_answers_can_be_a_file_that_does_not_exist_yet(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "answers.jsonl"
    options = ["generate", *MODEL, *SHORT, "--prompts", prompts, "--out", out]
    run(*options)
    assert capsys.readouterr().out == ""
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in found] == GIVEN
    assert "Grüße" in out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"answers.jsonl already exists: choose another --out"):
        run(*options)
    assert out.read_bytes() == before


def test_sampling_is_that_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    sampled = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]
    run("generate", *MODEL, *SHORT, "--prompt", "say yes", *sampled)
    sampling = Sampling(1.5, 0.9, seed=3)
    expected = generate(*load_dense(shared() / "model"), "say yes", limit=8, sampling=sampling)
    assert capsys.readouterr().out == expected + "\n"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_is_escaped_on_a_terminal_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "minilora.huggingface.generation.generate", lambda *_, **__: "\x1b[2Jone\ntwo"
    )
    run("generate", *MODEL, "--prompt", "x")
    assert capsys.readouterr().out == "\x1b[2Jone\ntwo\n"
    monkeypatch.setattr(sys, "stdout", Screen())
    run("generate", *MODEL, "--prompt", "x")
    assert sys.stdout.getvalue() == "\\x1b[2Jone\ntwo\n"  # type: ignore[attr-defined]


def test_a_program_can_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("say yes\n/base\n/again\n"))
    run("chat", *SHORT, "--adapter", shared() / "on-dense")
    model, tokenizer = load_dense(shared() / "model")
    base = generate(model, tokenizer, "say yes", limit=8)
    adapted = generate(load_adapter(model, shared() / "on-dense"), tokenizer, "say yes", limit=8)
    said = capsys.readouterr()
    assert said.out == f"{adapted}\n{base}\n" and base != adapted
    base_of_the_adapter, switched = said.err.splitlines()
    assert base_of_the_adapter.startswith("minilora: note: base model: ")
    assert switched.startswith("minilora: note: The adapter is off: the base answers.")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"/x\n", "unknown command /x: /help lists the commands"),
        (b"\xff\n", "standard input is not UTF-8 text: "),
    ],
)
def test_a_line_without_an_answer_ends_the_chat_of_a_program(
    line: bytes, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minilora", "chat", *MODEL, *SHORT])
    stdin = io.TextIOWrapper(io.BytesIO(b"say yes\n" + line + b"say no\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("minilora.cli.discard_output", lambda: None)
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr()
    assert left.value.code == 1 and printed.err.startswith(f"minilora: {said}")
    answer = generate(*load_dense(shared() / "model"), "say yes", limit=8)
    assert printed.out == f"{answer}\n" and printed.err.count("\n") == 1


def ended(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, list[str]]:
    """The exit code and the lines of standard error of `main`, notes left out."""
    monkeypatch.setattr(sys, "argv", ["minilora", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 600 + "\n"))
    monkeypatch.setattr("minilora.cli.discard_output", lambda: None)
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert said.out == ""
    return left.value.code, [line for line in said.err.splitlines() if ": note: " not in line]


# Stands for the folder of the tiny model, which is another one in each process.
NO_ADAPTER = "the-model"
ONE = ["generate", "--prompt", "x"]

# Loading it is an error, which comes later than those of the options.
NO_MODEL = ["--model", "./nowhere"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([*ONE, "--adapter", NO_ADAPTER], 1, "the-model holds no adapter"),
        (["chat", "--adapter", NO_ADAPTER], 1, "the-model holds no adapter"),
        (["chat", "--adapter", "nowhere"], 1, "there is no folder 'nowhere'"),
        (ONE, 1, "no model given: pass --model, or an --adapter that records its base model"),
        (["chat"], 1, "no model given"),
        ([*ONE, "--max-new-tokens", "0", *NO_MODEL], 1, "max_new_tokens=0: must be at least 1"),
        (["chat", "--max-new-tokens", "0", *NO_MODEL], 1, "max_new_tokens=0: must be at least 1"),
        ([*ONE, "--batch-size", "0", *NO_MODEL], 1, "batch_size=0: must be at least 1"),
        (["chat", *MODEL], 1, "it exceeds the model's context of 512"),
        (["generate", *MODEL, "--prompt", "x" * 600], 1, "it exceeds the model's context of 512"),
        (["chat", *MODEL, "--temperature", "-1"], 1, "temperature=-1.0: must be 0 (greedy)"),
        ([*ONE, *MODEL, "--top-p", "0"], 1, "top_p=0.0: must be more than 0"),
        (["generate", *MODEL], 2, "give either --prompt or --prompts"),
        ([*ONE, *MODEL, "--prompts", "x"], 2, "give either --prompt or --prompts"),
        ([*ONE, *MODEL, "--out", "x"], 2, "--out is for the answers to --prompts"),
        (["generate", *MODEL, "--prompts", "x.txt"], 1, "x.txt does not exist"),
        (["merge", "--adapter", NO_ADAPTER, "--out", "x"], 1, "the-model holds no adapter"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(shared() / "model")
    arguments = [folder if word == NO_ADAPTER else word for word in arguments]
    found, lines = ended(arguments, monkeypatch, capsys)
    assert found == code and len(lines) == 1
    assert lines[0].startswith("minilora: ") and said.replace(NO_ADAPTER, folder) in lines[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "prompts.txt is empty: it holds no prompt"),
        ("x\n" + "y" * 600, "prompt 2: the prompt has"),
    ],
)
def test_a_file_that_cannot_be_answered_is_said_in_one_line(
    text: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text(text)
    arguments = ["generate", *MODEL, "--prompts", str(file), "--out", str(out)]
    code, lines = ended(arguments, monkeypatch, capsys)
    assert code == 1 and len(lines) == 1 and said in lines[0]
    assert not out.exists()


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import minilora

    run("--version")
    assert capsys.readouterr().out == f"minilora {minilora.__version__}\n"
