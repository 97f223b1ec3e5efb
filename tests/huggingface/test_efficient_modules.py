"""The norms and MLPs of `efficient_training`, one by one: values, gradients, what is kept.

A module is recognised by its structure and by its numbers.
"""

import copy
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the models are transformers'")

import torch
import transformers
from helpers import gaussian, same_bits
from live_memory import LiveMemory, kept_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from minilora.huggingface.efficient_modules import efficient_class

DTYPES = [torch.float32, torch.bfloat16]


def is_as_exact(found: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether the error is no larger than PyTorch's, but for the noise of other last bits."""
    error, allowed = ((t.detach() - exact).norm() for t in (found, plain))
    return bool(error <= 1.05 * allowed)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_is_as_exact_and_keeps_its_input(dtype: torch.dtype, kind: Any) -> None:
    norm: Any = kind(40, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(gaussian(40))
    x = gaussian(30, 20, 40).mul(2).to(dtype).requires_grad_()
    dy = gaussian(30, 20, 40, seed=1).to(dtype)

    exact_x = x.detach().double().requires_grad_()
    n = exact_x * (exact_x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact = n * (norm.weight.double() + (kind is GemmaRMSNorm))
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())

    plain = norm(x)
    (plain_dx,) = torch.autograd.grad(plain, x, dy)
    norm.__class__ = efficient_class(norm)
    found = norm(x)
    (dx,) = torch.autograd.grad(found, x, dy)

    assert found.dtype == dx.dtype == dtype
    assert is_as_exact(found, plain, exact.detach()) and is_as_exact(dx, plain_dx, exact_dx)
    assert kept_bytes(lambda: norm(x), norm) == x.nbytes + 4 * 600


def llama_mlp(activation: str = "silu") -> Any:
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, hidden_act=activation, num_attention_heads=1
    )
    return LlamaMLP(config)


def results(mlp: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The output and all gradients."""
    x = x.to(mlp.gate_proj.weight.dtype).requires_grad_()
    y = mlp(x)
    return y.detach(), *torch.autograd.grad(y, [x, *mlp.parameters()], dy.to(y.dtype))


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_mlp_is_as_exact_and_keeps_less(dtype: torch.dtype, activation: str) -> None:
    mlp = llama_mlp(activation).to(dtype)
    x, dy = gaussian(300, 24).to(dtype), gaussian(300, 24, seed=1).to(dtype)
    exact = results(copy.deepcopy(mlp).double(), x, dy)

    plain = results(mlp, x, dy)
    before = kept_bytes(lambda: mlp(x), mlp)
    mlp.__class__ = efficient_class(mlp)
    found = results(mlp, x, dy)

    if dtype == torch.bfloat16 or activation not in ("silu", "swish"):
        assert same_bits(found, plain)
    assert all(map(is_as_exact, found, plain, exact))
    # act(g); relu keeps that itself, in place of g.
    saved = 0 if activation == "relu" else 300 * 40 * dtype.itemsize
    assert kept_bytes(lambda: mlp(x), mlp) == before - saved


def test_an_activation_that_is_replaced_or_hooked_in_the_block_is_called() -> None:
    mlp, x = llama_mlp(), gaussian(5, 24)
    mlp.__class__ = efficient_class(mlp)
    calls: list[Tensor] = []
    with mlp.act_fn.register_forward_hook(lambda module, given, out: calls.append(out)):
        mlp(x)
    mlp(x)
    assert len(calls) == 1

    mlp.act_fn = nn.ReLU()
    expected = mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x))
    assert same_bits(mlp(x), expected)


def test_tensors_without_memory_have_pytorchs_operations() -> None:
    norm = LlamaRMSNorm(24).requires_grad_(False)
    norm.__class__ = efficient_class(norm)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.empty(5, 24, requires_grad=True))
    y = norm(x)
    (dx,) = torch.autograd.grad(y, x, mode.from_tensor(torch.ones(5, 24)))
    assert type(y) is type(dx) is FakeTensor and y.shape == dx.shape == (5, 24)


def test_a_dispatch_mode_sees_pytorchs_operations() -> None:
    mlp = llama_mlp()
    mlp.__class__ = efficient_class(mlp)
    with LiveMemory(mlp.parameters()) as memory:
        mlp(gaussian(5, 24))
    assert any("silu" in operator for *_, operator in memory.at_peak)


class Clamped(LlamaRMSNorm):  # type: ignore[misc]
    """Its largest output is sqrt(8) = 2.83."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-2.8, 2.8)  # type: ignore[no-any-return]


class Gated(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if gate is None else y * gate


class ClampedMLP(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=7.0)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))  # type: ignore[no-any-return]


class ScaledMLP(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale  # type: ignore[no-any-return]


SMALL = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1)


@pytest.mark.parametrize(
    "module",
    [
        Clamped(8),
        Gated(8),
        ClampedMLP(SMALL),
        ScaledMLP(SMALL),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        LlamaRMSNorm(8).to("meta"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_left_alone(module: nn.Module) -> None:
    assert efficient_class(module) is None


def test_a_forward_on_the_instance_is_left_alone() -> None:
    norm = LlamaRMSNorm(8)
    norm.forward = norm.forward
    assert efficient_class(norm) is None
