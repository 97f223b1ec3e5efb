"""kill -9 and SIGSTOP of each process, at random steps, under torchrun; and 50 ordinary ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from processes import run

from minilora.training import FinetuneConfig, finetune

# Of the whole command, after the signal.
BOUND = 60.0

STEPS, ROUNDS = 40, 10


def command(model: Path, data: Path, out: Path, *options: str) -> list[str]:
    settings = ["--model", model, "--data", data, "--out", out, "--steps", STEPS, "--save-every", 5]
    settings += ["--batch-size", 2, "--max-length", 80, "--eval-fraction", 0, "--lr", 1e-3]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    called = ["--nproc-per-node", "2", *options, "-m", "minilora", "finetune"]
    return [*torchrun, *called, *map(str, settings)]


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, of which nothing is left at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=output, start_new_session=True, env=environment()
        )
    try:
        yield process
    finally:
        for pid in [*workers(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started, the first rank first."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except FileNotFoundError:
        return []
    ranks = {}
    for child in map(int, children):
        with suppress(OSError, StopIteration):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks[child] = next(v for v in variables if v.startswith(b"RANK="))
    return sorted(ranks, key=lambda child: ranks[child])


def wait_for_step(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    lines = out / "metrics.jsonl"
    end = time.monotonic() + 120
    while not lines.exists() or lines.read_bytes().count(b"\n") < step:
        assert process.poll() is None and time.monotonic() < end, "the run does not get on"
        time.sleep(0.005)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"prompt": f"say {word}", "completion": word.upper()} for word in ("yes", "no") * 10]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def expected(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with started(command(folder, data, out), out.with_suffix(".log")) as process:
        assert process.wait(120) == 0
    return losses(out)


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_ends_the_run_and_a_resume_goes_on(
    number: signal.Signals,
    rank: int,
    round_: int,
    folder: Path,
    data: Path,
    expected: list[float],
    tmp_path: Path,
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    step = random.Random(f"{number} {rank} {round_}").randint(6, STEPS - 4)
    with started(command(folder, data, out), log) as process:
        wait_for_step(process, out, step)
        os.kill(workers(process.pid)[rank], number)
        start = time.monotonic()
        assert process.wait(BOUND) != 0
        seconds = time.monotonic() - start
    text = log.read_text()
    print(f"{number.name} of rank {rank} after step {step}: {seconds:.1f} s")
    assert seconds < BOUND
    if number == signal.SIGSTOP:
        assert f"rank {rank} was killed or hangs: no sign of life" in text, text

    resumed = [*command(folder, data, out), "--resume"]
    with started(resumed, log) as process:
        assert process.wait(120) == 0, log.read_text()
    assert losses(out) == expected


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_run_again_and_it_goes_on(
    rank: int,
    folder: Path,
    data: Path,
    expected: list[float],
    tmp_path: Path,
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with started(command(folder, data, out, "--max-restarts", "1"), log) as process:
        wait_for_step(process, out, 8)
        os.kill(workers(process.pid)[rank], signal.SIGKILL)
        assert process.wait(120) == 0, log.read_text()
    assert losses(out) == expected
    # Not from the start: the first step is printed once.
    assert log.read_text().count(f"step  1/{STEPS}") == 1


def trained(rank: int, settings: dict[str, Any]) -> int:
    """Trains to the end; how many steps there were."""
    return len(finetune(FinetuneConfig(**settings)).history)


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(25))
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_no_process_aborts_at_its_exit(
    shard: bool, round_: int, folder: Path, data: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": folder, "data": data, "out": tmp_path / "run"}
    settings |= {"steps": 2, "batch_size": 2, "max_length": 80, "eval_fraction": 0.0}
    settings |= {"shard": shard}
    # Their exit codes are looked at.
    assert run(2, trained, settings, group=False) == [2, 2]
