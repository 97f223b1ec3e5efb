"""The header: what a run is going to do, and how long it will take."""

from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_step, random_examples
from torch import nn

from minilora.reports.planning import plan
from minilora.training import FinetuneConfig
from minilora.training.data import Example
from minilora.training.header import (
    describe_processes,
    describe_run,
    describe_time,
    print_header,
    where_to_watch,
)
from minilora.training.tensorboard import EventFormat


def configure(**changes: Any) -> FinetuneConfig:
    settings = {"r": 2, "steps": 10, "batch_size": 4, "grad_accum": 2, **changes}
    return FinetuneConfig("model", "my.jsonl", "run", **settings)


def described(**changes: Any) -> dict[str, str]:
    planned = plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2, quantize=False)
    return describe_run(configure(**changes), planned, random_examples([8] * 40), [])


def test_the_header_says_what_is_trained_on_what_and_in_how_much_memory() -> None:
    # 2 layers of 4 x 4 with a bias; adapters of 2 (4 + 4) each, with gradients and two moments.
    assert described() == {
        "model": "model, 40 parameters, dense",
        "adapters": "r=2, alpha=4 in 2 layers",
        "trainable": "32 parameters (80.00 %)",
        "data": "my.jsonl: 40 examples to train on, 0 held out",
        "steps": "10 steps of 8 examples each (2 epochs)",
        "memory": (
            "672 B for weights, adapters, gradients and optimizer states (the base: 160 B), "
            "plus activations"
        ),
    }


def test_the_header_says_what_each_of_several_processes_has() -> None:
    planned = plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2, quantize=False)
    assert describe_processes(configure(), planned, 1) == {}
    assert describe_processes(configure(), planned, 4) == {
        "processes": "4, each with 2 examples of a step and the whole model (DDP)"
    }
    # A quarter of 672 B; 64 B more, because A has two rows, which are padded to four; and 352 B
    # of what is whole while it is needed, as the plan says.
    assert describe_processes(configure(shard=True), planned, 4) == {
        "processes": "4, each with 2 examples of a step and a part of the model (FSDP2): 584 B, "
        "including what it gathers"
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 5}, "5 steps of 8 examples each (1 epoch)"),
        ({"steps": 1}, "1 step of 8 examples each (0.2 epochs)"),
        ({"steps": 1000, "batch_size": 1, "grad_accum": 1}, "1,000 steps of 1 example each (25 "),
    ],
)
def test_one_is_singular(changes: dict[str, Any], said: str) -> None:
    assert described(**changes)["steps"].startswith(said)


def test_the_header_names_the_evaluation_file_and_shows_no_control_characters() -> None:
    assert described(eval_data="eval.jsonl")["data"].endswith("0 of eval.jsonl held out")
    assert "\x1b" not in "".join(described(eval_data="a\x1b[2J").values())


def test_the_header_says_how_much_of_the_evaluation_file_is_trained_on() -> None:
    planned = plan(nn.Sequential(nn.Linear(4, 4)), 2, quantize=False)
    training, new = random_examples([8, 9, 10]), random_examples([7, 6])
    config = configure(eval_data="eval.jsonl")

    def held_out(examples: list[Example]) -> str:
        return describe_run(config, planned, training, examples)["data"]

    expected = "4 of eval.jsonl held out (2 of them also in the training data)"
    assert held_out([*training[:2], *new]).endswith(f", {expected}")
    assert held_out(new).endswith(", 2 of eval.jsonl held out")


def test_the_time_comes_from_the_evaluation() -> None:
    """100 tokens held out in 0.4 s; 10 steps of 8 examples of 25 tokens."""
    training, held_out = random_examples([20, 30]), random_examples([40, 60])

    def said(checkpointing: bool = False, **changes: Any) -> str:
        config = configure(**changes)
        return describe_time(config, training, held_out, [], 0.4, checkpointing)

    forward = 10 * 8 * 25 * 0.4 / 100
    assert said() == f"training takes about {3 * forward:.0f} s (at the speed of the evaluation)"
    assert said(True).startswith(f"training takes about {4 * forward:.0f} s ")
    assert said(eval_every=4).startswith(f"training takes about {3 * forward + 3 * 0.4:.0f} s ")


def test_the_time_of_a_resumed_run_comes_from_its_steps() -> None:
    done = [made_up_step(i, seconds=3) for i in (1, 2, 3, 4)]
    text = describe_time(configure(), random_examples([8]), [], done, None, False)
    assert text == "the remaining steps take about 18 s (at the speed of those so far)"


def test_without_a_hold_out_the_time_is_not_known_yet() -> None:
    text = describe_time(configure(), random_examples([8]), [], [], None, False)
    assert text.startswith("a time estimate follows with the first step")


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_is_named_where_it_is_installed(installed: bool) -> None:
    found = EventFormat(None, None, None, None) if installed else None
    expected = {"watch": "tensorboard --logdir 'my run/tensorboard'"} if installed else {}
    assert where_to_watch(Path("my run"), found) == expected


def test_the_lines_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_header({"a": "1", "longer": "2"})
    assert capsys.readouterr().out == "a       1\nlonger  2\n"
