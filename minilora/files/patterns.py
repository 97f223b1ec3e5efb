r"""Regular expressions from a file, matched so that they cannot hang.

`(a+)+b` takes 2^n steps for n times "a", and whoever wrote the file chose it. Most patterns are
names, though, as `re.escape` writes them: "model\.layers\.0\.q_proj". These are compared as text.
What repeats nothing and groups nothing cannot backtrack far and goes to `re`. The rest needs the
library `regex`, which has a time limit (and comes with transformers).
"""

import importlib
import re
import time
import warnings
from typing import Any

from minilora.files.text import shown
from minilora.targets import is_named

# For all matches of one file together.
_SECONDS = 0.5
_LONGEST = 10_000

_NAME = re.compile(r"\^?(?:[^\\.^$*+?{}\[\]|()]|\\[^\w])+")
# `regex` reads (ab){e<=1} as "ab with one error", `re` as ab and the text in braces.
_FUZZY = re.compile(r"(?<!\\)\{(?!\d+(,\d*)?\}|,\d+\})")
_INVALID = (re.error, Warning, ValueError, OverflowError, RecursionError, MemoryError)
_FLAT = re.compile(r"(?:[^\\()\[\]{}*+?]|\\.)*", re.DOTALL)


class Patterns:
    """The patterns of one file.

    Args:
        source: the file, for errors.
        seconds: the time limit of all matches together.

    Raises:
        ValueError: a pattern is invalid, too long or too slow, or `regex` is not installed; the
            pattern is named. So do the methods.

    Example:
        >>> patterns = Patterns("config.json")
        >>> patterns.match_end(r"^a\\.up|down", "b.down"), patterns.match_whole("up", "a.up")
        (True, False)
    """

    def __init__(self, source: object, seconds: float = _SECONDS) -> None:
        self._source = source
        self._left = seconds
        self._names: dict[str, list[tuple[bool, str]] | None] = {}
        self._compiled: dict[str, Any] = {}

    def match_end(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches a name or a dotted end of it."""
        if names := self._as_names(pattern):
            return any(name == n if from_start else is_named(name, n) for from_start, n in names)
        return self._match(pattern, r"(.*\.)?({})$", name) is not None

    def match_whole(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches the whole name."""
        if names := self._as_names(pattern):
            return any(name == n for _, n in names)
        return self._match(pattern, r"(?:{})\Z", name) is not None

    def index_after(self, pattern: str | None, name: str) -> int | None:
        """The number after the pattern's first match: layers.3.q_proj has 3. None: after any."""
        if pattern is None:
            found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        else:
            found = self._match(pattern, r"(?:^|.*?\.)(?:{})\.(?P<index>\d+)\.", name)
        return None if found is None else int(found["index"])

    def _as_names(self, pattern: str) -> list[tuple[bool, str]] | None:
        """The alternatives of a pattern that consists of names alone: (begins with ^, name)."""
        if pattern not in self._names:
            parts = pattern.split("|")
            literal = all(_NAME.fullmatch(part) for part in parts)
            self._names[pattern] = [_unescaped(part) for part in parts] if literal else None
        return self._names[pattern]

    def _match(self, pattern: str, template: str, name: str) -> Any:
        flat = _FLAT.fullmatch(pattern[:_LONGEST]) is not None
        key = template.replace("{}", pattern)
        if key not in self._compiled:
            self._compiled[key] = self._compile(pattern, key, flat)
        if flat:
            return self._compiled[key].match(name)

        start = time.perf_counter()
        try:
            return self._compiled[key].match(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise self._error(pattern, "takes too long to match: use names instead") from None
        finally:
            self._left -= time.perf_counter() - start

    def _compile(self, pattern: str, expression: str, flat: bool) -> Any:
        if len(pattern) > _LONGEST:
            raise self._error(pattern, f"is longer than {_LONGEST:,} characters")
        try:
            library: Any = re if flat else importlib.import_module("regex")
        except ImportError:
            hint = "needs the library regex to be matched safely: pip install regex"
            raise self._error(pattern, hint) from None
        if _FUZZY.search(pattern):
            raise self._error(pattern, "has a brace that begins no repetition: write it with a \\")
        try:
            with warnings.catch_warnings():
                # What `re` refuses or warns of, `regex` may take for something else.
                warnings.simplefilter("error")
                re.compile(expression)
                return library.compile(expression)
        except (*_INVALID, library.error) as error:
            reason = f"is not a valid regular expression ({shown(error)})"
            raise self._error(pattern, reason) from None

    def _error(self, pattern: str, reason: str) -> ValueError:
        return ValueError(f"{self._source}: the pattern {shown(pattern)} {reason}")


def _unescaped(part: str) -> tuple[bool, str]:
    return part.startswith("^"), re.sub(r"\\(.)", r"\1", part.removeprefix("^"))
