"""What the demo measured, as text."""

from dataclasses import dataclass

from minilora.demo.sheets import Command
from minilora.reports.formatting import format_bytes
from minilora.reports.planning import Plan
from minilora.training.loop import Step

CAVEAT = """\
What a model of this size learns in 100 steps is the form: a single command, then stop. Its factual
accuracy stays low: it makes up flags of tools that it has hardly seen. Do not run what it says."""


@dataclass(frozen=True)
class Answer:
    """What the model answered to a held-out task, before and after training."""

    command: Command
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """What the demo measured. All losses are on tools that were never trained on.

    Attributes:
        base_loss: loss (nats per completion token) of the unquantized base.
        nf4_loss: the same of the base in NF4.
        tuned_loss: the same after training.
        merged_loss: the same after merging into bfloat16.
        reload_error: largest difference of a logit after loading the adapter into a fresh model.
        answers: answers before and after training.
        plan: the number of parameters and the memory.
        adapter_bytes: size of the adapter's file.
        history: the metrics of every step.
        seconds: wall time of the training.
        peak: peak memory of the process in bytes.
    """

    base_loss: float
    nf4_loss: float
    tuned_loss: float
    merged_loss: float
    reload_error: float
    answers: list[Answer]
    plan: Plan
    adapter_bytes: int
    history: list[Step]
    seconds: float
    peak: int

    def __str__(self) -> str:
        rows = {**self._losses(), **self._sizes(), **self._training(), **self._saved()}
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]

        lines += ["", "Answers about tools that it was never trained on:"]
        for answer in self.answers:
            command = answer.command
            lines += [
                "",
                f"  {command.tool}: {command.task}",
                f"    before  {shortened(answer.before)}",
                f"    after   {shortened(answer.after)}",
                f"    sheet   {command.command}",
            ]
        return "\n".join([*lines, "", CAVEAT])

    def _losses(self) -> dict[str, str]:
        change = self.tuned_loss - self.base_loss
        return {
            "hold-out loss, unquantized base": f"{self.base_loss:.2f} nats per completion token",
            "hold-out loss, base in NF4": f"{self.nf4_loss:.2f}",
            "hold-out loss, fine-tuned": f"{self.tuned_loss:.2f}  ({change:+.2f})",
        }

    def _sizes(self) -> dict[str, str]:
        plan = self.plan
        trained = (
            f"{plan.trainable:,} of {plan.parameters:,} ({plan.trainable / plan.parameters:.2%})"
        )
        adapter, model = format_bytes(self.adapter_bytes), format_bytes(2 * plan.parameters)
        dense = 2 * sum(row.out_features * row.in_features for row in plan.rows)
        layers = (
            f"{format_bytes(plan.bytes['quantized'])} in NF4, {format_bytes(dense)} in bfloat16"
        )
        return {
            "trained parameters": trained,
            "adapter on disk": f"{adapter}, the model in bfloat16 {model}",
            "adapted layers": layers,
        }

    def _training(self) -> dict[str, str]:
        tokens = sum(step.tokens for step in self.history)
        time = f"{len(self.history)} steps in {self.seconds:.0f} s"
        return {
            "training": f"{time}, {tokens / self.seconds:.0f} tokens/s",
            "peak memory of the process": format_bytes(self.peak),
        }

    def _saved(self) -> dict[str, str]:
        return {
            "adapter in a fresh model": f"logits differ by {self.reload_error:.1g}",
            "merged into one dense model": f"hold-out loss {self.merged_loss:.2f}",
        }


def shortened(text: str, limit: int = 96) -> str:
    """Returns the text in one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
