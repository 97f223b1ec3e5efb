"""Launches of a small kernel, each several times: is it the compiled kernel that Triton would take?

A process of its own, without TRITON_INTERPRET. Prints the number of launches, of entries that
`runtime._compiled` has of them, and of compiled kernels.
"""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from bench_scripts import load
from torch import Tensor

from minilora.kernels.gpu import runtime


class Pair(NamedTuple):
    """Arguments that travel as one."""

    step: Any
    z: Any


@triton.jit
def add(x_ptr, pair, y_ptr, n, factor, SIZE: tl.constexpr, TWICE: tl.constexpr):
    """y = factor * x + z, with a step between the elements of z; twice that if asked for."""
    i = tl.arange(0, SIZE)
    y = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32) * factor
    if pair.z is not None:
        y += tl.load(pair.z + i * pair.step, mask=i < n, other=0.0).to(tl.float32)
    if TWICE:
        y += y
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n)


def tensor(dtype: torch.dtype, shift: int) -> Tensor:
    """64 elements or fewer, whose address 16 divides if nothing is left out before them."""
    return torch.zeros(64, dtype=dtype)[shift:]


HALF, FULL = torch.bfloat16, torch.float32

# All that may differ between launches, the usual first.
VALUES: dict[str, tuple[Any, ...]] = {
    "x": tuple(tensor(dtype, shift) for dtype in (FULL, HALF) for shift in (0, 1, 8)),
    "z": (tensor(FULL, 0), None, tensor(FULL, 1), tensor(HALF, 0)),
    "step": (5, 1, 16, 48, 2**31 - 1, 2**31, 2**31 + 1, 2**33),
    "y": (tensor(FULL, 0), tensor(FULL, 3)),
    "n": (7, 1, 0, 16, 21),
    "factor": (0.5, 1.0, 16.0, 1, 2, 16),
    "TWICE": (False, True),
    "num_warps": (4, 1),
}


def cases() -> Iterator[dict[str, Any]]:
    """The usual arguments with one or two of them changed, each three times in random order."""
    usual = {name: values[0] for name, values in VALUES.items()}
    changes = [{name: value} for name, values in VALUES.items() for value in values]
    draw = random.Random(0)
    pairs = [a | b for a, b in itertools.combinations(changes, 2) if a.keys() != b.keys()]
    all_changes = 3 * (changes + draw.sample(pairs, 12))
    draw.shuffle(all_changes)
    return (usual | change for change in all_changes)


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same: of tensors the tensor itself."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b)


def main() -> None:
    driver = load("silent_driver")
    driver.activate()
    launches, kernels = 0, set()
    for case in cases():
        x, z, step, y, n, factor, twice, warps = case.values()
        args = x, Pair(step, z), y, n, factor
        settings = {"SIZE": 64, "TWICE": twice, "num_warps": warps}

        runtime.launch(add, (3,), *args, **settings)
        launcher, found = driver.Launcher.last
        add[(3,)](*args, **settings, enable_fp_fusion=False)
        theirs, expected = driver.Launcher.last

        # But for the record of a launch that profilers read, which is new each time.
        found, expected = found[:6] + found[7:], expected[:6] + expected[7:]
        if launcher is not theirs or not same(found, expected):
            raise AssertionError(f"{case}: {found} is launched, not {expected}")
        kernels.add(id(launcher))
        launches += 1

    print(json.dumps([launches, len(runtime._compiled), len(kernels)]))


if __name__ == "__main__":
    main()
