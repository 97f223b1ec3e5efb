"""The settings of a run: what is out of range, and how many steps they make."""

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


def test_the_number_of_steps_is_given_or_comes_from_the_epochs() -> None:
    config = FinetuneConfig("m", "d", "o", batch_size=4, grad_accum=2, epochs=3)
    assert config.steps_for(examples=80) == 30 and config.steps_for(examples=1) == 1
    assert FinetuneConfig("m", "d", "o", steps=7).steps_for(examples=80) == 7
