"""The calculator's page in a browser: numbers, keyboard, a narrow screen, light and dark."""

from collections.abc import Iterator
from typing import Any

import browser
import pytest
from contrast import background, contrast, ratio

import minilora
from minilora.reports.formatting import format_bytes

pytestmark = [
    pytest.mark.site,
    pytest.mark.skipif(
        not (browser.SITE / "calculator/index.html").exists(),
        reason="the site is not built: make docs",
    ),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with browser.served() as address:
        yield f"{address}calculator/"


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    page = chromium.new_page(viewport=browser.DESKTOP)
    page.goto(address)
    page.wait_for_selector("#calculator-peak")
    yield page
    page.close()


def shown(page: Any) -> str:
    return spaced(page.locator("#calculator-peak").inner_text())


def spaced(text: str) -> str:
    """A number's unit is never on another line, and here is behind a usual space."""
    return text.replace("\u00a0", " ")


def test_the_page_shows_what_plan_says(page: Any) -> None:
    page.locator("[name=model]").select_option("smollm2-135m")
    page.locator("[name=batch]").fill("4")
    page.locator("[name=tokens]").fill("256")
    plan = minilora.plan("smollm2-135m", r=16, batch_size=4, length=256)
    assert shown(page) == format_bytes(plan.total_bytes)

    # The method that is not chosen is there for comparison.
    summary = spaced(page.locator("#calculator-summary").inner_text())
    for method, needed in plan.compared.items():
        assert f"{method} {format_bytes(needed)}" in summary

    table = page.locator("#calculator-table tr")
    cells = [spaced(row).split("\t") for row in table.all_inner_texts()]
    totals = [format_bytes(sum(kinds.values())) for kinds in plan.phases.values()]
    assert cells[-1] == ["total", *totals]


def test_bars_are_as_long_as_what_they_show(page: Any) -> None:
    page.locator("[name=model]").select_option("llama-7b")
    plan = minilora.plan("llama-7b", r=16, batch_size=1, length=512)
    # The bars' scale is the GPU's memory where that is larger.
    scale = max(plan.total_bytes, 48 * 10**9)
    width = page.locator("#calculator-bars .bar").first.bounding_box()["width"]
    for bar, kinds in zip(
        page.locator("#calculator-bars .bar").all(), plan.phases.values(), strict=True
    ):
        parts = {spaced(part.get_attribute("title")): part for part in bar.locator(".part").all()}
        assert set(parts) == {f"{kind} {format_bytes(n)}" for kind, n in kinds.items()}
        for kind, n in kinds.items():
            box = parts[f"{kind} {format_bytes(n)}"].bounding_box()
            assert box["width"] == pytest.approx(width * n / scale, abs=1)
        said = spaced(bar.get_attribute("aria-label"))
        assert f"{format_bytes(sum(kinds.values()))}: quantized" in said


def test_everything_can_be_reached_and_changed_by_keyboard(page: Any) -> None:
    page.locator("[name=model]").focus()
    reached, before = [], shown(page)
    for _ in range(12):
        reached.append(page.evaluate("document.activeElement.name"))
        page.keyboard.press("Tab")
    names = "model method r batch tokens dtype gpu checkpointing dropout accumulate paged efficient"
    assert reached == names.split()

    page.locator("[name=batch]").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("[name=batch]").input_value() == "2" and shown(page) != before
    before = shown(page)
    page.locator("[name=checkpointing]").focus()
    page.keyboard.press("Space")
    assert shown(page) != before
    # Enter does not send the form to another page.
    page.locator("[name=tokens]").focus()
    page.keyboard.press("Enter")
    assert page.url.endswith("calculator/")


def test_every_field_has_a_name_that_is_read_aloud(page: Any) -> None:
    for field in page.locator("#calculator :is(input, select)").all():
        assert field.evaluate("e => e.labels.length == 1 && e.labels[0].textContent.trim() != ''")
    assert page.locator("#calculator-summary").get_attribute("aria-live") == "polite"


def test_a_number_out_of_range_is_said_and_a_gpu_that_is_too_small(page: Any) -> None:
    page.locator("[name=r]").fill("0")
    assert "out of range" in page.locator("#calculator-summary").inner_text()
    page.locator("[name=r]").fill("8")
    page.locator("[name=gpu]").fill("24")
    assert "does not fit" in page.locator("#calculator-summary").inner_text()


def test_the_rank_is_of_no_use_to_full_fine_tuning(page: Any) -> None:
    page.locator("[name=method]").select_option("full")
    assert page.locator("[name=r]").is_disabled()
    assert "(100.00%)" in page.locator("#calculator-summary").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(chromium: Any, address: str, scheme: str) -> None:
    page = chromium.new_page(viewport=browser.PHONE, color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("#calculator-peak")
    assert page.evaluate("document.documentElement.scrollWidth") <= browser.PHONE["width"]
    bar = page.locator("#calculator-bars .bar").first.bounding_box()
    assert bar["x"] >= 0 and bar["x"] + bar["width"] <= browser.PHONE["width"]
    for text in ("#calculator-summary", "#calculator [name=batch]", "#calculator-bars .label"):
        assert contrast(page, text) >= 4.5, text
    # A part of a bar against the page: what is no text needs 3 (WCAG 1.4.11).
    for part in page.locator("#calculator-legend .part").all():
        color = part.evaluate("e => getComputedStyle(e).backgroundColor")
        assert ratio(color, background(page)) >= 3, color
    page.close()
