"""Padding, the order of the examples, and the hold-out."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.batches import (
    batch_order,
    check_step_size,
    collate,
    forward_passes,
    make_batch,
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


LENGTHS = st.lists(st.integers(1, 99), min_size=1, max_size=60).map(tuple)


@given(LENGTHS, st.integers(1, 12), st.integers(0, 3))
def test_batches_of_similar_length_show_every_example_once_in_every_epoch(
    lengths: tuple[int, ...], batch_size: int, seed: int
) -> None:
    n = len(lengths)
    steps = -(-3 * n // batch_size)
    batches = [batch_order(n, batch_size, seed, step, lengths) for step in range(steps)]
    stream = [i for batch in batches for i in batch]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert batches[1:] == [batch_order(n, batch_size, seed, i, lengths) for i in range(1, steps)]


def test_batches_of_similar_length_need_less_padding_and_come_in_a_random_order() -> None:
    """Of 1,003 lengths from 1 to 100, whose longest of eight is 89 on average, in two epochs."""
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(torch.randint(1, 101, (1003,), generator=generator).tolist())

    def padded(grouped: bool) -> list[int]:
        given = lengths if grouped else None
        batches = [batch_order(1003, 8, 0, step, given) for step in range(250)]
        return [max(lengths[i] for i in batch) for batch in batches]

    usual, grouped = padded(False), padded(True)
    # Groups of 400: a batch has a fiftieth of the range, 2 tokens, and half of that is padding.
    assert 8 * sum(usual) > 1.6 * 2 * sum(lengths)
    assert 8 * sum(grouped) < 1.05 * 2 * sum(lengths)
    # Neither sorted nor, as sorted groups would be, rising nine times out of ten.
    rising = sum(a < b for a, b in pairwise(grouped))
    assert 90 < rising < 160


def test_a_step_is_grouped_by_length_if_the_config_says_so() -> None:
    examples = [Example([0] * n, [0] * n) for n in (1, 50, 2, 49, 3, 48, 4, 47)]
    config = FinetuneConfig("m", "d", "o", batch_size=2, group_by_length=True)
    for step in range(8):
        (_, short), (_, long) = pick_examples(examples, config, step)
        assert len(long.ids) - len(short.ids) <= 1


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


@given(
    lengths=st.lists(st.integers(2, 40), min_size=4, max_size=20),
    batch_size=st.integers(1, 5),
    ranks=st.integers(1, 4),
    packing=st.booleans(),
)
def test_each_process_makes_the_same_number_of_passes_and_each_example_is_in_one(
    lengths: list[int], batch_size: int, ranks: int, packing: bool
) -> None:
    # The processes share a step equally.
    lengths = sorted(lengths[: len(lengths) // ranks * ranks])
    picked = [(i, Example([1] * n, [1] * n)) for i, n in enumerate(lengths)]
    config = FinetuneConfig("m", "d", "o", batch_size=batch_size, packing=packing, max_length=40)
    shares = [forward_passes(picked, config, rank=k, ranks=ranks) for k in range(ranks)]

    assert len({len(passes) for passes in shares}) == 1
    rows = [row for passes in shares for each in passes for row in each]
    assert sorted(i for row in rows for i, _ in row) == list(range(len(picked)))
    for passes in shares:
        for each in passes:
            batch = make_batch(each, config, 0)["input_ids"]
            assert 1 <= len(batch) <= batch_size and batch.shape[1] <= 48
    if ranks == 1 and not packing:
        sizes = [len(each) for each in shares[0]]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
