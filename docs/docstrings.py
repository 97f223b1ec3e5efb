"""Prepares our docstrings for mkdocstrings."""

import re
from typing import Any

import griffe

# Two or more exceptions at the start of a line: "    ValueError, TypeError:".
ERRORS = re.compile(r"^ +[\w.]+Error(?:, [\w.]+Error)+:", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Prepares docstrings for mkdocstrings.

    `Example:` becomes `Examples:`, which is shown as a Python session. `ValueError, TypeError: ...`
    becomes `ValueError | TypeError: ...`; the comma would be shown as a tuple.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
            obj.docstring.value = ERRORS.sub(lambda m: m[0].replace(",", " |"), text)
