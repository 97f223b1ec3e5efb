"""Text from a file is shown on one line, cut, and with nothing that a terminal would act on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.files.text import shown


@given(st.text(st.characters()), st.integers(0, 50))
def test_what_is_shown_is_printable_and_short(text: str, limit: int) -> None:
    found = shown(text, limit)
    assert found.isprintable() and len(found) <= 10 * limit + 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0", "model.layers.0"),
        ("Größe 模型", "Größe 模型"),
        ("\x1b[2J\u202e\ud800\n", r"\x1b[2J\u202e\ud800\n"),
        (3.5, "3.5"),
        ("a" * 101, "a" * 100 + "..."),
    ],
)
def test_what_is_harmless_is_shown_as_it_is(text: object, expected: str) -> None:
    assert shown(text) == expected
