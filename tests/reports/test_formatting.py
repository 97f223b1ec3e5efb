"""Numbers as a person reads them."""

import pytest

from minilora.reports.formatting import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (5e9, "5.00 GB"),
        (7e12, "7.00 TB"),
        (1.2345e19, "12,345,000.00 TB"),
    ],
)
def test_bytes_have_the_unit_that_a_person_would_choose(n: float, text: str) -> None:
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0000021, "2.10 us"),
        (0.0995, "99.5 ms"),
        (0.231, "231 ms"),
        (1, "1.00 s"),
        (9.996, "10.0 s"),
        (12345.6, "12,346 s"),
    ],
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
