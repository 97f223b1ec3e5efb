"""The Markdown of a GPU day: what `gpu_day.py` found, for docs/benchmarks."""

from collections.abc import Iterator
from typing import Any

import side_by_side as bench

NOT_MEASURED = "not measured"

Outcome = dict[str, Any]


def render(day: dict[str, Any]) -> str:
    """Returns the report.

    Args:
        day: {"dry run": whether, "machine": what it ran on, "steps": outcomes in order}.
    """
    return "\n".join(_lines(day)).rstrip() + "\n"


def _lines(day: dict[str, Any]) -> Iterator[str]:
    machine = day["machine"]
    if day["dry run"]:
        yield "# A dry run of `make gpu-day`"
        yield "\n**Dry run: launches were stubbed, and nothing was measured.**"
    else:
        yield f"# {machine['card']}"
        yield "\n`make gpu-day`"
    yield f"\n{_describe(machine)}\n"

    steps = day["steps"]
    rows = [[step["name"], step["status"], cell(step["seconds"])] for step in steps]
    yield bench.table(["step", "status", "seconds"], rows)
    for step in steps:
        yield from _section(step)


def _describe(machine: dict[str, Any]) -> str:
    """The card, the driver, the versions and the date, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [machine["card"], machine["driver"] and f"driver {machine['driver']}", versions]
    return "; ".join(part for part in [*parts, machine["date"]] if part) + "."


def _section(step: Outcome) -> Iterator[str]:
    yield f"## {step['name'][0].upper()}{step['name'][1:]}\n"
    yield f"{step['what']}\n"
    if step["error"]:
        yield f"{step['status'].capitalize()}:\n\n```text\n{step['error']}\n```\n"

    result = step["result"]
    for each in result.get("tables", ()):
        yield f"{each['title']}:\n\n{markdown(each)}"
    for note in result.get("notes", ()):
        yield f"{note}\n"
    if stubbed := result.get("stubbed launches"):
        yield f"Stubbed launches: {stubbed}.\n"
    if result.get("text"):
        yield f"```text\n{result['text'].strip()}\n```\n"


def markdown(table: dict[str, Any]) -> str:
    """A table of rows that need not have the same columns."""
    columns = list(dict.fromkeys(column for row in table["rows"] for column in row))
    measured = set(table["measured"])
    rows = [
        [_cell_of(row, column, is_measured=column in measured) for column in columns]
        for row in table["rows"]
    ]
    return bench.table(columns, rows)


def _cell_of(row: dict[str, Any], column: str, is_measured: bool) -> str:
    if column not in row:
        return ""
    return cell(row[column]) if is_measured else str(row[column])


def cell(value: Any) -> str:
    """A measured value with three digits or more; None was not measured."""
    if value is None:
        return NOT_MEASURED
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
