"""Tokens per second of greedy generation: minilora, peft + bitsandbytes, and dense bfloat16.

    python tests/bench/generate.py              64 tokens after a prompt of 32, batch 1
    python tests/bench/generate.py --full       three rounds, batch 1, 2, 4, 8 and 16
    python tests/bench/generate.py --full --store       ... into docs/benchmarks, and the page

Both 4-bit sides have the same adapter on every linear layer, and all call transformers' own
`model.generate` with no preparation. What minilora generates is checked before anything is printed:
a float32 model with the same weights, decoded and merged with the adapter, reads the tokens, and
each has to be its best one, or as close to it as rounding the logits to bfloat16 may bring it. The
same distance of bitsandbytes' tokens is shown, and not a condition: its kernel for few rows gives
other logits than its own decoded weights.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import side_by_side as bench
from sides import (
    OURS,
    SIDES,
    THEIRS,
    Case,
    child_arguments,
    import_libraries,
    set_adapters,
    smollm2,
    text_ids,
)

DENSE = "dense"
PROMPT, TOKENS = 32, 64
BATCHES = (1, 2, 4, 8, 16)

# An adapter that changes the result: B's standard deviation.
STD_B = 0.002


def build(side: str, folder: Path, case: Case) -> Any:
    """The model of a side in eval mode, with its adapter; "dense" has none."""
    if side == DENSE:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=case.torch_dtype).eval()
    model = SIDES[side](folder, case).model.eval()
    bench.check("adapters", set_adapters(model, STD_B) > 0)
    return model


def measure(
    side: str, folder: Path, case: Case, tokens: int, calls: int, threads: int
) -> bench.Result:
    """Generates in this process; the first call compiles and is not timed."""
    import torch

    torch.set_num_threads(threads)
    import_libraries(side if side in SIDES else OURS, folder)
    ids = text_ids(folder, case.batch, case.length)
    model = build(side, folder, case)

    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        with torch.no_grad():
            output = model.generate(input_ids=ids, **options)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "tokens": output.tolist(), "peak": bench.memory()}


def distances(folder: Path, case: Case, tokens: list[list[int]], threads: int) -> bench.Result:
    """How far below the best token of a float32 model the tokens of a side are, at most.

    "bound" is what rounding may explain: twice the largest difference between the logits of this
    model in float32 and in the dtype of the case, computed by PyTorch.
    """
    import torch

    import minilora

    torch.set_num_threads(threads)
    exact = build(OURS, folder, replace(case, dtype="float32"))
    minilora.merge(exact, into="dense")
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits = exact(input_ids=ids).logits[:, case.length - 1 : -1]
        rounded = exact.to(case.torch_dtype)(input_ids=ids).logits[:, case.length - 1 : -1]
    chosen = logits.gather(2, ids[:, case.length :, None])
    return {
        "distance": (logits.amax(2, keepdim=True) - chosen).max().item(),
        "bound": 2 * (rounded.float() - logits).abs().max().item(),
    }


def compare(folder: Path, case: Case, options: argparse.Namespace) -> bench.Result:
    """All sides in turn; then what they generated is checked."""
    common = {"folder": str(folder), "case": case.to_dict()}

    def run(side: str) -> bench.Result:
        print(f"  batch {case.batch}: {side}", file=sys.stderr, flush=True)
        arguments = common | {"side": side, "tokens": options.tokens, "calls": options.calls}
        return bench.run(__file__, arguments, options.threads)

    results = bench.in_turn(run, (OURS, THEIRS, DENSE), options.rounds, noisy=options.noisy)
    sides = {}
    for side, found in results.items():
        sides[side] = {key: bench.median(found, key) for key in ("seconds", "peak")}
        sides[side]["tokens per second"] = case.batch * options.tokens / sides[side]["seconds"]
        if side != DENSE:
            arguments = common | {"tokens": found[0]["tokens"]}
            checked = bench.run(__file__, arguments, options.threads)
            sides[side] |= {key: checked[key] for key in ("distance", "bound")}
    ours = sides[OURS]
    bench.check(f"batch {case.batch}: {OURS}", ours["distance"] <= ours["bound"])
    return {"case": case.to_dict(), "tokens": options.tokens, "sides": sides}


def main_table(rows: list[bench.Result]) -> str:
    columns = ["batch", "side", "tokens/s", "ours / its", "peak MB"]
    columns += ["logits below the best, at most", "rounding explains"]
    lines = []
    for row in rows:
        ours = row["sides"][OURS]["tokens per second"]
        for side, found in row["sides"].items():
            rate = found["tokens per second"]
            cells = [row["case"]["batch"] if side == OURS else "", side, f"{rate:.1f}"]
            cells += ["" if side == OURS else f"{ours / rate:.2f}", f"{found['peak'] / 1e6:,.0f}"]
            cells += [f"{found[key]:.3f}" if key in found else "" for key in ("distance", "bound")]
            lines.append(cells)
    return bench.table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1; --full: 1 to 16")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="new tokens per sequence")
    parser.add_argument("--calls", type=int, default=2, help="timed calls per process")
    bench.add_options(parser)
    options = parser.parse_args()
    if options.child:
        arguments = child_arguments(options.child)
        print(json.dumps((measure if "side" in arguments else distances)(**arguments)))
        return

    bench.begin(parser, options)
    folder = options.model or smollm2()
    rows = []
    for batch in options.batches or (BATCHES if options.full else (1,)):
        rows.append(compare(folder, Case(batch=batch, length=PROMPT), options))
        print(main_table(rows[-1:]), flush=True)
    bench.finish("generate", {"rounds": options.rounds, "rows": rows}, options)


if __name__ == "__main__":
    main()
