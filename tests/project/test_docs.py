"""Every code block of the documentation runs and prints what the page shows; pictures are current.

The ```python and ```bash blocks of a page run in order, in a folder with a tiny model under the
name of a real one. A ```text block right after one is what it prints or, after title="fails", the
error; "..." stands for anything. A ```json block is written to the file in its title. A block that
cannot run here says why: title="not run here: ...".
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import interrupted
import layout
import pytest
import torch

import minilora
from minilora.training import Interrupted

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

# The name in the documentation.
MODEL = "HuggingFaceTB/SmolLM2-1.7B-Instruct"


class Block(NamedTuple):
    language: str
    title: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(
        r'^( *)```(\w+)(?: title="([^"\n]*)")?\n(.*?)^\1```$', text, re.MULTILINE | re.DOTALL
    )
    return [
        Block(
            m[2],
            m[3] or "",
            re.sub(f"^{m[1]}", "", m[4], flags=re.MULTILINE),
            text[: m.start()].count("\n") + 1,
        )
        for m in found
    ]


PAGES = sorted(
    p for p in DOCS.rglob("*.md") if any(b.language in ("python", "bash") for b in blocks(p))
)
RUNS = [pytest.param(p, id=str(p.relative_to(DOCS))) for p in PAGES]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A tiny model under MODEL's name, twenty examples, four adapters, two interrupted runs."""
    pytest.importorskip("typer", reason="the commands on the pages are run with typer")
    from minilora.huggingface.loading import load_dense

    place = tmp_path_factory.mktemp("docs")
    shutil.copytree(folder, place / MODEL)
    (place / "my.jsonl").write_text(
        "".join(f'{{"prompt": "What is {i} + {i}?", "completion": "{2 * i}"}}\n' for i in range(20))
    )
    adapters = ("my-adapter", "another-adapter", "qlora-adapter", "another-qlora")
    for seed, name in enumerate(adapters, start=1):
        model, _ = load_dense(folder)
        if "qlora" in name:
            minilora.quantize(model)
        minilora.inject(model, r=8)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in minilora.adapter_parameters(model):
                parameter.normal_(std=0.02, generator=generator)
        minilora.save_adapter(model, place / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in ("stopped", "third"):
            config = minilora.FinetuneConfig(MODEL, "my.jsonl", name, steps=6, batch_size=4)
            with (
                interrupted.in_step(3, lambda: signal.raise_signal(signal.SIGTERM), accum=1),
                pytest.raises(Interrupted),
            ):
                minilora.finetune(config)
    return place


def run(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        return
    from minilora.cli import app

    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["minilora"]:
            app(words[1:], standalone_mode=False)


def agree(said: str, shown: str) -> bool:
    """Whether a page shows what was printed, apart from white space and "..."."""
    parts = [re.escape(" ".join(part.split())) for part in shown.split("...")]
    return (
        re.fullmatch(r"\s*" + r"\s*.*?\s*".join(parts) + r"\s*", " ".join(said.split())) is not None
    )


@pytest.mark.parametrize("page", RUNS)
def test_a_page_runs_from_top_to_bottom(
    page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("peft", "matplotlib"):
        if f"import {needed}" in page.read_text():
            pytest.importorskip(needed, reason=f"a block of {page.name} needs {needed}")
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("MPLBACKEND", "agg")
    # The pages show the output of a machine without a GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    said: str | None = None
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "json" and block.title:
            (tmp_path / block.title).write_text(block.code)
        elif block.language == "text" and said is not None:
            assert agree(said, block.code), (
                f"{where} shows\n{block.code}\nand this was printed:\n{said}"
            )
        said = None
        if block.language not in ("python", "bash") or block.title.startswith("not run here: "):
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if block.title == "fails":
                with pytest.raises((ValueError, TypeError, OSError, ArithmeticError)) as error:
                    run(block, page, namespace)
                said = str(error.value)
            else:
                run(block, page, namespace)
                said = out.getvalue()


def test_what_agrees_and_what_does_not() -> None:
    assert agree("a  1.5 b\n", "a ... b") and agree("a b", "a\nb\n")
    assert not agree("a 1 b", "a 2 b") and not agree("a b c", "a b")


@pytest.mark.parametrize("page", [*RUNS, pytest.param(ROOT / "README.md", id="README.md")])
def test_every_command_and_flag_exists(page: Path) -> None:
    """Even in blocks that do not run here."""
    typer = pytest.importorskip("typer", reason="the commands are typer's")
    from minilora.cli import app

    commands: Any = typer.main.get_command(app)
    for block in blocks(page):
        for line in (
            block.code.replace("\\\n", " ").splitlines() if block.language == "bash" else ()
        ):
            words = shlex.split(line, comments=True)
            if words[:1] == ["minilora"]:
                # Raises where click would.
                commands.commands[words[1]].make_context(words[1], words[2:])


def test_few_blocks_are_not_run() -> None:
    skipped = [
        (page.name, b.title)
        for page in PAGES
        for b in blocks(page)
        if b.title.startswith("not run here: ")
    ]
    assert len(skipped) <= 7, skipped
    titles = {b.title for page in PAGES for b in blocks(page) if b.language in ("python", "bash")}
    assert all(title in ("", "fails") or title.startswith("not run here: ") for title in titles), (
        titles
    )


@pytest.fixture(scope="module")
def draw() -> Any:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_stored_pictures_are_those_drawn(draw: Any, tmp_path: Path) -> None:
    draw.main(tmp_path)
    stored, drawn = (
        {p.name: p.read_text() for p in folder.glob("*.svg")}
        for folder in (DOCS / "pictures", tmp_path)
    )
    assert (
        drawn and {name for name in drawn | stored if drawn.get(name) != stored.get(name)} == set()
    ), "python docs/draw.py"


def test_text_in_pictures_is_large_enough(draw: Any) -> None:
    for name, picture in draw.PICTURES.items():
        drawn = picture()
        sizes = [int(size) for size in re.findall(r"font(?:-size)?:(?:\d+ )?(\d+)px", str(drawn))]
        assert sizes and min(sizes) * 700 / drawn.width >= 11, name


def test_the_picture_of_the_structure_is_what_the_sources_import(draw: Any) -> None:
    structure = sys.modules["structure"]
    assert tuple(structure.CORE) == layout.CORE
    assert set(structure.SUBPACKAGES) == {*layout.SUBPACKAGES, "cli"}
    assert set(structure.KERNELS) == layout.KERNELS

    for unit in structure.UNITS:
        names = {
            name
            for path, owner in layout.FILES.items()
            if owner == unit
            for name in layout.imports(path, ast.parse(path.read_text()))
            if name.startswith("minilora.")
        }
        # `ops` loads the kernels by name, so that `import minilora` does not import them.
        by_name = layout.KERNELS if unit == "ops" else set()
        expected = {layout.unit_named(name) for name in names} - {unit, "minilora"} | by_name
        assert structure.imported(unit) == expected, unit


def test_an_arrow_is_left_out_where_another_way_leads(draw: Any) -> None:
    direct = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert sys.modules["structure"].reduced(direct) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_the_codes_drawn_are_those_of_the_library(draw: Any) -> None:
    values = [y / 100 for y in range(-100, 101)]
    assert [draw.code_of(y) for y in values] == minilora_codes(values)


def minilora_codes(values: list[float]) -> list[int]:
    """With a 1 at the front of each block of 32, whose absmax it is."""
    codes: list[int] = []
    for value in values:
        packed = minilora.quantize_nf4(torch.tensor([1.0, value]), 32, double_quant=False).packed
        codes.append(int(packed[0]) & 15)
    return codes


def test_instructions_on_the_page_are_those_of_the_budget() -> None:
    budget = json.loads((ROOT / "tests" / "tools" / "sass_budget.json").read_text())["3.9.0"]
    rows = re.findall(
        r"^\| ([\w=, ]+: _\w+) \| (\d+) \| (\d+) \| (\d+) \|$",
        (DOCS / "kernels.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 5
    for case, *numbers in rows:
        assert [budget[target][case] for target in ("sm_80", "sm_90", "sm_100")] == [
            int(number) for number in numbers
        ], case
