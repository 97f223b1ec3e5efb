"""Draws: with the probabilities that they are said to have, from their seed alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minilora.huggingface import GREEDY, Sampling, generate, load_dense
from minilora.huggingface.sampling import Draws, nucleus

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def expected_probabilities(temperature: float, top_p: float) -> Tensor:
    """softmax(z / T) in float64, cut after the likeliest tokens that make up top_p."""
    whole = (torch.tensor(LOGITS, dtype=torch.float64) / temperature).softmax(0)
    kept, total = torch.zeros_like(whole), 0.0
    for i in whole.argsort(descending=True):
        if total < top_p:
            kept[i] = whole[i]
        total += float(whole[i])
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float, top_p: float) -> None:
    count = 20_000
    draws = Draws(Sampling(temperature, top_p, seed=1), range(count))
    logits = torch.tensor(LOGITS).expand(count, -1)
    drawn = draws(torch.empty(0), logits).argmax(-1).bincount(minlength=len(LOGITS)).double()

    p = expected_probabilities(temperature, top_p)
    assert torch.equal(drawn[p == 0], torch.zeros_like(drawn[p == 0]))
    p, drawn = p[p > 0], drawn[p > 0]

    # Pearson's statistic is the square of at most 5 normal variables: for k of them a value above
    # k + 2 sqrt(k x) + 2 x has a probability below exp(-x) (Laurent and Massart 2000).
    statistic = ((drawn - count * p) ** 2 / (count * p)).sum().item()
    k, x = len(p) - 1, math.log(1e6)
    assert statistic <= k + 2 * math.sqrt(k * x) + 2 * x


def test_successive_draws_for_a_prompt_are_independent() -> None:
    """Pairs of draws are as often equal as independent ones: sum p^2, within 5 deviations."""
    count = 20_000
    draws = Draws(Sampling(1.0, seed=2), range(count))
    logits = torch.tensor(LOGITS).expand(count, -1)
    first, second = (draws(torch.empty(0), logits).argmax(-1) for _ in range(2))
    same = (first == second).double().mean().item()
    p = expected_probabilities(1.0, 1.0).square().sum().item()
    assert abs(same - p) <= 5 * math.sqrt(p * (1 - p) / count)


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
)
def test_the_nucleus_is_the_smallest_set_that_is_likely_enough(
    values: list[float], top_p: float
) -> None:
    logits = torch.tensor([values])
    kept = nucleus(logits, top_p)[0].isfinite()
    assert torch.equal(nucleus(logits, top_p)[0][kept], logits[0][kept])

    p = logits[0].double().softmax(0)
    rounding = 1e-5
    assert kept.any()
    assert p[kept].sum() >= top_p - rounding
    assert p[kept].sum() - p[kept].min() <= top_p + rounding
    assert kept.all() or p[kept].min() >= p[~kept].max() - rounding


@pytest.fixture(scope="module")
def tiny(folder: Path) -> tuple[Any, Any]:
    return load_dense(folder, dtype=torch.float32)


def answer(tiny: tuple[Any, Any], sampling: Sampling) -> str:
    return generate(*tiny, "say yes", limit=20, sampling=sampling)


def test_without_a_choice_a_sample_is_greedy(tiny: tuple[Any, Any]) -> None:
    expected = answer(tiny, GREEDY)
    for seed in range(3):
        assert answer(tiny, Sampling(0.0, 0.5, seed)) == expected
        assert answer(tiny, Sampling(1.0, 1e-6, seed)) == expected


def test_a_seed_gives_the_same_answer_and_the_random_state_stays(tiny: tuple[Any, Any]) -> None:
    answers = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        answers.append([answer(tiny, Sampling(1.0, seed=seed)) for seed in range(4)])
        assert torch.equal(torch.get_rng_state(), before)
    assert answers[0] == answers[1] and len(set(answers[0])) == 4


def test_a_sampling_of_the_generation_config_is_not_used(tiny: tuple[Any, Any]) -> None:
    expected = answer(tiny, Sampling(1.0, seed=5))
    theirs = tiny[0].generation_config
    theirs.update(do_sample=True, temperature=0.1, top_k=1)
    try:
        assert answer(tiny, Sampling(1.0, seed=5)) == expected
    finally:
        theirs.update(do_sample=False, temperature=None, top_k=None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be 0"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0.0: must be more than 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"seed": 2**63}, "seed="),
        ({"seed": -(2**63) - 1}, "seed="),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**values)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_of_a_config_can_be_given(seed: int) -> None:
    draws = Draws(Sampling(1.0, seed=seed), [0, 1])
    assert draws(torch.empty(0), torch.zeros(2, 9)).isfinite().all()
    assert Sampling(1.0, 0.5, seed).with_next_seed() != Sampling(1.0, 0.5, seed)
