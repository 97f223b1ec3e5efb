"""The demo in one picture: the losses, and what the model answered before and after training."""

from pathlib import Path
from typing import TYPE_CHECKING

from minilora.demo.report import Answer, Report, shortened
from minilora.files.atomic import atomic_files
from minilora.training.result import LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Steps of the running mean.
WINDOW = 10

ANSWERS_SHOWN = 3
LINE_HEIGHT = 0.074


def draw(report: Report, path: Path) -> None:
    """Writes the picture of a report as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    title = "SmolLM2-135M learns to write shell commands: QLoRA on a CPU"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    _draw_losses(left, report)
    _draw_answers(right, report.answers[:ANSWERS_SHOWN])
    with atomic_files(path) as (temporary,):
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def _draw_losses(axes: "Axes", report: Report) -> None:
    steps = [step.step for step in report.history]
    losses = [step.loss for step in report.history]
    label = f"training, mean of {WINDOW} steps"
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, running_mean(losses), color="tab:blue", linewidth=2, label=label)

    for name, value, style in (
        ("base in NF4", report.nf4_loss, ":"),
        ("unquantized base", report.base_loss, "--"),
        ("fine-tuned", report.tuned_loss, "-"),
    ):
        axes.axhline(value, color="tab:red", linestyle=style, linewidth=1.2)
        axes.annotate(
            f"hold-out: {name} {value:.2f}",
            xy=(1, value),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )

    axes.set(xlabel="step (8 commands each)", ylabel=LOSS, xlim=(1, max(2, len(steps))))
    axes.legend(fontsize=9, loc="lower left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(values: list[float]) -> list[float]:
    """Returns the mean of each value and those before it, at most WINDOW in all."""
    windows = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _draw_answers(axes: "Axes", answers: list[Answer]) -> None:
    axes.axis("off")
    heights = iter(0.97 - LINE_HEIGHT * line for line in range(100))
    heading = "tools that it was never trained on"
    axes.text(0, next(heights), heading, fontsize=10, color="0.4", va="top")

    for answer in answers:
        command = answer.command
        next(heights)
        question = shortened(f"{command.tool}: {command.task}", 62)
        axes.text(0, next(heights), question, fontsize=10, va="top")
        for name, text, colour in (
            ("before", answer.before, "0.45"),
            ("after", answer.after, "tab:blue"),
            ("sheet", command.command, "tab:green"),
        ):
            axes.text(
                0.02,
                next(heights),
                f"{name:<6}  {shortened(text, 52)}",
                fontsize=9,
                family="monospace",
                va="top",
                color=colour,
                parse_math=False,
            )
