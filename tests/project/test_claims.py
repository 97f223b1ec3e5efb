"""docs/claims.md: every claim of the lesson with a number, and the number is what code printed."""

import re
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import readme

PAGE = readme.ROOT / "docs" / "claims.md"
HOW = {"run", "computed", "run; needs a GPU for the rest", "computed; needs a GPU to be run"}
LINK = re.compile(r"\]\((\.\./notebooks/[\w.-]+)\)")


class Claim(NamedTuple):
    """A row of the table."""

    number: int
    claim: str
    how: str
    # What the notebook has to have printed: the parts in backticks.
    figures: tuple[str, ...]
    notebook: Path


def claims(text: str) -> list[Claim]:
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    return [
        Claim(
            int(number),
            claim.strip(),
            how.strip(),
            tuple(re.findall(r"`([^`]+)`", figures)),
            (PAGE.parent / LINK.findall(where)[0]).resolve(),
        )
        for number, claim, how, figures, where in rows
    ]


CLAIMS = claims(PAGE.read_text())


def printed(path: Path) -> str:
    """All that the code of a stored notebook printed, with single spaces."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    outputs = [o for cell in cells for o in cell.outputs if o.output_type == "stream"]
    return " ".join(" ".join(o.text for o in outputs if o.name == "stdout").split())


def missing(claim: Claim) -> list[str]:
    """Figures that its notebook has not printed. A digit more on either side is another figure."""
    text = printed(claim.notebook)
    return [
        figure
        for figure in claim.figures
        if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)", text)
    ]


def test_all_21_claims_are_there_and_at_most_two_need_a_gpu() -> None:
    assert [claim.number for claim in CLAIMS] == list(range(1, 22))
    assert {claim.how for claim in CLAIMS} <= HOW
    assert sum("GPU" in claim.how for claim in CLAIMS) <= 2


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: str(claim.number))
def test_the_numbers_of_a_claim_are_what_its_notebook_printed(claim: Claim) -> None:
    assert claim.figures, "a claim has a number"
    assert missing(claim) == []


@pytest.mark.parametrize(("was", "now"), [("13.5 GB", "13.4 GB"), ("13.5 GB", "3.5 GB")])
def test_another_number_is_seen(was: str, now: str) -> None:
    first = CLAIMS[0]
    assert was in first.figures
    assert missing(first._replace(figures=(now,))) == [now]


def test_the_numbers_are_those_of_tagged_cells_or_of_times() -> None:
    """What is compared when notebooks run again; only the latency in claim 14 is not."""
    for claim in CLAIMS:
        cells = nbformat.read(claim.notebook, as_version=4).cells
        tagged = [c for c in cells if {"headline", "measured"} & set(c.metadata.get("tags", []))]
        text = " ".join(" ".join(o.get("text", "") for c in tagged for o in c.outputs).split())
        kept = [figure for figure in claim.figures if figure in text]
        assert len(kept) == len(claim.figures) or claim.number == 14
