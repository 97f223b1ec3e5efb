"""A process that fails, hangs or differs: what the others say, and how soon."""

import contextlib
import itertools
import os
import time
from typing import Any

from processes import run

from minilora.distributed import processes as joining
from minilora.distributed.processes import ProcessError, Processes, join_processes

# The smallest that a run accepts.
TIMEOUT = 5.0


def each(rank: int) -> list[Any]:
    """What this process got to know in each situation."""
    told = [_told(rank, situation) for situation in (differ, fail, fail_in_a_collective, hang)]
    # As in a process that torchrun has started again: the store is the one of those before it.
    joining._groups = itertools.count()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return [*told, _told(rank, agree)]


def _told(rank: int, situation: Any) -> str:
    with contextlib.suppress(SystemExit):
        try:
            with join_processes(TIMEOUT) as processes:
                situation(processes)
        except (ValueError, ProcessError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def differ(processes: Processes) -> None:
    processes.check_same("the data", "same")
    processes.check_same("the base model", "other" if processes.rank == 2 else "same")


def fail(processes: Processes) -> None:
    if processes.rank == 1:
        raise ValueError("no room")
    processes.share("the checkpoint is saved")


def fail_in_a_collective(processes: Processes) -> None:
    with processes.explained("step 3"):
        if processes.rank == 1:
            raise ValueError("no gradient")
        processes.exchange(1.0)


def agree(processes: Processes) -> None:
    found = processes.share("the processes are ready", f"rank {processes.rank}")
    assert found == ["rank 0", "rank 1", "rank 2"]
    processes.check_same("the base model", "same")


def hang(processes: Processes) -> None:
    if processes.rank == 2:
        # As a process does that is stopped: it gives no sign of life, and comes back much later.
        processes._heartbeat.end()  # type: ignore[union-attr]
        time.sleep(TIMEOUT + 3)
        raise SystemExit
    processes.share("the model is loaded")


def test_the_others_say_which_process_it_was() -> None:
    told = run(3, each, group=False)
    differing, failing, in_collective, hanging, started_again = zip(*told, strict=True)

    way_out = "start every process with the same command, files and versions"
    expected = f"ValueError: the base model of rank 2 is not that of rank 0: {way_out}"
    assert differing == (expected,) * 3

    failed = "ProcessError: rank 1 failed: ValueError: "
    assert failing == (f"{failed}no room", "ValueError: no room", f"{failed}no room")
    assert in_collective[::2] == (f"{failed}no gradient",) * 2

    silence = "no sign of life for 5 s (the model is loaded)"
    assert hanging == (*(f"ProcessError: rank 2 was killed or hangs: {silence}",) * 2, "")
    assert started_again == ("",) * 3
