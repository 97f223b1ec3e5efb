"""Every error is one line and an exit code; --debug adds the traceback; nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run_main
from safetensors import SafetensorError

from minilora.reports.errors import INTERNAL_ERROR, describe

START = [sys.executable, "-m", "minilora"]


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (ValueError("r=0: must be positive"), "r=0: must be positive", 1),
        (OSError(28, "No space left on device"), "No space left", 1),
        (MemoryError(), "out of memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), "out of memory", 1),
        (RuntimeError("a tensor"), "internal error: RuntimeError('a tensor')", INTERNAL_ERROR),
        (KeyError("layer"), "internal error: KeyError('layer')", INTERNAL_ERROR),
        (RecursionError("deep"), "internal error: RecursionError", INTERNAL_ERROR),
        (SafetensorError("header"), "internal error: SafetensorError", INTERNAL_ERROR),
        (ValueError(""), "internal error: ValueError('')", INTERNAL_ERROR),
    ],
)
def test_an_error_is_described_in_one_line(error: Exception, said: str, code: int) -> None:
    text, found = describe(error)
    assert said in text and found == code


@pytest.mark.parametrize("debug", [True, False])
def test_debug_shows_the_traceback(
    debug: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("a\x1b[31m\nb")

    monkeypatch.setattr("minilora.reports.dry_run.read_config", fails)
    arguments = ["--debug"] * debug + ["plan", "--model", "x"]
    code, err = run_main(capsys, monkeypatch, *arguments)
    assert code == INTERNAL_ERROR and ("Traceback" in err) == debug
    line = err.splitlines()[-1]
    assert line.startswith("minilora: internal error: KeyError") and "--debug" in line
    assert "\x1b" not in line and (debug or err.count("\n") == 1)


def test_a_usage_error_is_one_line_that_only_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, err = run_main(capsys, monkeypatch, "plan", "--model", "x", "--\u202e\x1b[2J")
    assert code == 2 and err.count("\n") == 1 and err.startswith("minilora: No such option")
    assert "--help" in err and "\u202e" not in err and "\x1b" not in err


@pytest.mark.parametrize("device", ["foo", "xpu", "meta", "cpu:7"])
def test_an_unknown_device_is_named_with_what_there_is(
    device: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", str(folder), "--prompt", "x", "--device", device]
    code, err = run_main(capsys, monkeypatch, "generate", *options)
    assert code == 1 and f"device='{device}': this machine has cpu" in err


def test_a_warning_is_one_line_without_a_path(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    def warns(*_: Any, **__: Any) -> None:
        warnings.simplefilter("default")
        warnings.warn("a\nlayer \x1b[31m", UserWarning, stacklevel=1)
        raise ValueError("x")

    monkeypatch.setattr("minilora.reports.dry_run.read_config", warns)
    with warnings.catch_warnings():
        _, err = run_main(capsys, monkeypatch, "plan", "--model", "x")
    assert err.splitlines() == ["minilora: warning: a layer \\x1b[31m", "minilora: x"]


def shell(command: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Runs a shell line in which $M is the command."""
    return subprocess.run(
        ["bash", "-c", "set -o pipefail; " + command],
        env={**os.environ, "M": " ".join(START), **environment},
        capture_output=True,
        check=False,
    )


def test_a_closed_pipe_and_a_full_disk_end_without_a_traceback(folder: Path) -> None:
    done = shell(f"$M plan --model {folder} | true")
    assert done.stderr == b"" and done.returncode in (0, 1)
    done = shell(f"$M plan --model {folder} > /dev/full")
    assert (
        done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr
    )


def test_standard_streams_may_be_closed_and_the_locale_may_be_c(folder: Path) -> None:
    command = f"$M generate --model {folder} --max-new-tokens 2 --prompt"
    done = shell(f"{command} - <&-")
    assert done.returncode == 1 and b"standard input is closed" in done.stderr
    assert shell(f"{command} x >&- 2>&-").returncode == 0
    done = shell(f"{command} $'\\xff'", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 1 and b"--prompt is not UTF-8 text" in done.stderr
    done = shell(f"{command} - < <(printf '\\xff')")
    assert done.returncode == 1 and b"standard input is not UTF-8 text" in done.stderr
