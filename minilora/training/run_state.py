"""What a checkpoint knows of its run besides tensors: run.json, and the steps in metrics.jsonl.

The steps are not copied into each checkpoint, which would write the whole history again and again.
A checkpoint holds their number, and how many bytes of OUT/metrics.jsonl they take with which
SHA-256; the file only grows until the run is finished.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from minilora.files.json_file import parse_json, read_json
from minilora.files.text import shown_value
from minilora.training.callbacks import to_jsonl
from minilora.training.loop import Step
from minilora.training.random_state import check_random_states, random_states

# Increase it whenever the contents of a checkpoint change. Checkpoints of format 1 have no number.
FORMAT = 4

RUN = "run.json"
METRICS = "metrics.jsonl"

_HEX = frozenset("0123456789abcdef")


def checkpoint_name(steps: int) -> str:
    """Returns the name of the folder of a checkpoint after so many steps."""
    return f"step-{steps:08}"


@dataclass
class RunState:
    """What a checkpoint holds besides tensors.

    Attributes:
        config: the settings, as JSON holds them.
        examples: the `fingerprint` of the data.
        base: the `sha256_of_base` of the model.
        eval_before: loss (nats per completion token) on the hold-out before training.
        answers: what the model answered to the sample prompts before training.
        history: the metrics of every step so far; `add` adds one.
        lr: the learning rate of each group of parameters at the checkpoint.
        random: the random states at the checkpoint.
    """

    config: dict[str, Any]
    examples: str = ""
    base: str = ""
    eval_before: float | None = None
    answers: list[str] = field(default_factory=list)
    history: list[Step] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    random: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lines = to_jsonl(self.history).encode()
        self._bytes, self._sha256 = len(lines), hashlib.sha256(lines)

    def add(self, step: Step) -> None:
        """Adds a step to the history."""
        self.history.append(step)
        line = to_jsonl([step]).encode()
        self._bytes += len(line)
        self._sha256.update(line)

    def facts(self, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
        """Returns the contents of run.json, with learning rates and random states as they are."""
        return {
            "format": FORMAT,
            "config": self.config,
            "examples": self.examples,
            "base": self.base,
            "eval_before": self.eval_before,
            "answers": self.answers,
            "steps": len(self.history),
            "metrics_bytes": self._bytes,
            "metrics_sha256": self._sha256.hexdigest(),
            "lr": [group["lr"] for group in optimizer.param_groups],
            "random": random_states(device),
        }


def read_run(path: Path, out: Path) -> RunState:
    """Reads and checks what an intact checkpoint holds besides tensors.

    Args:
        path: the checkpoint.
        out: the output folder, which contains metrics.jsonl.

    Raises:
        FileNotFoundError: metrics.jsonl does not exist.
        ValueError: another version of minilora wrote the checkpoint, in another format; run.json
            is not what this version writes; metrics.jsonl is not what it was.
    """
    facts = read_json(path / RUN)
    _check_format(path, facts.get("format", 1))
    try:
        _check_facts(facts, path.name)
    except ValueError as error:
        raise ValueError(
            f"{path / RUN} is not what minilora wrote: {error}. Restore it, or remove {path} to "
            "resume from the checkpoint before it"
        ) from None

    history = _read_history(path, out / METRICS, facts)
    return RunState(
        config=facts["config"],
        examples=facts["examples"],
        base=facts["base"],
        eval_before=facts["eval_before"],
        answers=facts["answers"],
        history=history,
        lr=facts["lr"],
        random=facts["random"],
    )


def _check_format(path: Path, found: Any) -> None:
    if found == FORMAT and type(found) is int:
        return
    formats = f"(checkpoint format {shown_value(found)}; this version reads format {FORMAT})"
    if isinstance(found, int) and found < FORMAT:
        raise ValueError(
            f"{path} was written by an older version of minilora {formats}: finish the run with "
            f"that version, or remove {path.parent} to start over"
        )
    raise ValueError(
        f"{path} was written by a newer version of minilora {formats}: update minilora to resume "
        f"the run, or remove {path.parent} to start over"
    )


def _check_facts(facts: dict[str, Any], folder: str) -> None:
    """Raises ValueError unless every entry has the type and the range that `facts` writes."""
    known = {
        "format": True,
        "config": isinstance(facts.get("config"), dict),
        "examples": _is_sha256(facts.get("examples")),
        "base": _is_sha256(facts.get("base")),
        "eval_before": "eval_before" in facts and _is_loss(facts["eval_before"]),
        "answers": _are_texts(facts.get("answers")),
        "steps": _is_count(facts.get("steps")) and folder == checkpoint_name(facts["steps"]),
        "metrics_bytes": _is_count(facts.get("metrics_bytes")),
        "metrics_sha256": _is_sha256(facts.get("metrics_sha256")),
        "lr": _is_lr(facts.get("lr")),
        "random": isinstance(facts.get("random"), dict),
    }
    for name, right in known.items():
        if not right:
            raise ValueError(
                f"{name} is {shown_value(facts[name]) if name in facts else 'missing'}"
            )
    if unknown := sorted(facts.keys() - known.keys()):
        raise ValueError(f"it has the unknown entries {shown_value(unknown)}")
    check_random_states(facts["random"])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_loss(value: Any) -> bool:
    """Whether it is a loss on the hold-out, or None: it was not evaluated."""
    return value is None or _is_number(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_lr(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(lr) and lr >= 0 for lr in value)


def _is_sha256(value: Any) -> bool:
    """Whether it is the hash of something, or the empty text of a run without one."""
    return isinstance(value, str) and len(value) in (0, 64) and set(value) <= _HEX


def _read_history(path: Path, metrics: Path, facts: dict[str, Any]) -> list[Step]:
    """Reads the steps up to a checkpoint from metrics.jsonl."""
    text = _read_prefix(path, metrics, facts)
    try:
        return [_step(i, line) for i, line in enumerate(_lines(text, facts["steps"]), start=1)]
    except TypeError:
        raise ValueError(
            f"{path} was written by a version of minilora with other metrics per step: finish the "
            f"run with that version, or remove {path.parent} to start over"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{metrics} does not hold the {facts['steps']} steps that {path} was saved after: "
            f"{error}"
        ) from None


def _read_prefix(path: Path, metrics: Path, facts: dict[str, Any]) -> bytes:
    way_out = (
        f"{path} was saved after {facts['steps']} steps, and their lines are needed to resume. "
        f"Restore {metrics.name}, or start over with --overwrite (overwrite=True)"
    )
    size = facts["metrics_bytes"]
    if not metrics.exists():
        raise FileNotFoundError(f"{metrics} does not exist: {way_out}")
    if not metrics.is_file() or metrics.stat().st_size < size:
        raise ValueError(f"{metrics} is shorter than it was: {way_out}")

    with metrics.open("rb") as file:
        text = file.read(size)
    if hashlib.sha256(text).hexdigest() != facts["metrics_sha256"]:
        raise ValueError(f"{metrics} is not what it was: {way_out}")
    return text


def _lines(text: bytes, steps: int) -> Sequence[bytes]:
    lines = text.split(b"\n")
    if lines.pop() or len(lines) != steps:
        raise ValueError(f"it has {len(lines)} lines")
    return lines


def _step(number: int, line: bytes) -> Step:
    values = parse_json(line, f"line {number}")
    step = Step(**values)
    always = [getattr(step, m.name) for m in fields(Step) if m.name != "eval_loss"]
    right = all(map(_is_number, always)) and _is_loss(step.eval_loss)
    if step.step != number or not right:
        raise ValueError(f"line {number} is {shown_value(values)}")
    return step
