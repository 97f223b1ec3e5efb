"""A few functions that write SVG: boxes, lines and text that read well on a light or dark page."""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

# The smallest text, in px of a picture 720 wide; the page shows it 700 wide, where it has 11.7 px.
SMALLEST = 12

# Fills are translucent: light on white paper, dark on dark paper. The ink changes with the paper.
COLOURS = {
    "x": "#3b82c4",
    "w": "#8a939c",
    "lora": "#d98a3d",
    "grad": "#9a6fd0",
    "code": "#3f9f78",
}
STYLE = "".join(
    [
        "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;",
        "fill:#1f2328}",
        ".mono{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}",
        f".small{{font-size:{SMALLEST}px}}",
        ".head{font-weight:600;font-size:14px}.soft{fill:#57606a}.paper{fill:#fff;stroke:#d5dae0}",
        ".ink{stroke:#57606a;fill:none}.tip{fill:#57606a}.dash{stroke-dasharray:5 4}",
        *(
            f".{name}{{fill:{c};fill-opacity:.3;stroke:{c}}}.line-{name}{{stroke:{c};fill:none}}"
            for name, c in COLOURS.items()
        ),
        "@media (prefers-color-scheme:dark){text{fill:#e6eaef}.soft{fill:#aab4c0}",
        ".paper{fill:#1e2129;stroke:#3a414d}",
        ".ink{stroke:#aab4c0}.tip{fill:#aab4c0}}",
    ]
)


def n(value: float) -> str:
    """A number as SVG needs it: to a tenth of a pixel."""
    return "0" if abs(value) < 0.05 else f"{value:.1f}".removesuffix(".0")


class Picture:
    """Collects shapes; (0, 0) is the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        kind: str = "",
        text: str = "",
        style: str = "",
        r: float = 3,
    ) -> None:
        """A rectangle, with a text in its middle."""
        where = f'x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}" rx="{n(r)}"'
        self.parts.append(f'<rect {where} class="{kind or "ink"}"/>')
        if text:
            self.text(x + w / 2, y + h / 2 + 4.5, text, style, "middle")

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """One line of text; y is its base line."""
        where = f'x="{n(x)}" y="{n(y)}" class="{style}" text-anchor="{anchor}"'
        self.parts.append(f"<text {where}>{escape(text)}</text>")

    def line(
        self, points: Sequence[tuple[float, float]], style: str = "ink", width: float = 1
    ) -> None:
        path = " ".join(f"{n(x)},{n(y)}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{style}" stroke-width="{n(width)}"/>')

    def area(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{n(x)},{n(y)}" for x, y in points)
        self.parts.append(f'<polygon points="{path}" class="{kind}"/>')

    def arrow(self, *points: tuple[float, float], style: str = "ink") -> None:
        """A line with a tip at its end."""
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = (x - x0) / length, (y - y0) / length
        back = (x - 8 * dx, y - 8 * dy)

        self.line([*points[:-1], back], style, 1.3)
        wings = [(back[0] - 3.5 * dy, back[1] + 3.5 * dx), (back[0] + 3.5 * dy, back[1] - 3.5 * dx)]
        path = " ".join(f"{n(a)},{n(b)}" for a, b in ((x, y), *wings))
        self.parts.append(f'<polygon points="{path}" class="tip"/>')

    def brace(self, x0: float, x1: float, y: float, depth: float = 8) -> None:
        """A flat bracket below x0 ... x1."""
        self.line([(x0, y), (x0, y + depth), (x1, y + depth), (x1, y)])

    def __str__(self) -> str:
        width, height = self.width, self.height
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        inner = f'width="{width - 1}" height="{height - 1}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect x="0.5" y="0.5" {inner} rx="6" class="paper"/>',
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def save(self, path: Path) -> None:
        path.write_text(str(self))
