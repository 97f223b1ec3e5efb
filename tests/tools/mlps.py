"""Small networks, dense or quantized, and a comparison of a model's state before and after."""

import itertools
from collections import OrderedDict
from typing import Any

import torch
from helpers import adapters_of, randomize, same_bits
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small_mlp(*, quantized: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers "up" [24, 20] and "block.down" [12, 24], the second without a bias."""
    torch.manual_seed(0)
    block = nn.Sequential(OrderedDict(down=nn.Linear(24, 12, bias=False), norm=nn.LayerNorm(12)))
    model = nn.Sequential(OrderedDict(up=nn.Linear(20, 24), act=nn.ReLU(), block=block)).to(dtype)
    return minilora.quantize(model) if quantized else model


@st.composite
def mlps(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """A random model, dense or quantized, and an input.

    The input is a row, rows, none or a batch, contiguous or a transposed view.
    """
    sizes = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    bias, quantized = draw(st.booleans()), draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    lead = draw(st.sampled_from([(), (1,), (5,), (2, 3), (0,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))

    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, bias=bias, dtype=dtype), nn.Tanh()]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))

    x = torch.randn((*lead, sizes[0]), generator=generator).to(dtype)
    if draw(st.booleans()) and x.dim() > 1:
        x = x.mT.contiguous().mT
    return (minilora.quantize(model) if quantized else model), x


def randomize_to(model: nn.Module, size: float, seed: int = 0) -> nn.Module:
    """`randomize`, with values of B of about this size."""
    randomize(model, seed=seed)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.B.mul_(size)
    return model


def stored(weight: Any) -> Tensor:
    """The values that a dense or quantized weight stands for, as exact as they are stored."""
    if isinstance(weight, minilora.NF4Weight):
        return weight.dequantize(torch.float32)
    return weight.detach()  # type: ignore[no-any-return]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Keys, their order, and every bit."""
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(same_bits(found[key], value) for key, value in expected.items())
