"""Pictures: well-formed SVG whose geometry is the data."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markup import parse

from minilora.reports.pictures import HEIGHT, WIDTH, plot, stacked_bar

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda v: round(v, 3))


def polyline(tree: Any) -> list[tuple[float, float]]:
    """The points of the only line in a picture."""
    pairs = [point.split(",") for point in tree.find(".//polyline").get("points").split()]
    return [(float(x), float(y)) for x, y in pairs]


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30),
    st.lists(NUMBERS, max_size=2),
    st.booleans(),
)
def test_a_plot_holds_every_point_inside_its_frame_in_the_right_order(
    points: list[tuple[float, float]], levels: list[float], line: bool
) -> None:
    x, y = zip(*points, strict=True)
    named_levels = {str(i): level for i, level in enumerate(levels)}
    tree = parse(plot(x, y, "step", "loss", line=line, levels=named_levels))

    circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in tree.iter("circle")]
    drawn = polyline(tree) if line else circles
    assert len(drawn) == len(points)
    assert all(0 <= a <= WIDTH and 0 <= b <= HEIGHT for a, b in drawn)

    # Pixels count downwards.
    for (a, b), ((xa, ya), (xb, yb)) in zip(pairwise(points), pairwise(drawn), strict=True):
        assert (b[0] - a[0]) * (xb - xa) >= 0
        assert (b[1] - a[1]) * (yb - ya) <= 0

    # Both names, and at least one tick on each axis.
    texts = [t.text for t in tree.iter("text")]
    assert "step" in texts and "loss" in texts and len(texts) >= 4


def test_a_plot_is_to_scale() -> None:
    tree = parse(plot([0, 1, 4], [10.0, 20.0, 15.0], "x", "y", line=True))
    (xa, ya), (xb, yb), (xc, yc) = polyline(tree)
    assert (xc - xa) / (xb - xa) == pytest.approx(4, rel=1e-2)
    assert (ya - yc) / (ya - yb) == pytest.approx(0.5, rel=1e-2)


def test_a_bar_of_one_part_fills_the_width() -> None:
    (rectangle, _) = parse(stacked_bar({"all": 3}, {"all": "3 B"})).iter("rect")
    assert rectangle.get("width") == f"{WIDTH:.1f}"


def test_a_bar_is_divided_in_proportion_and_its_legend_names_the_parts() -> None:
    tree = parse(stacked_bar({"one": 1, "three": 3}, {"one": "1 B", "three": "3 B"}))
    parts = [r for r in tree.iter("rect") if r.get("height") == "22"]
    assert [float(part.get("width", "")) for part in parts] == [WIDTH / 4, 3 * WIDTH / 4]
    assert [float(part.get("x", "")) for part in parts] == [0, WIDTH / 4]
    assert [t.text for t in tree.iter("text")] == ["one 1 B", "three 3 B"]
