"""The losses of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilora.files.atomic import atomic_files
from minilora.training.loop import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minilora.training.result import Result

TRAINING, HELD_OUT = "tab:blue", "tab:red"

# The running mean is over a tenth of the steps, at least and at most so many.
SHORTEST_MEAN, LONGEST_MEAN = 3, 50


def draw_result(result: "Result", path: Path) -> None:
    """Writes the losses of a run as a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    # Without pyplot, which would change what the caller's own figures are drawn with.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    draw_losses(
        figure.subplots(),
        result.history,
        eval_before=result.eval_before,
        eval_after=result.eval_after,
        best_step=result.best_step,
    )
    with atomic_files(path) as (temporary,):
        figure.savefig(temporary, format="png")


def draw_losses(
    axes: "Axes",
    history: Sequence[Step],
    *,
    eval_before: float | None = None,
    eval_after: float | None = None,
    best_step: int | None = None,
) -> None:
    """Draws the training loss, thin as it is and thick as a running mean, and the hold-out loss.

    Args:
        axes: what to draw on.
        history: the steps.
        eval_before, eval_after: the loss on the hold-out before and after training, if measured.
        best_step: the step whose adapter was kept, if the hold-out was evaluated in between.
    """
    from matplotlib.ticker import MaxNLocator

    steps, losses = [step.step for step in history], [step.loss for step in history]
    window = min(LONGEST_MEAN, max(SHORTEST_MEAN, len(losses) // 10))
    axes.plot(steps, losses, color=TRAINING, alpha=0.3, linewidth=1, label="training")
    mean, label = running_mean(losses, window), f"training, mean of {window} steps"
    axes.plot(steps, mean, color=TRAINING, linewidth=2.2, label=label)

    held_out = _held_out(history, eval_before, eval_after, best_step)
    if held_out:
        at, found = zip(*held_out, strict=True)
        # Between two points alone, a line would say more than is known.
        style = "o-" if len(found) > 2 else "o"
        axes.plot(at, found, style, color=HELD_OUT, ms=5, clip_on=False, label="hold-out")
        kept = [point for point in held_out if point[0] == best_step]
        for x, y in dict.fromkeys((held_out[0], *kept, held_out[-1])):
            _annotate(axes, x, y, f"{y:.2f}")
        if kept:
            label = f"kept: step {best_step}"
            axes.plot(*kept[0], "o", ms=13, mfc="none", color=HELD_OUT, label=label)

    axes.set(xlabel="step", ylabel="loss (nats per completion token)")
    axes.margins(x=0.04, y=0.12)
    # A margin below zero would be for losses that there are not.
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _held_out(
    history: Sequence[Step], before: float | None, after: float | None, best_step: int | None
) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation; step 0 is before training."""
    points = [(step.step, step.eval_loss) for step in history if step.eval_loss is not None]
    if before is not None:
        points.insert(0, (0, before))
    # Otherwise it is that of the best step, which is among them.
    if after is not None and best_step is None:
        points.append((history[-1].step, after))
    return points


def _annotate(axes: "Axes", x: float, y: float, text: str) -> None:
    axes.annotate(
        text,
        xy=(x, y),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=HELD_OUT,
    )


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Returns the mean of each value and those before it, at most `window` in all."""
    windows = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in windows]
