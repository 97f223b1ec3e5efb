"""What paging costs: python tests/bench/paged.py

On the CPU: page="never" against torch.optim.AdamW(foreach=True), in one process, taking turns step
by step. With a GPU also: training under a memory limit that AdamW's states do not fit into, against
the same without a limit and against bitsandbytes' PagedAdamW32bit, if it is installed.

A wrong result is not timed: parameters and states are first compared with PyTorch's, bit for bit
(bitsandbytes, which rounds differently, within 1e-3 of the largest update).
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora import PagedAdamW

MB = 10**6
LR = 1e-3

# As LoRA's A and B: 420 tensors, 2,399,040 parameters.
ADAPTERS = [(16, 357), (357, 16)] * 210

# 1.07 GB of float32, as much again of gradients, twice that of states.
LAYERS = [(4096, 4096)] * 16


def check(name: str, right: bool) -> None:
    if not right:
        sys.exit(f"{name}: the result is wrong, so it is not timed")


def parameters(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator(params[0].device).manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, device=p.device, generator=generator)


def on_host(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and states, copied to the host."""
    tensors: list[Tensor] = []
    for p in optimizer.param_groups[0]["params"]:
        state = optimizer.state[p]
        tensors += [p.detach(), state["step"], state["exp_avg"], state["exp_avg_sq"]]
    return [tensor.cpu() for tensor in tensors]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def milliseconds(step: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def compare_never_with_foreach(steps: int, device: str, warmup: int = 5) -> None:
    my_params = parameters(ADAPTERS, device)
    their_params = parameters(ADAPTERS, device)
    mine = PagedAdamW(my_params, page="never")
    theirs = torch.optim.AdamW(their_params, foreach=True)
    times: dict[torch.optim.Optimizer, list[float]] = {mine: [], theirs: []}

    for i in range(warmup + steps):
        give_gradients(my_params, i)
        give_gradients(their_params, i)

        for optimizer in (mine, theirs) if i % 2 else (theirs, mine):
            times[optimizer].append(milliseconds(optimizer.step, device))

        if i == warmup - 1:
            check("page=never", equal(on_host(mine), on_host(theirs)))

    check("page=never", equal(on_host(mine), on_host(theirs)))
    my_time = statistics.median(times[mine][warmup:])
    their_time = statistics.median(times[theirs][warmup:])

    numel = sum(p.numel() for p in my_params)
    print(f"{numel:,} parameters in {len(ADAPTERS)} tensors on {device}")
    print(f"median of {steps} steps, taking turns\n")
    print("| PagedAdamW(page='never') | torch.optim.AdamW(foreach=True) | ours / PyTorch's |")
    print("|---|---|---|")
    print(f"| {my_time:.2f} ms | {their_time:.2f} ms | {my_time / their_time:.2f} |\n")


class Run(NamedTuple):
    """One training on the GPU: milliseconds of each step, peak bytes, the final parameters."""

    times: list[float]
    peak: int
    params: list[Tensor]


def train(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int, limit: int | None
) -> Run:
    """`limit`: bytes that PyTorch may reserve, or None."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(limit / total if limit else 1.0)
    try:
        params = parameters(LAYERS, "cuda")
        optimizer = make(params)
        times = []
        for i in range(steps):
            give_gradients(params, i)
            times.append(milliseconds(optimizer.step, "cuda"))
            optimizer.zero_grad()

        if isinstance(optimizer, PagedAdamW):
            print(optimizer.paging)
        peak = torch.cuda.max_memory_allocated()
        return Run(times, peak, [p.detach().cpu() for p in params])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def train_with_bitsandbytes(steps: int, limit: int, expected: list[Tensor]) -> Run | None:
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError:
        print("bitsandbytes is not installed: its PagedAdamW32bit is not measured")
        return None

    # Unified memory is outside PyTorch's allocator: the limit does not apply to its states.
    run = train(lambda p: PagedAdamW32bit(p, weight_decay=1e-2), steps, limit)
    differences = [(f - e).abs().max() for f, e in zip(run.params, expected, strict=True)]

    # A step of AdamW moves a parameter by about lr at most.
    check("PagedAdamW32bit", float(max(differences)) < 1e-3 * steps * LR)
    return run


def compare_under_a_limit(steps: int) -> None:
    nbytes = 4 * sum(rows * columns for rows, columns in LAYERS)

    # Parameters and gradients fit, the states do not.
    limit = 3 * nbytes
    print(
        f"{torch.cuda.get_device_name()}: {nbytes / MB:.0f} MB of parameters, "
        f"{2 * nbytes / MB:.0f} MB of states\n"
    )

    theirs = train(lambda p: torch.optim.AdamW(p, foreach=True), steps, None)
    never = train(lambda p: PagedAdamW(p, page="never"), steps, None)
    paged = train(PagedAdamW, steps, limit)
    check("PagedAdamW(page='never')", equal(never.params, theirs.params))
    check("PagedAdamW", equal(paged.params, theirs.params))

    runs = {
        "torch.optim.AdamW(foreach=True)": theirs,
        "PagedAdamW(page='never')": never,
        f"PagedAdamW, at most {limit / MB:.0f} MB": paged,
    }
    bitsandbytes = train_with_bitsandbytes(steps, limit, theirs.params)
    if bitsandbytes is not None:
        runs["bitsandbytes PagedAdamW32bit, the same limit"] = bitsandbytes

    print("\n| | ms per step | peak MB |\n|---|---|---|")
    for name, run in runs.items():
        print(f"| {name} | {statistics.median(run.times[2:]):.1f} | {run.peak / MB:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{args.threads} threads, {platform.machine()}\n"
    )
    compare_never_with_foreach(args.steps, "cpu")
    if not torch.cuda.is_available():
        print("no CUDA device here: paging under a memory limit, and bitsandbytes, not measured")
        return
    compare_never_with_foreach(args.steps, "cuda")
    compare_under_a_limit(max(5, args.steps // 10))


if __name__ == "__main__":
    main()
