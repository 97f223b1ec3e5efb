"""linear_cross_entropy against the whole logits: errors, peak memory and time.

    python tests/bench/cross_entropy.py [--tokens 1024] [--hidden 576] [--words 49152] [--runs 5]

Errors are those of the loss and of both gradients against float64, for float32 inputs of 512
tokens. Peak memory is that of a process of its own for each loss, forward and backward, above its
inputs and gradients (VmHWM; Linux). Time is the median of alternating runs, forward and backward
with a frozen weight, as in QLoRA. Nothing is timed if an error is too large.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.losses import linear_cross_entropy

LARGEST_ERROR = 1e-6

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def whole_in_float32(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers' models compute it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


LOSSES: dict[str, Loss] = {
    "linear_cross_entropy": linear_cross_entropy,
    "F.cross_entropy": whole,
    "F.cross_entropy(.float())": whole_in_float32,
}


def make(tokens: int, hidden: int, words: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = (torch.randn(words, hidden, generator=generator) / hidden**0.5).to(dtype)
    return x, weight, torch.randint(words, (tokens,), generator=generator)


def errors(hidden: int, words: int) -> dict[str, float]:
    """Relative errors of the loss and of both gradients, in float32."""

    def run(loss: Loss, dtype: torch.dtype) -> list[Tensor]:
        x, weight, labels = make(512, hidden, words, torch.float32)
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight)]
        value = loss(*inputs, labels)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    pairs = zip(run(linear_cross_entropy, torch.float32), run(whole, torch.float64), strict=True)
    names = ("loss", "gradient of hidden", "gradient of weight")
    found = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    return dict(zip(names, found, strict=True))


def backward(loss: Loss, x: Tensor, weight: Tensor, labels: Tensor) -> None:
    x = x.detach().requires_grad_()
    loss(x, weight, labels).backward()
    weight.grad = None


def peak(name: str, tokens: int, hidden: int, words: int, dtype: str, trained: bool) -> int:
    """Bytes at the peak above inputs and gradients, in a process of its own."""
    source = Path(__file__)
    arguments = [name, str(tokens), str(hidden), str(words), dtype, str(int(trained))]
    command = [sys.executable, str(source), "--peak", json.dumps(arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_peak(name: str, tokens: str, hidden: str, words: str, dtype: str, trained: str) -> int:
    x, weight, labels = make(int(tokens), int(hidden), int(words), getattr(torch, dtype))
    weight.requires_grad_(bool(int(trained)))
    # Libraries and their buffers are there before the measurement.
    small = weight[:128].detach().requires_grad_(weight.requires_grad)
    backward(LOSSES[name], x[:64], small, labels[:64] % 128)

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    backward(LOSSES[name], x, weight, labels)
    outputs = x.nbytes + (weight.nbytes if weight.requires_grad else 0)
    return status("VmHWM") - before - outputs


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def seconds(tokens: int, hidden: int, words: int, dtype: torch.dtype, runs: int) -> None:
    inputs = make(tokens, hidden, words, dtype)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(runs + 1):
        for name, loss in LOSSES.items():
            start = time.perf_counter()
            backward(loss, *inputs)
            times[name].append(time.perf_counter() - start)
    ours = statistics.median(times["linear_cross_entropy"][1:])
    for name, found in times.items():
        median = statistics.median(found[1:])
        print(f"  {name:27} {median:7.3f} s  ours / this {ours / median:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--words", type=int, default=49152)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(measure_peak(*args.peak))
        return

    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}")
    found = errors(args.hidden, args.words)
    print("errors against float64:", {name: f"{error:.1e}" for name, error in found.items()})
    if max(found.values()) > LARGEST_ERROR:
        raise SystemExit(f"an error is larger than {LARGEST_ERROR}: nothing is timed")

    for dtype in ("float32", "bfloat16"):
        for trained in (False, True):
            kind = "trained" if trained else "frozen"
            print(f"peak above inputs and gradients, 2048 tokens, {dtype}, weight {kind}:")
            peaks = {n: peak(n, 2048, args.hidden, args.words, dtype, trained) for n in LOSSES}
            for name, size in peaks.items():
                share = peaks["linear_cross_entropy"] / size
                print(f"  {name:27} {size / 1e6:7.0f} MB  ours / this {share:5.2f}")

    for dtype in (torch.bfloat16, torch.float32):
        print(f"forward and backward, {args.tokens} tokens, {dtype}, weight frozen:")
        seconds(args.tokens, args.hidden, args.words, dtype, args.runs)


if __name__ == "__main__":
    main()
