"""Speed on the CPU of the 4-bit kernels: minilora, bitsandbytes and dense bfloat16.

    python tests/bench/few_rows.py              the products of a few rows, one round
    python tests/bench/few_rows.py --full       three rounds; also quantize, dequantize, M = 1024

Quantizing, decoding (into a new tensor; into one that is there already), and y = x W^T for M rows,
forward alone and with the backward, of a 4096 x 4096 weight and of SmolLM2's 576 x 1536. Every time
is the median of many calls in a process, and the smallest of the rounds.

A wrong result is not timed. minilora's and bitsandbytes' bytes and decoded weights are compared
with the reference, and all products with float64: a product may be off by a rounding of the result,
of the weight and of the sums. bitsandbytes runs as it does for a user: for few rows in eval mode,
which repacks the weight for a kernel with other roundings. Its largest error is shown beside ours
and is no condition.
"""

import argparse
import ctypes
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import side_by_side as bench
import torch
from torch import Tensor

from minilora.kernels.reference import nf4 as reference

SHAPES = {"4096 x 4096": (4096, 4096), "576 x 1536": (576, 1536)}
FEW, MANY = (1, 2, 4, 8, 16, 32), 1024
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, THEIRS, DENSE = "minilora", "bitsandbytes", "dense bfloat16"

# How long one case is repeated, at least, and how many calls there are, at least.
SECONDS, CALLS = 0.3, 9

Layer = Callable[[Tensor], Tensor]


def weight(O: int, I: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(O, I, generator=generator).mul_(0.02).to(dtype)


def inputs(rows: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, features, generator=generator).bfloat16()


def error(y: Tensor, x: Tensor, W: Tensor) -> float:
    """The largest error of bfloat16 products, in units of what rounding may cause.

    That is a rounding of the result, 2^-8, and of the weight to bfloat16 and of the sums, which add
    up as their squares do: 8 standard deviations of 2^-9 per term. Every seventh output of many.
    """
    if len(x) >= MANY:
        y, W = y[:, ::7], W[::7]
    exact = x.double() @ W.double().T
    spread = (x.double().square() @ W.double().square().T).sqrt()
    return ((y.double() - exact).abs() / (2**-8 * exact.abs() + 8 * 2**-9 * spread)).max().item()


def milliseconds(call: Callable[[], object]) -> float:
    """The median of many calls, after two to warm up."""
    times: list[float] = []
    while len(times) < CALLS + 2 or sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def both(layer: Layer, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; returns the gradient of x."""

    def call() -> Tensor:
        leaf = x.detach().requires_grad_()
        layer(leaf).backward(dy)
        assert leaf.grad is not None
        return leaf.grad

    return call


def time_products(
    side: str, shape: str, layer: Layer, W: Tensor, full: bool, found: bench.Result
) -> None:
    """Adds the products of one weight: {case: {"ms": ..., "error": ...}}."""
    O, I = W.shape
    for rows in (*FEW, MANY) if full else FEW:
        x = inputs(rows, I)
        with torch.no_grad():
            off = error(layer(x), x, W)
        bench.check(f"{side}, {shape}, M={rows}", off <= 1 or side == THEIRS)

        def forward(x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return layer(x)

        name = f"{shape}, M={rows}, forward"
        found[name] = {"ms": milliseconds(forward), "error": off}
    if full:
        dy = inputs(MANY, O)
        step = both(layer, x, dy)
        off = error(step(), dy, W.T)
        bench.check(f"{side}, {shape}, M={MANY}, gradient", off <= 1)
        name = f"{shape}, M={MANY}, forward + backward"
        found[name] = {"ms": milliseconds(step), "error": off}


def ours(full: bool) -> bench.Result:
    import minilora

    found: bench.Result = {}
    for name, dtype in FLOATS.items() if full else ():
        w = weight(4096, 4096, dtype)
        packed, absmax = reference.quantize(w, 64)
        q = minilora.quantize_nf4(w)
        bench.check("quantize", torch.equal(q.packed, packed))
        parts = reference.double_quantize(absmax)
        expected = reference.PackedWeight(packed, *parts, tuple(w.shape), 64)
        right = reference.dequantize(expected, dtype)
        bench.check("dequantize", torch.equal(q.dequantize(), right))

        found[f"quantize, {name}"] = {"ms": milliseconds(lambda w=w: minilora.quantize_nf4(w))}
        found[f"dequantize, {name}"] = {"ms": milliseconds(q.dequantize)}
        into = warm_dequantize(q, torch.empty_like(w))
        bench.check("dequantize into memory", torch.equal(into(), right))
        found[f"dequantize into warm memory, {name}"] = {"ms": milliseconds(into)}

    for shape, (O, I) in SHAPES.items():
        q = minilora.quantize_nf4(weight(O, I, torch.bfloat16))
        layer = functools.partial(_multiply, minilora.nf4_linear, q)
        time_products(OURS, shape, layer, q.dequantize(torch.float32), full, found)
    return found


def _multiply(product: Callable[..., Tensor], weight: Any, x: Tensor) -> Tensor:
    return product(x, weight)


def warm_dequantize(q: Any, out: Tensor) -> Callable[[], Tensor]:
    """Decodes into `out`, as the products do with their scratch memory."""
    from minilora.kernels.cpu import nf4
    from minilora.kernels.reference.nf4 import PackedWeight

    w = PackedWeight(*q.tensors, tuple(q.shape), q.block_size, q.quant_type)
    blocks = q.numel() // q.block_size

    def call() -> Tensor:
        nf4.dequantize_tile(w, out, (0, blocks), (0, 1), blocks_per_row=1)
        return out

    return call


def bitsandbytes(full: bool) -> bench.Result:
    from bitsandbytes import functional as B

    found: bench.Result = {}
    options = {"quant_type": "nf4", "compress_statistics": True}
    for name, dtype in FLOATS.items() if full else ():
        w = weight(4096, 4096, dtype)
        q, state = B.quantize_4bit(w, blocksize=64, **options)
        bench.check("quantize", torch.equal(q.view(-1), reference.quantize(w, 64)[0]))

        quantize = functools.partial(B.quantize_4bit, w, blocksize=64, **options)
        found[f"quantize, {name}"] = {"ms": milliseconds(quantize)}
        dequantize = functools.partial(B.dequantize_4bit, q, state)
        found[f"dequantize, {name}"] = {"ms": milliseconds(dequantize)}
        into = their_warm_dequantize(q, state, torch.empty_like(w))
        bench.check("dequantize into memory", torch.equal(into(), dequantize()))
        found[f"dequantize into warm memory, {name}"] = {"ms": milliseconds(into)}

    for shape, (O, I) in SHAPES.items():
        # Eval mode repacks the weight, so each mode has a layer of its own.
        trains, infers = (linear4bit(weight(O, I, torch.bfloat16)) for _ in range(2))
        W = B.dequantize_4bit(trains.weight.data, trains.weight.quant_state).float()
        trains.train(), infers.eval()

        def call(x: Tensor, trains: Any = trains, infers: Any = infers) -> Tensor:
            layer = trains if x.requires_grad or len(x) >= MANY else infers
            return layer(x)  # type: ignore[no-any-return]

        time_products(THEIRS, shape, call, W, full, found)
    return found


def their_warm_dequantize(q: Tensor, state: Any, out: Tensor) -> Callable[[], Tensor]:
    """bitsandbytes' C function, which decodes into `out`; its Python has no such call on the CPU.

    The absmax is decoded once, outside of what is timed.
    """
    from bitsandbytes.cextension import lib
    from bitsandbytes.functional import dequantize_blockwise

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[out.dtype]
    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{name}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (q, absmax, out)]
    sizes = [ctypes.c_longlong(size) for size in (state.blocksize, *out.shape)]

    def call(keep: Tensor = absmax) -> Tensor:
        function(*pointers, *sizes)
        return out

    return call


def linear4bit(W: Tensor) -> Any:
    """bitsandbytes' layer of a weight, double-quantized, computing in bfloat16."""
    import bitsandbytes as bnb

    O, I = W.shape
    layer = bnb.nn.Linear4bit(I, O, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        W, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer.to("cpu")


def dense(full: bool) -> bench.Result:
    found: bench.Result = {}
    for shape, (O, I) in SHAPES.items():
        W = weight(O, I, torch.bfloat16)
        layer = functools.partial(_multiply, torch.nn.functional.linear, W)
        time_products(DENSE, shape, layer, W, full, found)
    return found


SIDES = {OURS: ours, THEIRS: bitsandbytes, DENSE: dense}


def best(results: dict[str, list[bench.Result]]) -> list[bench.Result]:
    """One row per case: the smallest median of each side."""
    rows = []
    for name in results[OURS][0]["cases"]:
        row: bench.Result = {"case": name, "ms": {}, "error": {}}
        for side, turns in results.items():
            measured = [turn["cases"][name] for turn in turns if name in turn["cases"]]
            if measured:
                row["ms"][side] = min(one["ms"] for one in measured)
                if "error" in measured[0]:
                    row["error"][side] = measured[0]["error"]
        rows.append(row)
    return rows


def main_table(rows: list[bench.Result]) -> str:
    """Milliseconds, how many times our speed is theirs, and the errors against float64."""
    columns = ["case", "minilora, ms", "bitsandbytes, ms", "its / ours", "dense, ms", "its / ours"]
    columns += ["error, ours", "error, bitsandbytes"]
    lines = []
    for row in rows:
        ours = row["ms"][OURS]
        cells = [row["case"], f"{ours:.3f}"]
        for side in (THEIRS, DENSE):
            theirs = row["ms"].get(side)
            cells += [f"{theirs:.3f}", f"{theirs / ours:.2f}"] if theirs else ["", ""]
        errors = (row["error"].get(side) for side in (OURS, THEIRS))
        cells += ["" if off is None else f"{off:.2f}" for off in errors]
        lines.append(cells)
    return bench.table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    bench.add_options(parser)
    options = parser.parse_args()
    if options.child:
        arguments = json.loads(options.child)
        warnings.simplefilter("ignore")
        torch.set_num_threads(arguments["threads"])
        print(json.dumps({"cases": SIDES[arguments["side"]](arguments["full"])}))
        return

    bench.begin(parser, options)
    results = bench.in_turn(
        lambda side: bench.run(__file__, {"side": side, "full": options.full}, options.threads),
        list(SIDES),
        options.rounds,
        noisy=options.noisy,
    )
    rows = best(results)
    print(main_table(rows))
    print("An error of 1 is as large as rounding a bfloat16 product may cause.")
    bench.finish("few_rows", {"rounds": options.rounds, "rows": rows}, options)


if __name__ == "__main__":
    main()
