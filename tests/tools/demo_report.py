"""A report of the demo, made up."""

from pathlib import Path

from torch import nn

from minilora.demo.report import Report
from minilora.demo.tasks import orders
from minilora.training.loop import Step
from minilora.training.result import Result
from minilora.training.samples import Sample

RIGHT = Sample("Two red caps, small, please.", "CAP-RED-S x2", "Sure! Here", "CAP-RED-S x2")
WRONG = Sample("Got one pink mug, large?", "MUG-PNK-L x1", "I am sorry", "MUG-L x1")


def report(samples: list[Sample], peak: int = 1_500_000_000) -> Report:
    """Returns a report of two steps with these answers."""
    steps = [
        Step(step=n, loss=6.0 / n, lr=1e-3, grad_norm=1.0, learned=90, tokens=500, seconds=2.0)
        for n in (1, 2)
    ]
    return Report(
        task=orders(0),
        result=Result(nn.Identity(), None, Path("out"), 6.0, 0.25, steps, samples),
        base_loss=5.0,
        merged_loss=0.26,
        reload_error=0.0,
        adapter_bytes=19_600_000,
        base_bytes=269_000_000,
        peak=peak,
    )
