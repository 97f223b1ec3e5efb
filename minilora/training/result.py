"""What `finetune` returns, and how it looks: a table and samples, in a notebook also a plot."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files.text import shown
from minilora.reports.pictures import plot
from minilora.reports.tables import Table
from minilora.training.loop import Step
from minilora.training.samples import Sample

LOSS = "loss (nats per completion token)"

# Of a prompt or an answer in the printed result. The report has them whole.
WIDTH = 80


class ReleasedModel(nn.Module):
    """In place of a model whose shards are gone with the processes that held them.

    Its forward raises ValueError, which says where the adapter is.
    """

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out

    def forward(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "the model of a sharded run is released at its end: load the base, and "
            f"minilora.load_adapter(model, {shown(self.out)!r})"
        )


@dataclass(repr=False)
class Result:
    """The result of a run. It prints as a table with the sample answers; a notebook adds a plot.

    Attributes:
        model: the trained model; of a sharded run a `ReleasedModel`.
        tokenizer: its tokenizer.
        out: the output folder.
        eval_before: loss (nats per completion token) on the hold-out before training; None: no
            hold-out.
        eval_after: the same after training.
        history: the metrics of every step.
        samples: prompts of the hold-out, with the answers before and after training.
        best_step: the step after which the loss on the hold-out was lowest, and whose adapter this
            is; None: the hold-out was not evaluated during training, and this is the last one.
    """

    model: nn.Module
    tokenizer: Any
    out: Path
    eval_before: float | None
    eval_after: float | None
    history: list[Step] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    best_step: int | None = None

    @property
    def exact_before(self) -> int:
        """How many answers before training were exactly the expected ones."""
        return sum(sample.exact_before for sample in self.samples)

    @property
    def exact_after(self) -> int:
        """The same after training."""
        return sum(sample.exact for sample in self.samples)

    @property
    def exact(self) -> str:
        """Both in words."""
        before, after, n = self.exact_before, self.exact_after, len(self.samples)
        return f"Exactly as expected: {before} of {n} answers before training, {after} after"

    @property
    def speed(self) -> float:
        """Tokens per second of training, without padding and without evaluations."""
        tokens = sum(step.tokens for step in self.history)
        return tokens / sum(step.seconds for step in self.history)

    def table(self) -> Table:
        """Returns the losses before and after training."""
        first, last = self.history[0], self.history[-1]
        rows = [("training (first step, last step)", f"{first.loss:.3f}", f"{last.loss:.3f}")]
        if self.eval_before is not None and self.eval_after is not None:
            before, after = f"{self.eval_before:.3f}", f"{self.eval_after:.3f}"
            rows.append(("hold-out (before, after)", before, after))

        kept = f" of step {self.best_step}" if self.best_step is not None else ""
        title = f"{last.step} steps, {self.speed:.0f} tokens/s; adapter{kept} saved in {self.out}/"
        return Table(title, (LOSS, "start", "end"), tuple(rows))

    def __repr__(self) -> str:
        lines = [str(self.table())]
        if self.samples:
            lines += ["", self.exact]
        for sample in self.samples:
            lines += ["", *(f"  {name:<8}  {_short(text)}" for name, text in vars(sample).items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        steps = [step.step for step in self.history]
        losses = [step.loss for step in self.history]
        held_out = {"hold-out, before": self.eval_before, "hold-out, after": self.eval_after}
        levels = {name: value for name, value in held_out.items() if value is not None}
        picture = plot(steps, losses, "step", f"training {LOSS}", line=True, levels=levels)
        return self.table().html(picture + self._samples_html())

    def _samples_html(self) -> str:
        if not self.samples:
            return ""
        rows = [_row("th", vars(self.samples[0]).keys())]
        rows += [_row("td", map(_short, vars(sample).values())) for sample in self.samples]
        return f"<p>{escape(self.exact)}</p><table>{''.join(rows)}</table>"


def _short(text: str) -> str:
    """A text in one line, without what controls a terminal."""
    return shown(" ".join(text.split()), WIDTH)


def _row(tag: str, cells: Any) -> str:
    style = 'style="text-align:left;padding:2px 10px"'
    return f"<tr>{''.join(f'<{tag} {style}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
