"""What the demo measured, as text."""

from collections.abc import Iterator
from dataclasses import dataclass

from minilora.demo.tasks import Task
from minilora.files.text import shown
from minilora.reports.formatting import format_bytes
from minilora.training.loop import Step
from minilora.training.samples import Sample

# How many answers are shown, and how many wrong ones beside them.
SHOWN = 3


@dataclass(frozen=True)
class Report:
    """What the demo measured. All losses and answers are of held-out records.

    Attributes:
        task: the task.
        samples: answers before and after training.
        base_loss: loss (nats per completion token) of the unquantized base.
        nf4_loss: the same of the base in NF4.
        tuned_loss: the same after training.
        merged_loss: the same after merging into dense weights.
        reload_error: largest difference of a logit after loading the adapter into a fresh model.
        adapter_bytes: size of the adapter's file.
        base_bytes: size of the unquantized base.
        history: the metrics of every step.
        peak: peak memory of the process in bytes; 0: not known.
    """

    task: Task
    samples: list[Sample]
    base_loss: float
    nf4_loss: float
    tuned_loss: float
    merged_loss: float
    reload_error: float
    adapter_bytes: int
    base_bytes: int
    history: list[Step]
    peak: int

    @property
    def exact_before(self) -> int:
        """How many answers before training were exactly right."""
        return sum(sample.exact_before for sample in self.samples)

    @property
    def exact_after(self) -> int:
        """The same after training."""
        return sum(sample.exact for sample in self.samples)

    @property
    def right(self) -> list[Sample]:
        """A few of those that are answered right after training."""
        return [sample for sample in self.samples if sample.exact][:SHOWN]

    @property
    def wrong(self) -> list[Sample]:
        """A few of those that are not."""
        return [sample for sample in self.samples if not sample.exact][:SHOWN]

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
            count = len(self.samples) - self.exact_after
            lines += ["", f"Wrong after training, {count} of {len(self.samples)}:"]
        for sample in self.wrong:
            lines += _lines_of(sample)
        return "\n".join([*lines, "", self.task.caveat])

    def _answers(self) -> dict[str, str]:
        count = len(self.samples)
        return {
            "exactly right before training": f"{self.exact_before} of {count}",
            "exactly right after training": f"{self.exact_after} of {count}",
        }

    def _losses(self) -> dict[str, str]:
        return {
            "hold-out loss, unquantized base": f"{self.base_loss:.2f} nats per completion token",
            "hold-out loss, base in NF4": f"{self.nf4_loss:.2f}",
            "hold-out loss, fine-tuned": f"{self.tuned_loss:.2f}",
            "hold-out loss, merged": f"{self.merged_loss:.2f}, one dense model",
        }

    def _sizes(self) -> dict[str, str]:
        adapter, base = format_bytes(self.adapter_bytes), format_bytes(self.base_bytes)
        return {
            "adapter in a fresh model": f"logits differ by {self.reload_error:.1g}",
            "adapter on disk": f"{adapter}; the unquantized base {base}",
        }

    def _training(self) -> dict[str, str]:
        tokens = sum(step.tokens for step in self.history)
        seconds = sum(step.seconds for step in self.history)
        time = f"{len(self.history)} steps in {seconds:.0f} s"
        rows = {"training": f"{time}, {tokens / seconds:.0f} tokens/s"}
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
