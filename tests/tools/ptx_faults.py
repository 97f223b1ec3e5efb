"""Faults planted in the PTX of the products, to see that the emulator finds them.

    python tests/tools/ptx_faults.py               prints a result as JSON

A fault is a change of one statement. It is tried in several places of a kernel, one at a time; in
each it is found by an error or by a wrong result, or missed. It needs a process of its own, without
TRITON_INTERPRET.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from cancelling import cancelling_weight
from ptx_launch import emulated
from ptx_machine import KernelError
from ptx_products import Source, within_bound
from torch import Tensor

from minilora.kernels.gpu import choose, matmul, skinny
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

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
    test, bits, predicate, counter, end = match.groups()
    twice = f".reg .b{bits} twice; shl.b{bits} twice, {counter}, 1;"
    return f"{{ {twice} setp.{test}.s{bits} {predicate}, twice, {end}; }}"


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
        r"setp\.(\w+)\.s(32|64)\s+(%p\d+),\s*(%rd?\d+),\s*([^;]+);"
        r"(?=(?:\s|\.loc[^\n]*)*@%p\d+\s+bra)",
        _halve,
    ),
]


# map8[code] * absmax2 + offset, rounded once. It is below every bound, so it is planted in products
# that are exactly 0 without it.
FUSED = Fault(
    "the absmax is fused",
    r"mul\.rn\.f32\s+(%r\d+), (%r\d+), (%r\d+);((?s:.*?))add\.rn\.f32\s+(%r\d+), \1, (%r\d+);",
    lambda m: f"{m[4]}fma.rn.f32 {m[5]}, {m[2]}, {m[3]}, {m[6]};",
)


class Product(NamedTuple):
    """A product in which faults are planted: the kernel that it launches first, and its call."""

    name: str
    kernel: str
    run: Callable[[], Tensor]
    right: Callable[[Tensor], bool]
    faults: list[Fault]


def products() -> list[Product]:
    """The skinny product, and the smallest tile in both directions, also with an absmax of 0.

    No tile divides their sizes, so that masks matter, and their loops are longer than a pipeline.
    The skinny product fuses on purpose.
    """
    forward, backward = _tile("forward"), _tile("backward")
    return [
        _product("forward", {"path": "skinny"}, "_partial", 9, 65, 1024),
        _product("forward", forward, "_forward", forward["BM"] + 9, 65, 384),
        _product("forward", forward, "_forward", 9, 65, 384, cancels=True),
        _product("backward", backward, "_backward", backward["BM"] + 9, 258, 128),
        _product("backward", backward, "_backward", 9, 258, 128, cancels=True),
    ]


def _tile(direction: str) -> dict[str, Any]:
    return next(line for line in choose.lines(direction) if line["path"] == "tile")


def _product(
    direction: str,
    line: dict[str, Any],
    kernel: str,
    M: int,
    O: int,
    I: int,
    cancels: bool = False,
) -> Product:
    """A product with an ordinary weight, or with one that two roundings make 0."""
    source = Source(0)
    packed, absmax = reference.quantize(0.1 * source.gauss(O, I), 64)
    w = PackedWeight(packed, *reference.double_quantize(absmax), (O, I), 64)
    if cancels:
        w = cancelling_weight((O, I))
    forward = direction == "forward"
    x = source.gauss(M, I if forward else O).to(torch.bfloat16)
    # Half of the rows have few terms, and so a small bound.
    x[::2] *= source.sparse(x[::2].shape)

    def run() -> Tensor:
        # With one program for each row of tiles its loop is as long as the rows of W.
        with mock.patch.object(skinny, "PROGRAMS", 1):
            if forward:
                return matmul.forward(x, w, None, None, line)
            return matmul.backward(x, w, None, line)

    def right(y: Tensor) -> bool:
        if cancels:
            return not y.any()
        return within_bound(y, x, w, None, None, forward, line["path"])

    name = f"{direction} {line['path']}{', absmax 0' if cancels else ''}"
    return Product(name, kernel, run, right, [FUSED] if cancels else FAULTS)


def planted(fault: Fault, kernel: str, which: int) -> Callable[[str], str]:
    """The change of PTX that plants a fault in one place of a kernel."""

    def change(ptx: str) -> str:
        if f".entry {kernel}(" not in ptx:
            return ptx
        match = list(re.finditer(fault.pattern, ptx))[which]
        return ptx[: match.start()] + fault.change(match) + ptx[match.end() :]

    return change


def kernel_text(product: Product) -> str:
    """The PTX of a product's kernel, as it is compiled."""
    seen: list[str] = []

    def look(ptx: str) -> str:
        seen.append(ptx)
        return ptx

    with emulated(change=look):
        y = product.run()
    assert product.right(y), f"{product.name} without a fault"
    return next(ptx for ptx in seen if f".entry {product.kernel}(" in ptx)


def attempt(fault: Fault, product: Product, which: int) -> str:
    """Plants a fault in one place; returns by what it is found, or ""."""
    try:
        with emulated(change=planted(fault, product.kernel, which)):
            y = product.run()
    except KernelError as error:
        return str(error)
    return "" if product.right(y) else "wrong result"


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below count, each from the middle of its share.

    Those in the middle come first: there the loop is.
    """
    most = min(most, count)
    found = [(2 * i + 1) * count // (2 * most) for i in range(most)]
    return sorted(found, key=lambda place: abs(2 * place + 1 - count))


def run(most: int, count: int, until_found: bool) -> list[dict[str, Any]]:
    """Plants every fault in the first `count` products, in at most `most` places of each.

    until_found: not in more places after one in which it is found
    """
    rows = []
    for product in products()[:count]:
        ptx = kernel_text(product)
        for fault in product.faults:
            statements = [match[0] for match in re.finditer(fault.pattern, ptx)]
            row: dict[str, Any] = {"product": product.name, "fault": fault.name}
            row |= {"places": len(statements), "found": [], "missed": []}
            for which in spread(len(statements), most):
                by = attempt(fault, product, which)
                said = f"{which}: {' '.join(statements[which].split())}"
                row["found" if by else "missed"].append(f"{said}: {by}" if by else said)
                if by and until_found:
                    break
            if statements:
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, default=4)
    parser.add_argument("--products", type=int, default=5)
    parser.add_argument("--until-found", action="store_true")
    options = parser.parse_args()

    began = time.monotonic()
    rows = run(options.places, options.products, options.until_found)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"triton": triton.__version__, "rows": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
