"""Made-up examples and metrics, for tests of training."""

import dataclasses

import torch

from minilora.training.data import IGNORE, Example
from minilora.training.loop import Step


def random_examples(lengths: list[int], vocabulary: int = 128) -> list[Example]:
    """One example per length; the loss covers the second half of its tokens."""
    g = torch.Generator().manual_seed(0)
    found = []
    for n in lengths:
        ids = torch.randint(0, vocabulary, (n,), generator=g).tolist()
        found.append(Example(ids, [IGNORE] * (n // 2) + ids[n // 2 :]))
    return found


def made_up_step(step: int, **metrics: float) -> Step:
    """A step with the given metrics; all others that a step always has are 1."""
    always = [f.name for f in dataclasses.fields(Step) if f.default is dataclasses.MISSING]
    values = dict.fromkeys(always, 1)
    return Step(**(values | {"step": step} | metrics))  # type: ignore[arg-type]
