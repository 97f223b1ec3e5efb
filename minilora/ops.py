"""The operators `torch.ops.minilora.*`: one schema each, and PyTorch's dispatcher chooses the kernel.

    CPU -> kernels/cpu (Numba)        CUDA, which is AMD's too -> kernels/gpu (Triton)
    any other device -> kernels/reference        meta, torch.compile -> the fakes below, shapes only

No autograd here (functional.py has it) and no validation (weight.py and functional.py have it). Kernels are imported at their
first call, so `import minilora` pays neither for Numba nor for Triton. Products are operators of their own and not a
composition with `dequantize`: torch.compile would merge the forward's dense weight with the backward's and keep it.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GROUP = 256  # blocks that share one absmax2, as in kernels/reference/nf4.py, which is imported at its first call only

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset"

_LORA = "float scale, SymInt[] shape, int block_size"

_SCHEMAS = {  # operator: (module of the kernel, signature)
    "quantize": ("nf4", "(Tensor x, int block_size) -> (Tensor, Tensor)"),
    "double_quantize": ("nf4", "(Tensor absmax) -> (Tensor, Tensor, Tensor)"),
    "double_dequantize": ("nf4", "(Tensor codes, Tensor absmax2, Tensor offset) -> Tensor"),
    "dequantize": (
        "nf4",
        f"({_WEIGHT}, SymInt[] shape, ScalarType dtype, int block_size) -> Tensor",
    ),
    "nf4_linear": (
        "matmul",
        f"(Tensor x, {_WEIGHT}, Tensor? bias, SymInt[] shape, int block_size) -> Tensor",
    ),
    "nf4_linear_backward": (
        "matmul",
        f"(Tensor dy, {_WEIGHT}, SymInt[] shape, int block_size) -> Tensor",
    ),
    "nf4_lora_linear": (
        "lora",
        f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor z, Tensor B, {_LORA}) -> Tensor",
    ),
    "nf4_lora_linear_backward": (
        "lora",
        f"(Tensor dy, {_WEIGHT}, Tensor u, Tensor A, {_LORA}) -> Tensor",
    ),
}


def _kernel(room: str, module: str, name: str) -> Callable[..., Any]:
    """Returns a function that imports minilora.kernels.<room>.<module> when it is first called."""

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"minilora.kernels.{room}.{module}"), name)  # type: ignore[no-any-return]

    def call(*args: Any) -> Any:
        with torch.autocast(
            args[0].device.type, enabled=False
        ):  # the fakes promise the input's dtype
            return load()(*args)

    return call


def _fake_quantize(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    return packed, x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


def _fake_double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = (absmax.numel() + GROUP - 1) // GROUP
    return (
        torch.empty_like(absmax, dtype=torch.uint8),
        absmax.new_empty(groups),
        absmax.new_empty(()),
    )


def _fake_double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _fake_dequantize(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, *layout: Any
) -> Tensor:
    shape, dtype, _ = layout
    return packed.new_empty(shape, dtype=dtype)


def _fake_nf4_linear(x: Tensor, *weight: Any) -> Tensor:
    *_, shape, _ = weight
    return x.new_empty((*x.shape[:-1], shape[0]))


def _fake_nf4_linear_backward(dy: Tensor, *weight: Any) -> Tensor:
    *_, shape, _ = weight
    return dy.new_empty((*dy.shape[:-1], shape[1]))


_fake_nf4_lora_linear = _fake_nf4_linear
_fake_nf4_lora_linear_backward = _fake_nf4_linear_backward

for _name, (_module, _signature) in _SCHEMAS.items():
    torch.library.define(f"minilora::{_name}", _signature)
    torch.library.impl(
        f"minilora::{_name}", "CompositeExplicitAutograd", _kernel("reference", _module, _name)
    )
    torch.library.impl(f"minilora::{_name}", "CPU", _kernel("cpu", _module, _name))
    torch.library.impl(f"minilora::{_name}", "CUDA", _kernel("gpu", _module, _name))
    torch.library.register_fake(f"minilora::{_name}", globals()[f"_fake_{_name}"])

quantize = torch.ops.minilora.quantize.default
double_quantize = torch.ops.minilora.double_quantize.default
double_dequantize = torch.ops.minilora.double_dequantize.default
dequantize = torch.ops.minilora.dequantize.default
nf4_linear = torch.ops.minilora.nf4_linear.default
nf4_linear_backward = torch.ops.minilora.nf4_linear_backward.default
nf4_lora_linear = torch.ops.minilora.nf4_lora_linear.default
nf4_lora_linear_backward = torch.ops.minilora.nf4_lora_linear_backward.default
