"""A step that ran out of memory anywhere and was retried is bit-identical to one that did not."""

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from allocator import FailingAllocator
from helpers import same_bits
from paged_cases import OUT_OF_MEMORY
from torch import Tensor, nn

from minilora import PagedAdamW, retry_on_oom

State = tuple[list[Tensor | None], Tensor, Any, Any]


class Run:
    """A model with dropout whose step also draws from Python's and NumPy's generators."""

    def __init__(self, page: str = "on_oom", accumulated: int = 0) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.GELU(), nn.Linear(9, 4))

        # A parameter that gets no gradient.
        self.spare = nn.Parameter(torch.ones(3))
        params = [*self.model.parameters(), self.spare]
        self.optimizer = PagedAdamW(params, page=page)  # type: ignore[arg-type]

        self.calls = 0
        self.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for _ in range(accumulated):
            self.step()

    def step(self) -> Tensor:
        self.calls += 1
        scale = random.random() + np.random.rand()
        loss = self.model(torch.randn(5, 6) * scale).square().mean()
        loss.backward()
        return loss.detach()

    def state(self) -> State:
        """Gradients and random states."""
        params = [*self.model.parameters(), self.spare]
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        return grads, torch.get_rng_state(), random.getstate(), np.random.get_state()


def assert_same(found: State, expected: State) -> None:
    """Gradients and random states are equal, bit for bit."""
    grads, cpu, python, numpy = found
    expected_grads, expected_cpu, expected_python, expected_numpy = expected

    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (expected_grad is None)
        assert grad is None or same_bits(grad, expected_grad)

    assert torch.equal(cpu, expected_cpu)
    assert python == expected_python
    assert numpy[0] == expected_numpy[0] and numpy[2:] == expected_numpy[2:]
    assert np.array_equal(numpy[1], expected_numpy[1])


def failing(run: Run, memory: FailingAllocator) -> Callable[[], Tensor]:
    """The step of the run under that allocator."""

    def step() -> Tensor:
        with memory:
            return run.step()

    return step


@pytest.mark.parametrize(
    ("page", "accumulated"),
    [
        ("on_oom", 0),
        ("always", 2),
        pytest.param("on_oom", 2, marks=pytest.mark.soak),
        pytest.param("never", 0, marks=pytest.mark.soak),
    ],
)
def test_the_retried_step_is_one_that_never_failed_wherever_it_failed(
    page: str, accumulated: int
) -> None:
    expected = Run(page, accumulated)
    with FailingAllocator() as memory:
        loss = expected.step()
    count = memory.count
    assert count > 15
    after = expected.state()
    expected.optimizer.step()

    for k in range(count):
        run = Run(page, accumulated)
        calls = run.calls
        memory = FailingAllocator(lambda i, k=k: i == k)
        assert torch.equal(retry_on_oom(failing(run, memory), run.optimizer), loss)
        assert memory.failed == 1 and run.calls == calls + 2
        assert_same(run.state(), after)
        assert run.optimizer.paging.since == {"on_oom": 2, "always": 1, "never": None}[page]

        run.optimizer.step()
        params = tuple(run.model.parameters())
        assert same_bits(params, tuple(expected.model.parameters()))


def test_where_anything_at_all_runs_out_the_call_can_be_repeated() -> None:
    """Also in retry_on_oom's own work: what it saves, and the host memory for the states."""
    expected = Run(accumulated=1)
    loss = expected.step()
    after = expected.state()

    k = 0
    while True:
        run = Run(accumulated=1)
        before = run.state()
        memory = FailingAllocator(lambda i, k=k: i in (k, k + 3))
        try:
            with memory:
                found = retry_on_oom(run.step, run.optimizer)
        except OUT_OF_MEMORY:
            assert_same(run.state(), before)
            found = retry_on_oom(run.step, run.optimizer)
        assert torch.equal(found, loss)
        assert_same(run.state(), after)
        if not memory.failed:
            break
        k += 1
    assert k > 20


def test_a_second_failure_says_what_was_freed_and_what_to_change() -> None:
    run = Run(accumulated=1)
    before = run.state()
    memory = FailingAllocator(lambda k: k == 9 or k >= 12)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        retry_on_oom(failing(run, memory), run.optimizer)
    text = str(caught.value)
    assert "first: injected at allocation 9" in text and "then: injected at allocation 12" in text
    for expected in (
        "0.0 MB of optimizer states moved",
        "In use after the second failure: cpu",
        "smaller batch",
        "shorter",
        "checkpointing",
    ):
        assert expected in text

    # The tracebacks of the two failures hold activations.
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert_same(run.state(), before)


def test_the_activations_of_the_first_run_are_gone_when_the_second_begins() -> None:
    run = Run()
    alive: list[weakref.ref[Tensor]] = []

    def step() -> Tensor:
        assert not [ref for ref in alive if ref() is not None]
        activation = run.model[0](torch.ones(5, 6))
        alive.append(weakref.ref(activation))
        if len(alive) == 1:
            raise torch.OutOfMemoryError("with the activation in this frame")
        return activation.sum()  # type: ignore[no-any-return]

    retry_on_oom(step, run.optimizer)
    assert len(alive) == 2


def test_gradients_that_the_step_dropped_come_back() -> None:
    run = Run(accumulated=1)
    before = run.state()
    calls = []

    def step() -> None:
        if not calls:
            calls.append(1)
            run.optimizer.zero_grad()
            run.step()
            run.model[0].weight.grad = None
            raise torch.OutOfMemoryError("late")
        assert_same(run.state(), before)

    retry_on_oom(step, run.optimizer)


def test_other_errors_pass_and_nothing_is_moved() -> None:
    run = Run()

    def step() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        retry_on_oom(step, run.optimizer)
    assert run.optimizer.paging.since is None
