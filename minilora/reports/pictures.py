"""Pictures for a notebook: inline SVG, with nothing to load.

Lines and text take the page's own color, so they are legible on a light page and on a dark one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Of a picture, in pixels.
WIDTH, HEIGHT = 560, 200

COLORS = ("#3b7dd8", "#8a8f98", "#e08a2e", "#3fa66b", "#b05cc4")


def stacked_bar(parts: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Returns one bar divided in the proportions of `parts`, with a legend of names and labels."""
    total = sum(parts.values())
    start = 0.0
    drawn = []

    for i, (name, part) in enumerate(parts.items()):
        color = COLORS[i % len(COLORS)]
        width = WIDTH * part / total
        drawn.append(_rectangle(start, 4, width, 22, color))
        start += width

        # The legend: three entries per line.
        line, column = divmod(i, 3)
        x, y = 185 * column, 44 + 20 * line
        drawn.append(_rectangle(x, y - 10, 10, 10, color))
        drawn.append(_text(x + 15, y, f"{name} {labels[name]}"))

    lines = math.ceil(len(parts) / 3)
    return _svg(drawn, height=34 + 20 * lines)


def plot(
    x: Sequence[float],
    y: Sequence[float],
    x_name: str,
    y_name: str,
    *,
    line: bool,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Returns a plot of y over x.

    Args:
        x, y: the points.
        x_name, y_name: what the axes are labelled with.
        line: draw a line through the points instead of the points.
        levels: name -> height of a dashed horizontal line with the name beside it.
    """
    levels = levels or {}
    heights = (*y, *levels.values())
    frame = _Frame(
        x_low=min(x),
        x_high=max(x),
        y_low=min(heights),
        y_high=max(heights),
        # Leaves space for the names of the levels.
        right=WIDTH - (150 if levels else 12),
    )

    across, up = map(frame.x, x), map(frame.y, y)
    points = list(zip(across, up, strict=True))

    drawn = _axes(frame, x_name, y_name)
    if line:
        drawn.append(_line_through(points))
    else:
        drawn += [_dot(*point) for point in points]

    for i, (name, level) in enumerate(levels.items()):
        height = frame.y(level)
        color = COLORS[(i + 2) % len(COLORS)]
        drawn.append(_horizontal(frame, height, f'stroke="{color}" stroke-dasharray="5 3"'))
        drawn.append(_text(frame.right + 6, height + 4, f"{name} {level:.3g}"))

    return _svg(drawn, HEIGHT)


@dataclass(frozen=True)
class _Frame:
    """Where the data's coordinates are in the picture. Pixels count downwards."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    right: int
    left: int = 46
    top: int = 22
    bottom: int = HEIGHT - 36

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low or 1)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low or 1)
        return self.bottom - share * (self.bottom - self.top)


def _axes(frame: _Frame, x_name: str, y_name: str) -> list[str]:
    """The names of the axes, their ticks, and a faint line at each tick of y."""
    middle = (frame.left + frame.right) / 2
    drawn = [_text(0, 11, y_name)]
    drawn.append(_text(middle, HEIGHT - 4, x_name, "middle"))

    for tick in _ticks(frame.x_low, frame.x_high):
        drawn.append(_text(frame.x(tick), frame.bottom + 15, f"{tick:g}", "middle"))

    for tick in _ticks(frame.y_low, frame.y_high):
        height = frame.y(tick)
        drawn.append(_text(frame.left - 6, height + 4, f"{tick:g}", "end"))
        drawn.append(_horizontal(frame, height, 'stroke="currentColor" stroke-opacity="0.15"'))

    return drawn


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers between low and high."""
    magnitude = 10 ** math.floor(math.log10((high - low) / 4 or 1))
    steps = [magnitude * factor for factor in (1, 2, 5, 10)]
    step = next(step for step in steps if (high - low) / step <= 5)

    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def _line_through(points: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{COLORS[0]}" stroke-width="1.5"/>'


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLORS[0]}" fill-opacity="0.6"/>'


def _horizontal(frame: _Frame, height: float, stroke: str) -> str:
    return f'<path d="M{frame.left} {height:.1f}H{frame.right}" {stroke}/>'


def _rectangle(x: float, y: float, width: float, height: float, color: str) -> str:
    place = f'x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{height:.0f}"'
    return f'<rect {place} fill="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="currentColor">{escape(text)}</text>'


def _svg(drawn: Sequence[str], height: int) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
    style = 'style="max-width:100%;height:auto;margin-top:12px"'
    font = 'font-family="sans-serif" font-size="12"'
    inside = "".join(drawn)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style} {font}>{inside}</svg>'
