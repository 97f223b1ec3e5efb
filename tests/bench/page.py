"""Writes the tables and plots of docs/benchmarks.md from the stored results:

    python tests/bench/page.py

The results are in docs/benchmarks/PROCESSOR/SCRIPT.json, one folder per processor, and are written
by `--store` of the scripts. Between the comments `<!-- train_step -->` and `<!-- /train_step -->`
of the page stands what this script makes of them; the rest of the page is written by hand.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import few_rows
import generate
import headline
import losses
import memory_timeline
import side_by_side as bench
import train_step
from plots import growth_plot
from sides import Case

PAGE = bench.ROOT / "docs" / "benchmarks.md"


def train_step_block(results: bench.Result, folder: Path) -> str:
    text = train_step.main_table(results["rows"])
    if not results["growth"]:
        return text
    plot = folder / bench.file_name(results["machine"]) / "growth.svg"
    growth_plot(results["growth"]).save(plot)
    doublings = train_step.doublings(results["growth"], train_step.OURS)
    sentences = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in doublings.items())
    title = "Tokens per second by length and by batch, of both sides"
    return (
        f"{text}\n{train_step.growth_table(results['growth'])}\n"
        f"Seconds of a step when the batch doubles (batch x length), minilora: {sentences}.\n\n"
        f"![{title}]({plot.relative_to(folder.parent).as_posix()})\n"
    )


def generate_block(results: bench.Result, folder: Path) -> str:
    return generate.main_table(results["rows"])


def few_rows_block(results: bench.Result, folder: Path) -> str:
    return few_rows.main_table(results["rows"])


def losses_block(results: bench.Result, folder: Path) -> str:
    return losses.summary(results)


def headline_block(results: bench.Result, folder: Path) -> str:
    rows = results["rows"].values()
    lines = [headline.line(row["shape"], row["tokens"], row) for row in rows]
    return "".join(f"* {line}\n" for line in lines)


def memory_timeline_block(results: bench.Result, folder: Path) -> str:
    tables = [
        f"{memory_timeline.phase_table(side, result['rows'])}\n"
        f"{memory_timeline.largest_table(result)}"
        for side, result in results["sides"].items()
    ]
    return f"{Case(**results['case'])}; MB are 10⁶ bytes.\n\n" + "\n".join(tables)


BLOCKS: dict[str, Callable[[bench.Result, Path], str]] = {
    "train_step": train_step_block,
    "generate": generate_block,
    "few_rows": few_rows_block,
    "losses": losses_block,
    "memory_timeline": memory_timeline_block,
    "headline": headline_block,
}


def block(name: str, folder: Path) -> str:
    """What stands on the page for one script: every processor that it ran on."""
    parts = [
        f"{bench.describe(results['machine'])}\n\n{BLOCKS[name](results, folder)}"
        for results in bench.stored(name, folder)
    ]
    return "\n".join(parts) or "Not measured yet.\n"


def render(text: str, folder: Path = bench.RESULTS) -> str:
    """The page with every block made anew. Plots are written into `folder`.

    Raises:
        ValueError: the page has a block of no script, or lacks one.
    """
    names = re.findall(r"<!-- (\w+) -->", text)
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"the page has blocks for {sorted(names)}, not for {sorted(BLOCKS)}")

    def renewed(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n\n{block(name, folder)}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", renewed, text, flags=re.DOTALL)


def update(page: Path = PAGE, folder: Path = bench.RESULTS) -> Path:
    """Writes the page, and returns it."""
    from minilora.files.atomic import write_text

    write_text(page, render(page.read_text(), folder))
    return page


if __name__ == "__main__":
    sys.exit(print(f"written: {update()}"))
