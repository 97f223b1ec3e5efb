"""A training step of one process, of DDP and of FSDP2, with as many threads in all; and loading.

    python tests/bench/distributed.py

The model has SmolLM2-135M's shape and random weights, in NF4 with adapters; every side computes the
same global batch, and its loss in chunks of tokens. The sides take turns, each measurement is a
process group of its own, and nothing is reported unless the losses agree. `plain` is `fully_shard`
and torch.optim.AdamW as they come; `shard` is `minilora.distributed.shard` and PagedAdamW. With
`taskset -c 0` all processes share one core, which compares the work that they do.

`half` is what one of two processes has to compute at least: half of the batch, with half of the
threads, and no other process. No other side can be faster. "busy" is how many cores one process
keeps busy: where it is near the number of its threads, nothing can be hidden behind anything.

Loading: bytes of the base in each of four processes, and the peak of their anonymous memory while
they load, against one process.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import SHAPE
from torch import Tensor, nn

import minilora

ROOT = Path(__file__).resolve().parents[2]
BATCH, LENGTH, RANK = 8, 128, 16
SIDES = {"one": 1, "half": 1, "ddp": 2, "plain": 2, "shard": 2}


class Loss(nn.Module):
    """The loss as a module's forward, so that the hooks of DDP and FSDP2 run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        from minilora.huggingface import causal_lm_loss

        return causal_lm_loss(self.model, {"input_ids": ids}, ids)


def dense_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False)).to(torch.bfloat16)


def prepared(side: str) -> tuple[nn.Module, Any]:
    """The module whose forward is the loss, and the optimizer of its parameters."""
    from torch.distributed.fsdp import fully_shard

    model = Loss(minilora.inject(minilora.quantize(dense_model()), RANK).train())
    if side == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif side == "plain":
        for layer in model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif side == "shard":
        from minilora.distributed import shard

        shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if side == "plain" else minilora.PagedAdamW
    return model, kind(trained, lr=1e-3)


def train(side: str, steps: int) -> dict[str, Any]:
    """Losses, seconds of each step but the first, and seconds of a step by what took them."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model, optimizer = prepared(side)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 7919 % SHAPE["vocab_size"]
    ids = ids[: BATCH // 2] if side == "half" else ids

    losses, seconds, busy, parts = [], [], [], []
    for _ in range(steps + 1):
        with seconds_of_communication() as spent:
            start, computed = time.perf_counter(), time.process_time()
            loss = model(ids[rank::size])
            loss.backward()
            before = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            end = time.perf_counter()
        seconds.append(end - start)
        busy.append((time.process_time() - computed) / (end - start))
        parts.append({**spent, "optimizer": end - before})
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    medians = {name: statistics.median(part[name] for part in parts[1:]) for name in parts[-1]}
    return {"losses": losses, "seconds": seconds[1:], "busy": busy[1:], "parts": medians}


@contextmanager
def seconds_of_communication() -> Iterator[dict[str, float]]:
    """Seconds inside of FSDP2's collectives and copies; 0 if there are none."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    functions = {
        "all-gather": "foreach_all_gather",
        "copies out": "foreach_all_gather_copy_out",
        "reduce-scatter": "foreach_reduce",
    }
    originals = {name: getattr(group, name) for name in functions.values()}
    spent = dict.fromkeys(functions, 0.0)

    def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[label] += time.perf_counter() - start

        return call

    for label, name in functions.items():
        setattr(group, name, timed(label, originals[name]))
    try:
        yield spent
    finally:
        for name, function in originals.items():
            setattr(group, name, function)


def load(folder: str) -> dict[str, Any]:
    """Bytes of the base in this process, and the peak of its anonymous memory while it loads."""
    from torch.distributed.tensor import DTensor

    from minilora.huggingface.heap import return_freed_memory
    from minilora.huggingface.sharded_folder import load_sharded

    def loaded() -> Any:
        if dist.is_initialized():
            return load_sharded(folder, adapter={"r": RANK})[0]
        return minilora.inject(minilora.load(folder)[0], RANK)

    # The first time, libraries are imported and kernels compiled, too.
    loaded()
    return_freed_memory()
    with anonymous_peak() as peak:
        model = loaded()
    base = [p for p in model.parameters() if not p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in base]
    return {"bytes": sum(p.nbytes for p in local), "peak": peak[0]}


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The most anonymous memory of this process inside the block, above what it has before."""

    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    before, peak, done = now(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], now() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def measure(arguments: argparse.Namespace) -> None:
    """Measures in this process, which torchrun may have started, and prints one line of JSON."""
    is_group = "RANK" in os.environ
    if is_group:
        dist.init_process_group("gloo")
    torch.set_num_threads(arguments.threads)
    loads = arguments.side == "load"
    result = load(arguments.folder) if loads else train(arguments.side, arguments.steps)
    if not is_group or dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    # What holds a communicator goes first: the other way round, gloo aborts at exit.
    gc.collect()
    if is_group:
        dist.destroy_process_group()


def run(side: str, size: int, threads: int, *options: str) -> dict[str, Any]:
    """What the first of `size` processes measured, each with so many threads."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    call = [
        str(ROOT / "tests/bench/distributed.py"),
        "--side",
        side,
        "--threads",
        str(threads),
        *options,
    ]
    command = [sys.executable, *(torchrun if size > 1 else []), *call]
    counts = {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    environment = os.environ | counts | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare_steps(rounds: int, steps: int, cores: int) -> None:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in [*SIDES][:: -1 if turn % 2 else 1]:
            size = SIDES[side]
            threads = max(1, cores // (2 if side == "half" else size))
            found[side].append(run(side, size, threads, "--steps", str(steps)))

    expected = found["one"][0]["losses"]
    for side, results in found.items():
        if side == "half":
            # Of other examples.
            continue
        differ = max(
            abs(a - b) for r in results for a, b in zip(r["losses"], expected, strict=True)
        )
        # In bfloat16, a row's gradient depends on which rows are computed with it.
        if differ > 0.02:
            sys.exit(
                f"{side}: its losses are not those of one process, they differ by {differ:.4f}"
            )

    one = statistics.median(t for r in found["one"] for t in r["seconds"])
    print("| side | processes | s per step | least | of one process | busy | of these, seconds |")
    print("|---|---|---|---|---|---|---|")
    for side, results in found.items():
        times = [t for r in results for t in r["seconds"]]
        parts = results[-1]["parts"]
        spent = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value >= 0.005)
        median = statistics.median(times)
        busy = statistics.median(share for r in results for share in r["busy"])
        figures = f"{median:.2f} | {min(times):.2f} | {median / one:.2f} | {busy:.2f}"
        print(f"| {side} | {SIDES[side]} | {figures} | {spent} |")


def loading_results() -> tuple[dict[str, Any], dict[str, Any]]:
    """What `load` measures of one process, and of the first of four."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(
            minilora.save_quantized(minilora.quantize(dense_model()), Path(temporary, "q"))
        )
        one, four = (run("load", size, 1, "--folder", folder) for size in (1, 4))
    return one, four


def compare_loading() -> None:
    one, four = loading_results()
    for name, means in {"bytes": "base", "peak": "anonymous peak while loading"}.items():
        share = four[name] / one[name]
        megabytes = (
            f"{one[name] / 1e6:.0f} MB in one process, {four[name] / 1e6:.0f} MB in each of 4"
        )
        print(f"{means}: {megabytes}, {share:.3f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    for name, kind in {"side": str, "threads": int, "folder": str}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments)
        return
    compare_loading()
    compare_steps(arguments.rounds, arguments.steps, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
