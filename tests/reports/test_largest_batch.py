"""What plan says fits a GPU does fit, and one sequence more does not."""

from dataclasses import replace

import pytest

import minilora
from minilora.reports.largest_batch import LARGEST_BATCH, RESERVED, fit, largest_batch, parse_memory
from minilora.reports.planning import Plan

pytest.importorskip("transformers", reason="the shapes are models of transformers'")


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [minilora.plan("smollm2-135m", r, batch_size=1, length=1) for r in (4, 64)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24", 24 * 10**9),
        (" 1.5 GiB ", 3 * 2**29),
        ("512mib", 2**29),
        ("800 MB", 8 * 10**8),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "24TB", "1e3", "24GB 3", "nan", "٢٤", "9" * 40]
)
def test_what_is_no_amount_of_memory_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="24GB"):
        parse_memory(text)


def test_the_largest_batch_fits_and_one_more_does_not(plans: list[Plan]) -> None:
    for plan in plans:
        for memory in (600_000_000, 2_000_000_000):
            for length in (128, 1000):
                assert plan.run
                run = replace(plan.run, batch=replace(plan.run.batch, length=length))
                size = largest_batch(run, memory)
                assert 0 < size < LARGEST_BATCH

                def needed(size: int, length: int = length, r: int = plan.r) -> int:
                    found = minilora.plan("smollm2-135m", r, batch_size=size, length=length)
                    return found.total_bytes

                assert needed(size) <= memory < needed(size + 1)


def test_the_table_of_what_fits(plans: list[Plan]) -> None:
    found = fit(plans, RESERVED + 400_000_000, lengths=[64, 512, 100_000])
    assert found.batches[4, 64] > found.batches[4, 512] > found.batches[4, 100_000] == 0
    assert found.batches[64, 512] < found.batches[4, 512]

    title, head, low, high, *below = str(found).splitlines()
    assert title == "largest batch size in 1.40 GB, with gradient checkpointing"
    assert head.split() == ["tokens", "64", "512", "100000"]
    assert low.split() == ["r=4", *(str(found.batches[4, n]) for n in (64, 512)), "-"]
    assert high.split()[0] == "r=64"
    assert below == [
        "  1.00 GB of it is kept for the GPU's context and fragmentation",
        "  -: not even one sequence fits",
    ]
    assert "not even one" not in str(fit(plans[:1], RESERVED + 400_000_000, lengths=[64]))


def test_when_nothing_fits_the_table_says_what_is_needed(plans: list[Plan]) -> None:
    found = fit(plans, 200_000_000, lengths=[64])
    assert set(found.batches.values()) == {0}
    needed = minilora.plan("smollm2-135m", 4, batch_size=1, length=64).total_bytes
    assert found.smallest == needed and "nothing fits" in str(found)
    assert "nothing fits" not in str(fit(plans, 10**12, lengths=[8]))
    assert f">= {LARGEST_BATCH}" in str(fit(plans, 10**12, lengths=[8]))


def test_a_plan_without_a_batch_says_what_it_needs() -> None:
    plan = minilora.plan("smollm2-135m")
    for ask in (lambda: fit([plan], 10**10), plan.memory_table):
        with pytest.raises(ValueError, match="batch_size= and length="):
            ask()
