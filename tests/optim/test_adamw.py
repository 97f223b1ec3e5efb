"""PagedAdamW against torch.optim.AdamW, bit for bit, wherever memory runs out.

On the CPU the states are copied to "host" tensors of their own: `BlockingTransfer` copies as early
as possible, `LazyTransfer` as late as possible. What is right under both does not depend on when an
asynchronous copy happens.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocator import FailingAllocator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_cases import (
    LAYOUTS,
    MODES,
    OUT_OF_MEMORY,
    SHAPES,
    Case,
    LazyTransfer,
    assert_same,
    assert_same_tensors,
    copies,
    everything,
    small_pages,
)
from small_models import (
    Optimizer,
    assert_same_models,
    loss_of,
    paged_adamw,
    small_model,
    torch_adamw,
    train,
)
from torch import Tensor, nn

from minilora import PagedAdamW
from minilora.optim.transfer import BlockingTransfer

FLOATS = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.0, 1e-4, 0.1]),
        "betas": st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.5, 0.0)]),
        "eps": st.sampled_from([0.0, 1e-6]),
        "weight_decay": st.sampled_from([0.0, 0.3]),
    },
)

# Which allocations of a step fail: none, some, or all from one of them on.
FAILURES = (
    st.just(frozenset())
    | st.frozensets(st.integers(0, 40), max_size=6)
    | st.integers(0, 30).map(lambda k: range(k, 60))
)

AFTERWARDS = ["", "", "", "page_in", "page_out", "reload", "to torch and back", "copy"]

# `scale` is that of the gradients, `missing` are the parameters that get none.
STEP = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([1.0, 1e-4, 1e-30, 1e15]),
        "missing": st.frozensets(st.integers(0, 6), max_size=3),
        "fails": FAILURES,
        "then": st.sampled_from(AFTERWARDS),
    }
)


@st.composite
def cases(draw: Any) -> Case:
    layouts = st.sampled_from(LAYOUTS)
    param = st.tuples(st.sampled_from(SHAPES), FLOATS, layouts, st.just(None) | layouts)
    group = st.tuples(st.integers(0, 3), OPTIONS)
    return Case(
        params=draw(st.lists(param, min_size=1, max_size=7)),
        groups=draw(st.lists(group, min_size=1, max_size=3)),
        steps=draw(st.lists(STEP, min_size=1, max_size=4)),
        seed=draw(st.integers(0, 99)),
        page=draw(st.sampled_from(MODES)),
        transfer=draw(st.sampled_from([BlockingTransfer, LazyTransfer])),
    )


def step_until_it_works(optimizer: PagedAdamW, fails: Callable[[int], bool]) -> None:
    """Calls step() until it returns, and checks that a step which raised changed nothing."""
    memory = FailingAllocator(fails)
    while True:
        before = copies(optimizer)
        try:
            with memory:
                optimizer.step()
            return
        except OUT_OF_MEMORY:
            assert_same_tensors(everything(optimizer), before)


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
        case.page = MODES[case.seed % 3]
        optimizer = case.optimizer(params)
        optimizer.load_state_dict(saved)
    elif what == "to torch and back":
        oracle = torch.optim.AdamW(case.grouped(params))
        oracle.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(oracle.state_dict())
    elif what == "copy":
        again, _ = copy.deepcopy((optimizer, params))
        assert_same(again, optimizer)
    return optimizer


def decay_learning_rates(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.7 + 1e-3 / (step + 1)


@given(case=cases())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_parameters_and_states_are_the_oracles_wherever_memory_runs_out(case: Case) -> None:
    params = case.parameters()
    oracle_params = case.parameters()
    oracle = case.oracle(oracle_params)

    with small_pages(case.transfer), warnings.catch_warnings():
        # For PyTorch a step that raised was not called.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        optimizer = case.optimizer(params)

        for number, step in enumerate(case.steps):
            case.give_gradients(step, params, oracle_params)
            oracle.step()
            step_until_it_works(optimizer, lambda k, step=step: k in step["fails"])
            assert_same(optimizer, oracle)

            optimizer = afterwards(step["then"], optimizer, case, params)
            assert_same(optimizer, oracle)

            decay_learning_rates(oracle, number)
            decay_learning_rates(optimizer, number)


@pytest.mark.parametrize("page", MODES)
def test_schedulers_clipping_closures_hooks_and_new_groups(page: str) -> None:
    def run(make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(1)
        late = nn.Linear(3, 3)
        model = nn.Sequential(*small_model(), late)
        optimizer = make(model)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[1e-2, 1e-3], total_steps=12, cycle_momentum=False
        )
        seen: list[Any] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))

        for step in range(10):
            if step == 5:
                optimizer.add_param_group(
                    {"params": (p for p in late.parameters()), "lr": 0.5, "betas": (0.5, 0.9)}
                )

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                loss = loss_of(model, step)
                loss.backward()
                seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
                return loss

            seen.append(optimizer.step(closure).item())
            if step < 5:
                schedule.step()
        return model, seen

    found, seen = run(lambda model: paged_adamw(model, page))
    expected, oracle_saw = run(torch_adamw)
    assert_same_models(found, expected)
    assert seen == oracle_saw


def test_a_deep_copy_goes_on_alone() -> None:
    a, b = small_model(), small_model()
    optimizer, oracle = paged_adamw(a, "always"), torch_adamw(b)
    train(a, optimizer, range(2))
    train(b, oracle, range(2))

    copied, again = copy.deepcopy((a, optimizer))
    train(copied, again, range(2, 4))
    train(b, oracle, range(2, 4))

    assert_same_models(copied, b)
    assert again.page == "always" and again.paging.pages > optimizer.paging.pages
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_named_parameters_are_kept() -> None:
    optimizer = PagedAdamW(small_model().named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_no_gradients_no_change() -> None:
    a, b = small_model(), small_model()
    paged_adamw(a).step()
    assert_same_models(a, b)
