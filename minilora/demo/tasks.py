"""The demo's two tasks: `orders`, which the model learns, and `shell`, which is too hard for it."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from minilora.demo.orders import make_orders
from minilora.demo.sheets import SYSTEM_PROMPT, read_sheets, split_by_tool
from minilora.training.records import Record

# Longest command to train on, with its question, in characters. The few longer ones would decide
# how much memory a batch takes.
LONGEST = 120

# Whatever a run's result is, these are true.
ORDERS_CAVEAT = """\
What there is to learn is a format, and the codes of twelve items and eight colors. No example shows
how to refuse, so expect no refusal: an order for a kettle may get a code too."""

SHELL_CAVEAT = """\
What a model of this size can learn here is the form: a single command, then stop. The facts, such
as the flags of a tool, are not in so few examples. Do not run what it says."""


@dataclass(frozen=True)
class Task:
    """What the model is to learn, and how long that takes.

    Attributes:
        name: what the command line calls it.
        title: of the picture.
        what: what becomes what.
        held_out_are: what is special about the held-out records.
        caveat: what one should know about the task, whatever the result.
        training: the records to train on.
        held_out: the records to measure on.
        asked: how many of the held-out records the model answers before and after training.
        steps: number of optimizer steps.
        lr: peak learning rate.
        system: the system message in the records; None: the chat template's own.
    """

    name: str
    title: str
    what: str
    held_out_are: str
    caveat: str
    training: list[Record]
    held_out: list[Record]
    asked: int
    steps: int
    lr: float
    system: str | None = None


def orders(seed: int) -> Task:
    """A customer's message -> the line that the stockroom reads."""
    training, held_out = make_orders(seed)
    return Task(
        name="orders",
        title="SmolLM2-135M learns to read orders: QLoRA on a CPU",
        what="a customer's message becomes a line for the stockroom, ITEM-COLOR-SIZE xNUMBER",
        held_out_are="items in colors that they never had in training, in other sentences",
        caveat=ORDERS_CAVEAT,
        training=[order.record for order in training],
        held_out=[order.record for order in held_out],
        asked=len(held_out),
        # Each training order one and a half times, eight at a time.
        steps=54,
        lr=1e-3,
    )


def shell(seed: int) -> Task:
    """A tool and what to do with it -> a shell command, from the `cheat` package."""
    training, held_out = split_by_tool(read_sheets(), seed)
    random.Random(seed).shuffle(held_out)
    return Task(
        name="shell",
        title="SmolLM2-135M learns to write shell commands: QLoRA on a CPU",
        what="a tool and something to do with it become one shell command",
        held_out_are="tools that it was never trained on",
        caveat=SHELL_CAVEAT,
        training=[c.record for c in training if len(c.tool + c.task + c.command) <= LONGEST],
        held_out=[c.record for c in held_out],
        asked=16,
        steps=100,
        lr=1e-3,
        system=SYSTEM_PROMPT,
    )


TASKS: dict[str, Callable[[int], Task]] = {"orders": orders, "shell": shell}


def make_task(name: str, seed: int) -> Task:
    """Returns a task with its data, the same for the same seed.

    Raises:
        ValueError: there is no such task.
        FileNotFoundError: its data is not installed.
    """
    if name not in TASKS:
        raise ValueError(f"there is no demo {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name](seed)
