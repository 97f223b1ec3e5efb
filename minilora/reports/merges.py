"""The merge report: what fraction of each adapter's update a merge would keep."""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from minilora.merging import (
    dense_weight,
    layers_to_merge,
    merged_weight,
    requantized,
    survival,
    update_of,
)
from minilora.nf4 import NF4Weight
from minilora.reports.pictures import plot
from minilora.reports.tables import Table, group_layers


@dataclass(frozen=True)
class MergeRow:
    """One adapted layer, and the fraction of its update that each kind of merge would keep.

    Attributes:
        update: the update's size, |dW| / |W| (Frobenius norms).
        dense: fraction kept by a merge into the base's dtype.
        nf4: fraction kept by a merge into NF4; None where the base is dense.
    """

    name: str
    out_features: int
    in_features: int
    update: float
    dense: float
    nf4: float | None


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The result of `merge_report`. It prints as a table; a notebook adds one point per layer.

    Attributes:
        rows: the adapted layers. `nf4` is None where the base is dense.
    """

    rows: tuple[MergeRow, ...]

    def table(self) -> Table:
        """One row per name and size: the medians of its layers, and the worst layer."""
        head = ("layer", "out x in", "count", "|update| / |W|", "dense", "nf4", "nf4, worst")
        rows = [
            (*kind, f"{len(layers)}", *_medians(layers))
            for kind, layers in group_layers(self.rows).items()
        ]
        return Table("Fraction of the update kept by a merge (medians)", head, tuple(rows))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        points = [
            (100 * row.update, 100 * row.nf4)
            for row in self.rows
            if row.nf4 is not None and math.isfinite(row.update)
        ]
        if not points:
            return self.table().html()

        x, y = zip(*points, strict=True)
        picture = plot(x, y, "size of the update, % of W", "kept in NF4, %", line=False)
        return self.table().html(picture)


def _medians(layers: list[MergeRow]) -> tuple[str, str, str, str]:
    update = median(row.update for row in layers)
    dense = median(row.dense for row in layers)
    nf4 = [row.nf4 for row in layers if row.nf4 is not None]
    if not nf4:
        return f"{update:.2%}", f"{dense:.1%}", "", ""
    return f"{update:.2%}", f"{dense:.1%}", f"{median(nf4):.1%}", f"{min(nf4):.1%}"


@torch.no_grad()
def merge_report(model: nn.Module) -> MergeReport:
    r"""Returns, layer by layer, what fraction of the adapters' updates `merge` would keep.

    The sum W + s B A, s = alpha / r, is rounded: to the base's dtype ("dense"), or to NF4 again
    ("nf4"). With W' the rounded weight, the fraction kept is measured along the update,

        <W' - W, s B A> / |s B A|^2,

    which is 1 if W' - W is the update and 0 if the rounding undid it. The model is not changed.

    Args:
        model: an injected model.

    Raises:
        ValueError: the model has no adapter; an adapter holds NaN or infinity.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
        >>> model = minilora.inject(minilora.quantize(model), r=4)
        >>> _ = torch.nn.init.normal_(model[0].adapters["default"].B, std=1e-3)
        >>> row = minilora.merge_report(model).rows[0]
        >>> row.dense > 0.99, row.nf4 < 0.5
        (True, True)
    """
    layers = layers_to_merge(model)
    return MergeReport(tuple(_measure(name, layer) for name, layer in layers.items()))


def _measure(name: str, layer: Any) -> MergeRow:
    old, wide = layer.weight, merged_weight(layer)
    base, update = dense_weight(old), update_of(layer)
    quantized = isinstance(old, NF4Weight)
    return MergeRow(
        name,
        layer.out_features,
        layer.in_features,
        update=float(update.norm() / base.norm()),
        dense=survival(wide.to(old.dtype), base, update),
        nf4=survival(requantized(wide, old), base, update) if quantized else None,
    )
