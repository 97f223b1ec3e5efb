"""What the Triton kernels share: the import and its error, the checks before a launch, tables on the device.

A kernel here never sees a tensor that it was not written for: `check` refuses it first, by name, because a GPU reports a wrong
pointer late, in another place, or not at all.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError(
        "NF4 on a GPU runs through Triton, which is not installed: pip install triton"
    ) from error

from ..reference import nf4 as reference

__all__ = [
    "FLOATS",
    "INTERPRETED",
    "PORTABLE",
    "LowRank",
    "Weight",
    "check",
    "check_block_size",
    "check_weight",
    "launch",
    "tables_on",
    "term_arguments",
    "tl",
    "triton",
]

INTERPRETED: bool = (
    triton.knobs.runtime.interpret
)  # TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors
PORTABLE = torch.version.hip is not None  # AMD: no PTX
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # packed, absmax, absmax2, offset
_BLOCK_SIZES = [2**k for k in range(5, 13)]


class LowRank(NamedTuple):
    """The term scale * left right^T: left [M, r] contiguous, right [N, r] in any strides, both in the dtype of x."""

    left: Tensor
    right: Tensor
    scale: float


def term_arguments(low: LowRank | None) -> tuple[Any, ...]:
    """left, right, scale, r and the strides of right, as the kernels take them."""
    return (*low, low.left.shape[1], *low.right.stride()) if low else (None, None, 0.0, 0, 0, 0)


def check(name: str, t: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raises TypeError or ValueError unless `t` is of one of `dtypes` and on `device`, a GPU."""
    if t.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} is {t.dtype}: the kernel takes {wanted}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the rest on {device}: move all to one device")
    if t.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{name} is on {t.device}: a Triton kernel runs on a GPU (or interpreted, with TRITON_INTERPRET=1)"
        )


def check_block_size(block_size: int) -> None:
    if block_size not in _BLOCK_SIZES:
        raise ValueError(
            f"block_size={block_size}: the kernels take {', '.join(map(str, _BLOCK_SIZES))}"
        )


def check_weight(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> None:
    """Raises TypeError or ValueError unless the tensors are an NF4 weight of `shape`, contiguous, on one GPU."""
    check_block_size(block_size)
    n = torch.Size(shape).numel()
    blocks = -(-n // block_size)
    if (absmax2 is None) != (offset is None):
        raise ValueError(
            "absmax2 and offset belong together: a double-quantized weight has both, a plain one neither"
        )
    double = absmax2 is not None and offset is not None
    fields = [
        ("packed", packed, torch.uint8, -(-n // 2)),
        ("absmax", absmax, torch.uint8 if double else torch.float32, blocks),
    ]
    if absmax2 is not None and offset is not None:
        fields += [
            ("absmax2", absmax2, torch.float32, -(-blocks // reference.GROUP)),
            ("offset", offset, torch.float32, 1),
        ]
    for name, t, dtype, size in fields:
        check(name, t, (dtype,), packed.device)
        if t.numel() != size or not t.is_contiguous():
            layout = "contiguous" if t.is_contiguous() else "strided"
            raise ValueError(
                f"{name} has {t.numel()} elements, {layout}: a weight {tuple(shape)} in blocks of {block_size} "
                f"needs {size}, contiguous"
            )


class Tables(NamedTuple):
    """The 16 levels in float32, the 256 of the 8-bit map, and the 16 levels rounded to 16 bits."""

    code: Tensor
    map8: Tensor
    rounded: dict[torch.dtype, Tensor]


@functools.cache
def tables_on(device: torch.device) -> Tables:
    """The reference's tables on a device, all copied there at the first call of any kernel: not while a CUDA graph is captured."""
    code, map8 = reference.CODE.to(device), reference.MAP8.to(device)
    return Tables(code, map8, {dtype: code.to(dtype) for dtype in (torch.float16, torch.bfloat16)})


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Runs a kernel on its first tensor's device, which need not be the current one. No fused multiply-add but where a kernel asks:
    the reference rounds products and sums one by one."""
    start(kernel, grid, args, {"enable_fp_fusion": False} | settings)


def start(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    with torch.cuda.device_of(args[0]):  # nothing for a CPU tensor
        kernel[grid](*args, **settings)
