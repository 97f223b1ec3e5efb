"""Writes the tables, verdicts and figures of docs/reproductions.md from the stored results:

    python docs/experiments/reproductions_page.py

Between the comments `<!-- rank -->` and `<!-- /rank -->` of the page stands what this script makes
of the results of that experiment, and in `<!-- summary -->` one line for each. The rest of the page
is written by hand.
"""

import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from claim import Check, verdict
from reproduce import EXPERIMENTS, HERE, RESULTS, Stored, experiment, stored

PAGE = HERE.parent / "reproductions.md"
FIGURES = HERE / "figures"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def anchor(title: str) -> str:
    """The anchor that MkDocs gives a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


def summary(folder: Path = RESULTS) -> str:
    """The table on top of the page, the machines, and how long all of it takes."""
    rows, everything = [], []
    for number, name in enumerate(EXPERIMENTS, start=1):
        module, results = experiment(name), stored(name, folder)
        everything += results
        title = f"[{module.TITLE}](#{anchor(f'{number}. {module.TITLE}')})"
        rows.append((str(number), title, f"**{judged(name, folder)}**", module.PAPER, module.MODEL))
    seconds = sum(result["seconds"] for result in everything)
    text = table(("", "claim", "here", "paper", "on"), rows)
    return f"{text}\nAll runs together: {seconds / 60:.0f} minutes.\n\n{machines(everything)}"


def judged(name: str, folder: Path = RESULTS) -> str:
    """The verdict on a claim; there is none before every seed has been run."""
    module, results = experiment(name), stored(name, folder)
    if len(results) < len(module.SEEDS):
        return f"{len(results)} of {len(module.SEEDS)} seeds have been run"
    return verdict(module.checks([result["numbers"] for result in results]))


def machines(results: list[Stored]) -> str:
    """One line per machine, set of versions and day, with what was measured there."""

    def where(result: Stored) -> str:
        machine = result["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        return (
            f"{machine['processor']}, {threads}. Python {machine['python']}, {versions}; "
            f"{machine['date']}"
        )

    lines = []
    for text, group in groupby(sorted(results, key=where), key=where):
        names = sorted({result["experiment"] for result in group}, key=EXPERIMENTS.index)
        lines.append(f"* {text}: {', '.join(names)}.\n")
    return "".join(lines)


def row(check: Check) -> tuple[str, str, str, str]:
    """A line of an experiment's table; each quantity is on a line of its own."""
    says = f"*our question:* {check.says}" if check.ours else check.says
    answer = "yes" if check.holds else "**no**"
    measured = check.measured.replace("; ", "<br>").replace("), ", ")<br>")
    together = re.sub(r"\((\S+) to (\S+)\)", r"(\1&nbsp;to&nbsp;\2)", measured)
    return says, check.rule, together, answer


def section(name: str, folder: Path = RESULTS) -> str:
    """Verdict, table, figure and command of one experiment."""
    module, results = experiment(name), stored(name, folder)
    if not results:
        return "Not run yet.\n"
    numbers = [result["numbers"] for result in results]
    rows = [row(check) for check in module.checks(numbers)]
    picture = module.figure(numbers)
    seconds = sum(result["seconds"] for result in results)
    seeds = ", ".join(str(seed) for seed in module.SEEDS)
    return (
        f"Verdict: **{judged(name, folder)}**. On: {module.MODEL}.\n\n"
        f"{table(('paper says', 'it holds here if', 'we measured', 'agrees?'), rows)}\n"
        f"![{picture.title}](experiments/figures/{name}.svg)\n\n"
        f"`python docs/experiments/reproduce.py --only {name}`: seeds {seeds}, "
        f"{seconds:.0f} seconds together. Source: [{name}.py](experiments/{name}.py).\n"
    )


def render(text: str, folder: Path = RESULTS) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: the page has a block of no experiment, or lacks one.
    """
    blocks: dict[str, Callable[[], str]] = {"summary": lambda: summary(folder)}
    blocks |= {name: lambda name=name: section(name, folder) for name in EXPERIMENTS}
    names = re.findall(r"<!-- (\w+) -->", text)
    if names != [*blocks]:
        raise ValueError(f"the page has blocks for {names}, not for {[*blocks]}")

    def renewed(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n\n{blocks[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", renewed, text, flags=re.DOTALL)


def draw_figures(into: Path = FIGURES, folder: Path = RESULTS) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name in EXPERIMENTS:
        results = stored(name, folder)
        if results:
            experiment(name).figure([r["numbers"] for r in results]).save(into / f"{name}.svg")


def update(page: Path = PAGE) -> Path:
    """Draws the figures, writes the page, and returns it."""
    from minilora.files.atomic import write_text

    draw_figures()
    write_text(page, render(page.read_text()))
    return page


if __name__ == "__main__":
    sys.exit(print(f"written: {update()}"))
