"""`NF4Linear.weight` keeps views of the layer's memory, and notices when that is another one."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import gaussian
from torch import nn

import minilora
from minilora import NF4Linear
from minilora.layers import become
from minilora.nf4 import PARTS


def layer_of(seed: int) -> NF4Linear:
    linear = nn.Linear(64, 32)
    linear.weight = nn.Parameter(gaussian(32, 64, seed=seed))
    linear.bias = nn.Parameter(torch.zeros(32))
    return NF4Linear.from_linear(linear)


def changes() -> dict[str, Callable[[NF4Linear, NF4Linear], object]]:
    """Ways in which a layer comes by the weight of another one."""

    def data(layer: NF4Linear, other: NF4Linear) -> None:
        for name in PARTS:
            getattr(layer, name).data = getattr(other, name).data

    def parameters(layer: NF4Linear, other: NF4Linear) -> None:
        for name in PARTS:
            setattr(layer, name, getattr(other, name))

    def values(layer: NF4Linear, other: NF4Linear) -> None:
        for name in PARTS:
            getattr(layer, name).data.copy_(getattr(other, name).data)

    def one_part(layer: NF4Linear, other: NF4Linear) -> None:
        values(layer, other)
        layer.offset = nn.Parameter(other.offset.clone(), requires_grad=False)

    return {
        "state dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
        "data": data,
        "parameters": parameters,
        "values": values,
        "one part": one_part,
        "become": lambda layer, other: become(layer, copy.deepcopy(other)),
    }


@pytest.mark.parametrize("change", changes())
def test_a_layer_computes_with_the_weight_that_it_has_now(change: str) -> None:
    layer, other = layer_of(0), layer_of(1)
    x = gaussian(3, 64)
    with torch.no_grad():
        layer(x)
        changes()[change](layer, other)
        assert torch.equal(layer(x), other(x))
        assert torch.equal(layer.weight.dequantize(), other.weight.dequantize())


def test_copies_and_pickles_do_not_hold_the_views() -> None:
    layer = layer_of(0)
    fresh = len(pickle.dumps(layer))
    layer(gaussian(1, 64))
    assert len(pickle.dumps(layer)) == fresh

    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.absmax2.zero_()
        layer.offset.zero_()
    assert twin.weight.dequantize().any() and not layer.weight.dequantize().any()


def test_a_merged_layer_frees_the_packed_memory() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    minilora.quantize(model, "0")
    minilora.inject(model, 2, targets="0")
    model(gaussian(1, 64))
    packed = weakref.ref(model[0].packed.untyped_storage())
    minilora.merge(model)
    gc.collect()
    assert packed() is None
