"""Prepares our docstrings for mkdocstrings.

A docstring is read in a terminal first, so its equations are plain text: `b1^t`, `sqrt(x)`,
`argmin_j |x|`. For a page they become LaTeX, which MathJax sets.
"""

import re
from typing import Any

import griffe

# Two or more exceptions at the start of a line: "    ValueError, TypeError:".
ERRORS = re.compile(r"^ +[\w.]+Error(?:, [\w.]+Error)+:", re.MULTILINE)

# The first heading of a section; what is before it describes.
SECTIONS = re.compile(r"^ *(?:Args|Attributes|Returns|Raises|Yields|Examples?):$", re.MULTILINE)

# Indented lines between blank ones.
EQUATION = re.compile(r"(?<=\n\n)(?: {4}.+\n?)+(?=\n|\Z)")

# What a token of an equation is in LaTeX. A word that is not here is set upright.
WORDS = {
    "argmin": r"\arg\min",
    "max": r"\max",
    "sqrt": r"\sqrt",
    "eps": r"\varepsilon",
    "lr": r"\eta",
    "wd": r"\lambda",
    "over": r"\text{ over }",
    "each": r"\text{each }",
    "block": r"\text{block}",
}
TOKEN = re.compile(r"(?P<arrow><-)|(?P<word>[A-Za-z]+)(?P<digit>\d?)|(?P<other>.)")


def latex(equation: str) -> str:
    """An equation in plain text as LaTeX.

    Example:
        >>> latex("p <- p - lr m / (sqrt(v) + eps)")
        'p \\\\leftarrow p - \\\\eta m / (\\\\sqrt{v} + \\\\varepsilon)'
    """
    text = re.sub(r"<(?!-)([^<>]+)>", r"⟨\1⟩", equation)
    text = re.sub(r"\|([^|]+)\|", r"‖\1‗", text)
    parts = [_token(match) for match in TOKEN.finditer(text)]
    return _braced("".join(parts)).replace("  ", " ").strip()


def _token(match: re.Match[str]) -> str:
    if match["arrow"]:
        return r"\leftarrow"
    if word := match["word"]:
        if match["digit"]:
            return rf"\beta_{match['digit']}" if word == "b" else rf"{word}_{match['digit']}"
        return WORDS.get(word, word if len(word) == 1 else rf"\mathrm{{{word}}}")
    return {"⟨": r"\langle ", "⟩": r"\rangle", "‖": r"\lvert ", "‗": r"\rvert"}.get(
        match["other"], match["other"]
    )


def _braced(text: str) -> str:
    r"""The argument of \sqrt in braces: \sqrt(v / (1 - x)) -> \sqrt{v / (1 - x)}."""
    while (start := text.find(r"\sqrt(")) >= 0:
        opening = start + len(r"\sqrt")
        depth = 0
        for end in range(opening, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                break
        text = f"{text[:opening]}{{{text[opening + 1 : end]}}}{text[end + 1 :]}"
    return text


def typeset(docstring: str) -> str:
    """The docstring with the equations of its description in LaTeX."""
    heading = SECTIONS.search(docstring)
    end = heading.start() if heading else len(docstring)

    def block(match: re.Match[str]) -> str:
        # What stands beside it in a terminal is below it on a page, which may be narrow.
        lines = [latex(line) for line in re.split(r"\n *| {4,}", match[0].strip())]
        body = " \\\\\n".join(lines)
        return f"$$\n\\begin{{gathered}}\n{body}\n\\end{{gathered}}\n$$\n"

    return EQUATION.sub(block, docstring[:end]) + docstring[end:]


class Docstrings(griffe.Extension):
    """Prepares docstrings for mkdocstrings.

    `Example:` becomes `Examples:`, which is shown as a Python session. `ValueError, TypeError: ...`
    becomes `ValueError | TypeError: ...`; the comma would be shown as a tuple. Equations are set.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
            text = ERRORS.sub(lambda m: m[0].replace(",", " |"), text)
            obj.docstring.value = typeset(text)
