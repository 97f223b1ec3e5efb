"""What `gpu_day.py` runs, one step per process:

    python tests/bench/gpu_day_steps.py crossover --out /a/file.json [--dry-run]

A step returns tables, each a list of rows, and the names of its columns that are measured. What is
not measured is None there. Its faults are what was wrong; the rest of its results stand.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_checks
import gpu_clock
import gpu_tune
import torch
import triton
from gpu_checks import WrongResultError, check_product, forced, gaussian, name_of, paths

from minilora.files.atomic import write_text

Result = dict[str, Any]

RIGHT, WRONG = "right", "the result is wrong, so it is not timed"

ROWS = (1, 16, 17, 32, 64, 128, 256, 2048)


class NotHereError(Exception):
    """What the step needs is not installed."""


class Sizes:
    """The sizes of a real run; small ones are for a dry run and for a checker that is slow."""

    def __init__(self, small: bool) -> None:
        self.square = (128, 128) if small else (4096, 4096)
        self.shapes = [(128, 128), (192, 128), (128, 192)] if small else [*gpu_cases.SHAPES]
        self.rows = (1, 17, 64) if small else ROWS

        # LLaMA 7B's, and of its decoder a quarter of the layers.
        self.model = {"hidden_size": 4096, "intermediate_size": 11008, "heads": 32}
        if small:
            self.model = {"hidden_size": 128, "intermediate_size": 192, "heads": 2}
        self.model["num_hidden_layers"] = 1 if small else 32
        self.decoded_layers = 1 if small else 8
        self.decoded_tokens = 2 if small else 64
        self.trained_tokens = 8 if small else 512

    def __str__(self) -> str:
        return f"width {self.model['hidden_size']}, MLP {self.model['intermediate_size']}"


def table(title: str, rows: list[Result], measured: list[str]) -> Result:
    """`measured`: the columns whose values are measured."""
    return {"title": title, "rows": rows, "measured": list(dict.fromkeys(measured))}


def smoke(sizes: Sizes) -> Result:
    """Every path against float64: the kernels alone, then as a user calls them."""
    O, I = sizes.square
    for dtype in (torch.bfloat16, torch.float32):
        gpu_checks.check_quantization(gaussian(O, I, dtype))

    w, dense = gpu_checks.packed_weight(O, I)
    rows, faults = [], []
    for direction in ("forward", "backward"):
        W = dense if direction == "forward" else dense.T
        for M in sizes.rows:
            x = gaussian(M, W.shape[1])
            for line, call in forced(direction, x, w, paths(direction, M, w)):
                row = {"direction": direction, "rows": M, "path": name_of(line)}
                found = verdict(call, x, W)
                if found == WRONG:
                    faults.append(f"{direction} M={M} {name_of(line)}: {WRONG}")
                rows.append(row | {"result": None if gpu_checks.DRY_RUN else found})

    try:
        gpu_checks.check_products(O, I, sizes.rows)
    except WrongResultError as error:
        faults.append(str(error))
    return {"tables": [table("Every path", rows, ["result"])], "faults": faults}


def verdict(call: Callable[[], torch.Tensor], x: torch.Tensor, W: torch.Tensor) -> str:
    """Runs a product x W^T: right, wrong, or too large for the card."""
    try:
        check_product("", call(), x, W)
    except WrongResultError:
        return WRONG
    except triton.runtime.errors.OutOfResources as error:
        return f"does not fit: {error}"
    return RIGHT


def crossover(sizes: Sizes) -> Result:
    """Every path at every number of rows, and cuBLAS on a bfloat16 weight; microseconds."""
    w, dense = gpu_checks.packed_weight(*sizes.square)
    timer = gpu_clock.clock()
    size = " x ".join(map(str, sizes.square))

    tables, faults = [], []
    for direction in ("forward", "backward"):
        W = dense if direction == "forward" else dense.T
        half = W.to(torch.bfloat16)
        rows = []
        for M in sizes.rows:
            x = gaussian(M, W.shape[1])
            sides: gpu_clock.Sides = {"cuBLAS, not quantized": lambda x=x, W=half: x @ W.T}
            for line, call in forced(direction, x, w, paths(direction, M, w)):
                found = verdict(call, x, W)
                if found == RIGHT:
                    sides[name_of(line)] = call
                elif found == WRONG:
                    faults.append(f"{direction} M={M} {name_of(line)}: {WRONG}")
            rows.append({"rows": M} | timer.microseconds(sides))

        measured = [column for row in rows for column in row if column != "rows"]
        title = f"{direction.capitalize()}, {size}, µs; the L2 cache is emptied by reading"
        tables.append(table(title, rows, measured))
    return {"tables": tables, "faults": faults}


def tune(sizes: Sizes) -> Result:
    """A short tune: the tiles of the table of choices, for three shapes. Stored for this user."""
    found = gpu_tune.tune(gpu_clock.clock(), sizes.shapes, sizes.rows, short=True)
    stored = None if gpu_checks.DRY_RUN else gpu_tune.store(found, torch.cuda.get_device_name())
    rows = [
        {
            "weight": " x ".join(map(str, row["shape"])),
            "direction": row["direction"],
            "rows": row["rows"],
            "fastest": row["line"] and name_of(row["line"]),
            "µs": row["microseconds"],
        }
        for row in found
    ]
    notes = ["The steps below use what was found here."] if stored else []
    return {"tables": [table("Fastest paths", rows, ["fastest", "µs"])], "notes": notes}


def bitsandbytes(sizes: Sizes) -> Result:
    """minilora, bitsandbytes, dequantize + cuBLAS and cuBLAS alone, as a user calls them."""
    if gpu_checks.bitsandbytes() is None:
        raise NotHereError("bitsandbytes is not installed: pip install bitsandbytes")

    O, I = sizes.square
    gpu_checks.check_quantization(gaussian(O, I))
    gpu_checks.check_products(O, I, sizes.rows)
    timer = gpu_clock.clock()
    rows = []
    for name, _, _, sides in gpu_cases.cases(O, I, sizes.rows):
        times = timer.microseconds(sides)
        rows.append({"case": name} | {f"{side}, µs": time for side, time in times.items()})
    measured = [f"{side}, µs" for side in ("minilora", *gpu_cases.OTHERS)]
    return {"tables": [table(f"{O} x {I}", rows, measured)]}


def decode(sizes: Sizes) -> Result:
    """One sequence, token by token, eagerly and as a CUDA graph: the same bits first."""
    from gpu_decoder import Decoder
    from gpu_decoder import decode as run

    device = torch.device(gpu_checks.DEVICE)
    tokens = sizes.decoded_tokens
    model = Decoder(sizes.model, sizes.decoded_layers, tokens, device)
    first = gaussian(1, sizes.model["hidden_size"])[None]
    x, out = first.clone(), torch.empty_like(first)

    def step() -> None:
        out.copy_(model(x))

    with torch.no_grad():
        steps = {"eager": step, "CUDA graph": gpu_clock.capture(step)}
        results, rows = {}, []
        for name, one in steps.items():
            model.start()
            x.copy_(first)
            results[name] = run(model, one, x, out, tokens)
        same = torch.equal(*results.values())
        gpu_checks.check("decoding", lambda: same and bool(out.isfinite().all()))

        for name, one in steps.items():
            model.start()
            time = gpu_clock.seconds(lambda one=one: run(model, one, x, out, tokens))
            rate = None if time is None else tokens / time
            rows.append({"how": name, "tokens per second": rate})

    title = f"Layers: {sizes.decoded_layers}; {sizes}, rank 16, {tokens} tokens"
    return {"tables": [table(title, rows, ["tokens per second"])]}


def generate(sizes: Sizes) -> Result:
    """transformers' generation, eagerly and inside `decode_graph`: the same tokens first."""
    import headline

    import minilora
    from minilora.huggingface import cuda_graph

    if gpu_checks.DRY_RUN:
        cuda_graph.check_device = lambda model: None
        cuda_graph.refuse_to_wait = contextlib.nullcontext
        cuda_graph.record = lambda step, device: (lambda: None, step())

    device = torch.device(gpu_checks.DEVICE)
    config = headline.config_of(sizes.model | {"num_hidden_layers": sizes.decoded_layers})
    model = headline.build(config, headline.in_memory(device), device).eval()
    minilora.inject(model, headline.RANK)
    for parameter in minilora.adapter_parameters(model):
        parameter.data.normal_(std=0.02)
    prompt = torch.arange(5, 21, device=device)[None]
    tokens = 2 + sizes.decoded_tokens
    answer = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **answer}

    def run(**options: Any) -> torch.Tensor:
        return model.generate(**asked, **options)

    def run_in_place() -> torch.Tensor:
        return run(cache_implementation="static", disable_compile=True)

    def run_as_graph() -> torch.Tensor:
        with cuda_graph.decode_graph(model):
            return run()

    gpu_checks.check("generating", lambda: torch.equal(run_in_place(), run_as_graph()))
    ways = {"as it is": run, "static cache": run_in_place, "decode_graph": run_as_graph}
    rows = []
    for name, way in ways.items():
        way()
        time = gpu_clock.seconds(way)
        rate = None if time is None else tokens / time
        rows.append({"how": name, "tokens per second": rate})

    title = (
        f"Layers: {sizes.decoded_layers}; {sizes}, rank 16, {tokens} tokens after a prompt of 16"
    )
    return {"tables": [table(title, rows, ["tokens per second"])]}


def qlora_step(sizes: Sizes) -> Result:
    """QLoRA steps of a model of LLaMA 7B's shape, as `headline.py` makes them."""
    import headline

    device = torch.device(gpu_checks.DEVICE)
    if not gpu_checks.DRY_RUN:
        torch.cuda.reset_peak_memory_stats()
    model = headline.build(headline.config_of(sizes.model), headline.in_memory(device), device)
    found = headline.train(model, sizes.trained_tokens, steps=4, device=device)

    numbers = zip(found["seconds"], found["losses"], strict=True)
    rows = [{"step": i + 1, "seconds": s, "loss": loss} for i, (s, loss) in enumerate(numbers)]
    peak = None
    if gpu_checks.DRY_RUN:
        rows = [row | {"seconds": None, "loss": None} for row in rows]
    else:
        peak = torch.cuda.max_memory_allocated() / 1e9

    layers = sizes.model["num_hidden_layers"]
    title = f"Layers: {layers}; {sizes}, rank 16, {sizes.trained_tokens} tokens, checkpointing"
    steps = table(title, rows, ["seconds", "loss"])
    memory = table("Memory", [{"what": "peak, allocated", "GB": peak}], ["GB"])
    return {"tables": [steps, memory], "notes": ["The first step compiles."]}


def paging(sizes: Sizes) -> Result:
    """`paged.py`: the optimizer with and without a limit of memory. Last, as it uses all of it."""
    import io

    import paged

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if gpu_checks.DRY_RUN:
            paged.ADAPTERS = paged.ADAPTERS[:4]
            paged.compare_never_with_foreach(1, "cpu", warmup=1)
        else:
            paged.compare_never_with_foreach(100, "cuda")
            paged.compare_under_a_limit(10)
    return {"text": None if gpu_checks.DRY_RUN else printed.getvalue()}


STEPS: dict[str, Callable[[Sizes], Result]] = {
    step.__name__: step
    for step in (smoke, crossover, tune, bitsandbytes, decode, generate, qlora_step, paging)
}


def run(name: str, dry_run: bool, small: bool = False) -> Result:
    """Runs one step in this process. A dry run stubs the launches and counts them."""
    launched: list[Any] = []
    if dry_run:
        from minilora.kernels.gpu import runtime

        gpu_checks.DRY_RUN, gpu_checks.DEVICE = True, "cpu"
        runtime.INTERPRETED = True
        runtime.start = lambda *launch: launched.append(launch)

    result: Result = {"tables": [], "notes": [], "faults": [], "text": None}
    try:
        result |= STEPS[name](Sizes(dry_run or small))
    except NotHereError as error:
        result["skipped"] = str(error)
    except (WrongResultError, SystemExit) as error:
        result["faults"] = [str(error)]
    return result | {"stubbed launches": len(launched)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--small", action="store_true", help="small sizes: for a slow checker")
    args = parser.parse_args()

    result = run(args.step, args.dry_run, args.small)
    if args.out:
        # Whole or not at all: the step may be stopped at any moment.
        write_text(args.out, json.dumps(result) + "\n")
    for fault in result["faults"]:
        print(fault, file=sys.stderr)
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
