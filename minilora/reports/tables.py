"""How a result shows itself: a table as text, and in a notebook as HTML with a picture (SVG, inline, nothing to load).

Jupyter asks an object for `_repr_html_`. `Plan`, `MergeReport` and `Result` answer with what is here. Lines and text take the
page's own colour, so they can be read on a light page and on a dark one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol, TypeVar

WIDTH, HEIGHT = 560, 200  # of a picture, in pixels
COLOURS = ("#3b7dd8", "#8a8f98", "#e08a2e", "#3fa66b", "#b05cc4")


@dataclass(frozen=True)
class Table:
    """A title, rows of text under a head (the first column stands left, the others right), and lines below.

    Example:
        >>> print(Table("two layers", ("layer", "size"), (("up", "8 x 4"), ("down", "4 x 8")), ("no bias",)))
        two layers
          layer   size
          up     8 x 4
          down   4 x 8
          no bias
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    below: tuple[str, ...] = ()

    def __str__(self) -> str:
        grid = (self.head, *self.rows)
        first, *others = (max(map(len, column)) for column in zip(*grid, strict=True))
        lines = [
            "  ".join(
                [
                    row[0].ljust(first),
                    *(cell.rjust(n) for cell, n in zip(row[1:], others, strict=True)),
                ]
            )
            for row in grid
        ]
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in (*lines, *self.below))])

    def html(self, picture: str = "") -> str:
        """The table for a notebook; `picture` goes below it."""
        below = "".join(f"<div>{escape(line)}</div>" for line in self.below)
        rows = "".join(_row("td", row) for row in self.rows)
        table = f"<table><thead>{_row('th', self.head)}</thead><tbody>{rows}</tbody></table>"
        return f"<div><p><b>{escape(self.title)}</b></p>{table}{below}{picture}</div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    sides = ("left", *["right"] * (len(cells) - 1))
    shown = (
        f'<{tag} style="text-align:{side};padding:2px 10px">{escape(cell)}</{tag}>'
        for side, cell in zip(sides, cells, strict=True)
    )
    return f"<tr>{''.join(shown)}</tr>"


class Layer(Protocol):
    """What the rows of a plan and of a merge report have in common."""

    @property
    def name(self) -> str: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...


L = TypeVar("L", bound=Layer)


def alike(layers: Iterable[L]) -> dict[tuple[str, str], list[L]]:
    """The layers by (last part of the name, size "out x in"): a deep model has many of one kind, which make one row of a table."""
    groups: dict[tuple[str, str], list[L]] = {}
    for layer in layers:
        kind = layer.name.rpartition(".")[2], f"{layer.out_features} x {layer.in_features}"
        groups.setdefault(kind, []).append(layer)
    return groups


def stack(parts: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """One bar, divided in the proportions of `parts`, with a legend of names and labels."""
    total, left, drawn = sum(parts.values()), 0.0, []
    for i, (name, part) in enumerate(parts.items()):
        width, colour, x, y = (
            WIDTH * part / total,
            COLOURS[i % len(COLOURS)],
            185 * (i % 3),
            44 + 20 * (i // 3),
        )
        drawn.append(
            f'<rect x="{left:.1f}" y="4" width="{width:.1f}" height="22" fill="{colour}"/>'
        )
        drawn.append(f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{colour}"/>')
        drawn.append(_text(x + 15, y, f"{name} {labels[name]}"))
        left += width
    return _svg("".join(drawn), 34 + 20 * math.ceil(len(parts) / 3))


def plot(
    x: Sequence[float],
    y: Sequence[float],
    x_name: str,
    y_name: str,
    *,
    line: bool,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Points, or a line through them, and a dashed line with its name at each of `levels`."""
    levels = levels or {}
    left, right, top, bottom = 46, WIDTH - (150 if levels else 12), 22, HEIGHT - 36
    heights = (*y, *levels.values())
    x_low, x_high, y_low, y_high = min(x), max(x), min(heights), max(heights)
    x_ticks, y_ticks = _ticks(x_low, x_high), _ticks(y_low, y_high)

    def at(a: float, b: float) -> tuple[float, float]:
        across, up = (a - x_low) / (x_high - x_low or 1), (b - y_low) / (y_high - y_low or 1)
        return left + across * (right - left), bottom - up * (bottom - top)

    drawn = [_text(0, 11, y_name), _text((left + right) / 2, HEIGHT - 4, x_name, "middle")]
    for tick in x_ticks:
        drawn.append(_text(at(tick, 0)[0], bottom + 15, f"{tick:g}", "middle"))
    for tick in y_ticks:
        height = at(0, tick)[1]
        drawn.append(_text(left - 6, height + 4, f"{tick:g}", "end"))
        drawn.append(
            f'<path d="M{left} {height:.1f}H{right}" stroke="currentColor" stroke-opacity="0.15"/>'
        )
    points = [at(a, b) for a, b in zip(x, y, strict=True)]
    if line:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[0]}" stroke-width="1.5"/>'
        )
    else:
        drawn += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{COLOURS[0]}" fill-opacity="0.6"/>'
            for a, b in points
        ]
    for i, (name, level) in enumerate(levels.items()):
        height, colour = at(0, level)[1], COLOURS[(i + 2) % len(COLOURS)]
        drawn.append(
            f'<path d="M{left} {height:.1f}H{right}" stroke="{colour}" stroke-dasharray="5 3"/>'
        )
        drawn.append(_text(right + 6, height + 4, f"{name} {level:.3g}"))
    return _svg("".join(drawn), HEIGHT)


def _ticks(low: float, high: float) -> list[float]:
    """Some four round numbers between low and high."""
    size = 10 ** math.floor(math.log10((high - low) / 4 or 1))
    step = next(size * m for m in (1, 2, 5, 10) if (high - low) / (size * m) <= 5)
    return [
        round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)
    ] or [low]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'


def _svg(inside: str, height: int) -> str:
    style = (
        'style="max-width:100%;height:auto;margin-top:12px" font-family="sans-serif" font-size="12"'
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" {style}>{inside}</svg>'
