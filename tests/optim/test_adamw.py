"""PagedAdamW against torch.optim.AdamW(foreach=False, fused=False), to the bit, wherever memory runs out.

The lane of the CPU copies its states to "host" tensors of their own: `PlainLane` as early as it may, `LazyLane` as late as it may.
What is right under both does not depend on when an asynchronous copy happens.
"""

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora import PagedAdamW
from minilora.optim import paging
from minilora.optim.paging import Desk, Lane, Pairs, PlainLane

OUT = (torch.OutOfMemoryError, MemoryError)
MODES = ("on_oom", "always", "never")


class LazyLane(Lane):
    """A side stream at its slowest: a copy happens when somebody waits for it. At most two pages may be on the device."""

    scratch_bytes = 2**10

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: deque[tuple[int, list[tuple[Tensor, Tensor]]]] = deque()
        self.tickets = self.on_device = self.most = 0

    def _host_like(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    def free_bytes(self) -> int:
        return 0  # the smallest page

    def release(self) -> None: ...

    def in_use(self) -> str:
        return "all"

    def start(self) -> None:
        assert not self.queue

    def bring(self, pairs: Pairs) -> int:
        self.on_device += 1
        self.most = max(self.most, self.on_device)
        return self._later(pairs)

    def _later(self, pairs: Pairs) -> int:
        self.tickets += 1
        self.queue.append((self.tickets, list(pairs)))
        return self.tickets

    def arrive(self, ticket: int) -> None:
        while self.queue and self.queue[0][0] <= ticket:
            for target, source in self.queue.popleft()[1]:
                target.copy_(source)

    def send(self, pairs: Pairs) -> None:
        self.on_device -= 1
        self._later(pairs)

    def finish(self) -> None:
        self.arrive(self.tickets)
        assert self.on_device == 0 and self.most <= 2


@contextmanager
def lanes(
    kind: type[Lane] = PlainLane, largest: int = 2**11, smallest: int = 2**10
) -> Iterator[None]:
    """Pages of some hundred elements, so that small tensors are larger than a page."""
    with (
        mock.patch.dict(paging.LANES, {"cpu": kind}),
        mock.patch.multiple(paging, LARGEST_PAGE=largest, SMALLEST_PAGE=smallest),
        mock.patch.object(PlainLane, "scratch_bytes", 2**10),
    ):
        yield


def bits(tensor: Tensor) -> Tensor:
    return (
        torch.empty(tensor.numel(), dtype=tensor.dtype)
        .copy_(tensor.detach().reshape(-1))
        .view(torch.uint8)
    )


def same(found: Tensor, expected: Tensor) -> bool:
    return (
        found.shape == expected.shape
        and found.dtype == expected.dtype
        and torch.equal(bits(found), bits(expected))
    )


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter and every state, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return params + [
        optimizer.state[p][k]
        for p in params
        if optimizer.state.get(p)
        for k in ("step", "exp_avg", "exp_avg_sq")
    ]


def assert_same(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    assert all(same(f, e) for f, e in zip(everything(found), everything(expected), strict=True))


# ---- random cases


def dense(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def transposed(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return dense(shape[::-1], dtype).permute(tuple(reversed(range(len(shape)))))


def with_gaps(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return dense([*shape, 2], dtype)[..., 1]


def further_on(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A stretch of a larger tensor, as the parameters of a flattened model are."""
    return dense([math.prod(shape) + 5], dtype)[5:].view(tuple(shape))


LAYOUTS = (dense, transposed, with_gaps, further_on)
# scalars, nothing, less than a piece, odd, larger than a page
SHAPES = ((), (0,), (1,), (3,), (7, 5), (64,), (130,), (13, 31), (3, 0, 2), (2, 3, 100), (2500,))


@dataclass
class Case:
    """Parameters in groups, and what happens in each step."""

    seed: int
    params: list[
        tuple[tuple[int, ...], torch.dtype, Any, Any]
    ]  # shape, dtype, layout, layout of its gradients
    groups: list[
        tuple[int, dict[str, Any]]
    ]  # how many of the parameters (the last one takes the rest), options
    page: str
    lane: type[Lane]
    steps: list[dict[str, Any]] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        torch.manual_seed(self.seed)
        return [nn.Parameter(layout(shape, dtype)) for shape, dtype, layout, _ in self.params]

    def grouped(self, params: list[nn.Parameter]) -> list[dict[str, Any]]:
        groups, rest = [], params
        for i, (size, options) in enumerate(self.groups):
            some, rest = (rest, []) if i == len(self.groups) - 1 else (rest[:size], rest[size:])
            groups.append({"params": some, **options})
        return groups


@st.composite
def cases(draw: Any) -> Case:
    floats = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    layouts = st.sampled_from(LAYOUTS)
    params = draw(
        st.lists(
            st.tuples(st.sampled_from(SHAPES), floats, layouts, st.just(None) | layouts),
            min_size=1,
            max_size=7,
        )
    )
    options = st.fixed_dictionaries(
        {},
        optional={
            "lr": st.sampled_from([0.0, 1e-4, 0.1]),
            "betas": st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.5, 0.0)]),
            "eps": st.sampled_from([0.0, 1e-6]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
        },
    )
    groups = draw(st.lists(st.tuples(st.integers(0, 3), options), min_size=1, max_size=3))
    failures = (
        st.just(frozenset())
        | st.frozensets(st.integers(0, 40), max_size=6)
        | st.integers(0, 30).map(lambda k: range(k, 60))
    )
    step = st.fixed_dictionaries(
        {
            "scale": st.sampled_from([1.0, 1e-4, 1e-30, 1e15]),  # of the gradients
            "missing": st.frozensets(st.integers(0, 6), max_size=3),
            "fails": failures,
            "then": st.sampled_from(
                ["", "", "", "page_in", "page_out", "reload", "to torch and back", "copy"]
            ),
        }
    )
    steps = draw(st.lists(step, min_size=1, max_size=4))
    seed, page, lane = (
        draw(st.integers(0, 99)),
        draw(st.sampled_from(MODES)),
        draw(st.sampled_from([PlainLane, LazyLane])),
    )
    return Case(seed, params, groups, page, lane, steps)


def give_gradients(case: Case, step: dict[str, Any], *models: list[nn.Parameter]) -> None:
    for i, (shape, dtype, layout, of_grad) in enumerate(case.params):
        grad = (of_grad or layout)(shape, dtype) * step["scale"]
        for params in models:
            params[i].grad = (
                None if i in step["missing"] else grad.clone()
            )  # clone keeps the strides of what has no gaps


def step_until_it_works(optimizer: PagedAdamW, fails: Callable[[int], bool], allocator: Any) -> int:
    """Calls step() until it returns, and checks that a step which raised changed nothing; returns how often it raised."""
    memory = allocator(fails)
    raised = 0
    while True:
        before = [t.clone() for t in everything(optimizer)]
        try:
            with memory:
                optimizer.step()
            return raised
        except OUT:
            raised += 1
        assert all(same(a, b) for a, b in zip(everything(optimizer), before, strict=True))


def afterwards(
    what: str, optimizer: PagedAdamW, case: Case, params: list[nn.Parameter]
) -> PagedAdamW:
    if what == "page_in" and case.page != "always":
        optimizer.page_in()
        assert optimizer.paging.since is None
    elif what == "page_out" and case.page != "never":
        optimizer.page_out()
    elif what == "reload":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = PagedAdamW(case.grouped(params), page=MODES[case.seed % 3])  # type: ignore[arg-type]
        optimizer.load_state_dict(saved)
        case.page = optimizer.page
    elif what == "to torch and back":
        oracle = torch.optim.AdamW(case.grouped(params))
        oracle.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(oracle.state_dict())
    elif what == "copy":
        again, _ = copy.deepcopy((optimizer, params))
        assert_same(again, optimizer)
    return optimizer


@given(case=cases())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_parameters_and_states_are_the_oracles_wherever_memory_runs_out(
    case: Case, allocator: Any
) -> None:
    params, oracles = case.parameters(), case.parameters()
    oracle = torch.optim.AdamW(case.grouped(oracles), foreach=False, fused=False)
    with lanes(case.lane), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Detected call of `lr_scheduler.step", UserWarning
        )  # a step that raised is no call
        optimizer = PagedAdamW(case.grouped(params), page=case.page)  # type: ignore[arg-type]
        for number, step in enumerate(case.steps):
            give_gradients(case, step, params, oracles)
            oracle.step()
            step_until_it_works(optimizer, lambda k, step=step: k in step["fails"], allocator)
            assert_same(optimizer, oracle)
            optimizer = afterwards(step["then"], optimizer, case, params)
            assert_same(optimizer, oracle)
            for groups in (oracle.param_groups, optimizer.param_groups):  # a schedule
                for group in groups:
                    group["lr"] = group["lr"] * 0.7 + 1e-3 / (number + 1)


# ---- every point of failure, one after the other


def three(page: str, steps: int = 0) -> tuple[PagedAdamW, torch.optim.AdamW, Callable[[], None]]:
    """An optimizer, its oracle, both after some steps, and a function that gives them new gradients."""
    case = Case(0, [((7, 5), torch.float32, dense, None), ((2500,), torch.bfloat16, dense, None), ((), torch.float32, dense, None)],
                [(1, {"weight_decay": 0.3}), (2, {})], page, PlainLane)  # fmt: skip
    params, oracles = case.parameters(), case.parameters()
    optimizer = PagedAdamW(case.grouped(params), page=page)  # type: ignore[arg-type]
    oracle = torch.optim.AdamW(case.grouped(oracles), foreach=False, fused=False)

    def gradients() -> None:
        give_gradients(case, {"scale": 1.0, "missing": ()}, params, oracles)

    for _ in range(steps):
        gradients()
        optimizer.step(), oracle.step()
    return optimizer, oracle, gradients


def allocations(allocator: Any, page: str, steps: int) -> int:
    optimizer, _, gradients = three(page, steps)
    gradients()
    with allocator() as memory:
        optimizer.step()
    return memory.count  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("page", MODES)
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
def test_a_failure_at_any_allocation_of_a_step_changes_nothing_or_does_not_matter(
    persistent: bool, page: str, steps: int, allocator: Any
) -> None:
    with lanes():
        count = allocations(allocator, page, steps)
        assert count >= (1 if steps else 5)
        for k in range(count):
            optimizer, oracle, gradients = three(page, steps)
            gradients()
            oracle.step()
            before = [t.clone() for t in everything(optimizer)]
            memory = allocator(lambda i, k=k: i >= k if persistent else i == k)
            try:
                with memory:
                    optimizer.step()
                raised = False
            except OUT:
                raised = True
            assert memory.failed >= 1
            # One failure is survived wherever there is something to give up; host memory has no such thing.
            assert raised if persistent or page == "never" else not raised or page == "always"
            if raised:
                assert all(same(a, b) for a, b in zip(everything(optimizer), before, strict=True))
                optimizer.step()
            assert_same(optimizer, oracle)
            assert (optimizer.paging.since is None) == (page == "never")


@pytest.mark.parametrize("lane", [PlainLane, LazyLane])
@pytest.mark.parametrize("page", MODES)
def test_the_update_itself_allocates_nothing(
    page: str, lane: type[Lane], allocator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = []
    run = Desk.run

    def watched(self: Desk, *rest: Any) -> None:
        with allocator() as memory:
            run(self, *rest)
        memories.append(memory.count)

    monkeypatch.setattr(Desk, "run", watched)
    case = Case(0, [(shape, dtype, layout, None) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)
                    for layout in LAYOUTS], [(30, {}), (0, {"weight_decay": 0.0})], page, lane)  # fmt: skip
    with lanes(lane):
        params = case.parameters()
        optimizer = PagedAdamW(case.grouped(params), page=page)  # type: ignore[arg-type]
        for _ in range(2):
            give_gradients(case, {"scale": 1.0, "missing": ()}, params)
            optimizer.step()
    assert memories == [0, 0]


def test_a_half_moved_optimizer_works_and_finishes_moving_later(allocator: Any) -> None:
    with lanes():
        for k in range(6):  # two states of each of three parameters
            optimizer, oracle, gradients = three("on_oom", steps=2)
            with (
                allocator(lambda i, k=k: i == k),
                pytest.raises(MemoryError, match=r"the host has no .* bytes for a state of"),
            ):
                optimizer.page_out()
            assert_same(optimizer, oracle)
            for _ in range(2):
                gradients()
                optimizer.step(), oracle.step()
                assert_same(optimizer, oracle)
            if k % 2:  # the device runs out again: first the rest moves, and pages stay as they are
                gradients()
                with allocator(lambda i: i == 0):
                    optimizer.step()
                oracle.step()
                assert optimizer.paging.page_bytes == 2**11
            else:
                moved, total = optimizer.page_out(), 2 * (4 * 35 + 2 * 2500 + 4)
                assert moved < total if k >= 2 else moved == total
            assert optimizer.page_out() == 0
            assert_same(optimizer, oracle)


def test_page_in_moves_all_or_nothing(allocator: Any) -> None:
    with lanes():
        for k in range(6):
            optimizer, oracle, gradients = three("on_oom", steps=1)
            optimizer.page_out()
            with (
                allocator(lambda i, k=k: i == k),
                pytest.raises(torch.OutOfMemoryError, match="stay on the host"),
            ):
                optimizer.page_in()
            assert optimizer.paging.since == 2
            assert (
                optimizer.page_in() == 2 * (4 * 35 + 2 * 2500 + 4)
                and optimizer.paging.since is None
            )
            gradients()
            optimizer.step(), oracle.step()
            assert_same(optimizer, oracle)
            assert optimizer.paging.pages == 0


# ---- what memory errors say


def test_never_says_how_to_page(allocator: Any) -> None:
    optimizer, _, gradients = three("never")
    gradients()
    with (
        allocator(lambda k: True),
        pytest.raises(torch.OutOfMemoryError, match=r'injected(.|\n)*No parameter.*page="on_oom"'),
    ):
        optimizer.step()
    assert not optimizer.state


def test_pages_halve_down_to_the_smallest_and_then_the_error_is_clear(allocator: Any) -> None:
    with lanes(largest=2**13):
        optimizer, _, gradients = three("always", steps=1)
        gradients()
        assert optimizer.paging.page_bytes == 2**13
        with allocator(lambda k: k < 2):
            optimizer.step()
        assert optimizer.paging.page_bytes == 2**11
        with (
            allocator(lambda k: True),
            pytest.raises(torch.OutOfMemoryError, match=r"pages as small as they get(.|\n)*step"),
        ):
            optimizer.step()
        optimizer.step()
        assert optimizer.paging.page_bytes == 2**10


def test_a_plain_runtime_error_is_not_taken_for_the_device_running_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer, _, gradients = three("on_oom")
    gradients()
    monkeypatch.setattr(
        torch,
        "zeros_like",
        mock.Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    )
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        optimizer.step()
    assert optimizer.paging.since is None and not optimizer.state
