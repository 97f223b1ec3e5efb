"""A step that runs out of memory at any of its allocations changes nothing, or is taken whole."""

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from allocator import FailingAllocator
from paged_cases import (
    MODES,
    OUT_OF_MEMORY,
    assert_same,
    assert_same_tensors,
    copies,
    everything,
    small_pages,
    three_parameters,
)
from torch import nn

from minilora import PagedAdamW
from minilora.optim.placement import Placement


def allocations(page: str, steps: int) -> int:
    """How often a step allocates."""
    optimizer, _, give_gradients = three_parameters(page, steps)
    give_gradients()
    with FailingAllocator() as memory:
        optimizer.step()
    return memory.count


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("page", MODES)
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
def test_a_failure_at_any_allocation_of_a_step_changes_nothing_or_does_not_matter(
    persistent: bool, page: str, steps: int
) -> None:
    with small_pages():
        count = allocations(page, steps)
        assert count >= (1 if steps else 5)

        for k in range(count):
            optimizer, oracle, give_gradients = three_parameters(page, steps)
            give_gradients()
            oracle.step()
            before = copies(optimizer)

            memory = FailingAllocator(lambda i, k=k: i >= k if persistent else i == k)
            raised = False
            try:
                with memory:
                    optimizer.step()
            except OUT_OF_MEMORY:
                raised = True
            assert memory.failed >= 1

            # One failure is survived wherever there is device memory to give up. Host memory can
            # only be waited for.
            if persistent or page == "never":
                assert raised
            elif page == "on_oom":
                assert not raised

            if raised:
                assert_same_tensors(everything(optimizer), before)
                optimizer.step()
            assert_same(optimizer, oracle)
            assert (optimizer.paging.since is None) == (page == "never")


def test_never_says_how_to_page() -> None:
    optimizer, _, give_gradients = three_parameters("never")
    give_gradients()
    says = r'injected(.|\n)*No parameter.*page="on_oom"'
    with FailingAllocator(lambda k: True), pytest.raises(torch.OutOfMemoryError, match=says):
        optimizer.step()
    assert not optimizer.state


def test_pages_halve_down_to_the_smallest_and_then_the_error_is_clear() -> None:
    with small_pages(largest=2**13):
        optimizer, _, give_gradients = three_parameters("always", steps=1)
        give_gradients()
        assert optimizer.paging.page_bytes == 2**13

        with FailingAllocator(lambda k: k < 2):
            optimizer.step()
        assert optimizer.paging.page_bytes == 2**11

        says = r"pages of the smallest size(.|\n)*step"
        with FailingAllocator(lambda k: True), pytest.raises(torch.OutOfMemoryError, match=says):
            optimizer.step()

        optimizer.step()
        assert optimizer.paging.page_bytes == 2**10


def test_a_plain_runtime_error_is_not_taken_for_the_device_running_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer, _, give_gradients = three_parameters("on_oom")
    give_gradients()
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "zeros_like", mock.Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        optimizer.step()
    assert optimizer.paging.since is None and not optimizer.state


def test_states_of_a_failed_attempt_are_gone_before_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or a step that halves its pages would hold the new states twice, and the host run out."""
    layer = nn.Linear(30, 10)
    optimizer = PagedAdamW(layer.parameters(), page="always")
    layer(torch.ones(1, 30)).sum().backward()

    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    new_state = Placement.new_state
    halve_pages = Placement.halve_pages

    def remember(self: Placement, *args: Any) -> Any:
        state = new_state(self, *args)
        made.append(weakref.ref(state["exp_avg"]))
        return state

    def count_before_halving(self: Placement) -> bool:
        alive.append(sum(state() is not None for state in made))
        return halve_pages(self)

    monkeypatch.setattr(Placement, "new_state", remember)
    monkeypatch.setattr(Placement, "halve_pages", count_before_halving)
    with FailingAllocator(lambda k: k in (6, 14)):
        optimizer.step()
    assert len(made) >= 4 and alive == [0, 0]
