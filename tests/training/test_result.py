"""A result prints its losses, and in a notebook draws each step."""

from pathlib import Path

from made_up import made_up_step
from markup import parse
from torch import nn

from minilora.training.result import Result
from minilora.training.samples import Sample


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


def test_a_result_shows_the_samples_in_short_and_safe() -> None:
    shown = result([4.0])
    shown.samples = [
        Sample("2 + 2?", "4", "I\x1b[2J think\nso " + 99 * "x", "4"),
        Sample("<b>1?", "1", "1", "2"),
    ]
    lines = str(shown).splitlines()
    assert "Exactly as expected: 1 of 2 answers before training, 1 after" in lines
    assert "  expected  4" in lines and "  after     2" in lines
    (before,) = (line for line in lines if line.startswith("  before    I"))
    assert before.startswith("  before    I\\x1b[2J think so xxx") and before.endswith("...")

    cells = [cell.text for cell in parse(shown._repr_html_()).iter("td")]
    assert cells[-4:] == ["<b>1?", "1", "1", "2"]


def test_a_result_names_the_step_whose_adapter_was_kept() -> None:
    shown = result([4.0, 3.0], 3.5, 3.0)
    shown.best_step = 1
    assert str(shown).splitlines()[0].endswith("; adapter of step 1 saved in run/")
