"""The demo's text."""

from minilora.demo.report import shortened


def test_an_answer_is_shortened_to_one_line() -> None:
    assert shortened("a\n  b") == "a b"
    assert shortened("x" * 97) == "x" * 95 + "…" and shortened("x" * 96) == "x" * 96
