"""What the tests of Triton kernels share: where they run, and buffers with guard bytes around them.

They run interpreted, on CPU tensors; with a GPU at hand, `TRITON_INTERPRET=0` runs the same tests
on it (`make test-gpu`).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from allocating import allocating_with
from torch import Tensor

from minilora.kernels.reference.nf4 import PackedWeight

pytest.importorskip("triton", reason="these kernels are written in Triton")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
if INTERPRETED:
    import interpreter

    interpreter.repair()
elif not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=0 asks for a GPU, and there is none", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

# Bytes of 0xFF before and after a buffer: NaN in every float format.
GUARD = 4096


class Buffers:
    """Tensors between guard bytes.

    A float that is read outside a tensor is NaN; a write outside is found by `check`.
    """

    def __init__(self) -> None:
        self._raw: list[tuple[Tensor, int]] = []

    def empty(
        self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any
    ) -> Tensor:
        """As torch.empty, filled with 0xFF."""
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or torch.float32
        nbytes = shape.numel() * dtype.itemsize
        raw = torch.full((nbytes + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=device or DEVICE)
        self._raw.append((raw, nbytes))
        return raw[GUARD : GUARD + nbytes].view(dtype).view(shape)

    def hold(self, t: Tensor | None) -> Any:
        """Returns a copy of t between guard bytes, on the device of the tests.

        Its strides are those of t; where t has gaps, they hold NaN too.
        """
        if t is None:
            return None

        span = 0
        if t.numel():
            steps = zip(t.shape, t.stride(), strict=True)
            span = 1 + sum((size - 1) * stride for size, stride in steps)
        inside = self.empty(span, dtype=t.dtype).as_strided(t.shape, t.stride())

        # A row that is repeated lies in memory once.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())
        inside[once] = t[once].to(DEVICE)
        return inside

    def hold_weight(self, w: PackedWeight) -> PackedWeight:
        """Returns a copy of the weight, each of its tensors between guard bytes."""
        return PackedWeight(*map(self.hold, w.tensors), *w[4:])

    def check(self) -> None:
        for raw, nbytes in self._raw:
            before, after = raw[:GUARD], raw[GUARD + nbytes :]
            assert bool((before == 0xFF).all() and (after == 0xFF).all()), (
                f"a write outside a buffer of {nbytes} bytes"
            )


def on_device(w: PackedWeight) -> PackedWeight:
    """Returns the weight on the device of the tests."""
    tensors = (None if t is None else t.to(DEVICE) for t in w.tensors)
    return PackedWeight(*tensors, *w[4:])


@contextlib.contextmanager
def guarded() -> Iterator[Buffers]:
    """Inside, the kernels' launchers allocate guarded memory full of NaN."""
    buffers = Buffers()
    with allocating_with(buffers.empty):
        yield buffers
    buffers.check()
