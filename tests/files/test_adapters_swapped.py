"""Adapters in the place of others, of another rank or none; on a model without values."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from adapter_files import adapters_of
from helpers import same_bits, snapshot
from torch import Tensor, nn
from two_blocks import Model, make, output, trained

import minilora

# What save_adapter says of whole parameters and patterns is tested in test_peft_limits.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rank:UserWarning"),
]


def test_an_adapter_of_another_rank_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    kept: dict[int, Tensor] = {}
    for r in (2, 3):
        model = trained(minilora.inject(make(), r=r, targets=["up", "head"], lora_bias=r == 3))
        minilora.save_adapter(model, tmp_path / str(r))
        kept[r] = output(model)

    model = minilora.load_adapter(make(), tmp_path / "2").train()
    for r in (3, 2, 2, 3):
        minilora.load_adapter(model, tmp_path / str(r))
        assert same_bits(output(model), kept[r])
        adapters = adapters_of(model).values()
        assert all(a.r == r and a.A.requires_grad for a in adapters)
    assert same_bits(output(minilora.eject(model)), output(make()))

    # An adapter that is not active is swapped as well, and stays so.
    both = minilora.load_adapter(
        minilora.load_adapter(make(), tmp_path / "2", "a"), tmp_path / "2", "b"
    )
    minilora.load_adapter(both, tmp_path / "3", "a")
    assert same_bits(output(both), kept[2])
    assert not any(p.requires_grad for a in adapters_of(both, "a").values() for p in a.parameters())
    assert same_bits(output(minilora.use(both, "a")), kept[3])


@pytest.mark.parametrize("already", [(), ("norm",)], ids=["new", "replaced"])
@pytest.mark.parametrize("how", ["use", "disabled"])
def test_whole_parameters_of_an_inactive_adapter_stay_out_of_the_base(
    how: str, already: tuple[str, ...], tmp_path: Path
) -> None:
    saved = trained(minilora.inject(make(), r=2, targets=["up"], train_also=["norm"]))
    path = minilora.save_adapter(saved, tmp_path)

    model = minilora.inject(make(), r=2, targets=["up"], train_also=already)
    base, norm = output(make()), make().norm
    inactive = minilora.disabled(model) if how == "disabled" else nullcontext(minilora.use(model))
    with inactive:
        minilora.load_adapter(model, path)
        assert same_bits(output(model), base)
        assert same_bits(model.norm.weight, norm.weight) and not model.norm.weight.requires_grad
    if how == "use":
        minilora.use(model, "default")
    assert same_bits(output(model), output(saved)) and model.norm.weight.requires_grad
    assert same_bits(output(minilora.eject(model)), base)


def test_a_model_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    model = trained(minilora.inject(make(), r=2, train_also=["head"], targets=["up"]))
    path = minilora.save_adapter(model, tmp_path)
    with torch.device("meta"):
        empty = Model()
    before = snapshot(empty)
    with pytest.raises(
        ValueError, match=r"model.layers.0.up is on the meta device .*load the model first"
    ):
        minilora.load_adapter(empty, path)
    assert snapshot(empty) == before


def test_b_of_zero_is_no_adapter_unless_something_else_was_trained(tmp_path: Path) -> None:
    untouched = minilora.inject(make(), r=2, targets=["up"], train_also=["norm"])
    with pytest.raises(ValueError, match=r"every B in .* is zero: the adapter changes nothing"):
        minilora.load_adapter(make(), minilora.save_adapter(untouched, tmp_path))

    model = minilora.inject(make(), r=2, targets=["up"], train_also=["norm"])
    nn.init.normal_(model.norm.weight)
    assert same_bits(
        output(minilora.load_adapter(make(), minilora.save_adapter(model, tmp_path))), output(model)
    )

    model = minilora.inject(make(), r=2, targets=["up"], lora_bias=True)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.bias)
    assert same_bits(
        output(minilora.load_adapter(make(), minilora.save_adapter(model, tmp_path))), output(model)
    )
