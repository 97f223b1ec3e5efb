"""The plot of how a training step's cost grows with length and batch, as SVG."""

import math
import sys
from collections.abc import Sequence

import side_by_side as bench

sys.path.insert(0, str(bench.ROOT / "docs"))

from sides import OURS, THEIRS
from svg import Picture

WIDTH, HEIGHT = 720, 360
STYLES = {OURS: "line-lora", THEIRS: "line-x"}
TOP, BOTTOM, LEFT, PANEL = 70, 300, 70, 270

Point = tuple[int, float]


def tokens_per_second(row: bench.Result, side: str) -> float:
    rate: float = row["case"]["batch"] * row["case"]["length"] / row["sides"][side]["seconds"]
    return rate


def series(rows: Sequence[bench.Result], side: str, axis: str) -> list[Point]:
    """(length, tokens per second) at batch 1, or (batch, tokens per second) at length 256."""
    fixed, value = ("batch", 1) if axis == "length" else ("length", 256)
    points = [
        (row["case"][axis], tokens_per_second(row, side))
        for row in rows
        if row["case"][fixed] == value
    ]
    return sorted(points)


def growth_plot(rows: Sequence[bench.Result]) -> Picture:
    """Two panels: tokens per second over length at batch 1, and over batch at length 256."""
    picture = Picture(WIDTH, HEIGHT, "How the speed of a training step changes with its size")
    every = [
        rate for axis in ("length", "batch") for s in STYLES for _, rate in series(rows, s, axis)
    ]
    top = nice_ceiling(max(every))
    for place, (axis, title) in enumerate(
        (("length", "tokens in a sequence, batch 1"), ("batch", "sequences of 256 tokens"))
    ):
        left = LEFT + place * (PANEL + 60)
        picture.text(left, 58, "tokens per second" if place == 0 else "", "small soft")
        picture.text(left + PANEL / 2, 338, title, "small", "middle")
        draw_axes(picture, left, top)
        ticks = [x for x, _ in series(rows, OURS, axis)]
        for index, x in enumerate(ticks):
            picture.text(at_x(left, index, len(ticks)), 318, str(x), "small soft", "middle")
        for side, style in STYLES.items():
            points = [
                (at_x(left, ticks.index(x), len(ticks)), at_y(rate, top))
                for x, rate in series(rows, side, axis)
                if x in ticks
            ]
            picture.line(points, style, 2.5)
            for x, y in points:
                picture.box(x - 3, y - 3, 6, 6, style.removeprefix("line-"), r=3)
    for place, (side, style) in enumerate(STYLES.items()):
        x = LEFT + 150 * place
        picture.line([(x, 26), (x + 24, 26)], style, 2.5)
        picture.text(x + 32, 30, side)
    return picture


def draw_axes(picture: Picture, left: float, top: float) -> None:
    """Five horizontal lines with their values, from zero."""
    for step in range(5):
        value = top * step / 4
        y = at_y(value, top)
        picture.line([(left, y), (left + PANEL, y)], "ink dash" if step else "ink", 0.6)
        picture.text(left - 8, y + 4, f"{value:g}", "small soft", "end")


def at_x(left: float, index: int, count: int) -> float:
    """Doublings are equally far apart."""
    return left + 20 + (PANEL - 40) * index / max(1, count - 1)


def at_y(value: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / top


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten, which four steps divide well."""
    power = 10 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 4, 5, 8, 10) if n * power >= value)
