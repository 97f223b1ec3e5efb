"""The tables of the course, from the notebooks: title, question and time are written there alone.

A page that has the line `<!-- notebooks -->` gets the table of all notebooks there, and one with
`<!-- lesson -->` that of the lesson's sections; `<!-- notebooks: LoRA -->` is for one section.
`docs/hooks.py` fills them in. Which notebook belongs to which section is in `LESSON`, by the name
of its file without the number.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^<!-- (notebooks|lesson)(?:: ([\w ]+))? -->$", re.MULTILINE)

# The time of a notebook that was not measured.
UNKNOWN = "\N{EN DASH}"


class Section(NamedTuple):
    """A section of the lesson, what explains it, and the source that it is about."""

    title: str
    notebooks: tuple[str, ...]
    sources: tuple[str, ...]
    pages: tuple[str, ...]


LESSON = (
    Section(
        "PEFT",
        ("the-lesson-run", "why-a-low-rank-is-enough", "what-it-forgets", "other-peft-methods"),
        ("minilora/reports/memory.py",),
        ("docs/calculator.md",),
    ),
    Section(
        "LoRA",
        ("the-lesson-run", "why-a-low-rank-is-enough", "training-an-adapter"),
        ("minilora/lora.py",),
        ("docs/explorables/how-much-rank.md",),
    ),
    Section(
        "QLoRA",
        (
            "the-lesson-run",
            "nf4-from-the-normal-distribution",
            "double-quantization",
            "when-memory-runs-out",
            "qlora-from-scratch",
        ),
        ("kernels/reference/nf4.py", "minilora/optim/paging.py"),
        ("docs/explorables/sixteen-levels.md",),
    ),
    Section(
        "Implementation",
        (
            "the-lesson-run",
            "qlora-from-scratch",
            "writing-the-kernels",
            "qlora-end-to-end",
        ),
        ("docs/examples/qlora_from_scratch.py", "minilora/layers.py"),
        ("docs/architecture.md",),
    ),
    Section(
        "Merging",
        ("the-lesson-run", "qlora-end-to-end", "one-base-three-tenants"),
        ("minilora/merging.py",),
        ("docs/how-to/merging-and-serving.md",),
    ),
)


class Notebook(NamedTuple):
    path: str
    number: str
    slug: str
    title: str
    question: str
    minutes: str

    @property
    def sections(self) -> str:
        return ", ".join(s.title for s in LESSON if self.slug in s.notebooks)


def read(path: Path) -> Notebook:
    stored = json.loads(path.read_text())
    first = "".join(stored["cells"][0]["source"])
    title = re.search(r"^# (?:\d+ · )?(.+)", first)
    question = re.search(r"\*\*The question: (.+?)\*\*", first, re.DOTALL)
    if not title or not question:
        raise ValueError(f"{path.name}: its first cell has no title or no **The question: ...**")
    number, _, slug = path.stem.partition("-")
    name = path.relative_to(ROOT).as_posix()
    asked = " ".join(question[1].split())
    return Notebook(name, number, slug, title[1], asked, minutes(stored["metadata"]))


def minutes(metadata: dict[str, Any]) -> str:
    """Whole minutes, as measured when the outputs were stored; UNKNOWN where that was not."""
    seconds = metadata.get("minilora", {}).get("seconds")
    return f"{math.ceil(seconds / 60)} min" if seconds else UNKNOWN


def notebooks() -> list[Notebook]:
    found = map(read, ROOT.glob("notebooks/*.ipynb"))
    return sorted(found, key=lambda notebook: int(notebook.number))


def link(path: str, text: str = "") -> str:
    """From a page in docs/ to a file of the repository."""
    to = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
    return f"[{text or path.rpartition('/')[2]}]({to})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def all_notebooks() -> str:
    """On a phone each row is a box of its own (extra.css)."""
    rows = [
        [link(n.path, f"{n.number} · {n.title}"), n.question, n.minutes, n.sections]
        for n in notebooks()
    ]
    rows_of = table(["notebook", "its question", "time", "section of the lesson"], rows)
    return f'<div class="boxes" markdown>\n\n{rows_of}\n\n</div>'


def of_section(section: Section) -> str:
    rows = [
        [link(n.path, f"{n.number} · {n.title}"), n.question, n.minutes]
        for n in notebooks()
        if n.slug in section.notebooks
    ]
    return table(["notebook", "its question", "time"], rows)


def page_title(path: str) -> str:
    return (ROOT / path).read_text().partition("\n")[0].removeprefix("# ")


def all_sections() -> str:
    known = {n.slug: n for n in notebooks()}
    rows = []
    for number, section in enumerate(LESSON, start=1):
        named = [known[slug] for slug in section.notebooks if slug in known]
        times = [n.minutes.removesuffix(" min") for n in named]
        rows.append(
            [
                f"{number} · [{section.title}](#{section.title.lower()})",
                ", ".join(link(n.path, n.number) for n in named),
                ", ".join(link(path) for path in section.sources),
                ", ".join(link(path, page_title(path)) for path in section.pages),
                f"{sum(map(int, times))} min" if UNKNOWN not in times else UNKNOWN,
            ]
        )
    return table(["section", "notebooks", "source", "page", "time"], rows)


def filled(text: str) -> str:
    """A page with its tables."""
    sections = {section.title: section for section in LESSON}

    def fill(mark: re.Match[str]) -> str:
        if mark[1] == "lesson":
            return all_sections()
        return of_section(sections[mark[2]]) if mark[2] else all_notebooks()

    return MARK.sub(fill, text)
