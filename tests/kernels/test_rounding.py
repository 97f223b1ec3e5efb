"""The derived tolerances of tests/tools/rounding.py: right results pass, wrong ones do not."""

import pytest
import torch
from helpers import gaussian
from rounding import Rounded

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@DTYPES
def test_two_layers_and_their_gradient_are_within_the_tolerance(dtype: torch.dtype) -> None:
    # Small enough for float16.
    x, V, W = ((0.2 * gaussian(*s)).to(dtype) for s in ((300, 256), (512, 256), (64, 512)))
    exact = Rounded.exact
    h = exact(x) @ exact(V).T
    y = h.relu() @ exact(W).T * 0.5
    dV = h.relu_backward(y @ exact(W)).T @ exact(x)

    hidden = x @ V.T
    found = 0.5 * (hidden.relu() @ W.T)
    gradient = ((found @ W) * (hidden > 0)).T @ x
    assert y.admits(found) and dV.admits(gradient)

    # Below 1 the variance would be too small, far above it the tolerance would mean nothing.
    assert 0.3 < y.deviations(found).max() < 8


@DTYPES
def test_an_error_of_a_few_roundings_is_found(dtype: torch.dtype) -> None:
    x, W = gaussian(50, 256, dtype=dtype), gaussian(64, 256, dtype=dtype)
    y = Rounded.exact(x) @ Rounded.exact(W).T
    right = x @ W.T
    assert y.admits(right)
    assert not y.admits(right * (1 + 12 * torch.finfo(dtype).eps))

    one_weight_off = W.clone()
    one_weight_off[3, 5] += 1
    assert not y.admits(x @ one_weight_off.T)
