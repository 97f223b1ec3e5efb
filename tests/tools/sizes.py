"""How large the core is and how dense its pages are: one count for the README, the docs and tests.

    python tests/tools/sizes.py

The core is `minilora/*.py` without `__init__.py`, `__main__.py` and `cli.py`, plus
`kernels/reference`. A line of code is one that holds a token which is not a comment and not a
docstring.
"""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FACADE = ("__init__.py", "__main__.py", "cli.py")
WIDTH = 100

LAYOUT = {
    getattr(tokenize, name)
    for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING")
}


# Kernels of what `efficient_training` replaces, and of the loss: LoRA and NF4 do without.
STEP = {"attention", "scores", "heads", "words", "products", "moves"}
STEP |= {"rms_norm", "swiglu", "rotary", "softmax", "dense", "exponential", "floats"}


def core_files() -> list[Path]:
    """The files of the core, in the order of their paths."""
    package = [p for p in (ROOT / "minilora").glob("*.py") if p.name not in FACADE]
    reference = [p for p in (ROOT / "kernels" / "reference").glob("*.py") if p.stem not in STEP]
    return sorted([*package, *reference])


def library_files() -> list[Path]:
    """Every source file of the library: `minilora/` without its link to `kernels/`; `kernels/`."""
    package = ROOT / "minilora"
    inside = [p for p in package.rglob("*.py") if "kernels" not in p.relative_to(package).parts]
    return sorted([*inside, *(ROOT / "kernels").rglob("*.py")])


def _docstring_lines(tree: ast.AST) -> set[int]:
    strings = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    return {
        number
        for string in strings
        if isinstance(string.value, str)
        for number in range(string.lineno, (string.end_lineno or string.lineno) + 1)
    }


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    docstrings = _docstring_lines(ast.parse(source))
    return [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in LAYOUT and token.start[0] not in docstrings
    ]


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, not a comment alone, not of a docstring."""
    tokens = _tokens(path.read_text())
    return len({n for t in tokens for n in range(t.start[0], t.end[0] + 1)})


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def wide_lines(paths: Iterable[Path], width: int = WIDTH) -> list[str]:
    """`file:line` of every line over `width` columns."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > width
    ]


def tokens_per_line(paths: Iterable[Path], share: float = 0.9) -> int:
    """The given percentile of the number of tokens on a line of code."""
    counts: list[int] = []
    for path in paths:
        counts += Counter(token.start[0] for token in _tokens(path.read_text())).values()
    return sorted(counts)[int(share * (len(counts) - 1))]


def main() -> None:
    core, library = core_files(), library_files()
    for path in core:
        print(f"{path.relative_to(ROOT)!s:40} {lines(path):5} lines {code_lines(path):5} of code")

    total, code = sum(map(lines, core)), sum(map(code_lines, core))
    print(f"{'core':40} {total:5} lines {code:5} of code, {len(core)} files")
    print(f"lines over {WIDTH} columns: {len(wide_lines(library))}")

    folders = {
        "minilora": [p for p in library if p.is_relative_to(ROOT / "minilora")],
        "kernels/cpu": [p for p in library if p.is_relative_to(ROOT / "kernels" / "cpu")],
        "kernels/reference": [p for p in core if p.is_relative_to(ROOT / "kernels")],
    }
    for name, paths in folders.items():
        print(f"90th percentile of tokens per line, {name}: {tokens_per_line(paths)}")


if __name__ == "__main__":
    main()
