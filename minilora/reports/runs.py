"""What a training run reports: a `Step` after each optimizer step, a `Result` at its end."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from minilora.reports.tables import Table, plot


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports: mean loss (nats a learned token), learned tokens, tokens in all, seconds."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    learned: int
    tokens: int
    seconds: float


@dataclass(repr=False)
class Result:
    """What `finetune` returns: the trained model, its tokenizer, the loss on the hold-out before and after, every step.

    It prints as a table; in a notebook the training loss is drawn below it.
    """

    model: nn.Module
    tokenizer: Any
    out: Path
    eval_before: float | None
    eval_after: float | None
    history: list[Step] = field(default_factory=list)

    def table(self) -> Table:
        """The losses before and after, in nats a learned token."""
        first, last = self.history[0], self.history[-1]
        rows = [("training", f"{first.loss:.3f}", f"{last.loss:.3f}")]
        if self.eval_before is not None and self.eval_after is not None:
            rows.append(("held out", f"{self.eval_before:.3f}", f"{self.eval_after:.3f}"))
        speed = sum(s.tokens for s in self.history) / sum(s.seconds for s in self.history)
        title = f"{last.step} steps, {speed:.0f} tokens/s; adapter in {self.out}/"
        return Table(title, ("nats a learned token", "at first", "at last"), tuple(rows))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        steps, losses = [s.step for s in self.history], [s.loss for s in self.history]
        held_out = {"held out, before": self.eval_before, "held out, after": self.eval_after}
        levels = {name: value for name, value in held_out.items() if value is not None}
        return self.table().html(
            plot(
                steps,
                losses,
                "step",
                "training loss, nats a learned token",
                line=True,
                levels=levels,
            )
        )
