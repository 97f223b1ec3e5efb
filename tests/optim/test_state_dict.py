"""State dicts: those of torch.optim.AdamW, both ways; and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocator import FailingAllocator
from paged_cases import MODES, OUT_OF_MEMORY
from safetensors.torch import load_file, save_file
from small_models import (
    Optimizer,
    assert_equal,
    assert_same_models,
    paged_adamw,
    small_model,
    torch_adamw,
    train,
)


@pytest.mark.parametrize("page", MODES)
def test_the_state_dict_is_torchs(page: str) -> None:
    a, b = small_model(), small_model()
    paged, oracle = paged_adamw(a, page), torch_adamw(b)
    assert_equal(paged.state_dict(), oracle.state_dict())

    train(a, paged, range(3))
    train(b, oracle, range(3))
    assert_equal(paged.state_dict(), oracle.state_dict())


@pytest.mark.parametrize("after", MODES)
@pytest.mark.parametrize("before", MODES)
def test_to_torch_and_back_and_on_to_another_mode_gives_the_bits_of_one_run(
    before: str, after: str
) -> None:
    a, b = small_model(), small_model()
    optimizer: Optimizer = paged_adamw(a, before)
    oracle = torch_adamw(b)

    makers = (torch_adamw, lambda model: paged_adamw(model, after), torch_adamw)
    for i, make in enumerate(makers):
        seeds = range(3 * i, 3 * i + 3)
        train(a, optimizer, seeds)
        train(b, oracle, seeds)

        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = make(a)
        optimizer.load_state_dict(saved)
        assert_equal(optimizer.state_dict(), saved)
        assert_equal(optimizer.state_dict(), oracle.state_dict())

    train(a, optimizer, range(9, 12))
    train(b, oracle, range(9, 12))
    assert_same_models(a, b)


def test_a_paged_out_state_dict_is_one_of_tensors_that_can_be_saved(tmp_path: Path) -> None:
    a = small_model()
    optimizer = paged_adamw(a)
    train(a, optimizer, range(2))
    optimizer.page_out()

    flat = {
        f"{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(flat, tmp_path / "states.safetensors")
    loaded = load_file(tmp_path / "states.safetensors")
    assert_equal(loaded, flat)


def test_loading_copies_and_shares_nothing_with_what_it_loads() -> None:
    a = small_model()
    optimizer = paged_adamw(a)
    train(a, optimizer, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)

    other = small_model()
    again = paged_adamw(other)
    again.load_state_dict(saved)
    train(other, again, range(3))
    assert_equal(saved, before)


def test_a_state_dict_without_states_leaves_none_behind() -> None:
    a = small_model()
    optimizer = paged_adamw(a)
    empty = copy.deepcopy(optimizer.state_dict())
    train(a, optimizer, range(1))

    optimizer.page_out()
    optimizer.load_state_dict(empty)
    assert optimizer.page_in() == 0 and not optimizer.state
    train(a, optimizer, range(1))
    assert optimizer.paging.pages == 0


def test_step_as_a_number_and_keys_that_older_versions_lack_are_read() -> None:
    a, b = small_model(), small_model()
    optimizer = paged_adamw(a)
    train(a, optimizer, range(2))
    train(b, paged_adamw(b), range(2))

    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        state["step"] = int(state["step"])
    for group in old["param_groups"]:
        for key in (
            "foreach",
            "fused",
            "maximize",
            "capturable",
            "differentiable",
            "decoupled_weight_decay",
        ):
            del group[key]

    again = paged_adamw(b)
    again.load_state_dict(old)
    assert_equal(again.state_dict(), optimizer.state_dict())


def other_shape(saved: dict[str, Any]) -> None:
    saved["state"][2]["exp_avg"] = torch.zeros(3, 3)


def amsgrad(saved: dict[str, Any]) -> None:
    saved["state"][0]["max_exp_avg_sq"] = saved["state"][0]["exp_avg"]


def flagged(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["amsgrad"] = True


def tensor_lr(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["lr"] = torch.tensor(0.1)


def sgd(saved: dict[str, Any]) -> None:
    del saved["param_groups"][0]["betas"]


def adam(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["decoupled_weight_decay"] = False


def fewer(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def stray(saved: dict[str, Any]) -> None:
    saved["state"][17] = saved["state"][0]


@pytest.mark.parametrize("page", MODES)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            other_shape,
            r"exp_avg of parameter 2 has shape \(3, 3\), but the parameter has shape \(3, 7\)",
        ),
        (amsgrad, "state of parameter 0 has .*max_exp_avg_sq"),
        (flagged, "amsgrad=True is not supported"),
        (tensor_lr, "lr is a tensor"),
        (sgd, "lacks .*betas"),
        (adam, "decoupled_weight_decay=False"),
        (fewer, r"groups of \[1, 2\] parameters, this optimizer of \[2, 2\]"),
        (stray, r"in none of its groups: \[17\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], says: str, page: str
) -> None:
    a = small_model()
    optimizer = paged_adamw(a, page)
    train(a, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    since = optimizer.paging.since

    spoiled = copy.deepcopy(before)
    for state in spoiled["state"].values():
        state["exp_avg"].fill_(7.0)
    spoil(spoiled)

    with pytest.raises((ValueError, TypeError), match=says):
        optimizer.load_state_dict(spoiled)
    assert_equal(optimizer.state_dict(), before)
    assert optimizer.paging.since == since


@pytest.mark.parametrize("page", MODES)
def test_loading_where_memory_runs_out_leaves_all_as_it_was_or_goes_to_the_host(page: str) -> None:
    a, b = small_model(), small_model()
    trained = paged_adamw(b)
    train(b, trained, range(3))
    saved = copy.deepcopy(trained.state_dict())

    for k in range(12):
        optimizer = paged_adamw(a, page)
        train(a, optimizer, range(1))
        before = copy.deepcopy(optimizer.state_dict())

        memory = FailingAllocator(lambda i, k=k: i == k)
        try:
            with memory:
                optimizer.load_state_dict(saved)
        except OUT_OF_MEMORY:
            assert page != "on_oom"
            assert_equal(optimizer.state_dict(), before)
        else:
            assert page == "on_oom" and optimizer.paging.since == 4
            assert_equal(optimizer.state_dict(), saved)
        assert memory.failed == 1


def test_hooks_of_load_see_the_state_dict_before_and_the_states_after() -> None:
    a, b = small_model(), small_model()
    optimizer, again = paged_adamw(a), paged_adamw(b)
    train(a, optimizer, range(2))
    seen = []

    def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(state_dict["state"]))
        halved = {i: {**s, "exp_avg": s["exp_avg"] / 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": halved}

    again.register_load_state_dict_pre_hook(halve)
    again.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    # Twice, since the optimizer's own hooks are gone after a load.
    for _ in range(2):
        again.load_state_dict(optimizer.state_dict())
    assert seen == [4, 4, 4, 4]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(again.state[q]["exp_avg"], optimizer.state[p]["exp_avg"] / 2)
