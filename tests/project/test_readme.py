"""The README's badges say what is true today, its tables the lines that the files have, its links lead somewhere."""

import re

import pytest
import readme

TEXT = readme.README.read_text()


def test_the_badges_are_those_of_today_and_all_are_shown() -> None:
    assert {p.name: p.read_text() for p in readme.FOLDER.glob("*.svg")} == readme.badges(), (
        "python tests/tools/readme.py"
    )
    assert set(re.findall(r"docs/badges/([\w.]+)", TEXT)) == set(readme.badges())
    assert (readme.NOT_RUN in " ".join(TEXT.split())) == ("not yet" in readme.badges()["gpu.svg"])


def test_the_line_counts_are_those_of_today() -> None:
    assert readme.counted(TEXT) == TEXT, "python tests/tools/readme.py"
    assert len(re.findall(r"\]\([\w/.]+\) \| \d+ \|", TEXT)) >= 20


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 20 and [link for link in links if not (readme.ROOT / link).exists()] == []


def test_the_page_of_commands_has_every_flag_as_it_is() -> None:
    pytest.importorskip("typer", reason="the command line is made with typer")
    assert readme.COMMANDS.read_text() == readme.commands(), "python tests/tools/readme.py"
