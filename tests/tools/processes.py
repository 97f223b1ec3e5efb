"""A function in several processes at once, as `torchrun` would start them, for tests.

    def work(rank: int, size: int) -> int:
        total = torch.ones(())
        torch.distributed.all_reduce(total)
        return int(total)

    assert run(2, work, 5) == [2, 2]

The module that holds the function is imported once, in a process of its own, and the ranks are
forked from it: importing PyTorch and transformers takes seconds.
"""

import contextlib
import gc
import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_TOOLS = Path(__file__).resolve().parent

# What one rank may wait for another one, in seconds: less than a group may take.
_COLLECTIVE = 30

# The end of a rank's output that an error shows.
_SHOWN = 4000


def run(
    n: int, function: Callable[..., Any], *args: Any, timeout: float = 120, group: bool = True
) -> list[Any]:
    """Calls `function(rank, *args)` in each of `n` processes, which are a gloo group.

    Each has one thread, the environment that `torchrun` gives, and a generator with the same seed.

    Args:
        n: number of processes.
        function: of a module's top level. The module is imported in a new process.
        args: what JSON holds; a `Path` arrives as a string.
        timeout: seconds, after which all processes are killed.
        group: False: the processes are no group yet; the function starts it.

    Returns:
        What the function returned, by rank: what JSON holds.

    Raises:
        AssertionError: a process failed, or took too long. It shows what each of them printed.
    """
    source = inspect.getsourcefile(function)
    assert source is not None
    with tempfile.TemporaryDirectory(prefix="minilora-ranks-") as name:
        folder = Path(name)
        call = {"n": n, "source": source, "function": function.__name__, "args": args}
        call |= {"group": group, "port": _free_port()}
        (folder / "call.json").write_text(json.dumps(call, default=str))
        problem = _launch(folder, timeout)
        if problem is not None:
            raise AssertionError(f"{problem}\n{_output(folder, n)}")
        return [json.loads(_result(folder, rank).read_text()) for rank in range(n)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _launch(folder: Path, timeout: float) -> str | None:
    """Runs the group to its end; returns what went wrong."""
    path = os.pathsep.join([str(_ROOT), str(_TOOLS), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with (folder / "output").open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **threads, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            stdout=output,
            stderr=output,
            # A process group of its own, so that it can be killed with all ranks.
            start_new_session=True,
        )
        try:
            code = launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"the processes took more than {timeout:g} s and were killed"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    return None if code == 0 else "a process failed, and the others were killed"


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.json"


def _output(folder: Path, n: int) -> str:
    """What the launcher and each rank printed, from the end."""
    files = [folder / "output", *(folder / f"output-{rank}" for rank in range(n))]
    texts = {file.name: file.read_text(errors="replace") for file in files if file.exists()}
    return "\n".join(f"--- {name}\n{text[-_SHOWN:]}" for name, text in texts.items() if text)


def main(folder: Path) -> int:
    """The launcher: imports the module, forks the ranks and waits for them."""
    call = json.loads((folder / "call.json").read_text())
    function = _imported(call)

    ranks = {}
    for rank in range(call["n"]):
        pid = os.fork()
        if pid == 0:
            return _rank(folder, rank, function, call)
        ranks[pid] = rank
    # Not before: a process with threads must not be forked.
    store = None if call["group"] else _store(call["port"])

    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if code := os.waitstatus_to_exitcode(status):
            print(f"rank {rank} ended with {code}", flush=True)
            # The others wait for it in vain.
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    del store
    return 0


def _store(port: int) -> Any:
    """The store that `torchrun` keeps for its processes, through all their restarts."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def _imported(call: dict[str, Any]) -> Callable[..., Any]:
    source = Path(call["source"])
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, call["function"])
    return function


def _rank(folder: Path, rank: int, function: Callable[..., Any], call: dict[str, Any]) -> int:
    with (folder / f"output-{rank}").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        import torch

        n = call["n"]
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(call["port"])}
        torch.set_num_threads(1)
        torch.manual_seed(0)
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        if call["group"]:
            result = _in_group(folder, rank, n, function, call["args"])
        else:
            result = function(rank, *call["args"])
        _result(folder, rank).write_text(json.dumps(result))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _in_group(
    folder: Path, rank: int, n: int, function: Callable[..., Any], args: list[Any]
) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=n,
        timeout=timedelta(seconds=_COLLECTIVE),
    )
    try:
        return function(rank, *args)
    except BaseException:
        # Before the group ends: the others fail when it does, and this process is killed with them.
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        # What holds a communicator goes first: the other way round, gloo aborts at exit.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
