"""Badges and line counts are up to date, links lead somewhere, and no page promises too much."""

import re

import readme
import sizes

TEXT = readme.README.read_text()
READING_ORDER = readme.READING_ORDER.read_text()
PAGES = [
    *sorted(readme.ROOT.glob("*.md")),
    *sorted((readme.ROOT / "docs").rglob("*.md")),
    *sorted((readme.ROOT / "notebooks").glob("*.ipynb")),
]


OUTDATED = "out of date: python tests/tools/readme.py"


def test_the_badges_are_up_to_date_and_all_are_shown() -> None:
    stored = {path.name: path.read_text() for path in readme.FOLDER.glob("*.svg")}
    assert stored == readme.badges(), OUTDATED
    assert set(re.findall(r"docs/badges/([\w.]+)", TEXT)) == set(stored)
    untested = "not yet" in stored["gpu.svg"]
    assert (readme.UNTESTED in " ".join(TEXT.split())) == untested


def test_the_line_counts_are_up_to_date() -> None:
    assert readme.counted(READING_ORDER) == READING_ORDER, OUTDATED
    assert len(readme.CORE_SENTENCE.findall(READING_ORDER)) == 1


def test_every_file_of_the_core_is_in_the_table_with_its_lines() -> None:
    rows = {path: int(n.replace(",", "")) for path, n in ROW.findall(READING_ORDER)}
    core = {str(p.relative_to(readme.ROOT)): sizes.lines(p) for p in sizes.core_files()}
    package = {name: n for name, n in core.items() if name.startswith("minilora/")}
    assert package.items() <= rows.items()
    assert len(rows) >= len(core)


ROW = re.compile(r"\]\(\.\./([\w/.]+)\) \| ([\d,]+) \|")


def test_a_count_that_changed_is_seen() -> None:
    row = "| 1 | [minilora/ops.py](../minilora/ops.py) | 7 | the dispatcher |"
    lines = sizes.lines(readme.ROOT / "minilora" / "ops.py")
    assert f"| {lines:,} |" in readme.counted(row)
    sentence = "7 files and 1 lines, 2 of them code"
    assert readme.counted(sentence) != sentence


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 20 and [link for link in links if not (readme.ROOT / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150


# `pip install minilora`, with or without options and extras; `pip install .` is something else.
FROM_AN_INDEX = re.compile(r"(pip|uv)[\w -]* (install|add) [^\n#`]*\bminilora\b")


def test_no_page_installs_from_an_index_where_the_name_is_not_yet() -> None:
    assert len(PAGES) > 20
    assert [page.name for page in PAGES if FROM_AN_INDEX.search(page.read_text())] == []
    for command in ("pip install minilora", "pip install -q 'minilora[hf]'", "uv add minilora"):
        assert FROM_AN_INDEX.search(command)
    assert not FROM_AN_INDEX.search("pip install .  # in a clone of minilora")
