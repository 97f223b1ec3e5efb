"""Odd layers, failures half way: a call refuses by name and changes nothing, or loses nothing."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomize, same_bits, snapshot
from torch import Tensor, nn

import minilora
from minilora import NF4Linear
from minilora.surgery import quantize_steps


class OwnCall(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class ExtraState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(2)

    def set_extra_state(self, state: Any) -> None: ...


class Slots(nn.Linear):
    __slots__ = ("more",)


def complex_weight() -> nn.Linear:
    return nn.Linear(16, 16, dtype=torch.complex64)


def empty() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(layer.weight.detach()[:, :0])
    return layer


def close_to_infinite() -> nn.Linear:
    """The double-quantized absmax would decode to infinity."""
    layer = nn.Linear(64, 64, dtype=torch.float16)
    layer.weight.data.fill_(65504)
    layer.weight.data[3] = 0.01
    return layer


def with_attribute(name: str) -> nn.Linear:
    layer = nn.Linear(16, 16)
    setattr(layer, name, 3)
    return layer


def of_another_size() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.bias = nn.Parameter(torch.ones(1))
    return layer


def tied_inside() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.again = layer.weight
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "dtype": (complex_weight, "quantize", "complex64"),
    "dtype of an adapted layer": (lambda: nn.Linear(16, 16).to(torch.int8), "inject", "int8"),
    "empty": (empty, "quantize", "odd"),
    "__call__": (lambda: OwnCall(16, 16), "quantize", "a __call__ of its own"),
    "__call__ of an adapted layer": (lambda: OwnCall(16, 16), "inject", "a __call__ of its own"),
    "extra state": (lambda: ExtraState(16, 16), "quantize", "a get_extra_state of its own"),
    "slots": (lambda: Slots(16, 16), "quantize", "cannot change its class"),
    "close to infinity": (close_to_infinite, "quantize", "above 6.48e"),
    "a name of ours": (lambda: with_attribute("packed"), "quantize", "'packed'"),
    "adapters": (lambda: with_attribute("adapters"), "inject", "'adapters'"),
    "a bias of another size": (of_another_size, "quantize", "its weight or bias is not"),
    "tied inside": (tied_inside, "quantize", "shares its weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_odd_layer_is_refused_by_name_and_the_model_unchanged(case: str) -> None:
    make, call, message = REFUSED[case]
    if case == "dtype of an adapted layer":
        odd = nn.Linear(16, 16).requires_grad_(False)
        odd.weight.data = odd.weight.data.to(torch.int8)
    else:
        odd = make()  # type: ignore[assignment]
    model = nn.Sequential()
    model.add_module("first", nn.Linear(16, 16))
    model.add_module("odd", odd)
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        getattr(minilora, call)(model)
    assert str(error.value).startswith(("odd", "nothing to quantize: odd"))
    assert snapshot(model) == before


def test_quantize_and_merge_keep_what_is_not_the_weight() -> None:
    layer = nn.Linear(16, 16)
    layer.register_buffer("steps", torch.arange(3))
    layer.gain = nn.Parameter(torch.ones(2))
    layer.norm = nn.LayerNorm(16)
    held = layer.steps, layer.gain, layer.norm, layer.bias
    model = minilora.inject(minilora.quantize(nn.Sequential(layer)), r=2)
    assert list(layer.state_dict())[:5] == ["packed", "absmax", "absmax2", "offset", "bias"]
    minilora.merge(model)
    assert type(layer) is nn.Linear
    now = layer.steps, layer.gain, layer.norm, layer.bias
    assert all(a is b for a, b in zip(now, held, strict=True))
    assert not hasattr(layer, "nf4_layout") and not hasattr(layer, "packed")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError, KeyboardInterrupt])
def test_a_merge_that_fails_at_the_second_layer_changes_nothing(error: type[BaseException]) -> None:
    model = randomize(minilora.inject(two_layers(), r=2))

    def fails(W: Tensor) -> Tensor:
        raise error("made up")

    model[1].adapters["default"].merged_into = fails
    before, bits = snapshot(model), [t.clone() for t in model.state_dict().values()]
    with pytest.raises(error):
        minilora.merge(model)
    assert snapshot(model) == before
    assert all(map(same_bits, model.state_dict().values(), bits))


@pytest.mark.parametrize("quantized", [True, False])
def test_a_merge_whose_warning_is_an_error_changes_nothing(quantized: bool) -> None:
    model: Any = two_layers()
    if quantized:
        minilora.quantize(model)
    else:
        model[1].weight = model[0].weight
    randomize(minilora.inject(model, r=2))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            minilora.merge(model, into="nf4" if quantized else "dense", min_survival=-100.0)
    assert snapshot(model) == before


class Fails(minilora.LoRA):
    """Fails at the second layer, while the model is edited."""

    left = 1

    def train(self, mode: bool = True) -> Any:
        Fails.left -= 1
        if Fails.left < 0:
            raise RuntimeError("made up")
        return super().train(mode)


def test_an_inject_that_fails_while_it_edits_is_undone() -> None:
    model = two_layers()
    handle = model[0].register_forward_hook(lambda m, i, y: y + 1)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="made up"):
        minilora.inject(model, r=2, adapter=Fails)
    assert snapshot(model) == before
    handle.remove()
    assert not model[0]._forward_hooks


def test_a_merge_that_overflows_is_refused_by_name() -> None:
    model = two_layers().half()
    minilora.inject(model, r=2)
    model[1].adapters["default"].B.data.fill_(1e5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the merged weight of 1 holds NaN or infinity"):
        minilora.merge(model)
    assert snapshot(model) == before


def test_quantize_that_runs_out_of_memory_says_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, make, left = two_layers(), NF4Linear.from_linear, iter(range(1))

    def one(*args: Any, **options: Any) -> NF4Linear:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("made up")
        return make(*args, **options)

    monkeypatch.setattr(NF4Linear, "from_linear", one)
    with pytest.raises(torch.OutOfMemoryError, match="1 of 2 layers are quantized"):
        list(quantize_steps(model))
    monkeypatch.undo()
    assert type(model[0]) is NF4Linear and type(model[1]) is nn.Linear
    assert type(minilora.quantize(model, exclude=["0"])[1]) is NF4Linear


def test_an_adapter_that_is_named_twice_is_used_once() -> None:
    model = minilora.inject(two_layers(), r=2)
    assert minilora.use(model, "default", "default")[0].active == ("default",)


def test_adapters_that_are_ejected_inside_disabled_stay_ejected() -> None:
    model = minilora.inject(two_layers(), r=2)
    with minilora.disabled(model):
        minilora.eject(model)
    assert "active" not in vars(model[0])


def damaged(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def spoil(state: dict[str, Any]) -> None:
        state[f"0.{name}"] = change(state[f"0.{name}"])

    return spoil


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another dtype": (damaged("packed", lambda t: t.float()), "0.packed: .*float32"),
    "a missing part": (lambda s: s.pop("0.offset"), "0.offset: the state dict holds nothing"),
    "NaN": (damaged("absmax2", lambda t: torch.full_like(t, 0x7FC00000)), "0.absmax2.*NaN"),
    "a codebook out of range": (
        damaged("nf4_layout", lambda t: t + torch.tensor([0, 0, 0, 0, 7])),
        r"0.nf4_layout: .*\[16, 16\] weight of torch.float32 in 7",
    ),
    "a short layout": (damaged("nf4_layout", lambda t: t[:3]), "0.nf4_layout"),
    "no tensor": (damaged("absmax", lambda t: t.tolist()), "0.absmax: .*a list"),
    "a bias of another size": (damaged("bias", lambda t: t[:3]), "0.bias"),
    "no values": (damaged("absmax", lambda t: t.to("meta")), "0.absmax: .*no values"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", STATES)
def test_a_damaged_state_dict_is_refused_by_key_and_the_layer_unchanged(
    case: str, strict: bool
) -> None:
    spoil, message = STATES[case]
    torch.manual_seed(1)
    state = minilora.quantize(nn.Sequential(nn.Linear(16, 16))).state_dict()
    spoil(state)
    model = minilora.quantize(two_layers()[:1])
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    assert all(map(same_bits, model.state_dict().values(), before))


def test_a_model_on_meta_takes_a_state_dict_by_assignment() -> None:
    state = minilora.quantize(two_layers()).state_dict()
    model = minilora.quantize(two_layers()).to("meta")
    model.load_state_dict(state, assign=True)
    assert all(map(same_bits, model.state_dict().values(), state.values()))
