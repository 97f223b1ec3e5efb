"""What a file says cannot control a terminal, nor fill it."""

import pytest

from minilora.huggingface.messages import one_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a\n  b\tc ", "a b c"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\u202eb\u2066", r"a\u202eb\u2066"),
        ("\udcff", r"\udcff"),
        ("Grüße 👋", "Grüße 👋"),
        (None, "None"),
    ],
)
def test_a_text_is_one_line_that_only_prints(text: object, expected: str) -> None:
    assert one_line(text) == expected


def test_a_text_has_a_limit() -> None:
    assert one_line("x" * 400) == "x" * 400
    assert one_line("x" * 401) == "x" * 400 + "..."
    assert len(one_line("\x1b" * 10**6, 40)) == 4 * 40 + 3
