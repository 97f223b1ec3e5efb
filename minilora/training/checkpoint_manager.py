"""Decides when a run saves a checkpoint, and from which one it resumes."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from minilora.training.callbacks import AfterStep
from minilora.training.checkpoints import (
    RunState,
    check_config,
    find_checkpoint,
    fingerprint,
    read_checkpoint,
    remove_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example
from minilora.training.interrupts import Interrupted, catch_signals
from minilora.training.loop import Step


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        config: `out`, `save_every`, `keep` and `resume` say where, how often, how many, and
            whether to resume. All other settings must be those of the run to resume.

    Attributes:
        run: what the next checkpoint will hold besides tensors.
        newest: the newest intact checkpoint; None: there is none yet.
        resumed: whether the run started from a checkpoint.

    Raises:
        ValueError: see `find_checkpoint`, `read_checkpoint` and `check_config`.
        FileNotFoundError: see `find_checkpoint`.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.newest = find_checkpoint(self.out, config.resume)
        self.resumed = self.newest is not None
        self.run = RunState(asdict(config))
        if self.newest is not None:
            self.run = read_checkpoint(self.newest)
            check_config(self.newest, self.run, asdict(config))

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Raises ValueError if the data gives other examples than those of the run so far."""
        now = fingerprint(examples)
        if self.resumed and now != self.run.examples:
            raise ValueError(
                f"{self.config.data} gives other examples than those that {self.newest} was "
                "trained on: the file, the tokenizer or its chat template has changed. Restore it "
                "to resume, or start a new run in another folder"
            )
        self.run.examples = now

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Step]:
        """Restores the checkpoint to resume from, if any; returns the steps taken so far."""
        if self.newest is not None:
            restore_checkpoint(self.newest, model, optimizer)
        return list(self.run.history)

    @contextmanager
    def saving(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[AfterStep]:
        """A callback that saves every `save_every` steps and when a signal stops the run.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after the step was finished and its checkpoint saved.
            OSError: a checkpoint could not be written.
            FloatingPointError: the error of the loop, with the newest checkpoint added.
        """
        every, keep = self.config.save_every, self.config.keep
        with catch_signals() as request:

            def after_step(step: Step) -> None:
                self.run.history.append(step)
                due = every > 0 and step.step % every == 0
                if due or request.signal is not None:
                    self.newest = save_checkpoint(self.out, self.run, model, optimizer, keep)
                if request.signal is not None:
                    raise self._interrupted(request.signal, step)

            try:
                yield after_step
            except FloatingPointError as error:
                newest = self.newest or "there is none yet"
                raise FloatingPointError(f"{error} The newest checkpoint: {newest}.") from error

    def _interrupted(self, number: int, step: Step) -> Interrupted:
        name = signal.Signals(number).name
        return Interrupted(
            number,
            f"stopped by {name} after step {step.step}; the checkpoint is {self.newest}. To "
            "continue, repeat the command with --resume (from Python: resume=True)",
        )

    def remove(self) -> None:
        """Removes the checkpoints of a finished run."""
        remove_checkpoints(self.out)
