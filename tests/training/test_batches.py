"""Padding, the order of the examples, and the hold-out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.batches import (
    batch_order,
    check_step_size,
    collate,
    pick_examples,
    split_hold_out,
)
from minilora.training.config import FinetuneConfig
from minilora.training.data import IGNORE, Example


def test_a_hold_out_splits_the_examples_and_leaves_some_to_train_on() -> None:
    examples = [Example([i, i], [i, i]) for i in range(10)]
    training, held_out = split_hold_out(examples, 0.3, seed=0)
    assert len(held_out) == 3
    assert sorted(e.ids for e in training + held_out) == [e.ids for e in examples]
    assert split_hold_out(examples, 0.3, seed=1)[1] != held_out
    with pytest.raises(ValueError, match=r"eval_fraction=0\.9 leaves none of 2 examples"):
        split_hold_out(examples[:2], 0.9, seed=0)


def test_padding_is_masked_by_position() -> None:
    batch = collate([Example([5, 2], [IGNORE, 2]), Example([7, 8, 2], [IGNORE, 8, 2])], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 2, 2], [7, 8, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 2, IGNORE], [IGNORE, 8, 2]]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_epoch_shows_every_example_once_in_an_order_of_its_own(
    n: int, batch_size: int, seed: int
) -> None:
    steps = -(-3 * n // batch_size)
    stream = [i for step in range(steps) for i in batch_order(n, batch_size, seed, step)]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    # By chance equal in 1 of 12! cases otherwise.
    if n > 12:
        assert stream[:n] != stream[n : 2 * n]


def step_of(batch_size: int, grad_accum: int = 1) -> FinetuneConfig:
    return FinetuneConfig("m", "d", "o", batch_size=batch_size, grad_accum=grad_accum)


def test_the_default_step_serves_even_one_example() -> None:
    config = FinetuneConfig("m", "d", "o")
    check_step_size(1, config)
    (example,) = examples = [Example([1, 2], [1, 2])]
    assert [picked for _, picked in pick_examples(examples, config, 0)] == 8 * [example]


@pytest.mark.parametrize(
    ("examples", "batch_size", "grad_accum"),
    [(1, 9, 1), (20, 161, 1), (20, 2, 81), (3, 2**16, 16)],
)
def test_a_step_that_repeats_the_data_many_times_is_refused(
    examples: int, batch_size: int, grad_accum: int
) -> None:
    config = step_of(batch_size, grad_accum)
    message = (
        f"batch_size={batch_size} times grad_accum={grad_accum} .* {examples} training examples"
    )
    with pytest.raises(ValueError, match=message):
        check_step_size(examples, config)
    with pytest.raises(ValueError, match=message):
        pick_examples(examples * [Example([1, 2], [1, 2])], config, 0)
    check_step_size(examples * batch_size * grad_accum, config)
