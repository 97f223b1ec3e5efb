"""The command line, run in the process of the tests."""

import sys
from typing import Any

import pytest

from minilora.cli import main


def run_main(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[Any, str]:
    """Runs `main` in this process; returns the exit code and what is on standard error."""
    monkeypatch.setattr(sys, "argv", ["minilora", *arguments])
    monkeypatch.setattr("minilora.cli.discard_output", lambda: None)
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capsys.readouterr().err
