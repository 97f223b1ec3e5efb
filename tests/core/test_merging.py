"""merge: the sum rounded once, what the merged model computes, and what a merge into NF4 keeps."""

import copy
import warnings

import pytest
import torch
from helpers import adapters_of, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from mlps import DTYPES, assert_same_state, mlps, randomize_to, small_mlp, state_of, stored
from torch import Tensor, nn

import minilora
from minilora import merging
from minilora.targets import adapted_layers

# float32's unit roundoff.
U32 = 2.0**-24


@given(mlps(), st.integers(0, 9))
@settings(max_examples=40)
def test_merge_gives_plain_linears_with_the_sum_rounded_once(
    case: tuple[nn.Sequential, Tensor], seed: int
) -> None:
    model, x = case
    randomize(minilora.inject(model.eval(), r=1, alpha=3.0), seed=seed)
    layers = adapted_layers(model)
    dtypes = {n: layer.weight.dtype for n, layer in layers.items()}
    dense = {n: stored(layer.weight).double() for n, layer in layers.items()}
    adapters = adapters_of(model)
    update = {n: 3.0 * (a.B.double() @ a.A.double()).detach() for n, a in adapters.items()}
    biases = {n: layer.bias for n, layer in layers.items()}

    minilora.merge(model)
    for n, w in dense.items():
        layer = model.get_submodule(n)
        assert type(layer) is nn.Linear
        assert (layer.weight.dtype, layer.bias) == (dtypes[n], biases[n])
        assert not layer.training
        assert not layer.weight.requires_grad

        # float32: B A (one product, r = 1), times s, plus W: three roundings; then one to the
        # base's dtype, 2^-eps/2, and half of its smallest subnormal.
        wide, info = w.abs() + update[n].abs(), torch.finfo(dtypes[n])
        bound = 3.01 * U32 * wide + info.eps / 2 * 1.01 * wide + info.smallest_normal * info.eps
        assert ((layer.weight.double() - (w + update[n])).abs() <= bound).all()
    assert model(x).dtype == x.dtype


@pytest.mark.parametrize("quantized", [True, False])
def test_the_merged_model_computes_what_the_adapter_computed(quantized: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 37))
    minilora.inject(minilora.quantize(model) if quantized else model, r=5)
    randomize(model)
    layer, adapter, x = model[0], adapters_of(model)["0"], torch.randn(11, 70)
    with minilora.disabled(model):
        base = model(x).double()
    before = model(x).double()
    update = adapter.scale * adapter.B.abs() @ adapter.A.abs()
    wide = (stored(layer.weight).abs() + update).double()
    magnitude = x.abs().double() @ wide.T + layer.bias.abs()

    after = minilora.merge(model)(x).double()
    # Each side is a sum of 70 products whose terms went through r + 4 more roundings: gamma_n = n u
    # to first order.
    bound = 2 * (70 + 5 + 4) * U32 * 1.01 * magnitude
    assert ((after - before).abs() <= bound).all()
    assert ((before - base).abs() > bound).any(), "the adapter does nothing: nothing is compared"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_merging_an_untrained_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    model = small_mlp().to(torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(24, 20, dtype=torch.float64))
    model.to(dtype)
    state = state_of(model)
    assert_same_state(minilora.merge(minilora.inject(model, r=4)), state)


def test_merge_into_nf4_refuses_to_lose_the_update() -> None:
    model = minilora.inject(small_mlp(quantized=True), r=4)
    # Far less than the gap between two levels.
    randomize_to(model, 1e-5)
    state, layers = state_of(model), list(model)
    worst = r"lose the update.*(up|block\.down) -?\d+\.\d%.*into='dense'"
    with pytest.raises(ValueError, match=worst):
        minilora.merge(model, into="nf4")
    assert_same_state(model, state)
    assert all(layer is was for layer, was in zip(model, layers, strict=True))
    assert list(adapted_layers(model)) == ["up", "block.down"]


def test_merge_into_nf4_reports_what_survives() -> None:
    model = randomize_to(minilora.inject(small_mlp(quantized=True), r=4), 3.0)
    expected = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"survives.* (up|block\.down) \d+\.\d%"):
        assert minilora.merge(model, into="nf4", min_survival=0.9) is model

    adapters = adapters_of(expected)
    for name, layer in adapted_layers(expected).items():
        new = model.get_submodule(name)
        assert type(new) is minilora.NF4Linear
        assert new.weight.absmax2 is not None

        # Half the widest gap between two levels of the codebook, times the block's largest value,
        # and 8-bit absmax on top.
        dense = layer.weight.dequantize() + adapters[name].delta()
        largest = dense.abs().max()
        assert (new.weight.dequantize() - dense).abs().max() < (0.152 + 0.05) * largest


def test_an_untrained_adapter_merges_into_nf4() -> None:
    model = minilora.inject(small_mlp(quantized=True), r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minilora.merge(model, into="nf4")
    assert type(model[0]) is minilora.NF4Linear


def test_running_out_of_memory_in_merge_leaves_every_layer_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = minilora.inject(small_mlp(), r=2), torch.randn(5, 20)
    torch.nn.init.normal_(adapters_of(model)["block.down"].B)
    expected = model(x)
    merged, left = merging.merged_weight, iter(range(1))

    def merge_one_layer(layer: minilora.LoRALinear) -> Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return merged(layer)

    monkeypatch.setattr(merging, "merged_weight", merge_one_layer)
    with pytest.raises(torch.OutOfMemoryError):
        minilora.merge(model)

    # A layer is merged or not, never half: 24 float32 products of values near ten, in another order
    # at most, and a norm.
    assert torch.allclose(model(x), expected, atol=1e-4)
