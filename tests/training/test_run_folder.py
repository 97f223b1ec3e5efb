"""What a run may replace, and what a kill at the end of one leaves."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupted import FINISHED, Outcome, contents, interrupt, run

from minilora.training import FinetuneConfig, checkpoints, finetune, recipe
from minilora.training.checkpoints import list_checkpoints, remove_checkpoints

Configure = Callable[..., FinetuneConfig]


def names(config: FinetuneConfig) -> list[str]:
    return sorted(p.name for p in Path(config.out).iterdir())


def test_a_finished_run_is_replaced_only_if_asked(resumable: Configure) -> None:
    finetune(resumable(steps=1, seed=1))
    notes = Path(resumable().out) / "notes.txt"
    notes.write_text("mine")
    before = contents(notes.parent)
    message = r"run contains adapter_model.safetensors of a finished run: .*--overwrite"
    with pytest.raises(ValueError, match=message):
        finetune(resumable())
    assert contents(notes.parent) == before
    assert len(finetune(resumable(steps=2, overwrite=True)).history) == 2
    assert names(resumable()) == sorted([*FINISHED, "notes.txt"])


def test_an_unfinished_run_is_replaced_if_asked(
    resumable: Configure, uninterrupted: Outcome
) -> None:
    interrupt(resumable(seed=1), 2)
    found = run(resumable(overwrite=True))
    assert found.history == uninterrupted.history and found.metrics == uninterrupted.metrics
    assert names(resumable()) == FINISHED


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(resumable: Configure) -> None:
    finetune(resumable(steps=1))
    out = Path(resumable().out)
    (out / "adapter_model.safetensors").unlink()
    (out / "adapter_config.json").unlink()
    assert len(finetune(resumable(steps=2)).history) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_config_of_a_model_is_never_replaced(overwrite: bool, resumable: Configure) -> None:
    out = Path(resumable().out)
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json is not the config of a run"):
        finetune(resumable(overwrite=overwrite))
    assert names(resumable()) == ["config.json"]


def test_metrics_that_are_not_of_a_run_stay(resumable: Configure) -> None:
    out = Path(resumable().out)
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"contains metrics\.jsonl"):
        finetune(resumable())


@pytest.mark.parametrize("resume", [False, True])
def test_a_link_in_the_place_of_the_checkpoints_is_refused(
    resume: bool, resumable: Configure, tmp_path: Path
) -> None:
    interrupt(resumable(), 1)
    folder = Path(resumable().out) / "checkpoints"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoints is a symbolic link"):
        finetune(resumable(resume=resume))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_checkpoints_are_removed_at_once_or_not(
    resumable: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any call while they are removed leaves whole ones, or none."""
    interrupt(resumable(save_every=1), 2)
    out, kept = Path(resumable().out), Path(resumable().out + "-kept")
    shutil.copytree(out, kept)

    class Killed(BaseException):
        pass

    for name in ("rename", "rmdir", "unlink", "remove"):
        for call in range(1, 20):
            count = [0]
            original = getattr(os, name)

            def dies(*arguments: Any, **options: Any) -> Any:
                count[0] += 1  # noqa: B023
                if count[0] == call:  # noqa: B023
                    raise Killed
                return original(*arguments, **options)  # noqa: B023

            with monkeypatch.context() as patch:
                patch.setattr(os, name, dies)
                try:
                    remove_checkpoints(out)
                    finished = True
                except Killed:
                    finished = False
            for path in list_checkpoints(out):
                assert checkpoints.find_damage(path) is None
            shutil.rmtree(out)
            shutil.copytree(kept, out)
            if finished:
                break


def test_a_kill_while_the_last_checkpoints_are_removed_leaves_a_finished_run(
    resumable: Configure, uninterrupted: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(resumable(), 2)
    rmtree = shutil.rmtree

    def dies(path: Any, *args: Any, **options: Any) -> None:
        if Path(path).parent.name == "checkpoints":
            raise KeyboardInterrupt
        rmtree(path, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", dies)
        finetune(resumable(resume=True))
    with pytest.raises(ValueError, match="finished run"):
        finetune(resumable())
    with pytest.raises(FileNotFoundError, match="a finished run keeps none"):
        finetune(resumable(resume=True))
    assert run(resumable(overwrite=True)).history == uninterrupted.history
    assert names(resumable()) == FINISHED


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_kill_between_the_adapter_and_the_report_leaves_a_run_to_resume_if_it_has_checkpoints(
    save_every: int, resumable: Configure, uninterrupted: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "write_report", dies)
        finetune(resumable(save_every=save_every))
    left = {path.name for path in Path(resumable().out).iterdir()}
    assert "adapter_model.safetensors" in left and "report.md" not in left

    if save_every == 0:
        with pytest.raises(ValueError, match="of a finished run"):
            finetune(resumable())
        with pytest.raises(FileNotFoundError, match="a finished run keeps none"):
            finetune(resumable(resume=True))
    else:
        with pytest.raises(ValueError, match="checkpoints of an unfinished run"):
            finetune(resumable(save_every=save_every))
        resumed = run(resumable(save_every=save_every, resume=True))
        assert resumed.agrees(uninterrupted) and names(resumable()) == FINISHED


def test_a_file_that_is_not_a_checkpoint_stays(resumable: Configure) -> None:
    interrupt(resumable(), 2)
    mine = Path(resumable().out) / "checkpoints" / "notes.txt"
    mine.write_text("mine")
    finetune(resumable(resume=True))
    assert [p.name for p in mine.parent.iterdir()] == ["notes.txt"]


def test_what_is_written_says_whether_the_base_was_quantized(resumable: Configure) -> None:
    finetune(resumable(steps=1))
    assert json.loads((Path(resumable().out) / "config.json").read_text())["quantize"] is True


@pytest.mark.parametrize("name", ["report.md", "loss.png"])
def test_a_file_that_no_run_has_written_is_replaced_only_if_asked(
    name: str, resumable: Configure
) -> None:
    out = Path(resumable().out)
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match=f"contains {name} of a finished run: .*--overwrite"):
        finetune(resumable())
    assert (out / name).read_text() == "mine"


def test_a_new_run_removes_the_report_and_the_events_of_the_run_before(
    resumable: Configure, tmp_path: Path
) -> None:
    """Before its first step: what is left never describes another run than the adapter is of."""
    finetune(resumable(steps=1))
    out = Path(resumable().out)
    events = out / "tensorboard"
    events.mkdir(exist_ok=True)
    (events / "events.out.tfevents.1.other.2.minilora").write_text("x")
    (events / "notes.txt").write_text("mine")
    interrupt(resumable(overwrite=True), 1)
    assert not (out / "report.md").exists() and not (out / "loss.png").exists()
    assert "events.out.tfevents.1.other.2.minilora" not in {path.name for path in events.iterdir()}
    assert (events / "notes.txt").read_text() == "mine"


def test_a_link_in_the_place_of_the_events_is_refused(resumable: Configure, tmp_path: Path) -> None:
    out = Path(resumable().out)
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "tensorboard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="tensorboard is a symbolic link"):
        finetune(resumable())


def test_a_new_run_leaves_the_event_files_of_other_programs(resumable: Configure) -> None:
    events = Path(resumable().out) / "tensorboard"
    events.mkdir(parents=True)
    mine = events / "events.out.tfevents.1.other.2"
    mine.write_text("mine")
    finetune(resumable(steps=1))
    finetune(resumable(steps=1, overwrite=True))
    assert mine.read_text() == "mine"
