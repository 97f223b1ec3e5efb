"""Charts in the look of the documentation's other pictures: points of every seed, lines of means.

draw("title", [Panel("rank", "loss", {"LoRA": [(1, [0.9, 1.1]), (16, [0.3, 0.2])]})])
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from svg import COLOURS, Picture

WIDE, TALL = 720, 330
TOP, BOTTOM, LEFT, GAP = 74, 262, 62, 74
KINDS = ("x", "lora", "code", "grad", "w")

# (x, values of the seeds)
Points = Sequence[tuple[float, Sequence[float]]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        x_label, y_label: what the axes show.
        series: name -> points, each with the values of all seeds.
        log_x, log_y: whether equal factors are equally far apart.
        names: of the ticks on the x axis, by x; None: the values of x.
        ticks: where they are; None: at every x.
        joined: whether the means of a series are joined by a line.
        top: where the y axis ends, so that two panels can have the same; None: above all values.
    """

    x_label: str
    y_label: str
    series: Mapping[str, Points]
    log_x: bool = False
    log_y: bool = False
    names: Mapping[float, str] | None = None
    ticks: Sequence[float] | None = None
    joined: bool = True
    top: float | None = None


@dataclass(frozen=True)
class Axis:
    """Maps values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        scale = math.log10 if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)


def draw(title: str, panels: Sequence[Panel]) -> Picture:
    """Panels side by side; a series has the same color in all of them."""
    picture = Picture(WIDE, TALL, title)
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    kinds = dict(zip(names, KINDS, strict=False))
    if len(kinds) < len(names):
        raise ValueError(f"{len(names)} series, and colors for {len(KINDS)}")

    legend(picture, kinds)
    width = (WIDE - 24 - LEFT - GAP * (len(panels) - 1)) / len(panels)
    for place, panel in enumerate(panels):
        draw_panel(picture, panel, LEFT + place * (width + GAP), width, kinds)
    return picture


def legend(picture: Picture, kinds: Mapping[str, str]) -> None:
    x = float(LEFT)
    for name, kind in kinds.items():
        dot(picture, x + 5, 26, kind)
        picture.text(x + 16, 30, name)
        x += 34 + 7.2 * len(name)


def draw_panel(
    picture: Picture, panel: Panel, left: float, width: float, kinds: Mapping[str, str]
) -> None:
    xs = sorted({x for points in panel.series.values() for x, _ in points})
    ys = [y for points in panel.series.values() for _, values in points for y in values]
    # Names are wider than numbers.
    margin = 22 if panel.names is None else width / (2 * len(xs))
    across = x_axis(xs, panel.log_x, left + margin, left + width - margin)
    up = y_axis(ys if panel.top is None else [*ys, panel.top], panel.log_y)

    picture.text(left - 44, 58, panel.y_label, "small soft")
    for value in y_ticks(up):
        y = up.at(value)
        picture.line([(left, y), (left + width, y)], "ink dash", 0.5)
        picture.text(left - 7, y + 4, f"{value:g}", "small soft", "end")
    picture.line([(left, BOTTOM), (left + width, BOTTOM)], "ink", 1)
    for x in panel.ticks or xs:
        name = f"{x:,g}" if panel.names is None else panel.names.get(x, "")
        picture.text(across.at(x), BOTTOM + 19, name, "small soft", "middle")
    picture.text(left + width / 2, BOTTOM + 44, panel.x_label, "small", "middle")

    for name, points in panel.series.items():
        if panel.joined and len(points) > 1:
            line = [(across.at(x), up.at(mean(values))) for x, values in sorted(points)]
            picture.line(line, f"line-{kinds[name]}", 2)
        for x, values in points:
            for value in values:
                dot(picture, across.at(x), up.at(value), kinds[name])


def x_axis(xs: Sequence[float], log: bool, start: float, end: float) -> Axis:
    """From the first to the last x; a single one is in the middle."""
    first, last = xs[0], xs[-1]
    if first == last:
        first, last = (first / 2, last * 2) if log else (first - 1, last + 1)
    return Axis(first, last, start, end, log)


def y_axis(ys: Sequence[float], log: bool) -> Axis:
    """From zero, or from the next lower power of ten."""
    if log:
        low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
        return Axis(low, max(high, 10 * low), BOTTOM, TOP, True)
    return Axis(0, nice_ceiling(max(ys)), BOTTOM, TOP, False)


def y_ticks(axis: Axis) -> list[float]:
    if not axis.log:
        return [axis.high * step / 4 for step in range(5)]
    first, last = round(math.log10(axis.low)), round(math.log10(axis.high))
    return [10.0**n for n in range(first, last + 1)]


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten, which four steps divide well."""
    power = 10 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if n * power >= value)


def dot(picture: Picture, x: float, y: float, kind: str) -> None:
    assert kind in COLOURS
    picture.box(x - 3.5, y - 3.5, 7, 7, kind, r=3.5)
