"""The fuzz suite: families of hostile inputs, and how each case of them may end.

A family is a file in tests/fuzz whose name does not start with "test". It has

    CI, SAMPLE, FULL    how many cases `make test`, `make fuzz` and `make fuzz FULL=1` try
    SECONDS, MEGABYTES  what one case may take and allocate (default: 2 and 500)
    prepare()           what the first case would have to wait for (default: nothing)
    run(seed, folder)   builds one case from its seed, in an empty folder; returns how it ended

A case ends in SAME (what a plain run gives), in REFUSED (an error of a listed class that names the
file, option or layer, and nothing has changed), or it raises `Wrong`. The same seed makes the same
case on every machine.
"""

import contextlib
import gc
import importlib.util
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilora.huggingface import heap

FAMILIES = Path(__file__).parents[1] / "fuzz"

SAME = "same"
REFUSED = "refused"

# What a user can act on. Anything else that reaches a user is a raw error.
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)

LONGEST_MESSAGE = 4000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Wrong(Exception):  # noqa: N818 - it is a verdict
    """A case that ended as none may.

    Attributes:
        kind: "silent" (a wrong result without an error), "raw" (an error that is not for users),
            "changed" (a refusal that left something changed), "executed" (planted code ran),
            "slow", "memory", "stuck", "died".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Case(NamedTuple):
    """How one case ended; `wrong` is None if it ended well."""

    family: str
    seed: int
    ended: str
    seconds: float
    megabytes: float
    wrong: str | None = None


def attempt(
    call: Callable[[], Any],
    names: Sequence[str],
    expected: tuple[type[BaseException], ...] = EXPECTED,
) -> tuple[Any, BaseException | None]:
    """Calls; returns (value, None), or (None, error) if the error is one that a user can act on.

    Raises:
        Wrong: the error is of another class, its message names none of `names`, is empty or very
            long, or holds characters that control a terminal.
    """
    try:
        return call(), None
    except Wrong:
        raise
    except expected as error:
        message = str(error)
        if not any(name in message for name in names):
            raise Wrong("raw", f"{error!r} names none of {list(names)}") from error
        if not 0 < len(message) <= LONGEST_MESSAGE:
            raise Wrong("raw", f"a message of {len(message)} characters") from error
        if found := _CONTROL.search(message):
            raise Wrong("raw", f"the message holds {found[0]!r}: {message!r}") from error
        return None, error
    except Exception as error:
        raise Wrong("raw", repr(error)) from error


def family(name: str, *, prepare: bool = True) -> Any:
    """The module of a family, by default prepared to run cases.

    What the process holds now stays out of garbage collections, until `gc.unfreeze()`: each case
    starts with one.
    """
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FAMILIES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if prepare and hasattr(module, "prepare"):
        module.prepare()
    gc.collect()
    gc.freeze()
    return module


def family_names() -> list[str]:
    return sorted(p.stem for p in FAMILIES.glob("*.py") if not p.stem.startswith("test"))


def run_case(name: str, module: Any, seed: int) -> Case:
    """Runs one case in a folder of its own, within the limits of its family."""
    seconds, megabytes = getattr(module, "SECONDS", 2), getattr(module, "MEGABYTES", 500)
    # Memory that is free but resident, or is freed during the case, would be used again unnoticed.
    heap.return_freed_memory()
    _reset_peak()
    held = _status("VmRSS")
    start = time.perf_counter()
    ended, wrong = "wrong", None
    try:
        folder = tempfile.TemporaryDirectory(prefix="minilora-fuzz-")
        with folder as path, _time_limit(10 * seconds):
            ended = module.run(seed, Path(path))
        if ended not in (SAME, REFUSED):
            wrong = f"the case ended in {ended!r}"
    except Wrong as error:
        wrong = str(error) + "\n" + traceback.format_exc()
    except Exception:
        wrong = "raw: " + traceback.format_exc()

    took = time.perf_counter() - start
    used = (_status("VmHWM") - held) / 1024
    if wrong is None and took > seconds:
        wrong = f"slow: {took:.1f} s, where {seconds} s are allowed"
    if wrong is None and used > megabytes:
        wrong = f"memory: {used:.0f} MB, where {megabytes} MB are allowed"
    return Case(name, seed, ended, round(took, 4), round(used, 1), wrong)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Wrong("stuck", f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _reset_peak() -> None:
    """Makes the process's peak memory what it holds now (Linux; elsewhere the peak stays)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """A field of /proc/self/status in kilobytes; 0 where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return 0
