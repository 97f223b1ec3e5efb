"""The demo's runner: all of it with a tiny model, and two steps with the real one."""

import io
import json
import os
import re
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from embedded import needs_model

from minilora.demo import run, tasks
from minilora.demo.report import Report
from minilora.demo.tasks import Task, orders
from minilora.training import finetune
from minilora.training.config import FinetuneConfig
from minilora.training.lock import hold_folder

SCRIPT = "minilora.exe" if os.name == "nt" else "minilora"


def short(seed: int) -> Task:
    """The orders, but few of them."""
    task = orders(seed)
    return replace(task, training=task.training[:16], held_out=task.held_out[:6], asked=4)


class Demo(NamedTuple):
    out: Path
    report: Report
    said: str


def leave_a_demo(out: Path, model: str, /, **changed: str) -> None:
    """Writes the files of a demo with other data."""
    out.mkdir(exist_ok=True)
    data, held_out = str(out / "train.jsonl"), str(out / "eval.jsonl")
    config = {"model": model, "data": data, "eval_data": held_out, "out": str(out)}
    (out / "config.json").write_text(json.dumps(config | changed))
    for name in ("train.jsonl", "eval.jsonl", "adapter_model.safetensors", "metrics.jsonl"):
        (out / name).write_text("old")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Demo:
    """Two steps of the orders with a tiny model, in a folder with a space in its name."""
    pytest.importorskip("matplotlib", reason="the demo draws a picture")
    out = tmp_path_factory.mktemp("demo") / "my demo"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(run, "DEMO_MODEL", str(folder))
        patch.setitem(tasks.TASKS, "orders", short)
        # What another demo has left; this one replaces it.
        leave_a_demo(out, str(folder))
        report = run.run_demo("orders", str(out), steps=2)
    return Demo(out, report, said.getvalue())


def test_the_adapter_is_what_was_trained(demo: Demo) -> None:
    # The adapter from its file gives the trained model's logits, bit for bit.
    assert demo.report.reload_error == 0.0
    # Merging rounds to the base's dtype: at most 2^-8 of a weight in bfloat16.
    assert abs(demo.report.merged_loss - demo.report.result.eval_after) < 0.05
    assert demo.report.base_loss != demo.report.result.eval_before


def test_the_data_is_written_as_it_is_trained_on(demo: Demo) -> None:
    task = short(0)
    for name, records in (("train.jsonl", task.training), ("eval.jsonl", task.held_out)):
        lines = (demo.out / name).read_text().splitlines()
        assert [json.loads(line) for line in lines] == records
    answers = [record["completion"] for record in task.held_out[:4]]
    assert [sample.expected for sample in demo.report.result.samples] == answers


def test_the_files_of_a_run_and_of_the_demo(demo: Demo) -> None:
    assert len((demo.out / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((demo.out / "adapter_config.json").read_text())["r"] == 16
    assert (demo.out / "demo.png").read_bytes().startswith(b"\x89PNG")

    # The run's report, and below it the demo's.
    text = (demo.out / "report.md").read_text()
    assert text.startswith("# my demo: ") and text.count("## The demo\n") == 1
    assert str(demo.report) in text and "](demo.png)" in text


def test_it_says_what_it_does_and_what_to_do_next(demo: Demo) -> None:
    assert str(demo.report) in demo.said
    first = short(0).training[0]
    assert f"    {first['prompt']}\n      -> {first['completion']}\n" in demo.said
    last = demo.said.splitlines()[-1]
    assert last.startswith("chat with it: ")
    assert last.endswith(f"minilora chat --adapter {shlex.quote(str(demo.out))}")


@pytest.mark.parametrize("on_path", [True, False])
@pytest.mark.parametrize("beside_python", [True, False])
def test_the_command_to_chat_with_is_one_that_works(
    on_path: bool, beside_python: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make demo` installs minilora into .venv/bin, where no shell looks for it."""
    places = {}
    for name, has_minilora in (("path", on_path), (".venv/bin", beside_python)):
        places[name] = tmp_path / name
        places[name].mkdir(parents=True)
        if has_minilora:
            script = places[name] / SCRIPT
            script.touch(0o755)
    monkeypatch.setenv("PATH", str(places["path"]))
    monkeypatch.setattr(sys, "executable", str(places[".venv/bin"] / "python"))
    monkeypatch.chdir(tmp_path)
    expected = ["minilora"]
    if not on_path:
        relative = str(Path(".venv", "bin", SCRIPT))
        expected = [relative] if beside_python else ["python", "-m", "minilora"]
    assert run.chat_command(orders(0), Path("x")) == [*expected, "chat", "--adapter", "x"]

    if not on_path and beside_python:
        monkeypatch.chdir(places["path"])
        assert run.installed_command() == [str(tmp_path / relative)]


def test_the_command_that_it_prints_is_the_run(demo: Demo) -> None:
    typer = pytest.importorskip("typer", reason="the command is read as the command line does")
    from minilora.cli import app

    found = re.search(r"^    (minilora finetune (?:.*\\\n)*.*)$", demo.said, re.MULTILINE)
    assert found is not None
    program, command, *options = shlex.split(found[1].replace("\\\n", " "))
    group: Any = typer.main.get_command(app)
    assert (program, command) == ("minilora", "finetune")
    with group.commands[command].make_context(command, options) as context:
        printed = asdict(FinetuneConfig(**context.params))
    stored = json.loads((demo.out / "config.json").read_text())
    changed = {name for name in stored if stored[name] != printed.get(name)}
    # finetune asks before it replaces a run, and looks at the model before it quantizes.
    assert changed <= {"overwrite", "quantize"}


def test_the_folder_of_a_model_is_left_alone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "DEMO_MODEL", str(folder))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is not the config of a run"):
        run.run_demo("orders", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    "train.jsonl eval.jsonl demo.png report.md loss.png metrics.jsonl adapter_config.json "
    "adapter_model.safetensors".split(),
)
def test_files_of_somebody_else_are_left_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "finetune", lambda _: pytest.fail("it runs"))
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is not a demo's and would be replaced: choose"):
        run.run_demo("orders", str(tmp_path))
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("option", ["model", "data", "eval_data", "out"])
def test_a_run_that_is_not_a_demo_is_left_alone(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "finetune", lambda _: pytest.fail("it runs"))
    leave_a_demo(tmp_path, "smollm2", **{option: "another"})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is not a demo's and would be replaced"):
        run.run_demo("orders", str(tmp_path))
    assert contents(tmp_path) == before


def stop(_: Any) -> None:
    raise KeyboardInterrupt


def test_a_demo_is_replaced_and_so_is_one_that_was_stopped_before_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "finetune", stop)
    leave_a_demo(tmp_path / "demo", "smollm2")
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path / "demo", tmp_path, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            run.run_demo("orders", str(out))
        assert (out / "train.jsonl").read_text().startswith('{"prompt"')

    # Of another seed, it is not the data that would be written.
    with pytest.raises(ValueError, match=r"train\.jsonl is not a demo's"):
        run.run_demo("orders", str(tmp_path), seed=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_second_demo_leaves_the_files_of_the_first_one_alone(tmp_path: Path) -> None:
    leave_a_demo(tmp_path, "smollm2")
    with hold_folder(tmp_path):
        before = contents(tmp_path)
        with pytest.raises(BlockingIOError, match="another run is working in"):
            run.run_demo("orders", str(tmp_path))
        assert contents(tmp_path) == before


def test_a_folder_in_which_no_run_can_work_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(ValueError, match="checkpoints is not a folder"):
        run.run_demo("orders", str(tmp_path))
    assert contents(tmp_path) == {"checkpoints": b"mine"}


def test_what_is_checked_is_the_task_and_not_what_the_file_holds_by_then(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the demo draws a picture")
    monkeypatch.setattr(run, "DEMO_MODEL", str(folder))
    monkeypatch.setitem(tasks.TASKS, "orders", short)

    def finetune_and_lose_the_data(config: FinetuneConfig) -> Any:
        result = finetune(config)
        (tmp_path / "eval.jsonl").unlink()
        return result

    monkeypatch.setattr(run, "finetune", finetune_and_lose_the_data)
    report = run.run_demo("orders", str(tmp_path), steps=1)
    assert abs(report.merged_loss - report.result.eval_after) < 0.05


@needs_model
def test_two_steps_with_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tasks.TASKS, "orders", short)
    report = run.run_demo(out=str(tmp_path), steps=2)
    assert report.reload_error == 0.0

    # What the four bits cost; two steps win back more than that on so easy a task.
    assert report.result.eval_after < report.base_loss < report.result.eval_before
    assert abs(report.merged_loss - report.result.eval_after) < 0.05

    # It does not know the codes.
    assert report.result.exact_before == 0
    assert str(report) in capsys.readouterr().out
