"""How the repository becomes a site: hooks for everything that MkDocs does not do by itself.

MkDocs makes pages from `docs/`. Most of what is worth reading is elsewhere, where people look for
it in a repository: README.md, the notebooks, kernels/README.md, the source itself. Nothing is
copied and nothing is written twice: `on_files` adds each of them as a page in memory
(`File.generated`), a notebook through nbconvert, with its images as files.

Links are written for a reader of the repository, from file to file
(`../kernels/reference/nf4.py`). One function, `place`, maps a file of the repository to its place
in the site, and `Links` uses it to rewrite every link of every page. A source file or a folder gets
a page when something links to it. A link to a file that does not exist fails the build
(`mkdocs build --strict`).

`on_config` turns patterns in the navigation into pages. The tables of the course are made by
`docs/course.py`; docstrings are prepared for mkdocstrings by `docs/docstrings.py`.
"""

import importlib.metadata
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

import course
import nbformat
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from markdown.util import HTML_PLACEHOLDER_RE
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernels/formulas.md",
}

# Longer than any fence in the text that it encloses.
FENCE = "~" * 10

# The front matter of a page that is found by links alone and uses the full width.
HIDDEN = "---\nhide: [navigation, toc]\nsearch: { exclude: true }\n---\n\n"


def place(path: str) -> str:
    """The place in the site of a file or folder of the repository, as MkDocs names its sources."""
    first, _, rest = path.partition("/")
    if path in PAGES:
        return PAGES[path]
    if first == "docs" and not path.endswith(".py"):
        return rest
    if first == "notebooks" and path.endswith(".ipynb"):
        # 4-double-quantization: the number is for the order and no part of the name.
        return f"tutorials/{Path(path).stem.partition('-')[2]}.md"
    if first == "notebooks":
        return f"tutorials/{rest}"
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def in_order(path: Path) -> tuple[int, str]:
    """A key to sort by: 2-x.ipynb is before 10-x.ipynb, and a file without a number after both."""
    number = re.match(r"\d+", path.name)
    return int(number[0]) if number else sys.maxsize, path.name


def target(link: str, origin: str) -> str:
    """The path in the repository that a link in the file `origin` points to.

    "" for a link that points to no file: a URL, or an anchor of the same page.
    """
    url = urlsplit(link)
    if url.scheme or url.netloc or not url.path or url.path.startswith("/"):
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), url.path))


class Links(Treeprocessor, Extension):
    """Rewrites links to places in the repository as links to places in the site."""

    def __init__(self) -> None:
        Treeprocessor.__init__(self)
        Extension.__init__(self)
        # Page of the site -> file in the repository.
        self.origins: dict[str, str] = {}
        self.page = ""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # After the inline patterns (20), before MkDocs' own check (0).
        md.treeprocessors.register(self, "places", 5)

    def run(self, root: Element) -> None:
        origin = self.origins.get(self.page)
        for element, key in (
            (e, key) for e in root.iter() for key in ("href", "src") if origin and e.get(key)
        ):
            link = element.get(key, "")
            path = target(link, str(origin))
            if path:
                anchor = "#" + urlsplit(link).fragment if urlsplit(link).fragment else ""
                element.set(
                    key,
                    posixpath.relpath(place(path), posixpath.dirname(self.page) or ".") + anchor,
                )


LINKS = Links()


class LongTexts(Treeprocessor):
    """Marks the columns of a table that hold whole sentences: they are not squeezed on a phone."""

    LONG = 40

    def run(self, root: Element) -> None:
        for table in root.iter("table"):
            for column in zip(*(list(row) for row in table.iter("tr")), strict=False):
                if any(self.length(cell) > self.LONG for cell in column):
                    for cell in column:
                        cell.set("class", "long")

    def length(self, cell: Element) -> int:
        """Of the text that is seen; code is in the stash by now."""
        stashed = self.md.htmlStash.rawHtmlBlocks

        def code(match: re.Match[str]) -> str:
            return re.sub(r"<[^>]+>", "", str(stashed[int(match[1])]))

        return len(HTML_PLACEHOLDER_RE.sub(code, "".join(cell.itertext())))


class Columns(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # After the inline patterns (20), when a link is no more than its text.
        md.treeprocessors.register(LongTexts(md), "long-texts", 4)


def without_formulas(html: str) -> str:
    """The same page, whose formulas are left out of the search index."""
    return html.replace('class="arithmatex"', 'class="arithmatex" data-search-exclude')


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A stored notebook as Markdown, and its images: file name -> content."""
    slug = Path(place(path.relative_to(ROOT).as_posix())).stem
    stored = nbformat.read(path, as_version=4)
    described(stored, slug)
    exporter = MarkdownExporter(raw_template=TEMPLATE.replace("FENCE", FENCE))
    text, resources = exporter.from_notebook_node(
        stored, {"unique_key": "output", "output_files_dir": slug}
    )
    return text, {
        Path(name).name: content for name, content in resources.get("outputs", {}).items()
    }


def described(stored: Any, slug: str) -> None:
    """Gives each picture of a notebook its alternative text, from `docs/alt-texts.json`.

    Of a picture that has none there, the text is what the code writes on it.
    """
    texts = json.loads((ROOT / "docs/alt-texts.json").read_text()).get(slug, {})
    for cell in stored.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["alt"] = texts.get(cell.get("id")) or labels(cell.source)


def labels(code: str) -> str:
    """The words that the code of a figure writes on it: titles and axes."""
    found = re.findall(r'(?:title|[xy]label)\w*\W{1,3}f?"([^"\\{]+)', code)
    return "A figure: " + "; ".join(dict.fromkeys(found)) + "."


TEMPLATE = """
{%- extends 'markdown/index.md.j2' -%}
{% block input %}
FENCE python
{{ cell.source }}
FENCE
{% endblock input %}
{% block stream %}{{ printed(output.text) }}{% endblock stream %}
{% block data_text scoped %}{{ printed(output.data['text/plain']) }}{% endblock data_text %}
{% block data_html scoped %}
<div class="output" markdown="0">
{{ output.data['text/html'] }}
</div>
{% endblock data_html %}
{% block data_png %}
![{{ output.metadata.alt }}]({{ output.metadata.filenames['image/png'] | path2url }})
{% endblock data_png %}
{%- macro printed(text) %}
FENCE { .text .output .no-copy }
{{ text.rstrip() | strip_ansi }}
FENCE
{% endmacro -%}
"""


def source(path: Path) -> str:
    """A source file as a page: its lines, numbered and highlighted."""
    language = {".py": "python", ".json": "json", ".toml": "toml"}.get(path.suffix, "text")
    name = path.relative_to(ROOT).as_posix()
    opening = f'{FENCE} {{ .{language} linenums="1" }}'
    return f"{HIDDEN}# {name}\n\n{opening}\n{path.read_text().rstrip()}\n{FENCE}\n"


def folder(path: Path) -> str:
    """A folder as a page: a list of its files."""
    here = path.relative_to(ROOT).as_posix()
    rows = [
        f"* [{p.name}]({posixpath.relpath(place(f'{here}/{p.name}'), f'source/{here}')})"
        for p in contents(path)
    ]
    return f"{HIDDEN}# {here}/\n\n" + "\n".join(rows) + "\n"


def contents(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))


def linked(texts: dict[str, str]) -> Iterator[Path]:
    """The source files and folders that these files of the repository link to."""
    for origin, text in texts.items():
        for link in re.findall(r"\]\(\s*<?([^)>#\s]+)", text):
            path = target(link, origin)
            if (
                path
                and not path.startswith("..")
                and (ROOT / path).exists()
                and place(path).startswith("source/")
            ):
                yield ROOT / path
                if (ROOT / path).is_dir():
                    yield from (
                        p
                        for p in contents(ROOT / path)
                        if place(p.relative_to(ROOT).as_posix()).startswith("source/")
                    )


def mathjax() -> bytes:
    """MathJax as a single file, from a package that contains it."""
    files = importlib.metadata.files("sphinx-mathjax-offline") or []
    (path,) = [f for f in files if f.name == "tex-svg.js"]
    return Path(str(path.locate())).read_bytes()


def on_config(config: MkDocsConfig) -> None:
    """Patterns in the navigation become the pages of the files that they match."""

    def expand(entry: Any) -> Any:
        if isinstance(entry, list):
            return [page for e in entry for page in (matches(e) if "*" in e else [expand(e)])]
        if isinstance(entry, dict):
            return {title: expand(e) for title, e in entry.items()}
        return entry

    def matches(pattern: str) -> list[str]:
        paths = sorted(ROOT.glob(pattern), key=in_order)
        return [place(p.relative_to(ROOT).as_posix()) for p in paths]

    config.nav = expand(config.nav)
    config.markdown_extensions += [LINKS, Columns()]  # type: ignore[list-item]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages whose files are not in docs/, and their images."""

    def add(
        uri: str, content: str | bytes, inclusion: InclusionLevel = InclusionLevel.INCLUDED
    ) -> None:
        files.append(File.generated(config, uri, content=content, inclusion=inclusion))

    pages = files.documentation_pages()
    texts = {f"docs/{f.src_uri}": course.filled(f.content_string) for f in pages}
    for name in PAGES:
        texts[name] = (ROOT / name).read_text()
        add(place(name), texts[name])
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        texts[name], pictures = notebook(path)
        add(place(name), texts[name])
        for picture, content in pictures.items():
            add(f"{place(name).removesuffix('.md')}/{picture}", content)
    for path in sorted(set(linked(texts))):
        text = folder(path) if path.is_dir() else source(path)
        add(place(path.relative_to(ROOT).as_posix()), text, InclusionLevel.NOT_IN_NAV)
    add("javascripts/tex-svg.js", mathjax())
    LINKS.origins = {place(name): name for name in texts}


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    LINKS.page = page.file.src_uri
    if page.is_homepage:
        # A list of one entry is no help there, and the first screen uses the full width.
        page.meta["hide"] = ["navigation", "toc"]
    return course.filled(markdown)


def on_page_content(html: str, **_: Any) -> str:
    return without_formulas(html)
