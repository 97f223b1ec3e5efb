"""inject, eject, merge, disabled and audit as laws about the model: what changes, what does not, and what trains."""

import copy
import itertools
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora.surgery import adapters

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24  # float32's unit roundoff


@st.composite
def mlps(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """A small random model, dense or quantized, and an input: a row, rows, none, a batch, contiguous or a transposed view."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    bias, quantized, dtype = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(DTYPES))
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
    if draw(st.booleans()):
        x = x.mT.contiguous().mT if x.dim() > 1 else x
    return (minilora.quantize(model) if quantized else model), x


def perturb(model: nn.Module, size: float = 1.0, seed: int = 0) -> None:
    """What training does: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.copy_(size * torch.randn(layer.lora_B.shape, generator=generator))


def small(*, quantized: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(OrderedDict(down=nn.Linear(24, 12, bias=False), norm=nn.LayerNorm(12)))
    model = nn.Sequential(OrderedDict(up=nn.Linear(20, 24), act=nn.ReLU(), block=block)).to(dtype)
    return minilora.quantize(model) if quantized else model


def decoded(weight: Any) -> Tensor:
    return (
        weight.dequantize(torch.float32)
        if isinstance(weight, minilora.NF4Weight)
        else weight.detach()
    )


def states(model: nn.Module) -> dict[str, Any]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Any]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())


# ---- inject and eject


@given(mlps(), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_inject_is_the_identity_and_eject_its_inverse_to_the_bit(
    case: tuple[nn.Sequential, Tensor], train: bool, autocast: bool
) -> None:
    model, x = case
    # frozen beforehand: torch multiplies a batch with strides in another order when the weight requires a gradient
    model.train(train).requires_grad_(False)
    layers, state = list(model), states(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model(x)
        assert minilora.inject(model, r=1, dropout=0.5) is model
        assert torch.equal(model(x), before)
        perturb(model)
        changed = model(x)
        assert minilora.eject(model) is model
        assert torch.equal(model(x), before)
    assert all(layer is was for layer, was in zip(model, layers, strict=True))
    assert all(layer.training == train for layer in model)
    assert_same_state(model, state)
    assert changed.shape == before.shape and changed.dtype == before.dtype


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_trained_adapter_changes_the_output_in_train_and_eval(
    train: bool, quantized: bool
) -> None:
    model = minilora.inject(small(quantized=quantized).train(train), r=4)
    x = torch.randn(5, 20)
    before = model(x)
    for name in adapters(model):
        perturb(model, 0.0)
        perturb(model.get_submodule(name), 1.0)
        assert not torch.allclose(model(x), before, atol=1e-2), name
    assert all(layer.training == train for layer in adapters(model).values())


@pytest.mark.parametrize("quantized", [True, False])
def test_training_moves_the_adapter_and_nothing_else(quantized: bool) -> None:
    model = small(quantized=quantized)
    state = states(model)
    minilora.inject(model, r=4)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 20)).square().sum().backward()
        optimizer.step()
    assert all(bool(layer.lora_B.any()) for layer in adapters(model).values())
    assert_same_state(minilora.eject(model), state)


def test_hooks_of_parents_survive_and_what_inject_froze_stays_frozen() -> None:
    model = small()
    calls: list[str] = []
    model.block.register_forward_hook(lambda *_: calls.append("parent"))
    minilora.eject(minilora.inject(model, r=4))
    model(torch.randn(5, 20))
    assert calls == ["parent"]
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    model(torch.randn(5, 20)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_round_of_inject_and_eject_is_like_the_first() -> None:
    model = minilora.inject(small(), r=4)
    first = model[0].lora_A.clone()
    minilora.inject(minilora.eject(model), r=4)
    assert torch.equal(model[0].lora_A, first)


def test_inject_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = minilora.inject(nn.Sequential(nn.Linear(20, 24)), r=4)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert (model[0].lora_A.shape, model[0].lora_B.shape) == ((4, 20), (24, 4))


# ---- what trains


def test_train_also_names_modules_and_parameters_that_stay_trainable() -> None:
    def trainable(*names: str) -> set[str]:
        model = minilora.inject(small(), r=4, targets=["block.down"], train_also=names)
        mine = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {id(p) for p in minilora.adapter_parameters(model)} == {
            id(p) for p in model.parameters() if p.requires_grad
        }
        assert {"block.down.lora_A", "block.down.lora_B"} <= mine
        return mine - {"block.down.lora_A", "block.down.lora_B"}

    assert trainable() == set()
    assert trainable("block.norm") == {"block.norm.weight", "block.norm.bias"}
    assert trainable("block.norm.bias") == {"block.norm.bias"}
    assert trainable("block.norm", "up.weight") == {
        "block.norm.weight",
        "block.norm.bias",
        "up.weight",
    }


def test_audit_names_the_adapters_that_got_no_gradient() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) @ self.read.weight.T  # as a fused loss reads the head

    model = minilora.inject(Skips(), r=2)
    assert minilora.audit(model) == ["used", "read", "idle"]
    model(torch.randn(3, 8)).sum().backward()
    assert minilora.audit(model) == ["read", "idle"]
    model.used.lora_B.grad.zero_()  # a gradient of zeros is none
    assert minilora.audit(model) == ["used", "read", "idle"]


# ---- merge


@given(mlps(), st.integers(0, 9))
@settings(max_examples=40)
def test_merge_gives_plain_linears_with_the_sum_rounded_once(
    case: tuple[nn.Sequential, Tensor], seed: int
) -> None:
    model, x = case
    minilora.inject(model.eval(), r=1, alpha=3.0)
    perturb(model, 1.0, seed)
    layers = adapters(model)
    dtypes = {n: layer.weight.dtype for n, layer in layers.items()}
    dense = {n: decoded(layer.weight).double() for n, layer in layers.items()}
    update = {
        n: (layer.lora_B.double() @ layer.lora_A.double()).detach() * 3.0
        for n, layer in layers.items()
    }
    biases = {n: layer.bias for n, layer in layers.items()}
    minilora.merge(model)
    for n, w in dense.items():
        layer = model.get_submodule(n)
        assert (
            type(layer) is nn.Linear and layer.weight.dtype == dtypes[n] and layer.bias is biases[n]
        )
        assert not layer.training and not layer.weight.requires_grad
        # float32: B A (one product, r = 1), times s, plus W: three roundings; then one to the base's dtype, 2^-eps/2,
        # and half of its smallest subnormal
        wide, info = w.abs() + update[n].abs(), torch.finfo(dtypes[n])
        bound = 3.01 * U32 * wide + info.eps / 2 * 1.01 * wide + info.smallest_normal * info.eps
        assert ((layer.weight.double() - (w + update[n])).abs() <= bound).all()
    assert model(x).dtype == x.dtype


@pytest.mark.parametrize("quantized", [True, False])
def test_the_merged_model_computes_what_the_adapter_computed(quantized: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 37))
    minilora.inject(minilora.quantize(model) if quantized else model, r=5)
    perturb(model)
    layer, x = model[0], torch.randn(11, 70)
    with minilora.disabled(model):
        base = model(x).double()
    before = model(x).double()
    wide = decoded(layer.weight).abs() + layer.scale * layer.lora_B.abs() @ layer.lora_A.abs()
    wide = x.abs().double() @ wide.double().T + layer.bias.abs()
    after = minilora.merge(model)(x).double()
    # each side is a sum of 70 products whose terms went through r + 4 more roundings: gamma_n = n u to first order
    bound = 2 * (70 + 5 + 4) * U32 * 1.01 * wide
    assert ((after - before).abs() <= bound).all()
    assert ((before - base).abs() > bound).any(), (
        "the adapter does nothing, so this compares nothing"
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_merging_an_untrained_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    model = small().to(torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(24, 20, dtype=torch.float64))
    model.to(dtype)
    state = states(model)
    assert_same_state(minilora.merge(minilora.inject(model, r=4)), state)


def test_merge_into_nf4_refuses_to_lose_the_update_and_reports_what_survives() -> None:
    model = minilora.inject(small(quantized=True), r=4)
    perturb(model, 1e-5)  # far less than the gap between two levels
    state, layers = states(model), list(model)
    with pytest.raises(
        ValueError, match=r"lose the update.*(up|block\.down) -?\d+\.\d%.*into='dense'"
    ):
        minilora.merge(model, into="nf4")
    assert_same_state(model, state)
    assert all(layer is was for layer, was in zip(model, layers, strict=True)) and list(
        adapters(model)
    ) == ["up", "block.down"]

    perturb(model, 3.0)
    expected = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"survives.* (up|block\.down) \d+\.\d%"):
        assert minilora.merge(model, into="nf4", min_survival=0.9) is model
    for n, layer in adapters(expected).items():
        new = model.get_submodule(n)
        dense = layer.weight.dequantize() + layer.scale * layer.lora_B @ layer.lora_A
        assert type(new) is minilora.NF4Linear and new.weight.absmax2 is not None
        # half the widest gap between two levels of the codebook, times the block's largest value, and 8-bit absmax on top
        assert (new.weight.dequantize() - dense).abs().max() < (0.152 + 0.05) * dense.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (
            type(minilora.merge(minilora.inject(model, r=4), into="nf4")[0]) is minilora.NF4Linear
        )


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0])
def test_a_merge_report_says_what_a_merge_then_keeps_and_changes_nothing(
    quantized: bool, size: float
) -> None:
    model = minilora.inject(small(quantized=quantized, dtype=torch.bfloat16), r=4)
    perturb(model, size)
    state = states(model)
    report = minilora.merge_report(model)
    assert_same_state(model, state)
    layers = {n: (decoded(layer.weight).double(), layer) for n, layer in adapters(model).items()}
    merged = {"dense": minilora.merge(copy.deepcopy(model))}
    if quantized:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged["nf4"] = minilora.merge(copy.deepcopy(model), into="nf4", min_survival=-9)
    assert [row.name for row in report.rows] == list(layers) and len(report.rows) == 2
    for row in report.rows:
        W, layer = layers[row.name]
        update = layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        assert row.update == pytest.approx(float(update.norm() / W.norm()), rel=1e-5)
        for kind in ("dense", "nf4"):
            if kind in merged:
                moved = decoded(merged[kind].get_submodule(row.name).weight).double() - W
                kept = float((moved * update).sum() / update.square().sum())
                assert getattr(row, kind) == pytest.approx(kept, rel=1e-4, abs=1e-4)
        assert (row.nf4 is None) is not quantized


def test_a_merge_report_refuses_what_merge_refuses() -> None:
    with pytest.raises(ValueError, match="no adapter"):
        minilora.merge_report(small())
    model = minilora.inject(small(), r=4)
    perturb(model, float("nan"))
    with pytest.raises(ValueError, match="up holds NaN"):
        minilora.merge_report(model)


# ---- disabled


@pytest.mark.parametrize("quantized", [True, False])
def test_disabled_computes_the_base_nests_and_ends_on_an_exception(quantized: bool) -> None:
    model, x = small(quantized=quantized), torch.randn(5, 20)
    base = model(x)
    minilora.inject(model, r=4)
    perturb(model)
    adapted = model(x)
    with minilora.disabled(model):
        assert torch.equal(model(x), base)
        with minilora.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base), "leaving the inner block switched the adapter on"
    assert torch.equal(model(x), adapted) and not torch.equal(adapted, base)
    with pytest.raises(KeyError), minilora.disabled(model):
        raise KeyError
    assert torch.equal(model(x), adapted)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch 2.13's own tracing does it
def test_disabled_works_under_compile_with_a_full_graph() -> None:
    model, x = small(quantized=True), torch.randn(5, 20)
    base = model(x)
    minilora.inject(model, r=4)
    perturb(model)
    adapted = model(x)
    compiled = torch.compile(
        model, fullgraph=True, backend="aot_eager"
    )  # aot_eager: traced whole, run by eager's kernels
    for _ in range(2):
        assert torch.equal(compiled(x), adapted)
        with minilora.disabled(model):
            assert torch.equal(compiled(x), base)
