"""The operators `torch.ops.minilora.*`: one schema each, and PyTorch's dispatcher picks the kernel.

    CPU -> kernels/cpu (Numba)
    CUDA, which is AMD's name too -> kernels/gpu (Triton)
    any other device -> kernels/reference
    meta, torch.compile -> the fakes below: shapes only

A schema has no records, so a weight crosses the dispatcher in parts: `_flatten` takes it apart on
this side and `_assemble` puts it together on the other. Everywhere else it is one argument.

Autograd is in functional.py, validation there and in nf4.py. A backend is imported at its first
call, so `import minilora` pays neither for Numba nor for Triton. The products are operators of
their own: of two calls to `dequantize`, torch.compile would make one and keep the dense weight.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from minilora.kernels.reference.nf4 import GROUP, PackedWeight

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, "
    "SymInt[] shape, int block_size, str quant_type"
)

_ADAPTER = "Tensor? A=None, Tensor? B=None, float scale=0."

_LOW_RANK = "Tensor left, Tensor right, float scale"

# operator: (file of the kernel, signature)
_SCHEMAS = {
    "quantize": ("nf4", "(Tensor x, int block_size, str quant_type='nf4') -> (Tensor, Tensor)"),
    "double_quantize": ("nf4", "(Tensor absmax) -> (Tensor, Tensor, Tensor)"),
    "double_dequantize": ("nf4", "(Tensor codes, Tensor absmax2, Tensor offset) -> Tensor"),
    "dequantize": ("nf4", f"({_WEIGHT}, ScalarType dtype) -> Tensor"),
    "dropout": ("dropout", "(Tensor x, float p, Tensor seed) -> Tensor"),
    "project": ("lora", "(Tensor x, Tensor A) -> Tensor"),
    "contract": ("lora", "(Tensor u, Tensor x, float scale) -> Tensor"),
    "nf4_linear": ("matmul", f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor"),
    "nf4_linear_backward": ("matmul", f"(Tensor dy, {_WEIGHT}) -> Tensor"),
    "nf4_lora_linear": ("lora", f"(Tensor x, {_WEIGHT}, Tensor? bias, {_LOW_RANK}) -> Tensor"),
    "nf4_inference": ("lora", f"(Tensor x, {_WEIGHT}, Tensor? bias, {_ADAPTER}) -> Tensor"),
    "nf4_lora_linear_backward": ("lora", f"(Tensor dy, {_WEIGHT}, {_LOW_RANK}) -> Tensor"),
}


def _flatten(w: Any) -> tuple[Any, ...]:
    """Returns an `NF4Weight`, or a `PackedWeight`, in the parts of `_WEIGHT`."""
    return w.packed, w.absmax, w.absmax2, w.offset, w.shape, w.block_size, w.quant_type


def _assembled(kernel: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """Returns the kernel as a function of an operator's arguments, with the weight in parts."""
    if _WEIGHT not in signature:
        return kernel

    first = signature[: signature.index(_WEIGHT)].count(",")
    last = first + len(PackedWeight._fields)

    def call(*args: Any) -> Any:
        w = PackedWeight(*args[first:last])
        return kernel(*args[:first], w._replace(shape=tuple(w.shape)), *args[last:])

    return call


def _kernel(backend: str, file: str, name: str) -> Callable[..., Any]:
    """Returns a function that imports minilora.kernels.<backend>.<file> at its first call."""
    kernel: Any = None
    only_device = {"cpu": "cpu", "gpu": "cuda"}.get(backend)

    def call(*args: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = getattr(importlib.import_module(f"minilora.kernels.{backend}.{file}"), name)
        device = only_device or args[0].device.type
        if not torch.is_autocast_enabled(device):
            return kernel(*args)
        # The fakes promise the dtype of the input.
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return call


# The fakes have the signatures of the kernels.


def _fake_quantize(x: Tensor, block_size: int, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    blocks = (x.numel() + block_size - 1) // block_size
    return packed, x.new_empty(blocks, dtype=torch.float32)


def _fake_double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    groups = (absmax.numel() + GROUP - 1) // GROUP
    return codes, absmax.new_empty(groups), absmax.new_empty(())


def _fake_double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _fake_dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    return w.packed.new_empty(w.shape, dtype=dtype)


def _fake_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_project(x: Tensor, A: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(A)))


def _fake_contract(u: Tensor, x: Tensor, scale: float) -> Tensor:
    return x.new_empty((u.shape[1], x.shape[1]))


def _fake_nf4_linear(x: Tensor, w: PackedWeight, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _fake_nf4_linear_backward(dy: Tensor, w: PackedWeight, *rest: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], w.shape[1]))


_fake_nf4_lora_linear = _fake_nf4_linear
_fake_nf4_inference = _fake_nf4_linear
_fake_nf4_lora_linear_backward = _fake_nf4_linear_backward


for _name, (_file, _signature) in _SCHEMAS.items():
    _operator = f"minilora::{_name}"
    torch.library.define(_operator, _signature)
    torch.library.register_fake(_operator, _assembled(globals()[f"_fake_{_name}"], _signature))

    _backends = {"CompositeExplicitAutograd": "reference", "CPU": "cpu", "CUDA": "gpu"}
    for _key, _backend in _backends.items():
        _call = _assembled(_kernel(_backend, _file, _name), _signature)
        torch.library.impl(_operator, _key, _call)


def _is_watched() -> bool:
    """Whether something wants to see the operators: a compiler, a mode, a transform as vmap."""
    is_transforming: bool = torch._C._are_functorch_transforms_active()
    return is_transforming or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _undispatched(name: str, dispatched: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator with the signature of kernels/reference, called without PyTorch's dispatcher.

    A dispatch takes 10 microseconds, as long as a small layer with a single row. It is needed where
    something traces, transforms or watches the operators, and on other devices.
    """
    file = _SCHEMAS[name][0]
    cpu_kernel, gpu_kernel = _kernel("cpu", file, name), _kernel("gpu", file, name)

    def call(x: Tensor, *rest: Any) -> Tensor:
        direct = cpu_kernel if x.is_cpu else gpu_kernel if x.is_cuda else dispatched
        kernel = dispatched if type(x) is not Tensor or _is_watched() else direct
        return kernel(x, *rest)

    return call


def _with_weight(name: str, at: int = 1) -> Callable[..., Tensor]:
    """The operator with the signature of kernels/reference, where w is argument number `at`."""
    operator = getattr(torch.ops.minilora, name).default
    return lambda *args: operator(*args[:at], *_flatten(args[at]), *args[at + 1 :])


quantize = torch.ops.minilora.quantize.default
double_quantize = torch.ops.minilora.double_quantize.default
double_dequantize = torch.ops.minilora.double_dequantize.default
dropout = torch.ops.minilora.dropout.default
dequantize = _with_weight("dequantize", at=0)
project = _undispatched("project", torch.ops.minilora.project.default)
contract = _undispatched("contract", torch.ops.minilora.contract.default)
nf4_linear = _with_weight("nf4_linear")
nf4_linear_backward = _with_weight("nf4_linear_backward")
nf4_lora_linear = _undispatched("nf4_lora_linear", _with_weight("nf4_lora_linear"))
nf4_inference = _undispatched("nf4_inference", _with_weight("nf4_inference"))
nf4_lora_linear_backward = _undispatched(
    "nf4_lora_linear_backward", _with_weight("nf4_lora_linear_backward")
)
