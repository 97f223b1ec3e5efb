"""What the tests of Triton kernels share: where they run, and buffers that tell when a kernel leaves them.

They run interpreted, on CPU tensors; with a GPU at hand, `TRITON_INTERPRET=0` runs the same tests on it (`make test-gpu`).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="these kernels are written in Triton")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
if INTERPRETED:
    import interpreter

    interpreter.repair()
elif not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=0 asks for a GPU, and there is none", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
GUARD = 4096  # bytes of 0xFF before and after a buffer: NaN in every float format

_empty = torch.empty


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Buffers:
    """Tensors in the middle of guard bytes: a float read outside is NaN, a write outside is found by `check`."""

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
        """A copy of t, its bytes guarded, on the tests' device. Strides are kept where t has gaps: they hold NaN too."""
        if t is None:
            return None
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            if t.numel()
            else 0
        )
        inside = self.empty(span, dtype=t.dtype).as_strided(t.shape, t.stride())
        once = tuple(
            slice(0, 1) if stride == 0 else slice(None) for stride in t.stride()
        )  # a row that is repeated lies there once
        inside[once] = t[once].to(DEVICE)
        return inside

    def check(self) -> None:
        for raw, nbytes in self._raw:
            before, after = raw[:GUARD], raw[GUARD + nbytes :]
            assert bool((before == 0xFF).all() and (after == 0xFF).all()), (
                f"a write outside a buffer of {nbytes} bytes"
            )


@contextlib.contextmanager
def guarded() -> Iterator[Buffers]:
    """Inside, torch.empty gives guarded memory full of NaN, which is what the kernels' launchers allocate with."""
    buffers = Buffers()
    torch.empty = buffers.empty  # type: ignore[assignment]
    try:
        yield buffers
    finally:
        torch.empty = _empty
    buffers.check()
