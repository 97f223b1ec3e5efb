"""A training step of this checkout against one of another checkout: seconds and peak memory.

    git worktree add /tmp/other HEAD~1
    python tests/bench/step.py --against /tmp/other

Each measurement is a process of its own; the two sides take turns, and every round runs the other
checkout twice, so that the noise of a measurement against itself stands beside the ratio. The
losses of both sides are compared first: nothing is timed if they differ.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# SmolLM2-135M's shape with random weights: nothing is downloaded.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
BATCH, LENGTH, RANK = 4, 256, 8
CASES = ("nf4", "nf4 checkpointing", "nf4 dropout", "dense")


def measure(case: str, steps: int) -> dict[str, Any]:
    """Runs the steps of one case in this process: losses, seconds per step, peak bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import minilora

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    if case != "dense":
        minilora.quantize(model)
    minilora.inject(model, RANK, dropout=0.05 if "dropout" in case else 0.0)
    model.train()
    if "checkpointing" in case:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=1e-3)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 7919 % config.vocab_size

    losses, seconds = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)

    # The first step compiles kernels and allocates.
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"losses": losses, "seconds": statistics.median(seconds[1:]), "bytes": peak}


def run(checkout: Path, case: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--steps", str(steps)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}, {case}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(other: Path, case: str, pairs: int, steps: int) -> None:
    before: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    for _ in range(pairs):
        before.append(run(other, case, steps))
        after.append(run(ROOT, case, steps))
        again.append(run(other, case, steps))

    expected, found = before[0]["losses"], after[0]["losses"]
    worst = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    # bfloat16 keeps 8 bits: a loss of 11 in another order of its roundings moves by some 0.05.
    if "dropout" not in case and worst > 0.05:
        sys.exit(f"{case}: the losses differ by {worst:.3f}: {expected} and {found}")

    for key, unit, size in (("seconds", "s", 1.0), ("bytes", "MB", 1e-6)):
        old, new, same = ([size * one[key] for one in side] for side in (before, after, again))
        ratios = [n / o for n, o in zip(new, old, strict=True)]
        noise = [s / o for s, o in zip(same, old, strict=True)]
        print(
            f"{case:18} {key:8} before {statistics.median(old):8.3f} {unit:3}"
            f"after {statistics.median(new):8.3f} {unit:3}"
            f"ratio {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]  "
            f"before against itself [{min(noise):.3f}, {max(noise):.3f}]",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per measurement")
    parser.add_argument("--case", choices=CASES, help="measure one case in this process")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    args = parser.parse_args()

    if args.case:
        print(json.dumps(measure(args.case, args.steps)))
        return
    if args.against is None:
        parser.error("--against is needed")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for case in args.cases:
        compare(args.against.resolve(), case, args.pairs, args.steps)


if __name__ == "__main__":
    main()
