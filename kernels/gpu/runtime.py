"""What the Triton kernels share: the import and its error, checks, tables on the device, launches.

A kernel never sees a tensor that it was not written for: `check` refuses it first, by name, because
a GPU reports a wrong pointer late, in another place, or not at all.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources
except ModuleNotFoundError as error:
    raise ImportError(
        "NF4 on a GPU runs through Triton, which is not installed: pip install triton"
    ) from error

from ..reference import codebooks
from ..reference.nf4 import GROUP, PackedWeight

__all__ = [
    "FLOATS",
    "HALVES",
    "INTERPRETED",
    "PORTABLE",
    "LowRank",
    "OutOfResources",
    "Term",
    "check",
    "check_block_size",
    "check_weight",
    "checked",
    "launch",
    "map8",
    "power_of_two",
    "tables",
    "term_of",
    "tl",
    "triton",
]

# TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors.
INTERPRETED: bool = triton.knobs.runtime.interpret

# AMD: no PTX.
PORTABLE = torch.version.hip is not None

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES, torch.float64)
_BLOCK_SIZES = [2**k for k in range(5, 13)]


# Records that were checked, as the kernels take them.
_checked: "weakref.WeakKeyDictionary[Any, PackedWeight]" = weakref.WeakKeyDictionary()


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of an NVIDIA GPU, None for another device."""
    if PORTABLE or device.type != "cuda":
        return None
    return torch.cuda.get_device_capability(device)


class LowRank(NamedTuple):
    """The term scale * left right^T of a product, both factors in the dtype of x.

    left: [.., r], M rows, contiguous
    right: [N, r], in any strides
    """

    left: Tensor
    right: Tensor
    scale: float


class Term(NamedTuple):
    """A `LowRank` as a kernel takes it, with the rank and the strides of the right factor."""

    left: Any
    right: Any
    scale: float
    r: int
    right_row: int
    right_column: int


def term_of(low: LowRank | None) -> Term | None:
    """Returns the kernels' argument `term`."""
    if low is None:
        return None

    left, right, scale = low
    right_row, right_column = right.stride()
    return Term(left, right, scale, left.shape[-1], right_row, right_column)


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is no less than n >= 1.

    Triton's own function, which kernels can call, takes 3 microseconds on the host.
    """
    return 1 << (n - 1).bit_length()


def check(name: str, t: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raises TypeError or ValueError unless `t` has one of `dtypes` and is on `device`, a GPU."""
    if t.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} is {t.dtype}: the kernel takes {wanted}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the rest on {device}: move all to one device")
    if not (t.is_cuda or INTERPRETED):
        raise ValueError(
            f"{name} is on {t.device}: a Triton kernel runs on a GPU "
            "(or interpreted, with TRITON_INTERPRET=1)"
        )


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless the kernels take the block size."""
    if block_size not in _BLOCK_SIZES:
        sizes = ", ".join(map(str, _BLOCK_SIZES))
        raise ValueError(f"block_size={block_size}: the kernels take {sizes}")


def check_weight(w: PackedWeight) -> None:
    """Raises TypeError or ValueError unless the parts are a weight, contiguous, on one GPU."""
    check_block_size(w.block_size)
    if (w.absmax2 is None) != (w.offset is None):
        raise ValueError(
            "absmax2 and offset belong together: "
            "a double-quantized weight has both, a plain one neither"
        )

    n = w.numel()
    blocks = -(-n // w.block_size)
    _check_part("packed", w.packed, torch.uint8, -(-n // 2), w)
    if w.absmax2 is None or w.offset is None:
        _check_part("absmax", w.absmax, torch.float32, blocks, w)
    else:
        _check_part("absmax", w.absmax, torch.uint8, blocks, w)
        _check_part("absmax2", w.absmax2, torch.float32, -(-blocks // GROUP), w)
        _check_part("offset", w.offset, torch.float32, 1, w)


def checked(w: Any) -> PackedWeight:
    """Returns a weight as the kernels take it, after `check_weight`.

    Args:
        w: a `PackedWeight`, or any record with its attributes that never changes, as an `NF4Weight`
            is. The latter is checked at its first product alone.
    """
    if isinstance(w, PackedWeight):
        check_weight(w)
        return w

    found = _checked.get(w)
    if found is None:
        parts = w.packed, w.absmax, w.absmax2, w.offset
        found = PackedWeight(*parts, tuple(w.shape), w.block_size, w.quant_type)
        check_weight(found)
        _checked[w] = found
    return found


def _check_part(name: str, t: Tensor, dtype: torch.dtype, size: int, w: PackedWeight) -> None:
    check(name, t, (dtype,), w.device)
    if t.numel() != size or not t.is_contiguous():
        layout = "contiguous" if t.is_contiguous() else "strided"
        raise ValueError(
            f"{name} has {t.numel()} elements, {layout}: a weight {tuple(w.shape)} "
            f"in blocks of {w.block_size} needs {size}, contiguous"
        )


class Tables(NamedTuple):
    """What the kernels look up on a device.

    levels: the 16 levels of a quantization type
    map8: the 256 values of the 8-bit map, float32
    """

    levels: Any
    map8: Any


@functools.cache
def map8(device: torch.device) -> Tensor:
    """Returns the 256 values of the 8-bit map on a device, float32."""
    return codebooks.MAP8.to(device)


def tables(device: torch.device, quant_type: str, dtype: torch.dtype = torch.float32) -> Tables:
    """Returns the tables of a quantization type on a device, its levels rounded to `dtype`.

    All are copied there at the first product or dequantization, and none later, while a CUDA graph
    may be captured.
    """
    return _tables(device, quant_type)[dtype]


@functools.cache
def _tables(device: torch.device, quant_type: str) -> dict[torch.dtype, Tables]:
    levels = codebooks.levels(quant_type).to(device)
    dtypes = (torch.float32, *HALVES)
    return {dtype: Tables(levels.to(dtype), map8(device)) for dtype in dtypes}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Runs a kernel on the device of its first argument, which need not be the current one.

    There is no fused multiply-add except where a kernel asks for it: the reference rounds products
    and sums separately.
    """
    settings.setdefault("enable_fp_fusion", False)
    start(kernel, grid, args, settings)


def start(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    first = args[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(first):
            _run(kernel, grid, args, settings)
    else:
        _run(kernel, grid, args, settings)


# Arguments as Triton tells them apart -> what was compiled for them, its constants, and the kernel,
# whose id stands in the key.
_compiled: dict[Any, tuple[Any, tuple[Any, ...], Any]] = {}

# Every new number makes an entry, and a seed is always new.
_MOST_COMPILED = 2048


def _run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    """Runs a kernel, the second time without asking Triton which of its compilations fits.

    Triton finds that out in 8 to 12 microseconds of each launch, more than the kernels of a small
    product take. It depends on nothing but what the key holds: the kernel, the device, the settings
    and the `_kinds` of the arguments.
    """
    key = id(kernel), args[0].get_device(), tuple(settings.items()), _kinds(args)
    if found := _compiled.get(key):
        compiled, constants, _ = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return

    compiled = kernel[grid](*args, **settings)
    # AMD's also depends on the size of a tensor; the interpreter compiles nothing.
    if compiled is not None and not PORTABLE:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        names = kernel.arg_names[len(args) :]
        _compiled[key] = compiled, tuple(settings[name] for name in names), kernel


def _kinds(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of its arguments a compiled kernel depends on, or more than that.

    Of a tensor these are the dtype and the alignment. Of an integer it is whether it is 1, what
    divides it and how long it is, so the number itself says enough; of a float it is nothing.
    """
    kinds: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            kinds += (value.dtype, value.data_ptr() % 16)
        elif isinstance(value, tuple):
            kinds.append(_kinds(value))
        else:
            # An integer, or None.
            kinds.append(float if type(value) is float else value)
    return tuple(kinds)
