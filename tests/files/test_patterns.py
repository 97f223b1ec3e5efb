"""Patterns from a file match what `re` says, as PEFT uses it, and never take long."""

import importlib
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.files.patterns import Patterns

NAMES = ["up", "a.up", "b.a.up", "a.b", "layers.3.up", "layers.10.up", "xup", "up.down"]
PATTERNS = [
    "up",
    "^up",
    "a.up",
    r"a\.up",
    r"^a\.up|b",
    "^up|^a",
    r".*\.up",
    "(a|b).up",
    "u.",
    "a.*",
]
PATTERNS += [r"layers\.\d+\.up", "", "$", "x?up", r"\w+", "[ab]"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    pytest.importorskip("regex", reason="patterns with repetitions are matched by regex")
    patterns = Patterns("config")
    for name in NAMES:
        end = re.match(rf"(.*\.)?({pattern})$", name) is not None
        whole = re.fullmatch(pattern, name) is not None
        assert patterns.match_end(pattern, name) == end
        assert patterns.match_whole(pattern, name) == whole


@given(st.lists(st.text(st.sampled_from("ab.\\|*-_ ^$"), min_size=1), min_size=1, max_size=3))
def test_escaped_names_are_those_names(names: list[str]) -> None:
    pattern = "|".join(map(re.escape, names))
    patterns = Patterns("config")
    assert all(patterns.match_whole(pattern, name) for name in names)
    assert not patterns.match_whole(pattern, "c") and not patterns.match_whole(pattern, "a0b")


def test_the_index_of_a_block() -> None:
    patterns = Patterns("config")
    assert patterns.index_after("layers", "model.layers.3.up") == 3
    assert patterns.index_after("layers", "model.layers.3.experts.7.up") == 3
    assert patterns.index_after(None, "model.layers.10.up") == 10
    assert patterns.index_after("h", "model.layers.3.up") is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "is not a valid regular expression"),
        ("[", "is not a valid regular expression"),
        ("a{99999999999}(", "is not a valid regular expression"),
        ("(" * 3000 + ")" * 3000, "is not a valid regular expression"),
        ("(?i)up", "is not a valid regular expression"),
        ("[[:alpha:]]+", "is not a valid regular expression"),
        (r"\pL+", "is not a valid regular expression"),
        ("(up){e<=1}", "has a brace that begins no repetition"),
        ("u.|" * 10_000, "is longer than 10,000 characters"),
        ("((u|p|up)+)+[^a-z]", "takes too long to match: use names instead"),
    ],
)
def test_a_bad_pattern_is_refused_by_name_and_soon(pattern: str, reason: str) -> None:
    pytest.importorskip("regex", reason="patterns with repetitions are matched by regex")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"^config: the pattern ") as error:
        Patterns("config").match_end(pattern, 60 * "up")
    assert reason in str(error.value) and pattern[:20] in str(error.value)
    assert time.perf_counter() - start < 2


def test_without_regex_only_repetitions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert Patterns("config").match_end("a.up", "b.a.up")
    with pytest.raises(ValueError, match=r"needs the library regex .*: pip install regex"):
        Patterns("config").match_end(".*up", "b.a.up")
