"""A training step of minilora and of peft + bitsandbytes on SmolLM2-135M: seconds and memory.

    python tests/bench/train_step.py            the cases of the table, one round
    python tests/bench/train_step.py --growth   and how cost grows with batch and length
    python tests/bench/train_step.py --full     three rounds; how cost grows; reference lines
    python tests/bench/train_step.py --full --store     ... into docs/benchmarks, and the page

Both sides train the same adapters, r = 8 on all linear layers, from the same start on the same
tokens with AdamW, and compute the loss of every token. Their losses are compared first: nothing is
printed if they differ. A time is the median of the steps of a process, and of the processes.

peft's `prepare_model_for_kbit_training` makes the residual stream float32, and the losses of every
step are compared with that. A third side goes without: it computes in the dtypes that minilora
computes in, but rounds x W^T to bfloat16 before the adapter's term is added, and an update smaller
than that rounding is lost. So only its loss before the first update is compared. Without
AVX512-BF16 minilora rounds so too, and that holds for all sides.

Memory is the peak of the process (VmHWM), as it is and above what was resident once the libraries
were imported. It includes loading.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import side_by_side as bench
from plots import tokens_per_second
from sides import (
    OURS,
    REFERENCE_LINES,
    SAME_DTYPE,
    SIDES,
    THEIRS,
    Case,
    Side,
    child_arguments,
    import_libraries,
    set_adapters,
    smollm2,
    text_ids,
)

from minilora.kernels.cpu.avx512 import AVX512_BF16

STEP = Case()
MAIN = {
    "step": STEP,
    "step, checkpointing": replace(STEP, checkpointing=True),
    "step, dropout 0.05": replace(STEP, dropout=0.05),
    "step, float32": replace(STEP, dtype="float32"),
    "prefill, forward alone": replace(STEP, forward_only=True),
}
LENGTHS = [replace(STEP, batch=1, length=n) for n in (64, 128, 256, 512, 1024)]
BATCHES = [replace(STEP, batch=n) for n in (1, 2, 4, 8, 16)]
LONGER = [replace(STEP, length=512), replace(STEP, batch=8, length=512)]
GROWTH = list(dict.fromkeys([*LENGTHS, *BATCHES, *LONGER]))


def measure(side: str, folder: Path, case: Case, steps: int, threads: int) -> bench.Result:
    """Takes the steps in this process. The first one compiles and allocates; it is not timed."""
    import torch

    torch.set_num_threads(threads)
    import_libraries(side, folder)
    ids = text_ids(folder, case.batch, case.length)
    imported = bench.memory("VmRSS")
    bench.restart_peak()

    built = SIDES[side](folder, case)
    if side != "full fine-tuning":
        bench.check("adapters", set_adapters(built.model) > 0)
    loading = bench.memory()

    with built.context():
        losses, seconds = take_steps(built, case, ids, steps)

    peak = bench.memory()
    return {
        "losses": losses,
        "seconds": statistics.median(seconds[1:]),
        "peak": peak,
        "peak above imports": peak - imported,
        "loading above imports": loading - imported,
        "trained": sum(p.numel() for p in built.trained),
    }


def take_steps(built: Side, case: Case, ids: Any, steps: int) -> tuple[list[float], list[float]]:
    """The loss and the seconds of each step, the first and untimed one included."""
    import torch

    losses, seconds = [], []
    if case.forward_only:
        built.model.eval()
        for _ in range(steps + 1):
            start = time.perf_counter()
            with torch.no_grad():
                logits = built.model(input_ids=ids).logits
            seconds.append(time.perf_counter() - start)
            found = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
            )
            losses.append(found.item())
            del logits, found
    else:
        optimizer = torch.optim.AdamW(built.trained, lr=1e-4)
        for _ in range(steps + 1):
            start = time.perf_counter()
            loss = built.loss(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
    return losses, seconds


def compare(
    folder: Path, case: Case, sides: Sequence[str], options: argparse.Namespace
) -> bench.Result:
    """One case: every side in turn, checked against the first, and its medians."""

    def run(side: str) -> bench.Result:
        print(f"  {case}: {side}", file=sys.stderr, flush=True)
        arguments = {"side": side, "folder": str(folder), "case": case.to_dict()}
        return bench.run(__file__, arguments | {"steps": options.steps}, options.threads)

    results = bench.in_turn(run, sides, options.rounds, noisy=options.noisy)
    check_results(case, results)
    keys = ("seconds", "peak", "peak above imports", "loading above imports")
    return {
        "case": case.to_dict(),
        "sides": {
            side: {key: bench.median(found, key) for key in keys}
            | {"seconds of each round": [one["seconds"] for one in found]}
            for side, found in results.items()
        },
    }


def check_results(case: Case, results: dict[str, list[bench.Result]]) -> None:
    """Ends the script unless all sides computed the same losses and trained as many numbers."""
    expected = results[OURS][0]
    for side, found in results.items():
        if side in REFERENCE_LINES:
            continue
        rounds_twice = side == SAME_DTYPE or (case.dtype == "bfloat16" and not AVX512_BF16)
        # With dropout the masks differ; while B is zero, they do not show.
        last = 1 if case.dropout or (rounds_twice and side != OURS) else None
        for one in found:
            name = f"{case}, {OURS} and {side}"
            bench.check(f"{name}: trained numbers", expected["trained"] == one["trained"])
            losses = expected["losses"][:last], one["losses"][:last]
            bench.check_close(name, *losses, case.loss_bound)


# -- what is printed -----------------------------------------------------------------------------


def main_table(rows: Sequence[bench.Result]) -> str:
    """Seconds and memory of each side, and ours / theirs."""
    columns = ["work", "side", "s", "ours / its", "peak MB", "ours / its"]
    columns += ["above imports MB", "ours / its"]
    lines = []
    for row in rows:
        ours = row["sides"][OURS]
        for side, found in row["sides"].items():
            cells: list[Any] = [row["name"] if side == OURS else "", side]
            for key, text in (
                ("seconds", f"{found['seconds']:.2f}"),
                ("peak", f"{found['peak'] / 1e6:,.0f}"),
                ("peak above imports", f"{found['peak above imports'] / 1e6:,.0f}"),
            ):
                cells += [text, "" if side == OURS else f"{ours[key] / found[key]:.2f}"]
            lines.append(cells)
    return bench.table(columns, lines)


def growth_table(rows: Sequence[bench.Result]) -> str:
    """Tokens per second and memory as batch and length grow."""
    columns = ["batch x length", "minilora, tokens/s", f"{THEIRS}, tokens/s", "ratio"]
    columns += ["minilora, peak MB", f"{THEIRS}, peak MB"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["case"]["batch"], row["case"]["length"])):
        ours, theirs = row["sides"][OURS], row["sides"][THEIRS]
        rates = [tokens_per_second(row, side) for side in (OURS, THEIRS)]
        size = f"{row['case']['batch']} x {row['case']['length']}"
        cells = [size, *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"]
        lines.append([*cells, *(f"{found['peak'] / 1e6:,.0f}" for found in (ours, theirs))])
    return bench.table(columns, lines)


def doublings(rows: Sequence[bench.Result], side: str) -> dict[str, float]:
    """ "batch a -> 2a at length n" -> how many times the seconds of a step."""
    seconds = {
        (row["case"]["batch"], row["case"]["length"]): row["sides"][side]["seconds"] for row in rows
    }
    return {
        f"{batch} -> {2 * batch} x {length}": seconds[2 * batch, length] / first
        for (batch, length), first in sorted(seconds.items())
        if (2 * batch, length) in seconds
    }


# ------------------------------------------------------------------------------------------------


def run_all(folder: Path, options: argparse.Namespace) -> bench.Result:
    """The table, and with --full the growth; every case is printed when it is done."""
    chosen = {name: MAIN[name] for name in options.cases or MAIN}
    with_reference_lines = ("step", "step, checkpointing")
    rows, growth = [], []
    for name, case in chosen.items():
        sides = [OURS, THEIRS]
        if case.dtype == "bfloat16" and not case.dropout:
            sides.append(SAME_DTYPE)
        if options.full and case.dtype == "bfloat16" and not case.forward_only:
            sides += ["peft + bitsandbytes, autocast", "minilora, float32 stream"]
        if options.full and name in with_reference_lines:
            sides += REFERENCE_LINES
        rows.append({"name": name} | compare(folder, case, sides, options))
        print(main_table(rows[-1:]), flush=True)
    if options.growth or (options.full and not options.cases):
        growth = [compare(folder, case, [OURS, THEIRS], options) for case in GROWTH]
        print(growth_table(growth))
        for name, ratio in doublings(growth, OURS).items():
            print(f"batch {name}: {ratio:.2f} x the time")
    return {"rounds": options.rounds, "rows": rows, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=MAIN, help="only these; default: all")
    parser.add_argument("--growth", action="store_true", help="also how cost grows, as in --full")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per process")
    bench.add_options(parser)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**child_arguments(options.child))))
        return

    bench.begin(parser, options)
    results = run_all(options.model or smollm2(), options)
    bench.finish("train_step", results, options)


if __name__ == "__main__":
    main()
