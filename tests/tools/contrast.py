"""The contrast of what a page shows (WCAG 2)."""

import re
from typing import Any


def background(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def contrast(page: Any, selector: str) -> float:
    color = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
    return ratio(color, background(page))


def ratio(one: str, other: str) -> float:
    """The contrast of two colors (WCAG 2, relative luminance)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    red, green, blue, *alpha = (float(n) for n in re.findall(r"[\d.]+", color))
    # Text that is a little transparent is on the page's own color: opaque is close enough.
    assert not alpha or alpha[0] >= 0.8, color
    parts = [c / 255 for c in (red, green, blue)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
