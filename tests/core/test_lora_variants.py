"""Variants of LoRA as subclasses, without a change of the core: they inject, train and merge."""

import math
from typing import Any

import pytest
import torch
from helpers import adapters_of, randomize
from mlps import stored
from torch import Tensor, nn

import minilora
from minilora import LoRA

# float32's unit roundoff.
U32 = 2.0**-24


class RankStabilizedLoRA(LoRA):
    """The update is scaled by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.r)


class RowScaledLoRA(LoRA):
    """W' = diag(m) (W + s B A) with a trained m [out, 1], one at first.

    As DoRA (Liu et al. 2024, arXiv:2402.09353) without its norms: a term that is not added to the
    layer's output, and a parameter more.
    """

    def __init__(self, in_features: int, out_features: int, r: int = 8, **options: Any) -> None:
        super().__init__(in_features, out_features, r, **options)
        self.m = nn.Parameter(torch.ones(out_features, 1, device=self.B.device))

    def adapt(self, y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        bias: Any = 0 if layer.bias is None else layer.bias
        update: Tensor = self(x)
        return (y - bias + update) * self.m[:, 0].to(y.dtype) + bias

    def merged_into(self, W: Tensor) -> Tensor:
        return self.m.to(W.dtype) * super().merged_into(W)


every_variant = pytest.mark.parametrize("variant", [RankStabilizedLoRA, RowScaledLoRA])
both_kinds = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])

OUT, IN, R = 37, 70, 4


def base_model(quantized: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    return minilora.quantize(model) if quantized else model


def trained(model: nn.Sequential, variant: type[LoRA]) -> nn.Sequential:
    """The model with an adapter whose parameters all have values other than the first ones."""
    randomize(minilora.inject(model, r=R, alpha=6.0, adapter=variant))
    for adapter in adapters_of(model).values():
        if isinstance(adapter, RowScaledLoRA):
            with torch.no_grad():
                adapter.m.copy_(torch.linspace(0.5, 1.5, OUT)[:, None])
    return model


@every_variant
@both_kinds
def test_a_variant_starts_as_the_base_and_is_switched_off(
    variant: type[LoRA], quantized: bool
) -> None:
    model, x = base_model(quantized), torch.randn(11, IN)
    base = model(x)
    minilora.inject(model, r=R, adapter=variant)
    assert all(type(adapter) is variant for adapter in adapters_of(model).values())
    # m = 1 exactly, so what is rounded is y - bias + bias: two roundings of numbers near ten.
    assert torch.allclose(model(x), base, rtol=0, atol=2 * 10 * 2 * U32)

    minilora.eject(model)
    adapted = trained(model, variant)(x)
    with minilora.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)
    assert not torch.allclose(adapted, base, atol=1e-2)
    assert torch.equal(minilora.eject(model)(x), base)


@every_variant
@both_kinds
def test_every_parameter_of_a_variant_is_trained(variant: type[LoRA], quantized: bool) -> None:
    model = trained(base_model(quantized), variant)
    (adapter,) = adapters_of(model).values()
    parameters = minilora.adapter_parameters(model)
    assert {id(p) for p in parameters} == {id(p) for p in adapter.parameters()}

    model(torch.randn(11, IN)).square().sum().backward()
    assert minilora.audit(model) == []
    assert all(p.grad is not None and p.grad.any() for p in parameters)


@every_variant
@both_kinds
def test_a_merged_variant_computes_what_the_adapter_computed(
    variant: type[LoRA], quantized: bool
) -> None:
    model, x = trained(base_model(quantized), variant), torch.randn(11, IN)
    (adapter,) = adapters_of(model).values()
    before = model(x).double()
    update = adapter.scale * adapter.B.detach().abs() @ adapter.A.detach().abs()
    wide = 1.5 * (stored(model[0].weight).abs() + update).double()
    bias = model[0].bias.detach().abs().double()
    magnitude = x.abs().double() @ wide.T + 3 * bias

    merged = minilora.merge(model)
    assert type(merged[0]) is nn.Linear
    # Each side is a sum of 70 products whose terms went through r + 8 more roundings: gamma_n = n u
    # to first order. m is 1.5 at most, and the bias is taken off and added again.
    bound = 2 * (IN + R + 8) * U32 * 1.01 * magnitude
    assert ((merged(x).double() - before).abs() <= bound).all()


@both_kinds
def test_the_rank_stabilized_update_is_sqrt_of_r_times_larger(quantized: bool) -> None:
    plain, stabilized = (
        trained(base_model(quantized), kind) for kind in (LoRA, RankStabilizedLoRA)
    )
    (one,), (other,) = adapters_of(plain).values(), adapters_of(stabilized).values()
    # sqrt(4) is a power of two: nothing is rounded.
    assert torch.equal(other.delta(), 2 * one.delta())
