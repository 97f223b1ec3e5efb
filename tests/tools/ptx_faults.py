"""Faults planted in the PTX of the products, to see that the emulator finds them.

    python tests/tools/ptx_faults.py               prints a result as JSON

A fault is a change of one statement. It is tried in several places of a kernel, one at a time; in
each it is found by an error or by a wrong result, or missed. It needs a process of its own, without
TRITON_INTERPRET.
"""

import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from ptx_launch import emulated
from ptx_machine import KernelError
from ptx_products import within_bound
from torch import Tensor

from minilora.kernels.gpu import choose, matmul
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

# Sizes that no tile divides, so that masks matter, and a loop longer than its pipeline.
M, O, I = 9, 65, 512

# Places in which a fault is tried, spread over the kernel.
PLACES = 4

Match = re.Match[str]


class Fault(NamedTuple):
    """pattern: what a place looks like; change: what it becomes."""

    name: str
    pattern: str
    change: Callable[[Match], str]


def _further(match: Match) -> str:
    """An access at an address that is one element further."""
    kind = re.search(r"\.b(8|16|32|64)\b", match[0])
    size = int(kind[1]) // 8 if kind else 4
    return f"{match[1]} + {int(match[2]) + size}"


def _halve(match: Match) -> str:
    """A loop that ends when its counter has come half as far."""
    test, predicate, counter, end = match.groups()
    return f"{{ .reg .b32 t; shl.b32 t, {counter}, 1; setp.{test} {predicate}, t, {end}; }}"


FAULTS = [
    Fault("a barrier removed", r"bar\.sync\s+0;", lambda m: ""),
    Fault("a wait removed", r"cp\.async\.wait_group\s+\d+;", lambda m: ""),
    Fault(
        "a wait for one group too few",
        r"cp\.async\.wait_group\s+(\d+);",
        lambda m: f"cp.async.wait_group {int(m[1]) + 1};",
    ),
    Fault("a commit removed", r"cp\.async\.commit_group\s*;", lambda m: ""),
    Fault("the mask of a load dropped", r"@!?%p\d+ (?=ld\.global)", lambda m: ""),
    Fault(
        "the mask of a copy dropped",
        r"(cp\.async\.c[ag][^;]*?0x\w+)\s*,\s*%r\d+;",
        lambda m: f"{m[1]};",
    ),
    Fault("the mask of a store dropped", r"@!?%p\d+ (?=st\.global)", lambda m: ""),
    Fault(
        "a load one element further",
        r"(ld\.global[\w.:]*\s+\{[^}]*\},\s*\[\s*%rd\d+)\s*\+\s*(\d+)",
        _further,
    ),
    Fault(
        "a copy 4 bytes further",
        r"(cp\.async\.c[ag][\w.:]*\s+\[[^\]]*\],\s*\[\s*%rd\d+)\s*\+\s*(\d+)",
        _further,
    ),
    Fault(
        "a store one element further",
        r"(st\.global[\w.:]*\s+\[\s*%rd\d+)\s*\+\s*(\d+)",
        _further,
    ),
    Fault(
        "two sources of prmt exchanged",
        r"prmt\.b32\s+([^,;]+),\s*([^,;]+),\s*([^,;]+),\s*([^;]+);",
        lambda m: f"prmt.b32 {m[1]}, {m[3]}, {m[2]}, {m[4]};",
    ),
    Fault(
        "two registers of mma's B exchanged",
        r"(mma\.sync[^;{]*\{[^}]*\},\s*\{[^}]*\},\s*\{)([^,}]+),([^,}]+)\}",
        lambda m: f"{m[1]}{m[3]}, {m[2]}}}",
    ),
    Fault("a transposition forgotten", r"\.x4\.trans", lambda m: ".x4"),
    Fault(
        "a row of ldmatrix 16 bytes further",
        r"(ldmatrix[^;]*\[%r\d+)(?:\+(\d+))?\]",
        lambda m: f"{m[1]}+{int(m[2] or 0) + 16}]",
    ),
    Fault(
        "the halves of a pair exchanged",
        r"(cvt\.rn\.b?f16x2\.f32\s+[^,;]+),([^,;]+),([^;]+);",
        lambda m: f"{m[1]}, {m[3]}, {m[2]};",
    ),
    Fault(
        "half of a loop's iterations",
        r"setp\.(\w+\.s32)\s+(%p\d+),\s*(%r\d+),\s*([^;]+);(?=(?:\s|\.loc[^\n]*)*@%p\d+\s+bra)",
        _halve,
    ),
]


class Product(NamedTuple):
    """A product in which faults are planted: the kernel that it launches first, and its call."""

    name: str
    kernel: str
    run: Callable[[], Tensor]
    right: Callable[[Tensor], bool]


def products() -> list[Product]:
    """The skinny product, and the smallest tile in both directions."""
    generator = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize(0.1 * torch.randn(O, I, generator=generator), 64)
    w = PackedWeight(packed, *reference.double_quantize(absmax), (O, I), 64)
    x = torch.randn(M, I, generator=generator).to(torch.bfloat16)
    dy = torch.randn(M, O, generator=generator).to(torch.bfloat16)

    def tile(direction: str) -> dict[str, Any]:
        return next(line for line in choose.lines(direction) if line["path"] == "tile")

    def forward(path: str, line: dict[str, Any], kernel: str) -> Product:
        return Product(
            f"forward {path}",
            kernel,
            lambda: matmul.forward(x, w, None, None, line),
            lambda y: within_bound(y, x, w, None, None, True, path),
        )

    backward = Product(
        "backward tile",
        "_backward",
        lambda: matmul.backward(dy, w, None, tile("backward")),
        lambda dx: within_bound(dx, dy, w, None, None, False, "tile"),
    )
    skinny = forward("skinny", {"path": "skinny"}, "_partial")
    return [skinny, forward("tile", tile("forward"), "_forward"), backward]


def planted(fault: Fault, kernel: str, which: int) -> Callable[[str], str]:
    """The change of PTX that plants a fault in one place of a kernel."""

    def change(ptx: str) -> str:
        if f".entry {kernel}(" not in ptx:
            return ptx
        match = list(re.finditer(fault.pattern, ptx))[which]
        return ptx[: match.start()] + fault.change(match) + ptx[match.end() :]

    return change


def places(fault: Fault, product: Product) -> list[str]:
    """The statements of a product's kernel in which a fault can be planted."""
    seen: list[str] = []

    def look(ptx: str) -> str:
        if f".entry {product.kernel}(" in ptx:
            seen.extend(match[0] for match in re.finditer(fault.pattern, ptx))
        return ptx

    with emulated(change=look):
        product.run()
    return seen


def attempt(fault: Fault, product: Product, which: int) -> str:
    """Plants a fault in one place; returns by what it is found, or ""."""
    try:
        with emulated(change=planted(fault, product.kernel, which)):
            y = product.run()
    except KernelError as error:
        return str(error)
    return "" if product.right(y) else "wrong result"


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below count, from the first to the last."""
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


def run(most: int = PLACES) -> list[dict[str, Any]]:
    """Plants every fault in every product that has a place for it."""
    rows = []
    for product in products():
        for fault in FAULTS:
            statements = places(fault, product)
            row: dict[str, Any] = {"product": product.name, "fault": fault.name}
            row |= {"places": len(statements), "found": [], "missed": []}
            for which in spread(len(statements), most):
                by = attempt(fault, product, which)
                said = f"{which}: {' '.join(statements[which].split())}"
                row["found" if by else "missed"].append(f"{said}: {by}" if by else said)
            if statements:
                rows.append(row)
    return rows


def main() -> None:
    began = time.monotonic()
    rows = run()
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"triton": triton.__version__, "rows": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
