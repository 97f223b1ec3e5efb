"""retry_on_oom: a step that ran out of memory at any point, run again, is to the bit a step that never failed."""

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minilora import PagedAdamW, retry_on_oom

State = tuple[list[Tensor | None], Tensor, Any, Any]


class Run:
    """A model with dropout whose step also draws from Python's and NumPy's generators."""

    def __init__(self, page: str = "on_oom", accumulated: int = 0) -> None:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.GELU(), nn.Linear(9, 4))
        self.spare = nn.Parameter(torch.ones(3))  # gets no gradient
        self.optimizer = PagedAdamW([*self.model.parameters(), self.spare], page=page)  # type: ignore[arg-type]
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
    for f, e in zip(found[0], expected[0], strict=True):
        assert (f is None and e is None) or (f is not None and e is not None and torch.equal(f, e))
    assert torch.equal(found[1], expected[1]) and found[2] == expected[2]
    assert (
        found[3][0] == expected[3][0]
        and np.array_equal(found[3][1], expected[3][1])
        and found[3][2:] == expected[3][2:]
    )


def failing_once(run: Run, memory: Any) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with memory:
            return run.step()

    return step


@pytest.mark.parametrize(
    ("page", "accumulated"), [("on_oom", 0), ("on_oom", 2), ("always", 2), ("never", 0)]
)
def test_the_retried_step_is_one_that_never_failed_wherever_it_failed(
    page: str, accumulated: int, allocator: Any
) -> None:
    expected = Run(page, accumulated)
    with allocator() as memory:
        loss = expected.step()
    count = memory.count
    assert count > 15
    after = expected.state()
    expected.optimizer.step()
    for k in range(count):
        run = Run(page, accumulated)
        calls = run.calls
        memory = allocator(lambda i, k=k: i == k)
        assert torch.equal(retry_on_oom(failing_once(run, memory), run.optimizer), loss)
        assert memory.failed == 1 and run.calls == calls + 2
        assert_same(run.state(), after)
        assert run.optimizer.paging.since == {"on_oom": 2, "always": 1, "never": None}[page]
        run.optimizer.step()
        assert all(
            torch.equal(p, q)
            for p, q in zip(run.model.parameters(), expected.model.parameters(), strict=True)
        )


def test_where_anything_at_all_runs_out_the_call_can_be_repeated(allocator: Any) -> None:
    """The allocator fails in retry_on_oom's own work too: what it remembers, and the host memory of the states."""
    expected = Run(accumulated=1)
    loss = expected.step()
    after = expected.state()
    k = 0
    while True:
        run = Run(accumulated=1)
        before = run.state()
        memory = allocator(lambda i, k=k: i in (k, k + 3))
        try:
            with memory:
                found = retry_on_oom(run.step, run.optimizer)
        except (torch.OutOfMemoryError, MemoryError):
            assert_same(run.state(), before)
            found = retry_on_oom(run.step, run.optimizer)
        assert torch.equal(found, loss)
        assert_same(run.state(), after)
        if not memory.failed:
            break
        k += 1
    assert k > 20


def test_a_second_failure_says_what_was_freed_and_what_to_change(allocator: Any) -> None:
    run = Run(accumulated=1)
    before = run.state()
    memory = allocator(lambda k: k == 9 or k >= 12)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        retry_on_oom(failing_once(run, memory), run.optimizer)
    text = str(caught.value)
    assert "first: injected at allocation 9" in text and "then: injected at allocation 12" in text
    for expected in (
        "0.0 MB of optimizer states moved",
        "In use after the second: cpu",
        "smaller batch",
        "shorter",
        "checkpointing",
    ):
        assert expected in text
    assert (
        caught.value.__cause__ is None and caught.value.__context__ is None
    )  # their tracebacks hold activations
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
