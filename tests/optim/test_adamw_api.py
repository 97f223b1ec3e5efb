"""PagedAdamW as a torch.optim.Optimizer: state dicts both ways, schedulers, clipping, groups, hooks; and what it refuses."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora import PagedAdamW

MODES = ("on_oom", "always", "never")
Optimizer = PagedAdamW | torch.optim.AdamW


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def groups(of: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(of[0].parameters()), "weight_decay": 0.3},
        {"params": list(of[2].parameters()), "lr": 1e-2},
    ]  # type: ignore[index]


def mine(of: nn.Module, page: str = "on_oom") -> PagedAdamW:
    return PagedAdamW(groups(of), lr=3e-3, page=page)  # type: ignore[arg-type]


def torchs(of: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(of), lr=3e-3)


def loss_of(of: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return of(torch.randn(4, 5, generator=generator)).square().sum()  # type: ignore[no-any-return]


def train(of: nn.Module, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(of, seed).backward()
        optimizer.step()


def assert_equal(found: Any, expected: Any) -> None:
    """Nested dicts and lists, tensors to the bit."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert (
            found.dtype == expected.dtype
            and found.device == expected.device
            and torch.equal(found, expected)
        )
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        [assert_equal(found[key], expected[key]) for key in found]
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        [assert_equal(f, e) for f, e in zip(found, expected, strict=True)]
    else:
        assert found == expected


def assert_same_models(found: nn.Module, expected: nn.Module) -> None:
    assert_equal(dict(found.state_dict()), dict(expected.state_dict()))


# ---- state dicts


@pytest.mark.parametrize("page", MODES)
def test_the_state_dict_is_torchs(page: str) -> None:
    a, b = model(), model()
    paged, oracle = mine(a, page), torchs(b)
    assert_equal(paged.state_dict(), oracle.state_dict())
    train(a, paged, range(3)), train(b, oracle, range(3))
    assert_equal(paged.state_dict(), oracle.state_dict())


@pytest.mark.parametrize("after", MODES)
@pytest.mark.parametrize("before", MODES)
def test_to_torch_and_back_and_on_to_another_mode_gives_the_bits_of_one_run(
    before: str, after: str
) -> None:
    a, b = model(), model()
    optimizer: Optimizer = mine(a, before)
    oracle = torchs(b)
    for i, make in enumerate((torchs, lambda of: mine(of, after), torchs)):
        train(a, optimizer, range(3 * i, 3 * i + 3)), train(b, oracle, range(3 * i, 3 * i + 3))
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = make(a)
        optimizer.load_state_dict(saved)
        assert_equal(optimizer.state_dict(), saved)
        assert_equal(optimizer.state_dict(), oracle.state_dict())
    train(a, optimizer, range(9, 12)), train(b, oracle, range(9, 12))
    assert_same_models(a, b)


def test_a_paged_out_state_dict_is_one_of_tensors_that_can_be_saved(tmp_path: Path) -> None:
    a = model()
    optimizer = mine(a)
    train(a, optimizer, range(2))
    optimizer.page_out()
    flat = {
        f"{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(flat, tmp_path / "states.safetensors")
    assert_equal(
        dict(sorted(load_file(tmp_path / "states.safetensors").items())), dict(sorted(flat.items()))
    )


def test_loading_copies_and_shares_nothing_with_what_it_loads() -> None:
    a = model()
    optimizer = mine(a)
    train(a, optimizer, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = model()
    again = mine(other)
    again.load_state_dict(saved)
    train(other, again, range(3))
    assert_equal(saved, before)


def test_a_state_dict_without_states_leaves_none_behind() -> None:
    a = model()
    optimizer = mine(a)
    empty = copy.deepcopy(optimizer.state_dict())
    train(a, optimizer, range(1))
    optimizer.page_out()
    optimizer.load_state_dict(empty)
    assert optimizer.page_in() == 0 and not optimizer.state
    train(a, optimizer, range(1))
    assert optimizer.paging.pages == 0


def test_step_as_a_number_and_keys_that_older_versions_lack_are_read() -> None:
    a, b = model(), model()
    optimizer = mine(a)
    train(a, optimizer, range(2)), train(b, mine(b), range(2))
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
    again = mine(b)
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
        (other_shape, r"exp_avg of parameter 2 has shape \(3, 3\), the parameter \(3, 7\)"),
        (amsgrad, "state of parameter 0 has .*max_exp_avg_sq"),
        (flagged, "amsgrad=True is not offered"),
        (tensor_lr, "lr is a tensor"),
        (sgd, "lacks .*betas"),
        (adam, "decoupled_weight_decay=False"),
        (fewer, r"groups of \[1, 2\] parameters, this optimizer of \[2, 2\]"),
        (stray, r"groups do not list: \[17\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], says: str, page: str
) -> None:
    a = model()
    optimizer = mine(a, page)
    train(a, optimizer, range(2))
    before, since = copy.deepcopy(optimizer.state_dict()), optimizer.paging.since
    spoiled = copy.deepcopy(before)
    for state in spoiled["state"].values():
        state["exp_avg"].fill_(7.0)
    spoil(spoiled)
    with pytest.raises((ValueError, TypeError), match=says):
        optimizer.load_state_dict(spoiled)
    assert_equal(optimizer.state_dict(), before)
    assert optimizer.paging.since == since


@pytest.mark.parametrize("page", MODES)
def test_loading_where_memory_runs_out_leaves_all_as_it_was_or_goes_to_the_host(
    page: str, allocator: Any
) -> None:
    a, b = model(), model()
    trained = mine(b)
    train(b, trained, range(3))
    saved = copy.deepcopy(trained.state_dict())
    for k in range(12):
        optimizer = mine(a, page)
        train(a, optimizer, range(1))
        before = copy.deepcopy(optimizer.state_dict())
        memory = allocator(lambda i, k=k: i == k)
        try:
            with memory:
                optimizer.load_state_dict(saved)
        except (torch.OutOfMemoryError, MemoryError):
            assert page != "on_oom"
            assert_equal(optimizer.state_dict(), before)
        else:
            assert page == "on_oom" and optimizer.paging.since == 4
            assert_equal(optimizer.state_dict(), saved)
        assert memory.failed == 1


def test_hooks_of_load_see_the_state_dict_before_and_the_states_after() -> None:
    a, b = model(), model()
    optimizer, again = mine(a), mine(b)
    train(a, optimizer, range(2))
    seen = []

    def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(state_dict["state"]))
        return {
            **state_dict,
            "state": {
                i: {**s, "exp_avg": s["exp_avg"] / 2} for i, s in state_dict["state"].items()
            },
        }

    again.register_load_state_dict_pre_hook(halve)
    again.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    for _ in range(2):  # the optimizer's own hooks are gone after a load
        again.load_state_dict(optimizer.state_dict())
    assert seen == [4, 4, 4, 4]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(again.state[q]["exp_avg"], optimizer.state[p]["exp_avg"] / 2)


# ---- an optimizer among optimizers


@pytest.mark.parametrize("page", MODES)
def test_schedulers_clipping_closures_hooks_and_new_groups(page: str) -> None:
    def run(make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(1)
        late = nn.Linear(3, 3)
        of = nn.Sequential(*model().children(), late)  # type: ignore[arg-type]
        optimizer = make(of)
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
                loss = loss_of(of, step)
                loss.backward()
                seen.append(nn.utils.clip_grad_norm_(of.parameters(), 0.5).item())
                return loss

            seen.append(optimizer.step(closure).item())
            if step < 5:
                schedule.step()
        return of, seen

    found, seen = run(lambda of: mine(of, page))
    expected, oracle_saw = run(torchs)
    assert_same_models(found, expected)
    assert seen == oracle_saw


def test_a_deep_copy_goes_on_alone() -> None:
    a, b = model(), model()
    optimizer, oracle = mine(a, "always"), torchs(b)
    train(a, optimizer, range(2)), train(b, oracle, range(2))
    copied, again = copy.deepcopy((a, optimizer))
    train(copied, again, range(2, 4)), train(b, oracle, range(2, 4))
    assert_same_models(copied, b)
    assert again.page == "always" and again.paging.pages > optimizer.paging.pages
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_named_parameters_are_kept() -> None:
    a = model()
    optimizer = PagedAdamW(a.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_no_gradients_no_change() -> None:
    a, b = model(), model()
    mine(a).step()
    assert_same_models(a, b)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lr": torch.tensor(0.1)}, TypeError, "lr is a tensor: a Python number"),
        ({"betas": (torch.tensor(0.9), 0.99)}, TypeError, r"betas\[0\] is a tensor"),
        ({"lr": -1.0}, ValueError, "lr=-1.0: at least 0"),
        ({"lr": float("nan")}, ValueError, "lr=nan: at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]=1.0: at least 0 and less than 1"),
        ({"eps": -1e-8}, ValueError, "eps=-1e-08"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"page": "auto"}, ValueError, "page='auto': one of"),
    ],
)
def test_options_out_of_range_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        PagedAdamW(model().parameters(), **options)
    optimizer = mine(model())
    if "page" not in options:
        with pytest.raises(error, match=says):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
        assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_what_is_not_offered_is_refused_by_name(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}=True is not offered by PagedAdamW"):
        PagedAdamW([{"params": model().parameters(), flag: True}])


def test_complex_parameters_and_sparse_or_foreign_gradients_are_refused_before_anything_changes() -> (
    None
):
    with pytest.raises(TypeError, match=r"a parameter of shape \(2,\) is torch.complex64"):
        PagedAdamW([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    embedding, linear = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2)
    optimizer = PagedAdamW([*linear.parameters(), *embedding.parameters()])
    linear(embedding(torch.tensor([1]))).sum().backward()
    before = copy.deepcopy(linear.state_dict())
    with pytest.raises(
        TypeError,
        match=r"gradient of a parameter of shape \(4, 2\) is sparse: use nn.Embedding\(sparse=False\)",
    ):
        optimizer.step()
    assert_equal(dict(linear.state_dict()), dict(before))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(TypeError, match="lr is a tensor"):
        optimizer.step()
    assert not optimizer.state


def test_moves_that_the_mode_excludes_are_refused() -> None:
    with pytest.raises(ValueError, match='page="never"'):
        mine(model(), "never").page_out()
    with pytest.raises(ValueError, match='page="always"'):
        mine(model(), "always").page_in()
