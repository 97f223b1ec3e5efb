"""What the demo measured, as text."""

from collections.abc import Iterator
from dataclasses import dataclass

from minilora.demo.tasks import Task
from minilora.files.text import shown
from minilora.reports.formatting import format_bytes
from minilora.training.result import Result
from minilora.training.samples import Sample

# How many answers are shown, and how many wrong ones beside them.
SHOWN = 3


@dataclass(frozen=True)
class Report:
    """What the demo measured. All losses and answers are of held-out records.

    Attributes:
        task: the task.
        result: that of the run: losses and answers before (the base in NF4) and after training.
        base_loss: loss (nats per completion token) of the unquantized base.
        merged_loss: the same after merging into dense weights.
        reload_error: largest difference of a logit after loading the adapter into a fresh model.
        adapter_bytes: size of the adapter's file.
        base_bytes: size of the unquantized base.
        peak: peak memory of the process in bytes; 0: not known.
    """

    task: Task
    result: Result
    base_loss: float
    merged_loss: float
    reload_error: float
    adapter_bytes: int
    base_bytes: int
    peak: int

    @property
    def right(self) -> list[Sample]:
        """A few of those that are answered right after training."""
        return [sample for sample in self.result.samples if sample.exact][:SHOWN]

    @property
    def wrong(self) -> list[Sample]:
        """A few of those that are not."""
        return [sample for sample in self.result.samples if not sample.exact][:SHOWN]

    def __str__(self) -> str:
        rows = {**self._answers(), **self._losses(), **self._sizes(), **self._training()}
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]

        lines += ["", f"Held out: {self.task.held_out_are}."]
        if self.right:
            lines[-1] += " Some right answers:"
        for sample in self.right:
            lines += _lines_of(sample)
        if self.wrong:
            count = len(self.result.samples) - self.result.exact_after
            lines += ["", f"Wrong after training, {count} of {len(self.result.samples)}:"]
        for sample in self.wrong:
            lines += _lines_of(sample)
        return "\n".join([*lines, "", self.task.caveat])

    def _answers(self) -> dict[str, str]:
        count = len(self.result.samples)
        return {
            "exactly right before training": f"{self.result.exact_before} of {count}",
            "exactly right after training": f"{self.result.exact_after} of {count}",
        }

    def _losses(self) -> dict[str, str]:
        return {
            "hold-out loss, unquantized base": f"{self.base_loss:.2f} nats per completion token",
            "hold-out loss, base in NF4": f"{self.result.eval_before:.2f}",
            "hold-out loss, fine-tuned": f"{self.result.eval_after:.2f}",
            "hold-out loss, merged": f"{self.merged_loss:.2f}, one dense model",
        }

    def _sizes(self) -> dict[str, str]:
        adapter, base = format_bytes(self.adapter_bytes), format_bytes(self.base_bytes)
        return {
            "adapter in a fresh model": f"logits differ by {self.reload_error:.1g}",
            "adapter on disk": f"{adapter}; the unquantized base {base}",
        }

    def _training(self) -> dict[str, str]:
        history = self.result.history
        time = f"{len(history)} steps in {sum(step.seconds for step in history):.0f} s"
        rows = {"training": f"{time}, {self.result.speed:.0f} tokens/s"}
        if self.peak:
            rows["peak memory of the process"] = format_bytes(self.peak)
        return rows


def _lines_of(sample: Sample) -> Iterator[str]:
    yield ""
    yield f"  {shortened(sample.prompt)}"
    for name, text in answers_of(sample):
        yield f"    {name:<8}  {shortened(text, 84)}"


def answers_of(sample: Sample) -> list[tuple[str, str]]:
    """Returns the answers with their names; what was expected only where the model is wrong."""
    rows = [("before", sample.before), ("after", sample.after)]
    return rows if sample.exact else [*rows, ("expected", sample.expected)]


def shortened(text: str, limit: int = 96) -> str:
    """Returns the text in one line of at most `limit` characters, which control no terminal."""
    line = shown(" ".join(text.split()), 2 * limit)
    return line if len(line) <= limit else line[: limit - 1] + "…"
