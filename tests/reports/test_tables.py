"""What results show of themselves: text that stands in columns, HTML that is well formed, pictures whose geometry is the data."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora
from minilora.reports.runs import Result, Step
from minilora.reports.tables import HEIGHT, WIDTH, Table, plot, stack

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda v: round(v, 3))


def parse(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.sub(r' xmlns="[^"]+"', "", html))


def result(losses: list[float], before: float | None = None, after: float | None = None) -> Result:
    steps = [Step(i + 1, loss, 1e-3, 1.0, 10, 50, 0.5) for i, loss in enumerate(losses)]
    return Result(nn.Identity(), None, Path("run"), before, after, steps)


def test_a_table_stands_in_columns_and_its_html_holds_the_same_cells_escaped() -> None:
    table = Table(
        "a < b", ("layer", "n"), (("<up>", "1"), ("down & out", "10,000")), ("left out: x",)
    )
    assert str(table).splitlines() == [
        "a < b",
        "  layer            n",
        "  <up>             1",
        "  down & out  10,000",
        "  left out: x",
    ]
    tree = parse(table.html())
    assert [[cell.text for cell in row] for row in tree.iter("tr")] == [
        ["layer", "n"],
        ["<up>", "1"],
        ["down & out", "10,000"],
    ]
    assert [cell.get("style") for cell in tree.iter("td")] == [
        f"text-align:{side};padding:2px 10px" for side in ("left", "right")
    ] * 2


def test_the_bar_of_a_plan_is_divided_as_its_bytes_are() -> None:
    plan = minilora.plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), r=4)
    bars = [r for r in parse(plan._repr_html_()).iter("rect") if r.get("height") == "22"]
    held = [n for n in plan.bytes.values() if n]
    assert [float(bar.get("width", "")) for bar in bars] == pytest.approx(
        [WIDTH * n / plan.total_bytes for n in held], abs=0.05
    )
    assert float(bars[-1].get("x", "")) + float(bars[-1].get("width", "")) == pytest.approx(
        WIDTH, abs=0.2
    )
    assert repr(plan) == str(plan) and "Row(" not in repr(plan)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30),
    st.lists(NUMBERS, max_size=2),
    st.booleans(),
)
def test_a_plot_holds_every_point_inside_its_frame_in_the_right_order(
    points: list[tuple[float, float]], levels: list[float], line: bool
) -> None:
    x, y = zip(*points, strict=True)
    tree = parse(
        plot(x, y, "step", "loss", line=line, levels={str(i): v for i, v in enumerate(levels)})
    )
    if line:
        drawn = [
            tuple(map(float, p.split(","))) for p in tree.find("polyline").get("points").split()
        ]  # type: ignore[union-attr]
    else:
        drawn = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in tree.iter("circle")]
    assert len(drawn) == len(points)
    assert all(0 <= a <= WIDTH and 0 <= b <= HEIGHT for a, b in drawn)
    for (a, b), ((xa, ya), (xb, yb)) in zip(pairwise(points), pairwise(drawn), strict=True):
        assert (b[0] - a[0]) * (xb - xa) >= 0 and (b[1] - a[1]) * (
            yb - ya
        ) <= 0  # pixels count downwards
    numbers = [t.text for t in tree.iter("text")]
    assert (
        "step" in numbers and "loss" in numbers and len(numbers) >= 4
    )  # each axis has a tick at least


def test_a_plot_is_to_scale() -> None:
    tree = parse(plot([0, 1, 4], [10.0, 20.0, 15.0], "x", "y", line=True))
    (xa, ya), (xb, yb), (xc, yc) = (
        tuple(map(float, p.split(","))) for p in tree.find("polyline").get("points").split()
    )  # type: ignore[union-attr]
    assert (xc - xa) / (xb - xa) == pytest.approx(4, rel=1e-2)
    assert (ya - yc) / (ya - yb) == pytest.approx(0.5, rel=1e-2)


def test_a_stack_of_one_part_fills_the_width() -> None:
    assert parse(stack({"all": 3}, {"all": "3 B"})).find("rect").get("width") == f"{WIDTH:.1f}"  # type: ignore[union-attr]


def test_a_result_says_its_losses_and_draws_each_step() -> None:
    shown = result([4.0, 3.5, 3.0], 3.9, 2.75)
    assert str(shown).splitlines() == [
        "3 steps, 100 tokens/s; adapter in run/",
        "  nats a learned token  at first  at last",
        "  training                 4.000    3.000",
        "  held out                 3.900    2.750",
    ]
    tree = parse(shown._repr_html_())
    assert len(tree.find(".//polyline").get("points").split()) == 3  # type: ignore[union-attr]
    assert {"held out, before 3.9", "held out, after 2.75"} <= {t.text for t in tree.iter("text")}
    assert "held out" not in str(result([1.0])) and parse(result([1.0])._repr_html_()) is not None


def kinds(html: str) -> dict[str, Any]:
    return {tag: len(list(parse(html).iter(tag))) for tag in ("circle", "td")}


def test_a_merge_report_draws_each_layer_of_a_quantized_model_and_none_of_a_dense_one() -> None:
    dense = minilora.inject(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), r=2)
    report = minilora.merge_report(dense)
    assert kinds(report._repr_html_())["circle"] == 0 and "None" not in str(report)
    quantized = minilora.inject(
        minilora.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), r=2
    )
    assert kinds(minilora.merge_report(quantized)._repr_html_())["circle"] == 2
