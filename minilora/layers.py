"""The quantized layers, and how a layer changes from one class to another.

`NF4Linear` is a linear layer whose weight is in 4 bits; `QLoRALinear` is the same layer with
adapters, as `LoRALinear` is an `nn.Linear` with adapters. A layer never leaves its place in the
model: quantizing, adapting and merging change its class and its parameters, and its hooks and the
names of what stays are the same before and after.

Float constants of a quantized weight are stored as int32 bit patterns: `model.to(torch.bfloat16)`,
`model.half()` and the mixed precision of FSDP cast every float parameter, and would change the
weights silently.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from minilora.functional import lora_linear, nf4_linear
from minilora.kernels.reference.codebooks import CODEBOOKS
from minilora.lora import LoRA, LoRALayer, LoRALinear, check_layer
from minilora.nf4 import DTYPES, NF4Weight, quantize_nf4


class NF4Linear(nn.Module):
    r"""A linear layer with a frozen weight in 4 bits: y = x W^T + bias.

    Args:
        weight: a quantized weight of shape [out_features, in_features].
        bias: [out_features] or None; stays dense.
        compute_dtype: dtype of the product; the output has the input's. Default: the input's.

    Example:
        >>> layer = NF4Linear.from_linear(torch.nn.Linear(64, 32))
        >>> layer(torch.randn(5, 64)).shape, layer.weight.dtype
        (torch.Size([5, 32]), torch.float32)
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    packed: nn.Parameter
    absmax: nn.Parameter
    absmax2: nn.Parameter | None
    offset: nn.Parameter | None

    def __init__(
        self,
        weight: NF4Weight,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            shape = tuple(weight.shape)
            raise ValueError(f"a linear layer's weight has two dimensions, this one has {shape}")
        self.out_features, self.in_features = weight.shape
        self.weight_dtype = weight.dtype
        self.block_size = weight.block_size
        self.quant_type = weight.quant_type
        self.compute_dtype = compute_dtype

        for name in ("packed", "absmax", "absmax2", "offset"):
            self.register_parameter(name, _to_parameter(getattr(weight, name)))
        self.register_parameter("bias", bias)
        self.register_buffer("nf4_layout", _layout(weight))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """A quantized layer; `linear` keeps its dense weight. Arguments of `quantize_nf4`."""
        weight = quantize_nf4(linear.weight, block_size, double_quant, quant_type)
        return cls(weight, linear.bias, compute_dtype).train(linear.training)

    @property
    def weight(self) -> NF4Weight:
        """The quantized weight, sharing this layer's memory."""
        absmax2, offset = _to_floats(self.absmax2), _to_floats(self.offset)
        return NF4Weight(
            packed=self.packed,
            absmax=self.absmax if absmax2 is not None else _to_floats(self.absmax),
            absmax2=absmax2,
            offset=None if offset is None else offset.view(()),
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.weight_dtype,
            block_size=self.block_size,
            quant_type=self.quant_type,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = nf4_linear(x.to(self.compute_dtype or x.dtype), self.weight, self.bias)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        weight = self.weight
        bits = 8 * weight.nbytes / weight.numel()
        size = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self.quant_type}, {bits:.3f} bits per weight"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuses a state dict made for another shape, dtype, block size or codebook."""
        *_, errors = args
        found, expected = state_dict.get(prefix + "nf4_layout"), self.get_buffer("nf4_layout")
        comparable = found is not None and found.shape == expected.shape and not expected.is_meta
        if not comparable or torch.equal(found.cpu(), expected.cpu()):
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        there, here = _describe(found), _describe(expected)
        errors.append(f"{prefix}nf4_layout: the state dict holds {there}, the model {here}")


def _to_parameter(t: Tensor | None) -> nn.Parameter | None:
    """Frozen and flat, floats as int32 bit patterns."""
    if t is None:
        return None
    bits = t.view(torch.int32) if t.dtype == torch.float32 else t
    return nn.Parameter(bits.reshape(-1), requires_grad=False)


def _to_floats(bits: Tensor | None) -> Any:
    return None if bits is None else bits.view(torch.float32)


def _layout(w: NF4Weight) -> Tensor:
    """Shape, dtype, block size and codebook, as integers that a state dict holds."""
    codebook = list(CODEBOOKS).index(w.quant_type)
    return torch.tensor([*w.shape, DTYPES.index(w.dtype), w.block_size, codebook])


def _describe(layout: Tensor) -> str:
    o, i, dtype, block_size, codebook = layout.tolist()
    kind = list(CODEBOOKS)[codebook]
    return f"a [{o}, {i}] weight of {DTYPES[dtype]} in {kind}, in blocks of {block_size}"


class QLoRALinear(LoRALayer, NF4Linear):
    r"""A 4-bit linear layer with adapters: y = x W^T + b + s (x A^T) B^T, W in NF4.

    `QLoRALinear(base, r=8)` makes a new layer beside `base`, as `LoRALinear` does.

    Example:
        >>> layer = QLoRALinear(NF4Linear.from_linear(torch.nn.Linear(64, 32)), r=4)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    base_class = NF4Linear

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.compute_dtype or x.dtype)
        adapters: list[Any] = [self.adapters[name] for name in self.active]
        if len(adapters) == 1 and _can_be_fused(adapters[0]):
            lora = adapters[0]
            y = lora_linear(h, self.weight, lora.A, lora.B, lora.scale, self.bias)
        else:
            y = super().forward(h)
        return y if self.compute_dtype is None else y.to(x.dtype)


def _can_be_fused(adapter: nn.Module) -> bool:
    """A plain adapter without dropout: its term is added in the same pass over y."""
    return type(adapter) is LoRA and not (adapter.training and adapter.dropout)


def adapter_class(layer: nn.Module, layer_name: str = "") -> type[LoRALayer]:
    """The class that `layer` has with adapters. A subclass of `LoRALayer` adds a kind of layer.

    Raises:
        TypeError: there is none, or an adapter cannot change what the layer computes.
    """
    if isinstance(layer, LoRALayer):
        return type(layer)
    kinds: list[Any] = LoRALayer.__subclasses__()
    kind = next((k for k in kinds if isinstance(layer, k.base_class)), LoRALinear)
    check_layer(layer, kind.base_class, layer_name)
    base_class: Any = type(layer)
    found: type[LoRALayer] = _subclass(kind, base_class)
    return found


@functools.cache
def _subclass(kind: Any, base_class: Any) -> Any:
    """`kind` for a base layer of exactly `base_class`, which may be a subclass of nn.Linear."""
    if kind.base_class is base_class:
        return kind
    attributes = {"base_class": base_class, "__reduce_ex__": _reduce}
    return type(f"LoRA{base_class.__name__}", (kind, base_class), attributes)


def _reduce(layer: LoRALayer, protocol: Any) -> Any:
    """For pickle: a class made at run time is found by its base class."""
    return _empty, type(layer).__bases__, vars(layer)


def _empty(kind: Any, base_class: Any) -> Any:
    cls = _subclass(kind, base_class)
    return cls.__new__(cls)


def add_adapter(layer: Any, name: str, adapter: LoRA) -> None:
    """Gives a layer one more adapter, which becomes the active one. Changes nothing else."""
    if not isinstance(layer, LoRALayer):
        change_class(layer, adapter_class(layer))
        layer.adapters = nn.ModuleDict()
    layer.adapters[name] = adapter.train(layer.training)
    layer.active = (name,)


def remove_adapter(layer: LoRALayer, name: str) -> None:
    """Takes an adapter away; without any, the layer is the base layer again, bit for bit."""
    del layer.adapters[name]
    layer.active = tuple(other for other in layer.active if other != name)
    if not layer.adapters:
        del layer.adapters, layer.active
        change_class(layer, layer.base_class)


def become(layer: nn.Module, new: nn.Module) -> None:
    """Makes `layer` what `new` is, in its place in the model: class, parameters, buffers."""
    change_class(layer, type(new))
    for name, value in vars(new).items():
        if name in ("_parameters", "_buffers") or not name.startswith("_"):
            vars(layer)[name] = value


def change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Assigns the class, and the class's forward where an instance holds a bound copy of it."""
    layer.__class__ = cls
    # accelerate's hooks call `_old_forward`, and leave `forward` behind when they are removed.
    for attribute in ("forward", "_old_forward"):
        if inspect.ismethod(vars(layer).get(attribute)):
            vars(layer)[attribute] = types.MethodType(cls.forward, layer)
