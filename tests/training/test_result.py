"""A result prints its losses, and in a notebook draws each step."""

from pathlib import Path

from made_up import made_up_step
from markup import parse
from torch import nn

from minilora.training.result import Result


def result(losses: list[float], before: float | None = None, after: float | None = None) -> Result:
    steps = [
        made_up_step(i, loss=loss, tokens=50, seconds=0.5) for i, loss in enumerate(losses, start=1)
    ]
    return Result(nn.Identity(), None, Path("run"), before, after, steps)


def test_a_result_prints_its_losses_and_draws_each_step() -> None:
    shown = result([4.0, 3.5, 3.0], 3.9, 2.75)
    assert str(shown).splitlines() == [
        "3 steps, 100 tokens/s; adapter saved in run/",
        "  loss (nats per completion token)  start    end",
        "  training (first step, last step)  4.000  3.000",
        "  hold-out (before, after)          3.900  2.750",
    ]
    tree = parse(shown._repr_html_())
    line = tree.find(".//polyline")
    assert line is not None and len(line.get("points", "").split()) == 3
    assert {"hold-out, before 3.9", "hold-out, after 2.75"} <= {t.text for t in tree.iter("text")}


def test_without_a_hold_out_a_result_shows_the_training_alone() -> None:
    assert "hold-out" not in str(result([1.0]))
    assert parse(result([1.0])._repr_html_()) is not None
