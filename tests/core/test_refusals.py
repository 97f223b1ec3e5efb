"""What is refused, by name, before anything is touched: layers, numbers, calls; and a failure half way leaves the model whole."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import minilora
from minilora import LoRALinear, NF4Linear
from minilora import layers as modules


def linear() -> nn.Linear:
    return nn.Linear(20, 12)


# ---- layers and numbers


class OwnForward(nn.Linear):
    """A subclass whose forward an adapter would replace."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Double(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def patched() -> nn.Linear:
    layer = linear()
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def pruned() -> nn.Linear:
    layer = linear()
    prune.random_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    return layer


def hooked(register: str) -> nn.Linear:
    layer = linear()
    getattr(layer, register)(lambda *_: None)
    return layer


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (lambda: nn.Conv1d(2, 2, 1), "is not a linear layer"),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), "is not a linear layer"),
    "adapter": (lambda: LoRALinear(linear(), r=2), "has an adapter already"),
    "own forward": (lambda: OwnForward(4, 4), "forward of its own"),
    "patched forward": (patched, "forward of its own"),
    "parametrized weight": (lambda: parametrizations.orthogonal(linear()), "parametrized"),
    "parametrized bias": (
        lambda: parametrize.register_parametrization(linear(), "bias", Double()),
        "parametrized",
    ),
    "weight norm": (lambda: parametrizations.weight_norm(linear()), "parametrized"),
    "pruned": (pruned, "parametrized"),
    "forward hook": (lambda: hooked("register_forward_hook"), "has hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "has hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "has hooks"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "has hooks"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_layer_that_an_adapter_cannot_stand_for_is_refused_by_name(kind: str) -> None:
    make, reason = UNFIT[kind]
    layer = make()
    keys = list(layer.state_dict())
    with pytest.raises(TypeError, match=reason) as error:
        LoRALinear(layer, r=1, name="blocks.3.up")  # type: ignore[arg-type]
    assert "blocks.3.up" in str(error.value) and type(layer).__name__ in str(error.value)
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("r", r) for r in (0, -1, 13, 2.0, "8", None)),
        *(("alpha", a) for a in (0.0, -1.0, math.inf, math.nan)),
        *(("dropout", p) for p in (-0.1, 1.0, 1.5, math.nan)),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(
    argument: str, value: Any, quantized: bool
) -> None:
    base = NF4Linear.from_linear(linear()) if quantized else linear()
    with pytest.raises(ValueError, match=rf"^blocks\.3\.up: {argument}=") as error:
        LoRALinear(base, **{"r": 12, "name": "blocks.3.up", argument: value})
    assert str(value) in str(error.value)
    assert LoRALinear(base, r=12, alpha=1e-3, dropout=0.99).scale == 1e-3 / 12


# ---- calls


def small() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "up": nn.Linear(20, 24),
            "norm": nn.LayerNorm(24),
            "down": nn.Linear(24, 12),
            "head": nn.Linear(12, 30),
        }
    )


def snapshot(model: nn.Module) -> list[Any]:
    """Modules by identity, parameters by identity, value (their version counter) and requires_grad."""
    found = [(n, id(m), type(m), m.training) for n, m in model.named_modules()]
    parameters = [
        (n, id(p), p.requires_grad, p._version)
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    return [found, parameters, list(model.state_dict())]


def unfit(model: nn.ModuleDict) -> None:
    model["head"] = OwnForward(12, 30)


def hook(model: nn.ModuleDict) -> None:
    model["head"].register_forward_hook(lambda *_: None)


def inject(model: nn.ModuleDict) -> None:
    minilora.inject(model, r=2, name="first")


def diverged(model: nn.ModuleDict) -> None:
    inject(model)
    model["head"].lora_A.data[1, 3] = torch.nan


def nothing(model: nn.ModuleDict) -> None:
    pass


Call = Callable[[nn.ModuleDict], Any]
REFUSED: dict[str, tuple[Callable[[nn.ModuleDict], None], Call, type[Exception], str]] = {
    "a layer with its own forward": (
        unfit,
        lambda m: minilora.inject(m, r=2),
        TypeError,
        r"^head \(OwnForward\)",
    ),
    "a layer with hooks": (
        hook,
        lambda m: minilora.inject(m, r=2),
        TypeError,
        r"^head \(Linear\) has hooks",
    ),
    "a rank beyond one layer": (
        nothing,
        lambda m: minilora.inject(m, r=13),
        ValueError,
        r"^down: r=13.*\[12, 24\].*1 to 12",
    ),
    "alpha": (
        nothing,
        lambda m: minilora.inject(m, r=2, alpha=-1.0),
        ValueError,
        "^up: alpha=-1.0",
    ),
    "dropout": (
        nothing,
        lambda m: minilora.inject(m, r=2, dropout=1.0),
        ValueError,
        "^up: dropout=1.0",
    ),
    "train_also": (
        nothing,
        lambda m: minilora.inject(m, r=2, train_also=["nrom"]),
        ValueError,
        "train_also='nrom'.*'norm'",
    ),
    "an adapter already": (
        inject,
        lambda m: minilora.inject(m, r=2),
        ValueError,
        r"'first' on 3 layers already \(up.*eject",
    ),
    "another adapter": (
        inject,
        lambda m: minilora.inject(m, r=2, name="second"),
        ValueError,
        "has the adapter 'first'",
    ),
    "eject without": (nothing, minilora.eject, ValueError, "no adapter: minilora.inject"),
    "merge without": (nothing, minilora.merge, ValueError, "no adapter: minilora.inject"),
    "audit without": (nothing, minilora.audit, ValueError, "no adapter: minilora.inject"),
    "parameters without": (
        nothing,
        minilora.adapter_parameters,
        ValueError,
        "no adapter: minilora.inject",
    ),
    "disabled without": (
        nothing,
        lambda m: minilora.disabled(m).__enter__(),
        ValueError,
        "no adapter: minilora.inject",
    ),
    "save without": (
        nothing,
        lambda m: minilora.save_adapter(m, "nowhere"),
        ValueError,
        "no adapter to save",
    ),
    "merge of NaN": (diverged, minilora.merge, ValueError, "^the adapter of head holds NaN"),
    "merge into what": (
        inject,
        lambda m: minilora.merge(m, into="int8"),
        ValueError,
        "into='int8'",
    ),  # type: ignore[arg-type]
    "nf4 of a dense base": (
        inject,
        lambda m: minilora.merge(m, into="nf4"),
        ValueError,
        "^up has a dense base.*into='dense'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_names_the_thing_and_leaves_the_model_as_it_was(case: str) -> None:
    spoil, call, error, message = REFUSED[case]
    model = small()
    spoil(model)
    model["norm"].requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("quantized", [True, False])
def test_running_out_of_memory_half_way_leaves_the_model_as_it_was(
    quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    if quantized:
        minilora.quantize(model, exclude=["head"])
    model["norm"].requires_grad_(False)
    before, draw, left = snapshot(model), modules._draw, iter(range(2))

    def last_straw(*arguments: Any) -> Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return draw(*arguments)

    monkeypatch.setattr(modules, "_draw", last_straw)
    with pytest.raises(torch.OutOfMemoryError):
        minilora.inject(model, r=2)
    assert snapshot(model) == before
    monkeypatch.undo()
    assert minilora.inject(model, r=2)["head"](torch.ones(1, 12)).shape == (1, 30)


def test_running_out_of_memory_in_merge_leaves_every_layer_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minilora import merging

    model, x = small(), torch.randn(5, 20)
    inject(model)
    torch.nn.init.normal_(model["down"].lora_B)
    expected = model["down"](model["up"](x))
    merged, left = merging.merged_weight, iter(range(1))

    def last_straw(layer: LoRALinear) -> Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return merged(layer)

    monkeypatch.setattr(merging, "merged_weight", last_straw)
    with pytest.raises(torch.OutOfMemoryError):
        minilora.merge(model)
    # 24 float32 products of values near ten, in another order at most: a layer is merged or not, never half
    assert torch.allclose(model["down"](model["up"](x)), expected, atol=1e-4)
