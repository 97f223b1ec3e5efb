"""The picture of the losses: what is drawn, and that it changes nothing of the caller's."""

from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_step

from minilora.training.picture import draw_losses, running_mean

pytest.importorskip("matplotlib", reason="the picture is drawn with it")


def drawn(**options: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The lines by their names in the legend."""
    from matplotlib.figure import Figure

    history = [made_up_step(i, loss=5.0 - i) for i in (1, 2)]
    history += [made_up_step(3, loss=1.0, eval_loss=2.5), made_up_step(4, loss=0.5, eval_loss=2.75)]
    axes = Figure().subplots()
    draw_losses(axes, history, **options)
    return {str(line.get_label()): (*map(list, line.get_data()),) for line in axes.lines}  # type: ignore[misc]


def test_the_losses_are_drawn_as_they_are_and_smoothed() -> None:
    lines = drawn()
    assert lines["training"] == ([1, 2, 3, 4], [4.0, 3.0, 1.0, 0.5])
    assert lines["training, mean of 3 steps"][1] == pytest.approx([4, 3.5, 8 / 3, 1.5])


def test_the_hold_out_is_drawn_from_before_training_on_and_the_kept_step_is_marked() -> None:
    lines = drawn(eval_before=3.5, eval_after=2.5, best_step=3)
    assert lines["hold-out"] == ([0, 3, 4], [3.5, 2.5, 2.75])
    assert lines["kept: step 3"] == ([3], [2.5])


def test_the_step_that_was_kept_is_marked_even_if_the_base_was_better() -> None:
    assert drawn(eval_before=1.0, eval_after=2.5, best_step=3)["kept: step 3"] == ([3], [2.5])


def test_without_evaluations_in_between_the_hold_out_has_two_points() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_losses(axes, [made_up_step(1), made_up_step(2)], eval_before=2.0, eval_after=1.5)
    (line,) = (line for line in axes.lines if line.get_label() == "hold-out")
    assert [*map(list, line.get_data())] == [[0, 2], [2.0, 1.5]]
    assert line.get_linestyle() == "None", "nothing is known between them"


def test_a_mean_is_over_the_last_values() -> None:
    assert running_mean([1, 2, 6, 7], window=2) == [1, 1.5, 4, 6.5]


def test_the_backend_of_the_caller_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    from torch import nn

    from minilora.training.picture import draw_result
    from minilora.training.result import Result

    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    steps = [made_up_step(1), made_up_step(2)]
    draw_result(Result(nn.Identity(), None, tmp_path, None, None, steps), tmp_path / "loss.png")
    assert matplotlib.rcParams["backend"] == "svg"
    header = (tmp_path / "loss.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1200, 630)
