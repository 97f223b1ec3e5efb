"""TensorBoard reads what a run writes, and a resumed run continues its curves."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_step

from minilora.training import FinetuneConfig, finetune, tensorboard
from minilora.training.callbacks import run_with
from minilora.training.tensorboard import find_tensorboard, remove_events, write_events

FOUND = find_tensorboard()

needed = pytest.mark.skipif(FOUND is None, reason="TensorBoard is not installed")


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@needed
def test_tensorboard_reads_every_curve(tmp_path: Path) -> None:
    steps = [made_up_step(1, loss=3.5), made_up_step(2, loss=2.5, eval_loss=2.75)]
    run_with([write_events(tmp_path, 0, FOUND)], steps)
    found = curves(tmp_path)
    assert found["loss"] == [(1, 3.5), (2, 2.5)]
    assert found["eval_loss"] == [(2, 2.75)]
    assert found["lr"] == found["grad_norm"] == [(1, 1.0), (2, 1.0)]


@needed
def test_a_step_can_be_seen_before_the_run_has_ended(tmp_path: Path) -> None:
    with write_events(tmp_path, 0, FOUND) as after_step:
        after_step(made_up_step(1, loss=3.5))
        assert curves(tmp_path)["loss"] == [(1, 3.5)]


@needed
def test_the_steps_that_a_resumed_run_repeats_are_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(1_000_000, 2_000_000))
    monkeypatch.setattr(tensorboard.time, "time", lambda: float(next(times)))
    run_with([write_events(tmp_path, 0, FOUND)], [made_up_step(i, loss=1.0) for i in (1, 2, 3)])
    run_with([write_events(tmp_path, 1, FOUND)], [made_up_step(i, loss=2.0) for i in (2, 3, 4)])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert curves(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


@needed
def test_a_write_that_was_cut_short_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a disk that is nearly full: seven bytes at a time."""

    class Nearly(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Nearly(path, mode))
    run_with([write_events(tmp_path, 0, FOUND)], [made_up_step(1, loss=3.5)])
    monkeypatch.undo()
    assert curves(tmp_path)["loss"] == [(1, 3.5)]


def test_without_tensorboard_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda _: None)
    assert find_tensorboard() is None
    run_with([write_events(tmp_path, 0, None)], [made_up_step(1)])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorBoard that is installed and raises an error of its own when it is imported."""
    package = tmp_path / "broken" / "tensorboard"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise TypeError("descriptors cannot be\\ncreated")')
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("broken")
def test_a_tensorboard_that_cannot_be_imported_is_named_in_one_line_and_the_run_goes_on(
    configure: Callable[..., FinetuneConfig],
) -> None:
    message = (
        r"^TensorBoard is installed but cannot be imported, so the run writes no events for it "
        r"\(TypeError: descriptors cannot be\\ncreated\)$"
    )
    with pytest.warns(UserWarning, match=message):
        result = finetune(configure(steps=1, batch_size=2, eval_fraction=0.0))
    assert (result.out / "report.md").exists() and not (result.out / "tensorboard").exists()


@needed
def test_what_a_run_has_written_is_removed(tmp_path: Path) -> None:
    run_with([write_events(tmp_path, 0, FOUND)], [made_up_step(1)])
    remove_events(tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_what_runs_have_written_is_removed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run" / "tensorboard", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.write_text("mine")
    (folder / "events.out.tfevents.1.host.2.minilora").write_text("")
    (folder / "events.out.tfevents.2.host.2.minilora").symlink_to(outside)
    others = ["events.out.tfevents.3.host.2", "notes.txt"]
    for name in others:
        (folder / name).write_text("mine")
    remove_events(tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == others
    assert outside.read_text() == "mine"

    for name in others:
        (folder / name).unlink()
    remove_events(tmp_path / "run")
    assert not folder.exists()


def test_a_folder_behind_a_link_stays_as_it_is(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "events.out.tfevents.1.host.2.minilora").write_text("")
    (tmp_path / "tensorboard").symlink_to(elsewhere)
    remove_events(tmp_path)
    assert (tmp_path / "tensorboard").is_symlink() and len(list(elsewhere.iterdir())) == 1
