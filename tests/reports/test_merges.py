"""The merge report: what it measures, as text and in a notebook."""

import copy
import math
import warnings

import pytest
import torch
from helpers import adapters_of
from markup import parse
from mlps import assert_same_state, randomize_to, small_mlp, state_of, stored
from torch import nn

import minilora
from minilora.targets import adapted_layers


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def test_a_notebook_shows_one_point_per_quantized_layer() -> None:
    dense = minilora.merge_report(minilora.inject(layers(), r=2))
    assert not list(parse(dense._repr_html_()).iter("circle"))

    quantized = minilora.merge_report(minilora.inject(minilora.quantize(layers()), r=2))
    assert len(list(parse(quantized._repr_html_()).iter("circle"))) == 2


@pytest.mark.parametrize("quantize", [True, False])
def test_layers_of_one_kind_share_a_row_and_a_dense_base_has_no_nf4_column(quantize: bool) -> None:
    model = minilora.quantize(layers()) if quantize else layers()
    text = str(minilora.merge_report(minilora.inject(model, r=2)))
    assert "None" not in text

    title, head, *rows = text.splitlines()
    assert title == "Fraction of the update kept by a merge (medians)"
    assert head.split("  ")[-1] == "nf4, worst"
    percentages = ["100.0%", "100.0%", "100.0%"] if quantize else ["100.0%"]
    assert [row.split() for row in rows] == [
        [name, "64", "x", "64", "1", "0.00%", *percentages] for name in ("0", "1")
    ]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0])
def test_a_merge_report_says_what_a_merge_then_keeps_and_changes_nothing(
    quantized: bool, size: float
) -> None:
    model = minilora.inject(small_mlp(quantized=quantized, dtype=torch.bfloat16), r=4)
    randomize_to(model, size)
    state = state_of(model)
    rows = minilora.merge_report(model).rows
    assert_same_state(model, state)
    assert [row.name for row in rows] == list(adapted_layers(model)) == ["up", "block.down"]

    merged = {"dense": minilora.merge(copy.deepcopy(model))}
    if quantized:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged["nf4"] = minilora.merge(copy.deepcopy(model), into="nf4", min_survival=-9)

    adapters = adapters_of(model)
    for row in rows:
        W = stored(model.get_submodule(row.name).weight).double()
        update = adapters[row.name].delta(torch.float64).detach()
        assert row.update == pytest.approx(float(update.norm() / W.norm()), rel=1e-5)
        assert (row.nf4 is None) is not quantized
        for kind, result in merged.items():
            moved = stored(result.get_submodule(row.name).weight).double() - W
            kept = float((moved * update).sum() / update.square().sum())
            assert getattr(row, kind) == pytest.approx(kept, rel=1e-4, abs=1e-4)


def test_a_merge_report_refuses_what_merge_refuses() -> None:
    with pytest.raises(ValueError, match="no adapter"):
        minilora.merge_report(small_mlp())
    model = randomize_to(minilora.inject(small_mlp(), r=4), math.nan)
    with pytest.raises(ValueError, match="up holds NaN"):
        minilora.merge_report(model)
