"""What paging costs: python tests/bench/paged.py

On the CPU: page="never" against torch.optim.AdamW(foreach=True), in one process, step by step in turn. With a GPU also: training
under a cap on the process's memory that Adam's states do not fit in, against the same without a cap and against bitsandbytes'
PagedAdamW32bit if it is installed. No figure is printed for a result that is wrong: parameters and states are first held against
PyTorch's, to the bit (bitsandbytes, which rounds elsewhere, within 1e-3 of the largest update).
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minilora import PagedAdamW

MB = 10**6
SHAPES = [(16, 357), (357, 16)] * 210  # as LoRA's A and B: 420 tensors, 2,399,040 parameters


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


def equal(mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> bool:
    """Parameters and states, to the bit."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for p, q in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        pairs += [
            (p, q),
            *(
                (mine.state[p][key], theirs.state[q][key])
                for key in ("step", "exp_avg", "exp_avg_sq")
            ),
        ]
    return all(torch.equal(p.detach().cpu(), q.detach().cpu()) for p, q in pairs)


def milliseconds(step: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def never_against_foreach(steps: int, device: str) -> None:
    params = [parameters(SHAPES, device) for _ in range(2)]
    mine, theirs = PagedAdamW(params[0], page="never"), torch.optim.AdamW(params[1], foreach=True)
    times: dict[torch.optim.Optimizer, list[float]] = {mine: [], theirs: []}
    for i in range(steps + 5):
        for some in params:
            give_gradients(some, i)
        for optimizer in (mine, theirs) if i % 2 else (theirs, mine):
            times[optimizer].append(milliseconds(optimizer.step, device))
        if i == 4:  # five steps to warm up
            check("page=never", equal(mine, theirs))
            times = {mine: [], theirs: []}
    check("page=never", equal(mine, theirs))
    a, b = statistics.median(times[mine]), statistics.median(times[theirs])
    print(
        f"{sum(p.numel() for p in params[0]):,} parameters in {len(SHAPES)} tensors on {device}, median of {steps} steps in turn\n"
    )
    print("| PagedAdamW(page='never') | torch.optim.AdamW(foreach=True) | ours / PyTorch's |")
    print("|---|---|---|")
    print(f"| {a:.2f} ms | {b:.2f} ms | {a / b:.2f} |\n")


# ---- a card


LAYERS = [(4096, 4096)] * 16  # 1.07 GB of float32, as much again of gradients, twice that of states


def rounds(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int, cap: int | None
) -> tuple[list[float], int, list[Tensor]]:
    """Milliseconds of each step, peak bytes and the parameters on the host; `cap`: bytes that PyTorch may take."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(cap / total if cap else 1.0)
    try:
        params = parameters(LAYERS, "cuda")
        optimizer = make(params)
        times = []
        for i in range(steps):
            give_gradients(params, i)
            times.append(milliseconds(optimizer.step, "cuda"))
            optimizer.zero_grad()
        if isinstance(optimizer, PagedAdamW):
            print(f"{optimizer.paging}")
        return times, torch.cuda.max_memory_allocated(), [p.detach().cpu() for p in params]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def under_a_cap(steps: int) -> None:
    nbytes = 4 * sum(a * b for a, b in LAYERS)
    cap = 3 * nbytes  # parameters and gradients fit, the states do not
    print(
        f"{torch.cuda.get_device_name()}: {nbytes / MB:.0f} MB of parameters, states of {2 * nbytes / MB:.0f} MB\n"
    )
    results = {
        "torch.optim.AdamW(foreach=True)": rounds(
            lambda p: torch.optim.AdamW(p, foreach=True), steps, None
        ),
        "PagedAdamW(page='never')": rounds(lambda p: PagedAdamW(p, page="never"), steps, None),
        f"PagedAdamW, at most {cap / MB:.0f} MB": rounds(PagedAdamW, steps, cap),
    }
    expected = results["torch.optim.AdamW(foreach=True)"][2]
    for name, (_, _, found) in results.items():
        check(name, all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)))
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError:
        print("bitsandbytes is not installed: its PagedAdamW32bit is not measured")
    else:
        # Unified memory lies outside PyTorch's allocator: the cap binds what PyTorch takes, not the states.
        found = rounds(lambda p: PagedAdamW32bit(p, weight_decay=1e-2), steps, cap)
        worst = max(float((f - e).abs().max()) for f, e in zip(found[2], expected, strict=True))
        check("PagedAdamW32bit", worst < 1e-3 * steps * 1e-3)
        results["bitsandbytes PagedAdamW32bit, the same cap"] = found
    print("\n| | ms a step | peak MB |\n|---|---|---|")
    for name, (times, peak, _) in results.items():
        print(f"| {name} | {statistics.median(times[2:]):.1f} | {peak / MB:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} threads, {platform.machine()}\n"
    )
    never_against_foreach(args.steps, "cpu")
    if not torch.cuda.is_available():
        print("no CUDA device here: paging under a memory cap, and bitsandbytes, are not measured")
        return
    never_against_foreach(args.steps, "cuda")
    under_a_cap(max(5, args.steps // 10))


if __name__ == "__main__":
    main()
