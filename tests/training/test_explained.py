"""`minilora finetune` on a user's file, off a terminal: everything that it says and leaves."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import FINISHED

import minilora

STEPS, EVERY = 20, 4


@dataclass
class Run:
    """What a command printed, and the folder that it wrote."""

    said: list[str]
    errors: str
    out: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def report(self) -> str:
        return (self.out / "report.md").read_text()


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Learns four words until it overfits: on two other words the loss rises again."""
    pytest.importorskip("typer", reason="the command is typer's")
    place = tmp_path_factory.mktemp("explained")
    for name, words in (
        ("train", ["yes", "no", "perhaps", "never"] * 4),
        ("eval", ["maybe", "always"]),
    ):
        records = [{"prompt": f"say {word}", "completion": word.upper()} for word in words]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))

    options = {
        "--model": folder,
        "--data": "train.jsonl",
        "--eval-data": "eval.jsonl",
        "--out": "my-run",
        "--steps": STEPS,
        "--eval-every": EVERY,
        "--samples": 2,
        "--log-every": 5,
        "--lr": 3e-2,
        "--batch-size": 4,
        "--max-length": 80,
        "--device": "cpu",
    }
    words = [str(word) for option in options.items() for word in option]
    path = os.pathsep.join([str(Path(minilora.__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "minilora", "finetune", *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Run(done.stdout.splitlines(), done.stderr, place / "my-run")


def test_it_says_first_what_it_is_going_to_do(run: Run) -> None:
    header = dict(re.split("  +", line, maxsplit=1) for line in run.said[2:10] if "  " in line)
    assert run.said[0].startswith("loading ") and run.said[1] == "quantizing it to 4 bits"
    assert header["model"].endswith(" parameters, in NF4")
    assert header["adapters"] == "r=16, alpha=32 in 14 layers"
    assert re.fullmatch(r"[\d,]+ parameters \([\d.]+ %\)", header["trainable"])
    expected = "train.jsonl: 16 examples to train on, 2 of eval.jsonl held out"
    assert header["data"] == expected
    assert header["steps"] == "20 steps of 4 examples each (5 epochs)"
    states = "weights, adapters, gradients and optimizer states"
    memory = rf"[\d.]+ .B for {states} \(the base: [\d.]+ .B\), plus activations"
    assert re.fullmatch(memory, header["memory"])
    at = run.said.index("evaluating the base model (examples: 2, sample answers: 2)")
    expected = r"training takes about \d+ \w+ \(at the speed of the evaluation\)"
    assert re.fullmatch(expected, run.said[at + 1]) and run.said[at + 2].startswith("step ")
    if find_spec("tensorboard"):
        assert header["watch"] == "tensorboard --logdir my-run/tensorboard"


def test_it_shows_its_progress_in_lines(run: Run) -> None:
    lines = [line for line in run.said if line.startswith("step ")]
    steps = [int(line.split()[1].partition("/")[0]) for line in lines]
    assert steps == sorted({1, STEPS, *range(5, STEPS, 5), *range(EVERY, STEPS, EVERY)})
    for step, line in zip(steps, lines, strict=True):
        metrics = run.metrics[step - 1]
        assert f"  loss {metrics['loss']:.3f}  " in line
        evaluated = metrics["eval_loss"] is not None
        assert evaluated == (step % EVERY == 0) == ("  hold-out " in line)
        assert re.search(r"  lr \S+  \d+ tokens/s  .*\d+ \w+ left$", line)
    assert "%|" not in run.errors


def test_the_adapter_that_is_saved_is_the_best_one(run: Run, folder: Path) -> None:
    """Evaluated again from the files: its loss is the lowest of all, and not the last."""
    from minilora.huggingface.loading import load_dense
    from minilora.training.data import load_examples
    from minilora.training.loss import evaluate

    losses = {m["step"]: m["eval_loss"] for m in run.metrics if m["eval_loss"] is not None}
    best = min(losses, key=losses.__getitem__)
    assert best < STEPS and losses[best] < losses[STEPS]
    assert f"The adapter is that of step {best} of {STEPS}, where it was lowest." in run.report

    model, tokenizer = load_dense(folder, device=torch.device("cpu"))
    minilora.load_adapter(minilora.quantize(model), run.out)
    held_out = load_examples(run.out.parent / "eval.jsonl", tokenizer, 80)
    found = evaluate(model, held_out, batch_size=4, pad=tokenizer.pad_token_id)
    assert found == pytest.approx(losses[best], rel=1e-3)


def test_it_leaves_a_report_with_a_picture(run: Run) -> None:
    assert sorted(path.name for path in run.out.iterdir()) == FINISHED
    first, last = run.metrics[0]["loss"], run.metrics[-1]["loss"]
    assert f"| training (first step, last step) | {first:.3f} | {last:.3f} |" in run.report
    assert "| data | train.jsonl: 16 examples to train on, 2 of eval.jsonl held out |" in run.report
    if find_spec("matplotlib"):
        assert "](loss.png)" in run.report
        picture = (run.out / "loss.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert [int.from_bytes(picture[i : i + 4], "big") for i in (16, 20)] == [1200, 630]


def test_it_shows_what_the_model_answered_before_and_after(run: Run) -> None:
    counted = "Exactly as expected: 0 of 2 answers before training, 0 after"
    assert counted in run.said and f"{counted}." in run.report
    for prompt in ("say maybe", "say always"):
        start = run.said.index(f"  prompt    {prompt}")
        names = [line.split()[0] for line in run.said[start : start + 4]]
        assert names == ["prompt", "expected", "before", "after"]
        assert run.said[start + 1] == f"  expected  {prompt.removeprefix('say ').upper()}"
        assert f"prompt:\n\n```text\n{prompt}\n```" in run.report


def test_it_says_at_the_end_what_to_do_next(run: Run) -> None:
    end = run.said[run.said.index("next steps:") :]
    assert end[1] == "  minilora chat --adapter my-run"
    assert [line.split()[1] for line in end[1:]] == ["chat", "generate", "merge"]
    assert all(line.strip() in run.report for line in end[1:])
    assert any(line.endswith("full report: my-run/report.md") for line in run.said)
