"""A table as text, as HTML for a notebook, and as Markdown for a report.

Jupyter asks an object for `_repr_html_`. `Plan`, `MergeReport` and `Result` answer with a `Table`
and a picture (see pictures.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol, TypeVar


@dataclass(frozen=True)
class Table:
    """A title, a head, rows of text, and lines below.

    The first column is aligned to the left, the others to the right.

    Example:
        >>> rows = (("up", "8 x 4"), ("down", "4 x 8"))
        >>> print(Table("two layers", ("layer", "size"), rows, below=("no bias",)))
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
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = [_aligned(row, widths) for row in grid]
        indented = [f"  {line}".rstrip() for line in (*lines, *self.below)]
        return "\n".join([self.title, *indented])

    def html(self, picture: str = "") -> str:
        """Returns the table for a notebook, with a picture below it."""
        head = _html_row("th", self.head)
        body = "".join(_html_row("td", row) for row in self.rows)
        below = "".join(f"<div>{escape(line)}</div>" for line in self.below)

        title = f"<p><b>{escape(self.title)}</b></p>"
        table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
        return f"<div>{title}{table}{below}{picture}</div>"

    def markdown(self) -> str:
        """Returns the head and the rows as a table of Markdown, without title and lines below."""
        rule = "|---" + "|---:" * (len(self.head) - 1) + "|"
        return "\n".join([_markdown_row(self.head), rule, *map(_markdown_row, self.rows)])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    cells[0] = row[0].ljust(widths[0])
    return "  ".join(cells)


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    shown = []
    for i, cell in enumerate(cells):
        side = "left" if i == 0 else "right"
        style = f"text-align:{side};padding:2px 10px"
        shown.append(f'<{tag} style="{style}">{escape(cell)}</{tag}>')
    return f"<tr>{''.join(shown)}</tr>"


class LayerRow(Protocol):
    """What the rows of a plan and of a merge report have in common."""

    @property
    def name(self) -> str: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...


L = TypeVar("L", bound=LayerRow)


def group_layers(layers: Iterable[L]) -> dict[tuple[str, str], list[L]]:
    """Groups layers by (last part of the name, size "out x in").

    A deep model has many layers of one kind; a table shows each kind in one row.
    """
    groups: dict[tuple[str, str], list[L]] = {}
    for layer in layers:
        short = layer.name.rpartition(".")[2]
        size = f"{layer.out_features} x {layer.in_features}"
        groups.setdefault((short, size), []).append(layer)
    return groups
