"""The built site, in a browser: pages, links, formulas, search, a phone's screen: `make docs`."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import browser
import pytest

import minilora

pytestmark = [
    pytest.mark.site,
    pytest.mark.skipif(
        not (browser.SITE / "index.html").exists(), reason="the site is not built: make docs"
    ),
]


class Parsed(HTMLParser):
    """The links of a page, and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [
            value
            for key, value in attributes
            if value and (key == "id" or (tag == "a" and key == "name"))
        ]
        self.links += [value for key, value in attributes if value and key in ("href", "src")]


@pytest.fixture(scope="module")
def parsed() -> dict[str, Parsed]:
    return {p: Parsed(file_of(p).read_text()) for p in browser.pages()}


def file_of(path: str) -> Path:
    """The file that a server returns for the path."""
    file = browser.SITE / unquote(path)
    return file / "index.html" if path.endswith("/") or not path else file


def test_every_link_and_every_anchor_leads_somewhere(parsed: dict[str, Parsed]) -> None:
    broken, seen = [], 0
    for path, page in parsed.items():
        for link in page.links:
            address, anchor = urldefrag(urljoin(f"http://here/{path}", link))
            if urlsplit(address).netloc != "here" or urlsplit(address).scheme != "http":
                continue
            seen += 1
            to = urlsplit(address).path.removeprefix("/")
            if not file_of(to).is_file() or (
                anchor and to in parsed and unquote(anchor) not in parsed[to].ids
            ):
                broken.append(f"{path or 'home'}: {link}")
    assert not broken and seen > 10 * len(parsed)


def test_no_page_has_an_id_twice(parsed: dict[str, Parsed]) -> None:
    twice = {
        path: [i for i, n in Counter(page.ids).items() if n > 1] for path, page in parsed.items()
    }
    assert not {path: ids for path, ids in twice.items() if ids}


def test_every_public_name_is_documented_once(parsed: dict[str, Parsed]) -> None:
    headings = [
        name
        for path in parsed
        if path.startswith("reference/")
        for name in re.findall(r'<h2 id="minilora\.(?:\w+\.)?(\w+)"', file_of(path).read_text())
    ]
    assert sorted(headings) == sorted(minilora.__all__)


def test_every_notebook_is_a_page_and_in_the_navigation(parsed: dict[str, Parsed]) -> None:
    stems = [path.stem.partition("-") for path in (browser.ROOT / "notebooks").glob("*.ipynb")]
    slugs = [slug for _, _, slug in sorted(stems, key=lambda stem: int(stem[0]))]
    assert slugs and all(f"tutorials/{slug}/" in parsed for slug in slugs)
    linked = re.findall(r"^tutorials/([\w-]+)/$", "\n".join(parsed[""].links), re.MULTILINE)
    assert list(dict.fromkeys(linked)) == slugs


@dataclass
class Visit:
    """What a page did when it was opened, and how wide it is on a phone."""

    # Console errors, exceptions, requests that failed.
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    formulas: int = 0
    unset: list[str] = field(default_factory=list)
    width: int = 0
    wide: list[str] = field(default_factory=list)
    # On a phone: columns of sentences that cannot be read, signatures that are cut off.
    squeezed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


# Pages that are open at the same time: while one waits until no request is left, others load.
AT_ONCE = 8
JSON = "application/json"


@pytest.fixture(scope="module")
def visits(chromium: Any, address: str) -> dict[str, Visit]:
    """Every page, opened once."""
    found = {}
    context = chromium.new_context(viewport=browser.DESKTOP)
    # Every page builds the search index anew, half of its work; the search has its own test.
    index = json.loads((browser.SITE / "search/search_index.json").read_text())
    small = json.dumps({**index, "docs": index["docs"][:1]})
    context.route("**/search_index.json", lambda r: r.fulfill(body=small, content_type=JSON))
    paths = browser.pages()
    for first in range(0, len(paths), AT_ONCE):
        opened = {path: watched(context.new_page()) for path in paths[first : first + AT_ONCE]}
        for path, (tab, _) in opened.items():
            tab.goto(address + path, wait_until="commit")
        for path, (tab, visit) in opened.items():
            # Leaving a page earlier would cut off its own requests.
            tab.wait_for_load_state("networkidle")
            look(tab, visit)
            tab.close()
            found[path] = visit
    context.close()
    return found


def watched(tab: Any) -> tuple[Any, Visit]:
    """A tab, and the visit that its events are added to."""
    visit = Visit()
    said = visit.problems.append
    tab.on("console", lambda m: said(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: said(str(e)))
    tab.on("requestfailed", lambda r: said(f"failed: {r.url}"))
    tab.on("response", lambda r: said(f"{r.status}: {r.url}") if r.status >= 400 else None)
    tab.on("request", lambda r: visit.requests.append(r.url))
    return tab, visit


def look(tab: Any, visit: Visit) -> None:
    visit.formulas = tab.locator(".arithmatex").count()
    try:
        browser.settle(tab)
    except Exception as late:
        # What is not rendered is listed below, by its source.
        visit.problems.append(str(late).splitlines()[0])
    visit.unset = tab.evaluate(UNSET)
    tab.set_viewport_size(browser.PHONE)
    visit.unset += tab.evaluate(UNSEEN)
    visit.width = tab.evaluate("document.documentElement.scrollWidth")
    if visit.width > browser.PHONE["width"]:
        visit.wide = tab.evaluate(WIDE)
    visit.squeezed = tab.evaluate(SQUEEZED)
    visit.cut = tab.evaluate(CUT)


# Formulas that were not rendered, or rendered as an error message.
UNSET = """[...document.querySelectorAll('.arithmatex')]
  .filter(e => !e.querySelector('mjx-container svg')
    || e.querySelector('[data-mml-node=merror], mjx-merror, merror'))
  .map(e => e.textContent.slice(0, 80))"""

# Formulas that are there and have no size.
UNSEEN = """[...document.querySelectorAll('.arithmatex')]
  .filter(e => e.checkVisibility()
    && !(e.querySelector('mjx-container svg')?.getBoundingClientRect().width > 2))
  .map(e => e.textContent.slice(0, 80))"""

# The innermost elements that are wider than the screen.
WIDE = """[...document.querySelectorAll('.md-content *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('pre, .md-typeset__scrollwrap, .output'))
  .map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 40)).slice(-3)"""

# Cells with a sentence that are less than 30 characters wide, and tables outside of a box.
SQUEEZED = """[...document.querySelectorAll('.md-typeset table:not([class])')]
  .filter(t => t.checkVisibility())
  .flatMap(t => [
    ...(t.closest('.md-typeset__scrollwrap, .output, .scrolls') ? [] : ['no box']),
    ...[...t.querySelectorAll('td')].filter(e => e.textContent.length > 40
      && e.getBoundingClientRect().width < 180)])
  .map(e => e.textContent ? e.textContent.slice(0, 60) : e)"""

# Signatures with a line that is wider than their box.
CUT = """[...document.querySelectorAll('.doc-signature pre > code')]
  .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.textContent.slice(0, 60))"""


def test_no_page_reports_an_error_or_asks_for_what_is_not_there(visits: dict[str, Visit]) -> None:
    assert not {path: v.problems for path, v in visits.items() if v.problems}


def test_nothing_is_fetched_from_another_host(visits: dict[str, Visit], address: str) -> None:
    requests = [r for v in visits.values() for r in v.requests]
    assert len(requests) > 2 * len(visits)
    assert not [r for r in requests if not r.startswith((address, "data:", f"blob:{address}"))]


def test_formulas_are_set(visits: dict[str, Visit]) -> None:
    notebooks = {
        p.stem.partition("-")[2]: p.read_text()
        for p in (browser.ROOT / "notebooks").glob("*.ipynb")
    }
    assert all(
        visits[f"tutorials/{slug}/"].formulas >= text.count("$$") // 2
        for slug, text in notebooks.items()
    )
    assert sum(v.formulas for v in visits.values())
    assert not {path: v.unset for path, v in visits.items() if v.unset}
    assert not [
        p
        for p, v in visits.items()
        if not v.formulas and any("tex-svg.js" in r for r in v.requests)
    ], "2 MB for nothing"


def test_a_page_fits_a_phone(visits: dict[str, Visit]) -> None:
    assert not {
        path: (v.width, v.wide) for path, v in visits.items() if v.width > browser.PHONE["width"]
    }


def test_tables_and_signatures_can_be_read_on_a_phone(visits: dict[str, Visit]) -> None:
    assert not {path: v.squeezed for path, v in visits.items() if v.squeezed}
    assert not {path: v.cut for path, v in visits.items() if v.cut}


def test_a_signature_has_a_line_for_each_parameter() -> None:
    page = file_of("reference/change-a-model/").read_text()
    signatures = re.findall(r"doc-signature.*?<pre>(.*?)</pre>", page, re.DOTALL)
    lines = [
        line for signature in signatures for line in re.sub(r"<[^>]+>", "", signature).splitlines()
    ]
    assert len(signatures) > 15 and max(map(len, lines)) <= 80
    assert "    dropout: float = 0.0," in lines


def test_equations_of_docstrings_are_set() -> None:
    pages = {p: file_of(p).read_text() for p in browser.pages() if p.startswith("reference/")}
    for path, equation in (
        ("quantized-weights", r"q = \\arg\\min_j"),
        ("optimizer-and-memory", r"\\sqrt\{v / \(1 - \\beta_2\^t\)\}"),
        ("change-a-model", r"\\langle W' - W, s B A\\rangle"),
    ):
        found = re.search(
            rf'<div class="arithmatex"[^>]*>[^<]*{equation}', pages[f"reference/{path}/"]
        )
        assert found, path


def test_formulas_are_not_in_the_search_index() -> None:
    index = json.loads((browser.SITE / "search/search_index.json").read_text())
    texts = [entry["text"] for entry in index["docs"]]
    assert len(texts) > 100 and any("absmax" in text for text in texts)
    assert not [
        text[:80] for text in texts if re.search(r"\\[(\[]|\\(?:frac|text|cdot)\b|\$\$", text)
    ]


def test_every_picture_has_an_alternative_text_of_its_own() -> None:
    pictures = 0
    for path in browser.pages():
        content = file_of(path).read_text().partition("<article")[2]
        found = re.findall(r"<img\b[^>]*>", content)
        texts = [re.search(r'alt="([^"]*)"', picture) for picture in found]
        assert all(text and len(text[1]) > 8 for text in texts), (path, found)
        assert len({text[1] for text in texts if text}) == len(texts), path
        pictures += len(found)
    assert pictures > 40


def test_alternative_texts_are_of_pictures_that_are_there() -> None:
    texts = json.loads((browser.ROOT / "docs/alt-texts.json").read_text())
    for path in (browser.ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        drawn = {
            cell["id"]
            for cell in cells
            if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        }
        known = texts.get(path.stem.partition("-")[2], {})
        assert set(known) <= drawn, path.name


def test_the_landing_page_lists_every_notebook_in_order(parsed: dict[str, Parsed]) -> None:
    page = file_of("tutorials/").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)[1:]
    named = [re.findall(r">(\d+) · ", row) for row in rows]
    stems = [path.stem for path in (browser.ROOT / "notebooks").glob("*.ipynb")]
    assert [int(n) for (n,) in named] == sorted(int(stem.partition("-")[0]) for stem in stems)
    # Each has a question, a time or a dash, and a section of the lesson.
    assert all(len(re.findall(r"<td[^>]*>[^<]|<td[^>]*><a", row)) == 4 for row in rows)
    assert "<!-- " not in page.partition("<article")[2].partition("</article>")[0]
    assert {"#peft", "#lora", "#qlora", "#implementation", "#merging"} <= set(
        parsed["lesson-map/"].links
    )


@pytest.fixture
def tab(chromium: Any, address: str) -> Iterator[Any]:
    page = chromium.new_page(viewport=browser.DESKTOP, color_scheme="light")
    page.goto(address)
    yield page
    page.close()


# What a visitor sees of the home page before scrolling: a selector, and a text that it must hold.
EQUATION = (".what pre", "y = x Wᵀ + (alpha/r) (x Aᵀ) Bᵀ")
PICTURE = (".what img", "")
INSTALL = (".install pre", "pip install .")
SNIPPET = (".snippet .highlight:nth-of-type(1) pre", "minilora.merge(model)")
OUTPUT = (".snippet .highlight:nth-of-type(2) pre", "step 100")
WAYS = [
    (".ways li:nth-child(1)", "Learn"),
    (".ways li:nth-child(2)", "Fine-tune"),
    (".ways li:nth-child(3)", "Teach"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("window", "parts"),
    [
        ("laptop", [EQUATION, PICTURE, INSTALL, SNIPPET, OUTPUT, *WAYS]),
        ("phone", [EQUATION, PICTURE, INSTALL]),
    ],
    ids=["laptop", "phone"],
)
def test_the_first_screen_shows_what_minilora_is(
    chromium: Any, address: str, window: str, parts: list[tuple[str, str]], scheme: Any
) -> None:
    size = browser.FIRST_SCREEN[window]
    page = chromium.new_page(viewport=size, color_scheme=scheme)
    page.goto(address, wait_until="networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for selector, text in parts:
        part = page.locator(f".first-screen {selector}")
        assert text in part.inner_text() and part.is_visible()
        box = part.bounding_box()
        assert box["width"] > 100 and box["height"] > 20, selector
        assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"], selector
        assert box["y"] >= 0 and box["y"] + box["height"] <= size["height"], selector
        # Nothing of it is hidden in a box that scrolls, nor by the header.
        assert part.evaluate("e => e.scrollWidth <= e.clientWidth || e.tagName == 'IMG'"), selector
        assert part.evaluate(ON_TOP), selector
    page.close()


# Whether the element, and nothing above it, is what a visitor sees in its corners.
ON_TOP = """e => {
  const {left, right, top, bottom} = e.getBoundingClientRect();
  return [[left + 3, top + 3], [right - 3, bottom - 3]]
    .every(([x, y]) => e.contains(document.elementFromPoint(x, y)));
}"""


def test_the_three_ways_lead_somewhere(tab: Any) -> None:
    links = tab.locator(".first-screen .ways li a")
    ways = [link.get_attribute("href") for link in links.all()]
    starts = ("source/docs/examples/qlora_from_scratch.py", "tutorials/the-lesson-run")
    assert [way for way in starts if not any(link.startswith(way) for link in ways)] == []
    assert {"#fine-tune-a-language-model", "lesson-map/"} <= set(ways)


def test_the_search_finds_a_function(tab: Any) -> None:
    tab.locator("[data-md-component=search-query]").click()
    tab.keyboard.type("inject", delay=20)
    result = tab.locator(
        ".md-search-result__item a[href*='reference/change-a-model/'][href$='#minilora.inject']"
    ).first
    result.wait_for(timeout=15000)
    assert "inject" in result.inner_text()
    assert not tab.locator(".md-search-result__item a[href*='source/']").count(), (
        "source files are no search results"
    )


def test_dark_and_light(tab: Any) -> None:
    def background() -> str:
        return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    tab.locator("label[for=__palette_1]:visible, label[for=__palette_0]:visible").click()
    tab.wait_for_function(
        f"getComputedStyle(document.body).backgroundColor != '{light}'", timeout=5000
    )
    dark = background()
    assert (
        sum(map(int, re.findall(r"\d+", dark)[:3]))
        < 200
        < 600
        < sum(map(int, re.findall(r"\d+", light)[:3]))
    )


def test_code_can_be_copied_and_an_example_without_prompts_and_answers(
    tab: Any, address: str
) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    tab.goto(address + "reference/change-a-model/")
    examples = tab.locator(".highlight:not(.doc-signature)")
    examples.first.wait_for()
    tab.wait_for_selector(".highlight button[data-md-type=copy]")
    assert (
        tab.locator(".highlight").count()
        == tab.locator(".highlight:has(button[data-md-type=copy])").count()
        > 10
    )
    examples.first.locator("button[data-md-type=copy]").click()
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("model = ") and "'NF4Linear'" not in copied
