"""report.md and loss.png: what a person keeps of a run, beside its adapter."""

import platform
import re
import shlex
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from minilora.files.atomic import write_text
from minilora.files.text import shown, shown_lines
from minilora.reports.formatting import format_bytes
from minilora.training.config import FinetuneConfig
from minilora.training.picture import draw_result
from minilora.training.progress import format_duration, peak_memory
from minilora.training.result import Result
from minilora.training.samples import Sample

REPORT = "report.md"
PICTURE = "loss.png"

# Of a text in a table or a heading.
LONGEST_LINE = 2000

# What has a meaning within a line of Markdown, in a table or as HTML.
_MARKUP = re.compile(r"([\\`*_\[\]<>|~&$])")


def write_report(result: Result, config: FinetuneConfig, header: Mapping[str, str]) -> None:
    """Writes loss.png and report.md to the output folder.

    Without matplotlib there is no picture, and the report says so.

    Args:
        result: the result of the run.
        config: its settings.
        header: what was shown before training: see `describe_run`.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        draw_result(result, result.out / PICTURE)
        picture = f"![the training loss and the hold-out loss]({PICTURE})"
    except ImportError:
        picture = f"There is no {PICTURE}: matplotlib is not installed (`pip install matplotlib`)."
    write_text(result.out / REPORT, to_markdown(result, config, header, picture))


def to_markdown(
    result: Result, config: FinetuneConfig, header: Mapping[str, str], picture: str
) -> str:
    """Returns the report; see `write_report`. Texts of the data and the model are not markup."""
    title = f"# {escaped(result.out.name)}: {escaped(config.model)}, fine-tuned"
    facts = {**header, **_measured(result)}
    parts = [
        title,
        _summary(result),
        picture,
        _table(("run", ""), facts),
        result.table().markdown(),
    ]
    parts += [_samples(result), _next_steps(config)]
    return "\n\n".join(parts) + "\n"


def _summary(result: Result) -> str:
    if result.eval_before is None or result.eval_after is None:
        first, last = result.history[0].loss, result.history[-1].loss
        return f"The training loss went from {first:.3f} to {last:.3f}; nothing was held out."
    change = f"from {result.eval_before:.3f} to {result.eval_after:.3f}"
    kept = "the last step"
    if result.best_step is not None:
        kept = f"step {result.best_step} of {len(result.history)}, where it was lowest"
    text = f"The hold-out loss went {change}. The adapter is that of {kept}."
    if result.eval_after >= result.eval_before:
        text += " **It is no better than the base model.**"
    return text


def _measured(result: Result) -> dict[str, str]:
    seconds = sum(step.seconds for step in result.history)
    device = next(result.model.parameters()).device
    found = {
        "training": f"{format_duration(seconds)}, {result.speed:.0f} tokens/s on {device.type}",
        "versions": ", ".join(f"{name} {version}" for name, version in _versions().items()),
    }
    if memory := peak_memory():
        found["peak memory"] = format_bytes(memory)
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("minilora", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return dict(sorted(found.items()))


def _table(head: tuple[str, ...], rows: Mapping[str, str]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {name} | {escaped(text)} |" for name, text in rows.items()]
    return "\n".join(lines)


def _samples(result: Result) -> str:
    if not result.samples:
        return (
            "There are no sample answers: `samples` is 0, the hold-out has no conversations, or "
            "every conversation in the hold-out was truncated."
        )
    shown_samples = [_sample(i, sample) for i, sample in enumerate(result.samples, start=1)]
    return "\n\n".join(["## Answers to held-out prompts", f"{result.exact}.", *shown_samples])


def _sample(number: int, sample: Sample) -> str:
    mark = "exact" if sample.exact else "not exact"
    parts = [f"### {number} ({mark})"]
    for name, text in vars(sample).items():
        parts.append(f"{name}:\n\n{fenced(text)}")
    return "\n\n".join(parts)


def _next_steps(config: FinetuneConfig) -> str:
    commands = "\n".join(next_commands(config))
    return f"## Next steps\n\n{fenced(commands, 'bash')}"


def next_commands(config: FinetuneConfig) -> list[str]:
    """Returns the commands with which to try out the adapter of a run, and to merge it.

    They read from the adapter which base it belongs to.
    """
    adapter = f"--adapter {shlex.quote(config.out)}"
    merged = shlex.quote(str(Path(config.out)) + "-merged")
    return [
        f"minilora chat {adapter}",
        f'minilora generate {adapter} --prompt "..."',
        f"minilora merge {adapter} --out {merged}",
    ]


def escaped(text: str) -> str:
    r"""Returns a text as one line of Markdown that shows it as it is.

    Example:
        >>> print(escaped("a|b <b>*c*</b>"))
        a\|b \<b\>\*c\*\</b\>
    """
    return _MARKUP.sub(r"\\\1", shown(text, LONGEST_LINE))


def fenced(text: str, language: str = "text") -> str:
    """Returns a block of code that the text cannot end; what controls a terminal is escaped."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, shown_lines(text), fence])
