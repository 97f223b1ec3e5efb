"""The hold-out: its loss before, after and during training, and the best adapter kept.

The training itself is the same with and without: an evaluation runs in eval mode, draws no random
numbers and leaves no gradients.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.distributed.processes import Processes
from minilora.optim.shards import local, local_part
from minilora.sharded import full
from minilora.surgery import adapter_parameters
from minilora.training.callbacks import AfterStep
from minilora.training.data import Example
from minilora.training.loop import Step
from minilora.training.loss import evaluate
from minilora.training.samples import Question, ask


@dataclass(frozen=True)
class HoldOut:
    """The hold-out of a run: its loss, and the answers to its sample prompts.

    Both are those of the model as it is when they are asked for.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        examples: the examples of the hold-out; none: there is no hold-out.
        questions: the sample prompts.
        batch_size: number of sequences per forward pass.
        pad: the id of the padding token.
        processes: the processes of the run.
    """

    model: nn.Module
    tokenizer: Any
    examples: Sequence[Example]
    questions: Sequence[Question]
    batch_size: int
    pad: int
    processes: Processes = field(default_factory=Processes)

    def loss(self) -> float:
        """Returns the mean loss (nats per completion token)."""
        return evaluate(
            self.model,
            self.examples,
            batch_size=self.batch_size,
            pad=self.pad,
            processes=self.processes,
        )

    def answers(self) -> list[str]:
        """Returns an answer to each sample prompt."""
        return ask(self.model, self.tokenizer, self.questions)

    def __str__(self) -> str:
        return f"examples: {len(self.examples)}, sample answers: {len(self.questions)}"


def evaluated(
    steps: Iterable[Step], every: int, last: int, measure: Callable[[], float]
) -> Iterator[Step]:
    """Yields the steps of a training loop, those that are due with their loss on the hold-out.

    Args:
        steps: the training loop.
        every: number of steps between two evaluations. 0: none is due.
        last: the number of the last step, which is always due.
        measure: returns the loss on the hold-out.

    Raises:
        FloatingPointError: the loss on the hold-out is NaN or infinite.

    Example:
        >>> from minilora.training.loop import Step
        >>> steps = [Step(i, 2.0, 1e-4, 1.0, 8, 16, 0.1) for i in (1, 2, 3)]
        >>> [step.eval_loss for step in evaluated(steps, 2, last=3, measure=lambda: 1.5)]
        [None, 1.5, 1.5]
    """
    for step in steps:
        if every and (step.step % every == 0 or step.step == last):
            yield replace(step, eval_loss=check_hold_out(measure(), f"after step {step.step}"))
        else:
            yield step


def timed(measure: Callable[[], float]) -> tuple[float, float]:
    """Returns what `measure` returns, and the seconds that it took."""
    start = time.perf_counter()
    return measure(), time.perf_counter() - start


def check_hold_out(loss: float, when: str) -> float:
    """Returns a loss on the hold-out; raises FloatingPointError if it is NaN or infinite.

    Args:
        loss: the loss.
        when: for the message, such as "before training".
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss on the hold-out is {loss} {when}: check the base model and the examples of "
            "the hold-out, or, if it was finite before, lower the learning rate."
        )
    return loss


class BestAdapter:
    """The adapter with the lowest loss on the hold-out so far: a copy in host memory.

    Attributes:
        step: the step after which it was copied; None: nothing has been evaluated yet.
        loss: its loss on the hold-out.
        tensors: its parameters, in the order of `adapter_parameters`.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.loss = math.inf
        self.tensors: list[Tensor] = []

    @contextmanager
    def keeping(self, model: nn.Module) -> Iterator[AfterStep]:
        """A callback that copies the adapter after each step with a lower loss than before."""

        def after_step(step: Step) -> None:
            if self.add(step):
                parameters = adapter_parameters(model)
                self.tensors = [full(p.detach()).to("cpu", copy=True) for p in parameters]

        yield after_step

    def add(self, step: Step) -> bool:
        """Takes note of a step; returns whether it is the best one so far. The first one wins."""
        if step.eval_loss is None or step.eval_loss >= self.loss:
            return False
        self.step, self.loss = step.step, step.eval_loss
        return True

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Gives the model the best adapter; changes nothing if nothing was evaluated."""
        if self.step is not None:
            for parameter, best in zip(adapter_parameters(model), self.tensors, strict=True):
                local(parameter).copy_(local_part(best, parameter))

    def restore(self, history: Sequence[Step], tensors: list[Tensor]) -> None:
        """Goes on from the steps of a checkpoint, with the tensors that it holds."""
        for step in history:
            self.add(step)
        self.tensors = tensors
