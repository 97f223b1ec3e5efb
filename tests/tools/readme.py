"""Writes what pages take from elsewhere: the README's badges, the reading order's line counts.

    python tests/tools/readme.py

tests/project/test_readme.py checks that they are up to date. Lines are counted by sizes.py.
"""

import re
from html import escape
from pathlib import Path

import sizes

try:
    import tomllib
except ModuleNotFoundError:
    # Python 3.10
    import tomli as tomllib

ROOT = sizes.ROOT
README = ROOT / "README.md"
READING_ORDER = ROOT / "docs" / "reading-order.md"
FOLDER = ROOT / "docs" / "badges"
GREY, BLUE, GREEN, ORANGE = "#555", "#2b6cb0", "#2f855a", "#b7791f"

# Stands in README.md and docs/benchmarks.md until the kernels have been run on a GPU.
UNTESTED = "GPU kernels: not yet tested on a real GPU"


def badges() -> dict[str, str]:
    """The file name of each badge, and the SVG."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    untested = UNTESTED in (ROOT / "docs" / "benchmarks.md").read_text()
    gpu = ("not yet tested on a real GPU", ORANGE) if untested else ("measured", GREEN)
    code = sum(map(sizes.code_lines, sizes.core_files()))

    facts = {
        "python": (project["requires-python"].replace(">=", "≥ "), BLUE),
        "license": (project["license"], BLUE),
        "core": (f"{code:,} lines of code", GREEN),
        "GPU kernels": gpu,
    }
    return {
        f"{name.split()[0].lower()}.svg": badge(name, text, colour)
        for name, (text, colour) in facts.items()
    }


def badge(name: str, text: str, colour: str) -> str:
    """A name on grey, and a text on a colour.

    `textLength` fits the words into their boxes whatever the font is.
    """
    left, right = (round(6.3 * len(words)) + 14 for words in (name, text))
    boxes, words = "", ""
    for x, width, said, fill in ((0, left, name, GREY), (left, right, text, colour)):
        boxes += f'<rect x="{x}" width="{width}" height="20" fill="{fill}"/>'
        words += f'<text x="{x + 7}" y="14" textLength="{width - 14}">{escape(said)}</text>'

    size = f'width="{left + right}" height="20"'
    label = f'role="img" aria-label="{escape(f"{name}: {text}")}"'
    font = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>'
        f'<clipPath id="r"><rect {size} rx="3"/></clipPath>'
        f'<g clip-path="url(#r)">{boxes}</g><g {font}>{words}</g></svg>\n'
    )


def counted(text: str) -> str:
    """The reading order with today's line counts, in its tables and in its sentence on the core."""

    def row(found: re.Match[str]) -> str:
        return f"{found[1]}{lines(READING_ORDER.parent / found[2]):,}"

    text = re.sub(r"(\]\(([\w/.]+)\) \| )[\d,]+(?= \|)", row, text)
    core = sizes.core_files()
    total, code = sum(map(sizes.lines, core)), sum(map(sizes.code_lines, core))
    sentence = f"{len(core)} files and {total:,} lines, {code:,} of them code"
    return re.sub(CORE_SENTENCE, sentence, text)


# How the reading order states the size of the core.
CORE_SENTENCE = re.compile(r"\d+ files and [\d,]+ lines, [\d,]+ of them code")


def lines(path: Path) -> int:
    """The lines of a file, or of the Python files of a folder."""
    return sum(map(sizes.lines, [path] if path.is_file() else path.glob("*.py")))


def main() -> None:
    READING_ORDER.write_text(counted(READING_ORDER.read_text()))
    FOLDER.mkdir(exist_ok=True)
    for name, svg in badges().items():
        (FOLDER / name).write_text(svg)


if __name__ == "__main__":
    main()
