"""What `finetune` returns, and how it looks: a table, and in a notebook a plot of the loss."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from minilora.reports.pictures import plot
from minilora.reports.tables import Table
from minilora.training.loop import Step

LOSS = "loss (nats per completion token)"


@dataclass(repr=False)
class Result:
    """The result of a run. It prints as a table; a notebook adds a plot of the training loss.

    Attributes:
        model: the trained model.
        tokenizer: its tokenizer.
        out: the output folder.
        eval_before: loss (nats per completion token) on the hold-out before training; None: no
            hold-out.
        eval_after: the same after training.
        history: the metrics of every step.
    """

    model: nn.Module
    tokenizer: Any
    out: Path
    eval_before: float | None
    eval_after: float | None
    history: list[Step] = field(default_factory=list)

    def table(self) -> Table:
        """Returns the losses before and after training."""
        first, last = self.history[0], self.history[-1]
        rows = [("training (first step, last step)", f"{first.loss:.3f}", f"{last.loss:.3f}")]
        if self.eval_before is not None and self.eval_after is not None:
            before, after = f"{self.eval_before:.3f}", f"{self.eval_after:.3f}"
            rows.append(("hold-out (before, after)", before, after))

        tokens = sum(step.tokens for step in self.history)
        speed = tokens / sum(step.seconds for step in self.history)
        title = f"{last.step} steps, {speed:.0f} tokens/s; adapter saved in {self.out}/"
        return Table(title, (LOSS, "start", "end"), tuple(rows))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        steps = [step.step for step in self.history]
        losses = [step.loss for step in self.history]
        held_out = {"hold-out, before": self.eval_before, "hold-out, after": self.eval_after}
        levels = {name: value for name, value in held_out.items() if value is not None}
        picture = plot(steps, losses, "step", f"training {LOSS}", line=True, levels=levels)
        return self.table().html(picture)
