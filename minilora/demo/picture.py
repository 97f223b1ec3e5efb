"""The demo in one picture: the losses, and what the model answered before and after training."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.demo.report import Report, answers_of, shortened
from minilora.files.atomic import atomic_files
from minilora.training.picture import draw_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_HEIGHT = 0.074

# Characters that fit into the right half.
QUESTION_WIDTH, ANSWER_WIDTH = 66, 50

WRONG, RIGHT = "0.45", "tab:green"


def draw(report: Report, path: Path) -> None:
    """Writes the picture of a report as a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    figure.suptitle(report.task.title, x=0.01, ha="left", fontweight="bold")
    left, right = figure.subplots(1, 2)
    result = report.result
    draw_losses(left, result.history, eval_before=result.eval_before, eval_after=result.eval_after)
    draw_answers(right, report)
    with atomic_files(path) as (temporary,), warnings.catch_warnings():
        # An answer may be in any script; the font draws a box for what it lacks.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure.savefig(temporary, format="png")


def draw_answers(axes: "Axes", report: Report) -> None:
    """Writes the score and a few answers on empty axes: right ones, if there are any."""
    axes.axis("off")
    heights = iter(0.98 - LINE_HEIGHT * line for line in range(100))

    def write(text: str, x: float = 0, **style: Any) -> None:
        style = {"fontsize": 9, "va": "top", "parse_math": False, **style}
        axes.text(x, next(heights), text, **style)

    result, count = report.result, len(report.result.samples)
    scores = f"{result.exact_before} of {count} before, {result.exact_after} of {count} after"
    write(f"exactly right: {scores}", fontsize=11, fontweight="bold")
    write(f"held out: {shortened(report.task.held_out_are, 80)}", color="0.4")

    write(f"some {'right' if report.right else 'wrong'} answers:", color="0.4")
    # A wrong one has a line more.
    for i, sample in enumerate(report.right or report.wrong[:2]):
        if i:
            next(heights)
        write(shortened(sample.prompt, QUESTION_WIDTH), fontsize=10)
        for name, text in answers_of(sample):
            right = text.strip() == sample.expected.strip()
            line = f"{name:<8}  {shortened(text, ANSWER_WIDTH)}"
            write(line, 0.02, family="monospace", color=RIGHT if right else WRONG)
