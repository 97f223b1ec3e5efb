"""Decides when a run saves a checkpoint, and from which one it resumes."""

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.distributed.processes import Processes
from minilora.files.text import shown_value
from minilora.training.base import sha256_of_base
from minilora.training.callbacks import AfterStep
from minilora.training.checkpoints import (
    checkpoint_path,
    fingerprint,
    newest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    take_part,
)
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example
from minilora.training.evaluation import BestAdapter
from minilora.training.interrupts import Interrupted, StopRequest, catch_signals
from minilora.training.loop import Step
from minilora.training.restart import forget_start, remember_start
from minilora.training.restoring import restore_checkpoint
from minilora.training.run_folder import begin, check_folder, check_new
from minilora.training.run_state import RunState, read_run
from minilora.training.samples import Question

# Settings that may change when a run is resumed. The paths of the data may, but not the examples.
MAY_CHANGE = {
    "data",
    "eval_data",
    "out",
    "device",
    "checkpointing",
    "log_every",
    "save_every",
    "keep",
    "resume",
    "overwrite",
    "trust_remote_code",
    "shard",
    "timeout",
}


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        config: `out`, `save_every`, `keep`, `resume` and `overwrite` say where, how often, how
            many, whether to resume, and whether a new run may replace another one. All other
            settings must be those of the run to resume.
        processes: the processes of the run. All of them call everything here, and the first one
            writes.

    Attributes:
        run: what the next checkpoint will hold besides tensors.
        best: the best adapter so far.
        newest: the newest intact checkpoint; None: there is none yet.
        resumed: whether the run started from a checkpoint.

    Raises:
        ValueError: see `check_new`, `read_run` and `check_config`.
        FileNotFoundError: see `newest_checkpoint`.
    """

    def __init__(self, config: FinetuneConfig, processes: Processes | None = None) -> None:
        self.config = config
        self.processes = processes or Processes()
        self.stop = StopRequest()
        self.out = Path(config.out)
        self.newest: Path | None = None
        self.resumed = config.resume
        self.run = RunState(asdict(config))
        self.best = BestAdapter()

        check_folder(self.out)
        if config.resume:
            self.newest = newest_checkpoint(self.out)
            self.run = read_run(self.newest, self.out)
            check_config(self.newest, self.run, asdict(config))
        else:
            check_new(self.out, config.overwrite)
        found = {"settings": asdict(config), "newest": self.newest}
        self.processes.check_same("the settings, or the newest checkpoint,", repr(found))

    def check_examples(self, training: Sequence[Example], held_out: Sequence[Example]) -> None:
        """Raises ValueError if the data gives other examples than those of the run so far."""
        now = fingerprint(training, held_out)
        self.processes.check_same("the data", now)
        if self.resumed and now != self.run.examples:
            files = " with ".join(filter(None, (self.config.data, self.config.eval_data)))
            raise ValueError(
                f"{files} gives other examples than those that {self.newest} was "
                "trained on: the file, the tokenizer or its chat template has changed. Restore it "
                "to resume, or start a new run in another folder"
            )
        self.run.examples = now

    def check_questions(self, questions: Sequence[Question]) -> None:
        """Raises ValueError if the run so far has not one answer to each sample prompt."""
        if self.resumed and len(self.run.answers) != len(questions):
            raise ValueError(
                f"{self.newest} has {len(self.run.answers)} answers to {len(questions)} sample "
                "prompts: restore it, or remove it to resume from the checkpoint before it"
            )

    def check_base(self, model: nn.Module) -> None:
        """Raises ValueError if the model, without adapters yet, is not that of the run so far."""
        now = sha256_of_base(model)
        self.processes.check_same("the base model", now)
        if self.resumed and now != self.run.base:
            raise ValueError(
                f"{self.config.model} is not the base that {self.newest} was trained on: its "
                "weights have changed, or this device loads them in another dtype. Restore it to "
                "resume, or start a new run in another folder"
            )
        self.run.base = now

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Step]:
        """Restores the checkpoint to resume from, if any; returns the steps taken so far."""
        if self.newest is not None:
            tensors = restore_checkpoint(self.newest, self.run, model, optimizer)
            self.best.restore(self.run.history, tensors)
        return list(self.run.history)

    def begin(self) -> None:
        """Writes config.json. Until then the folder is as it was; see `run_folder`."""
        self.processes.on_first("the folder is prepared", self._begin)

    def _begin(self) -> None:
        begin(self.out, asdict(self.config), self.newest)
        remember_start(self.out)

    @contextmanager
    def saving(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[AfterStep]:
        """A callback that saves every `save_every` steps and when a signal stops the run.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after the step was finished and its checkpoint saved.
            OSError: a checkpoint could not be written.
            FloatingPointError: the error of the loop, with the newest checkpoint added.
        """
        every = self.config.save_every
        alone = self.processes.size == 1
        with catch_signals(self.stop):

            def after_step(step: Step) -> None:
                self.run.add(step)
                number = self.stop.signal if alone else self.stop.agreed
                due = every > 0 and step.step % every == 0
                if due or number is not None:
                    self._save(model, optimizer)
                if number is not None:
                    raise self._interrupted(number, step)

            try:
                yield after_step
            except FloatingPointError as error:
                newest = self.newest or "there is none yet"
                raise FloatingPointError(f"{error} The newest checkpoint: {newest}.") from error

    def _save(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        keep, best = self.config.keep, self.best.tensors
        with self.processes.explained("the checkpoint is saved"):
            if self.processes.is_first:
                save_checkpoint(self.out, self.run, model, optimizer, keep, best)
            elif self.config.shard:
                take_part(model, optimizer)
        self.processes.share("the checkpoint is saved")
        self.newest = checkpoint_path(self.out, len(self.run.history))

    def _interrupted(self, number: int, step: Step) -> Interrupted:
        name = signal.Signals(number).name
        return Interrupted(
            number,
            f"stopped by {name} after step {step.step}; the checkpoint is {self.newest}. To "
            "continue, repeat the command with --resume (from Python: resume=True)",
        )

    def remove(self) -> None:
        """Removes the checkpoints of a finished run."""
        self.processes.on_first("the run is finished", self._remove)

    def _remove(self) -> None:
        forget_start(self.out)
        remove_checkpoints(self.out)


def check_config(path: Path, run: RunState, config: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the settings, if `config` cannot continue the run.

    Args:
        path: the checkpoint.
        run: what it holds.
        config: the settings to resume with.
    """
    # As JSON holds them: a tuple is a list.
    now = json.loads(json.dumps(dict(config)))

    if strange := sorted((run.config.keys() ^ now.keys()) - MAY_CHANGE):
        names = ", ".join(shown_value(name) for name in strange[:5])
        raise ValueError(
            f"{path} was not written with the settings of this version of minilora: {names} are "
            f"missing or unknown. Restore it, or remove {path.parent} to start over"
        )
    differing = [
        f"{name}={shown_value(run.config[name])}, not {shown_value(now[name])}"
        for name in sorted(now)
        if name not in MAY_CHANGE and not _same(run.config[name], now[name])
    ]
    if differing:
        raise ValueError(
            f"{path} belongs to a run with {'; '.join(differing)}: resume with the same settings, "
            "or start a new run in another folder"
        )


def _same(was: Any, now: Any) -> bool:
    """Whether two settings are equal; True is not 1."""
    return was == now and isinstance(was, bool) == isinstance(now, bool)
