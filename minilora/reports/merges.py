"""The merge report: how much of each adapter's update a merge would keep."""

import math
from dataclasses import dataclass
from statistics import median

from torch import nn

from minilora.merging import MergeRow, measure_merge
from minilora.reports.tables import Table, alike, plot


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What `merge_report` found. It prints as a table; in a notebook each layer is a point in a picture below it.

    Attributes:
        rows: the adapted layers. `nf4` is None where the base is dense.
    """

    rows: tuple[MergeRow, ...]

    def table(self) -> Table:
        """The layers, those of one name and size in one row: medians, and the worst."""
        rows = []
        for kind, layers in alike(self.rows).items():
            kept = [row.nf4 for row in layers if row.nf4 is not None]
            nf4 = (f"{median(kept):.1%}", f"{min(kept):.1%}") if kept else ("", "")
            sizes = (
                f"{median(row.update for row in layers):.2%}",
                f"{median(row.dense for row in layers):.1%}",
            )
            rows.append((*kind, f"{len(layers)}", *sizes, *nf4))
        title = "What a merge keeps of the updates (medians)"
        return Table(
            title,
            ("layer", "out x in", "count", "update / W", "into dense", "into nf4", "at worst"),
            tuple(rows),
        )

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        points = [
            (100 * r.update, 100 * r.nf4)
            for r in self.rows
            if r.nf4 is not None and math.isfinite(r.update)
        ]
        if not points:
            return self.table().html()
        x, y = zip(*points, strict=True)
        return self.table().html(
            plot(x, y, "size of the update, % of W", "kept by a merge into NF4, %", line=False)
        )


def merge_report(model: nn.Module) -> MergeReport:
    r"""Returns, layer by layer, what `merge` would keep of the adapters' updates. Changes nothing.

    The sum W + s B A, s = alpha / r, is rounded: to the base's dtype ("dense"), or to NF4 again. What is kept is measured along
    the update, <W' - W, s B A> / |s B A|^2: 1 if W' - W is the update, 0 if the rounding undid it.

    Args:
        model: an injected model.

    Raises:
        ValueError: there is no adapter; an adapter holds NaN or infinity.

    Example:
        >>> model = minilora.inject(minilora.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))), r=4)
        >>> _ = torch.nn.init.normal_(model[0].lora_B, std=1e-3)
        >>> row = minilora.merge_report(model).rows[0]
        >>> row.dense > 0.99, row.nf4 < 0.5
        (True, True)
    """
    return MergeReport(measure_merge(model))
