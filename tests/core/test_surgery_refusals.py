"""What is refused, by name, before anything is edited; a failure leaves the model whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import snapshot
from torch import Tensor, nn

import minilora
from minilora import LoRA


class OwnForward(nn.Linear):
    """A subclass whose forward an adapter would replace."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def small() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"up": nn.Linear(20, 24), "norm": nn.LayerNorm(24), "down": nn.Linear(24, 12)}
    return nn.ModuleDict(layers | {"head": nn.Linear(12, 30)})


def unfit(model: nn.ModuleDict) -> None:
    model["head"] = OwnForward(12, 30)


def inject(model: nn.ModuleDict) -> None:
    minilora.inject(model, r=2, name="first")


def inject_two(model: nn.ModuleDict) -> None:
    inject(model)
    minilora.inject(model, r=2, name="second")


def diverged(model: nn.ModuleDict) -> None:
    inject(model)
    model["head"].adapters["first"].A.data[1, 3] = torch.nan


def nothing(model: nn.ModuleDict) -> None:
    pass


Prepare = Callable[[nn.ModuleDict], None]

# What is done to the model first, the arguments of inject, the error and its message.
REFUSED_BY_INJECT: dict[str, tuple[Prepare, dict[str, Any], type[Exception], str]] = {
    "a layer with its own forward": (unfit, {}, TypeError, r"^head \(OwnForward\)"),
    "a rank of zero": (nothing, {"r": 0}, ValueError, r"^up: r=0: .* whole number from 1"),
    "alpha": (nothing, {"alpha": -1.0}, ValueError, "^up: alpha=-1.0"),
    "dropout": (nothing, {"dropout": 1.0}, ValueError, "^up: dropout=1.0"),
    "train_also": (
        nothing,
        {"train_also": ["nrom"]},
        ValueError,
        "train_also='nrom'.*'norm'",
    ),
    "an adapter already": (
        inject,
        {"name": "first"},
        ValueError,
        r"'first' on 3 layers already \(up.*eject",
    ),
    "a name with a dot": (nothing, {"name": "a.b"}, ValueError, "name='a.b'.*without dots"),
    "the name of a method": (nothing, {"name": "keys"}, ValueError, "name='keys'"),
    "train_also beside a second adapter": (
        inject,
        {"name": "second", "train_also": ["norm"]},
        ValueError,
        "'first' on 3 layers already.*single adapter",
    ),
}

Call = Callable[[nn.ModuleDict], Any]

# What is done to the model first, the call, and the message of a ValueError.
REFUSED: dict[str, tuple[Prepare, Call, str]] = {
    "use what is not there": (
        inject,
        lambda m: minilora.use(m, "second"),
        "no adapter 'second'; it has 'first'",
    ),
    "eject what is not there": (
        inject,
        lambda m: minilora.eject(m, "second"),
        "no adapter 'second'; it has 'first'",
    ),
    "merge with one that is not active": (
        inject_two,
        minilora.merge,
        "up also has the adapter 'first', which is not active",
    ),
    "eject without": (nothing, minilora.eject, "no adapter: minilora.inject"),
    "merge without": (nothing, minilora.merge, "no adapter: minilora.inject"),
    "audit without": (nothing, minilora.audit, "no adapter: minilora.inject"),
    "parameters without": (nothing, minilora.adapter_parameters, "no adapter: minilora.inject"),
    "disabled without": (
        nothing,
        lambda m: minilora.disabled(m).__enter__(),
        "no adapter: minilora.inject",
    ),
    "merge of NaN": (diverged, minilora.merge, "^the adapter of head holds NaN"),
    "merge into an unknown format": (
        inject,
        lambda m: minilora.merge(m, into="int8"),  # type: ignore[arg-type]
        "into='int8'",
    ),
    "merge of a dense base into nf4": (
        inject,
        lambda m: minilora.merge(m, into="nf4"),
        "^up has a dense base.*into='dense'",
    ),
}


def assert_refused(prepare: Prepare, call: Call, error: type[Exception], message: str) -> None:
    """Calls with a model and compares the model with what it was before."""
    model = small()
    prepare(model)
    model["norm"].requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", REFUSED_BY_INJECT)
def test_a_refused_inject_names_the_fault_and_leaves_the_model_as_it_was(case: str) -> None:
    prepare, arguments, error, message = REFUSED_BY_INJECT[case]
    options = {"r": 2} | arguments
    assert_refused(prepare, lambda m: minilora.inject(m, **options), error, message)


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_names_the_fault_and_leaves_the_model_as_it_was(case: str) -> None:
    prepare, call, message = REFUSED[case]
    assert_refused(prepare, call, ValueError, message)


@pytest.mark.parametrize("quantized", [True, False])
def test_running_out_of_memory_half_way_leaves_the_model_as_it_was(
    quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    if quantized:
        minilora.quantize(model, exclude=["head"])
    model["norm"].requires_grad_(False)
    before, init, left = snapshot(model), LoRA.__init__, iter(range(2))

    def make_two(*arguments: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        init(*arguments, **options)

    monkeypatch.setattr(LoRA, "__init__", make_two)
    with pytest.raises(torch.OutOfMemoryError):
        minilora.inject(model, r=2)
    assert snapshot(model) == before
    monkeypatch.undo()
    assert minilora.inject(model, r=2)["head"](torch.ones(1, 12)).shape == (1, 30)
