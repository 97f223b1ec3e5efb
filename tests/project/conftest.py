"""The built site, served, and the browser that reads it."""

from collections.abc import Iterator
from typing import Any

import browser
import pytest


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with browser.served() as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    pytest.importorskip(
        "playwright", reason="the browser is driven by playwright: pip install -e .[docs]"
    )
    if not browser.CHROMIUM:
        pytest.skip("there is no chromium here")
    with browser.chromium() as chromium:
        yield chromium
