"""The settings of a run: what is out of range, and how many steps they make."""

from pathlib import Path
from typing import Any

import pytest

from minilora.training import FinetuneConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"lr": -1.0}, "lr=-1"),
        ({"epochs": 0.0, "steps": None}, "epochs=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"grad_accum": 0}, "grad_accum=0"),
        ({"keep": 0}, "keep=0"),
        ({"save_every": -1}, "save_every=-1"),
    ],
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig("m", "d", "o", **change)


NAN, INFINITE = float("nan"), float("inf")
WHOLE = ("r", "steps", "batch_size", "grad_accum", "max_length", "seed", "save_every", "keep")
WHOLE += ("eval_every", "samples", "log_every")
REAL = ("alpha", "dropout", "lr", "epochs", "weight_decay", "clip", "eval_fraction")
FLAGS = (
    "quantize",
    "packing",
    "group_by_length",
    "learn_prompt",
    "checkpointing",
    "resume",
    "overwrite",
    "trust_remote_code",
    "shard",
)
WRONG = {
    **{name: ("1", 1.0, True, [1], NAN, 1 << 70, -(1 << 70)) for name in WHOLE},
    **{name: ("1", True, [1.0], NAN, INFINITE, -INFINITE, -1.0, 1e300) for name in REAL},
    **{name: ("yes", 1, 0, []) for name in FLAGS},
    **{name: ("", " ", "a\0b", None, 3, Path("x")) for name in ("model", "data", "out")},
    "eval_data": ("", " ", "a\0b", 3, Path("x")),
    "targets": ("", [], [""], [3], 3, None),
    "device": (3, True),
    "timeout": ("20", True, [20.0], NAN, INFINITE, 0.0, 4.9, 1e7),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_setting_of_a_wrong_type_or_out_of_range_is_refused_by_name(name: str) -> None:
    settings = {"model": "m", "data": "d", "out": "o"}
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=f"^{name}=.*: must be "):
            FinetuneConfig(**(settings | {name: value}))


def test_every_setting_is_among_them() -> None:
    assert WRONG.keys() == FinetuneConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 60_000, "grad_accum": 60_000}, "batch_size=60000 times grad_accum=60000"),
        ({"eval_every": 5, "eval_fraction": 0.0}, "eval_every=5 and eval_fraction=0 contradict"),
        ({"resume": True, "overwrite": True}, "resume and overwrite contradict"),
    ],
)
def test_settings_that_do_not_go_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig("m", "d", "o", **change)


def test_the_number_of_steps_is_given_or_comes_from_the_epochs() -> None:
    config = FinetuneConfig("m", "d", "o", batch_size=4, grad_accum=2, epochs=3)
    assert config.steps_for(examples=80) == 30 and config.steps_for(examples=1) == 1
    assert FinetuneConfig("m", "d", "o", steps=7).steps_for(examples=80) == 7
