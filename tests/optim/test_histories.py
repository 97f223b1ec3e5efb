"""What changed between two steps is refused; float32 states of 16-bit parameters."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from paged_cases import LazyTransfer, assert_same, copies, everything, small_pages
from torch import Tensor, nn

from minilora import PagedAdamW
from minilora.optim.reference import step as reference_step


def two(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(700).to(dtype)), nn.Parameter(torch.randn(7, 5).to(dtype))]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    return params


def to_bfloat16(optimizer: PagedAdamW, p: nn.Parameter) -> None:
    p.data, p.grad = p.data.bfloat16(), None
    p.grad = torch.ones_like(p)


def reshaped(optimizer: PagedAdamW, p: nn.Parameter) -> None:
    p.data = torch.ones(3)


def without_values(optimizer: PagedAdamW, p: nn.Parameter) -> None:
    optimizer.state[p]["exp_avg"] = None


def without_key(optimizer: PagedAdamW, p: nn.Parameter) -> None:
    del optimizer.state[p]["exp_avg_sq"]


def elsewhere(optimizer: PagedAdamW, p: nn.Parameter) -> None:
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to("meta")


def transposed(optimizer: PagedAdamW, p: nn.Parameter) -> None:
    state = optimizer.state[p]
    state["exp_avg_sq"] = state["exp_avg_sq"].T.contiguous().T


@pytest.mark.parametrize("page", ["on_oom", "always"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (to_bfloat16, r"exp_avg of parameter 1 of group 0 is torch.float32 \(7, 5\) on cpu, but"),
        (reshaped, r"the gradient of a parameter, torch.float32 \(3,\)"),
        (without_values, "exp_avg of parameter 1 of group 0 is a NoneType"),
        (without_key, r"the state of parameter 1 of group 0 \(shape \(7, 5\)\)"),
        (elsewhere, "exp_avg of parameter 1 of group 0 is .* on meta"),
        (transposed, "the states of parameter 1 of group 0 .* strides"),
    ],
)
def test_what_no_longer_fits_is_refused_before_a_parameter_moves(
    change: Callable[[PagedAdamW, nn.Parameter], None], says: str, page: Any
) -> None:
    params = two()
    optimizer = PagedAdamW(params, page=page)
    optimizer.step()
    change(optimizer, params[1])
    before = [p.detach().clone() for p in params]
    step = optimizer.state[params[0]]["step"].item()
    with pytest.raises(ValueError, match=says):
        optimizer.step()
    assert all(same_bits(p, was) for p, was in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["step"].item() == step


def test_an_eps_that_is_zero_in_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eps=1e-08 is zero in torch.float16.*state_dtype"):
        PagedAdamW(two(torch.float16))
    PagedAdamW(two(torch.float16), eps=1e-4).step()

    optimizer = PagedAdamW(two(torch.float32))
    p = optimizer.param_groups[0]["params"][0]
    p.data = p.data.half()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"eps=1e-08 is zero"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_states_of_16_bit_parameters_against_float64(dtype: torch.dtype) -> None:
    params = two(dtype)
    optimizer = PagedAdamW(params, lr=0.01, state_dtype=torch.float32)
    for p in params:
        # Its square is zero in float16.
        p.grad = p.grad * 1e-4 if p.grad is not None else None
    for t in range(1, 6):
        old = [p.detach().double() for p in params]
        zeros = {"exp_avg": torch.zeros(()), "exp_avg_sq": torch.zeros(())}
        states = [copy.deepcopy(optimizer.state.get(p)) or zeros for p in params]
        optimizer.step()
        for p, was, state in zip(params, old, states, strict=True):
            assert p.grad is not None
            m, v = (state[k].double() for k in ("exp_avg", "exp_avg_sq"))
            new, m, v = reference_step(was, p.grad.double(), m, v, t, 0.01)
            found = optimizer.state[p]
            assert found["exp_avg"].dtype == found["exp_avg_sq"].dtype == torch.float32
            assert torch.allclose(found["exp_avg"].double(), m, rtol=1e-5, atol=1e-10)
            assert torch.allclose(found["exp_avg_sq"].double(), v, rtol=1e-6, atol=1e-16)

            # One rounding to the dtype, and a dozen of float32.
            bound = (torch.finfo(dtype).eps / 2 + 2.0**-20) * new.abs() + 1e-6
            assert ((p.detach().double() - new).abs() <= bound).all()


@pytest.mark.parametrize("page", ["on_oom", "always"])
def test_float32_states_give_the_same_bits_wherever_they_live(page: Any) -> None:
    with small_pages(LazyTransfer):
        one = PagedAdamW(two(torch.bfloat16), page="never", state_dtype=torch.float32)
        other = PagedAdamW(two(torch.bfloat16), page=page, state_dtype=torch.float32)
        for step in range(4):
            one.step()
            other.step()
            assert_same(other, one)
            if step == 1 and page == "on_oom":
                other.page_out()
        again = PagedAdamW(two(torch.bfloat16), page=page, state_dtype=torch.float32)
        again.load_state_dict(other.state_dict())
        assert all(map(same_bits, everything(again)[2:], everything(one)[2:]))


def test_float32_states_are_not_rounded_on_loading_and_narrow_ones_are_widened() -> None:
    wide = PagedAdamW(two(torch.bfloat16), state_dtype=torch.float32)
    narrow = PagedAdamW(two(torch.bfloat16))
    wide.step()
    narrow.step()
    before = copies(narrow)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 .*rounded.*state_dtype"):
        narrow.load_state_dict(wide.state_dict())
    assert all(map(same_bits, everything(narrow), before))

    saved: dict[str, Any] = narrow.state_dict()
    wide.load_state_dict(saved)
    found: Tensor = wide.state_dict()["state"][0]["exp_avg"]
    assert same_bits(found, saved["state"][0]["exp_avg"].float())


def test_another_state_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state_dtype=torch.float16"):
        PagedAdamW(two(), state_dtype=torch.float16)


def test_a_model_that_was_converted_goes_on_with_float32_states() -> None:
    """The way out that the error names."""
    params = two()
    optimizer = PagedAdamW(params)
    optimizer.step()
    for p in params:
        to_bfloat16(optimizer, p)
    again = PagedAdamW(params, state_dtype=torch.float32)
    again.load_state_dict(optimizer.state_dict())
    again.step()
    assert again.state[params[0]]["step"].item() == 2
