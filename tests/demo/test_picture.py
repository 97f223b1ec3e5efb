"""The demo's picture."""

from dataclasses import replace
from pathlib import Path

import pytest
from demo_report import RIGHT, WRONG, report

from minilora.demo import picture
from minilora.training.samples import Sample

pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")


def texts(samples: list[Sample]) -> dict[str, str]:
    """Each line of the right half, with its color."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture.draw_answers(axes, report(samples))
    return {text.get_text(): text.get_color() for text in axes.texts}


def test_the_picture_says_how_many_answers_are_right() -> None:
    assert "exactly right: 0 of 4 before, 3 of 4 after" in texts([RIGHT, RIGHT, RIGHT, WRONG])


def test_right_answers_stand_out_and_the_expected_one_stands_below_a_wrong_one() -> None:
    found = texts([RIGHT])
    assert found["after     CAP-RED-S x2"] == picture.RIGHT
    assert "expected  CAP-RED-S x2" not in found
    found = texts([WRONG])
    assert found["after     MUG-L x1"] == picture.WRONG
    assert found["expected  MUG-PNK-L x1"] == picture.RIGHT


def test_it_shows_right_answers_as_the_report_does_and_wrong_ones_if_there_are_none() -> None:
    found = texts([WRONG, RIGHT])
    assert "some right answers:" in found and WRONG.prompt not in found
    found = texts([WRONG] * 9)
    assert "some wrong answers:" in found and WRONG.prompt in found


def test_all_lines_are_inside_the_picture() -> None:
    from matplotlib.figure import Figure

    for samples in ([RIGHT] * 9, [WRONG] * 9):
        axes = Figure().subplots()
        picture.draw_answers(axes, report(samples))
        assert min(text.get_position()[1] for text in axes.texts) > 0


def test_a_picture_is_drawn_of_any_text(tmp_path: Path) -> None:
    # Mathematics for matplotlib, a control character, and what its font lacks.
    odd = replace(WRONG, after="$x_{1$ \x0e 安")
    picture.draw(report([odd, RIGHT]), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
