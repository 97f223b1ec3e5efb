"""The harness sees every way in which a case may not end."""

import gc
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzzing
import pytest
from fuzzing import REFUSED, SAME, Wrong, attempt

from minilora.huggingface import heap


def ended(run: Any, **limits: Any) -> fuzzing.Case:
    return fuzzing.run_case("made up", SimpleNamespace(run=run, **limits), 0)


def raising(error: BaseException) -> Any:
    def call() -> None:
        raise error

    return call


def allocate() -> str:
    assert len(b"x" * 80_000_000) == 80_000_000
    return SAME


@pytest.mark.parametrize("how", [SAME, REFUSED])
def test_a_case_that_ends_well(how: str) -> None:
    case = ended(lambda seed, folder: how)
    assert case.wrong is None and case.ended == how


@pytest.mark.parametrize(
    ("run", "limits", "kind"),
    [
        (lambda seed, folder: None, {}, "the case ended in None"),
        (lambda seed, folder: raising(Wrong("silent", "x"))(), {}, "silent"),
        (lambda seed, folder: {}["x"], {}, "raw"),
        (lambda seed, folder: time.sleep(0.2) or SAME, {"SECONDS": 0.1}, "slow"),
        (lambda seed, folder: time.sleep(9) or SAME, {"SECONDS": 0.02}, "stuck"),
        (lambda seed, folder: allocate(), {"MEGABYTES": 40}, "memory"),
    ],
)
def test_a_case_that_ends_badly(run: Any, limits: dict[str, Any], kind: str) -> None:
    assert kind in (ended(run, **limits).wrong or "")


def test_memory_is_seen_where_as_much_is_freed_during_the_case() -> None:
    def after_a_collection(seed: int, folder: Path) -> str:
        gc.collect()
        return allocate()

    cycle: list[Any] = [b"x" * 200_000_000]
    cycle.append(cycle)
    del cycle
    assert "memory" in (ended(after_a_collection, MEGABYTES=40).wrong or "")


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_memory_is_seen_where_the_heap_has_as_much() -> None:
    with heap.freed_memory_is_kept():
        blocks = [b"x" * 20_000_000 for _ in range(8)]
        del blocks
        assert "memory" in (ended(lambda seed, folder: allocate(), MEGABYTES=40).wrong or "")


def test_a_user_can_act_on_an_error_that_names_the_thing() -> None:
    error = ValueError("layer.0 is damaged")
    assert attempt(raising(error), ["layer.0"]) == (None, error)
    assert attempt(lambda: 3, []) == (3, None)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("layer.0"),
        ValueError("something is damaged"),
        ValueError(""),
        ValueError("layer.0" + 5000 * "!"),
        ValueError("layer.0 \x1b[31m"),
        RecursionError("layer.0"),
    ],
)
def test_a_user_cannot_act_on_a_raw_error(error: Exception) -> None:
    with pytest.raises(Wrong, match="raw"):
        attempt(raising(error), ["layer.0"])


def test_the_folder_of_a_case_is_empty_and_its_own() -> None:
    seen: list[Path] = []
    ended(lambda seed, folder: seen.append(folder) or (folder / "x").write_text("") or SAME)
    ended(lambda seed, folder: seen.append(folder) or (list(folder.iterdir()) and "x") or SAME)
    assert len(set(seen)) == 2 and not any(folder.exists() for folder in seen)
