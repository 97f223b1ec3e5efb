"""The README's badges and line counts and the page of commands, from what they claim.

`python tests/tools/readme.py` writes them, tests/project/test_readme.py compares.
"""

import re
from html import escape
from pathlib import Path
from typing import Any

import test_layout

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
COMMANDS = ROOT / "docs" / "reference" / "command-line.md"
FOLDER = ROOT / "docs" / "badges"
GREY, BLUE, GREEN, ORANGE = "#555", "#2b6cb0", "#2f855a", "#b7791f"
NOT_RUN = "GPU path not yet run on a card"  # until benchmarks.md no longer says so


def badges() -> dict[str, str]:
    """The file name of each badge, and the SVG."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    gpu = (
        ("not yet run on a card", ORANGE)
        if NOT_RUN in (ROOT / "docs" / "benchmarks.md").read_text()
        else ("measured", GREEN)
    )
    facts = {
        "python": (project["requires-python"].replace(">=", "≥ "), BLUE),
        "license": (project["license"], BLUE),
        "core": (f"under {test_layout.CORE_LINES:,} lines of code", GREEN),
        "GPU": gpu,
    }
    return {
        f"{name.lower()}.svg": badge(name, text, colour) for name, (text, colour) in facts.items()
    }


def badge(name: str, text: str, colour: str) -> str:
    """A label on grey and what it says on a colour; textLength holds the words in their boxes whatever the font."""
    left, right = (round(6.3 * len(words)) + 14 for words in (name, text))
    boxes = f'<rect width="{left}" height="20" fill="{GREY}"/><rect x="{left}" width="{right}" height="20" fill="{colour}"/>'
    words = "".join(
        f'<text x="{x + 7}" y="14" textLength="{width - 14}">{escape(said)}</text>'
        for x, width, said in ((0, left, name), (left, right, text))
    )
    font = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'
    width, label = left + right, escape(f"{name}: {text}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}">'
        f'<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath><g clip-path="url(#r)">{boxes}</g>'
        f"<g {font}>{words}</g></svg>\n"
    )


def counted(text: str) -> str:
    """The README with the lines that the files of its tables have today, a folder's those of its Python files."""
    return re.sub(
        r"(\]\(([\w/.]+)\) \| )(\d+)(?= \|)", lambda row: row[1] + str(lines(ROOT / row[2])), text
    )


def lines(path: Path) -> int:
    return sum(
        len(p.read_text().splitlines()) for p in ([path] if path.is_file() else path.glob("*.py"))
    )


def commands() -> str:
    """The page of the command line: every command with its flags, as typer has them."""
    import typer

    from minilora.cli import app

    found: Any = typer.main.get_command(app)
    source = "Source: [cli.py](../../minilora/cli.py)."
    text = f"# The command line\n\n`minilora COMMAND --help` prints the same. An error is one line that names the way out. {source}\n"
    for name, command in found.commands.items():
        text += f"\n## minilora {name}\n\n{command.help}\n\n| flag | default | |\n|---|---|---|\n"
        for flag in command.params:
            names = " / ".join(f"`{n}`" for n in (*flag.opts, *flag.secondary_opts))
            default = (
                "required" if flag.required else "" if flag.default is None else f"`{flag.default}`"
            )
            text += f"| {names} | {default} | {flag.help} |\n"
    return text


def main() -> None:
    COMMANDS.write_text(commands())
    README.write_text(counted(README.read_text()))
    FOLDER.mkdir(exist_ok=True)
    for name, svg in badges().items():
        (FOLDER / name).write_text(svg)


if __name__ == "__main__":
    main()
