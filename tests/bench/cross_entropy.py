"""linear_cross_entropy against the whole logits: errors, peak memory and time.

    python tests/bench/cross_entropy.py [--tokens 1024] [--hidden 576] [--vocabulary 49152]

Errors are those of the loss and of both gradients against float64, for float32 inputs of 512
tokens. Peak memory is that of a process of its own for each loss, forward and backward, above its
inputs and gradients (VmHWM; Linux). Time is the median of alternating runs, forward and backward
with a frozen weight, as in QLoRA. Nothing is timed if an error is too large.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import side_by_side as bench
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


def make(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).to(dtype)
    return x, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def errors(hidden: int, vocabulary: int) -> dict[str, float]:
    """Relative errors of the loss and of both gradients, in float32."""

    def run(loss: Loss, dtype: torch.dtype) -> list[Tensor]:
        x, weight, labels = make(512, hidden, vocabulary, torch.float32)
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


def peak(
    loss: str, dtype: str, trained: bool, hidden: int, vocabulary: int, threads: int
) -> bench.Result:
    """Bytes at the peak above inputs and gradients, in this process, of 2,048 tokens."""
    torch.set_num_threads(threads)
    x, weight, labels = make(2048, hidden, vocabulary, getattr(torch, dtype))
    weight.requires_grad_(trained)
    # Libraries and their buffers are there before the measurement.
    small = weight[:128].detach().requires_grad_(trained)
    backward(LOSSES[loss], x[:64], small, labels[:64] % 128)

    before = bench.memory("VmRSS")
    bench.restart_peak()
    backward(LOSSES[loss], x, weight, labels)
    gradients = x.nbytes + (weight.nbytes if trained else 0)
    return {"peak": bench.memory() - before - gradients}


def print_peaks(hidden: int, vocabulary: int) -> None:
    sizes = {"hidden": hidden, "vocabulary": vocabulary}
    for dtype, trained in itertools.product(("float32", "bfloat16"), (False, True)):
        case = {"dtype": dtype, "trained": trained} | sizes
        peaks = {
            name: bench.run(__file__, case | {"loss": name}, torch.get_num_threads())["peak"]
            for name in LOSSES
        }
        kind = "trained" if trained else "frozen"
        print(f"peak above inputs and gradients, 2048 tokens, {dtype}, weight {kind}:")
        for name, size in peaks.items():
            share = peaks["linear_cross_entropy"] / size
            print(f"  {name:27} {size / 1e6:7.0f} MB  ours / this {share:5.2f}")


def print_seconds(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, runs: int) -> None:
    print(f"forward and backward, {tokens} tokens, {dtype}, weight frozen:")
    inputs = make(tokens, hidden, vocabulary, dtype)
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
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(peak(**args.child)))
        return

    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}")
    found = errors(args.hidden, args.vocabulary)
    print("errors against float64:", {name: f"{error:.1e}" for name, error in found.items()})
    if max(found.values()) > LARGEST_ERROR:
        raise SystemExit(f"an error is larger than {LARGEST_ERROR}: nothing is timed")

    print_peaks(args.hidden, args.vocabulary)
    for dtype in (torch.bfloat16, torch.float32):
        print_seconds(args.tokens, args.hidden, args.vocabulary, dtype, args.runs)


if __name__ == "__main__":
    main()
