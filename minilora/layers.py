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
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minilora.functional import lora_linear, nf4_linear
from minilora.kernels.reference.codebooks import CODEBOOKS
from minilora.lora import LoRA, LoRALayer, LoRALinear, check_layer
from minilora.nf4 import DTYPES, PARTS, NF4Weight, quantize_nf4
from minilora.sharded import full, is_sharded

# With the parameters of PARTS, what takes the place of `weight`.
_FORMAT = ("nf4_layout", "weight_dtype", "block_size", "quant_type", "compute_dtype")

# What a subclass of nn.Linear may define and quantizing may forget.
_FORGOTTEN = {"__init__", "__repr__", "extra_repr", "reset_parameters"}


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

        for name in PARTS:
            self.register_parameter(name, _to_parameter(getattr(weight, name)))
        self.register_parameter("bias", bias)
        # Not sharded with the parts: every process has it whole.
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
        own = self._parameters
        parts: list[Any] = [own["packed"], own["absmax"], own["absmax2"], own["offset"]]
        # Fake and sharded parameters have no address.
        if type(parts[0]) is not nn.Parameter or torch.compiler.is_compiling():
            return self._view(parts)

        # Making the views takes as long as a product with a single row.
        memory = [None if part is None else part.data_ptr() for part in parts]
        held: tuple[Any, NF4Weight] | None = self.__dict__.get("_held_view")
        if held is None or held[0] != memory:
            held = memory, self._view(parts)
            self.__dict__["_held_view"] = held
        return held[1]

    def _view(self, parts: list[Any]) -> NF4Weight:
        packed, absmax, absmax2, offset = (_to_floats(part) for part in parts)
        # A sharded offset is whole in one process alone.
        if offset is not None and not is_sharded(offset):
            offset = offset.view(())
        tensors = packed, absmax, absmax2, offset
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Weight(*tensors, shape, self.weight_dtype, self.block_size, self.quant_type)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: without the views."""
        return {name: value for name, value in vars(self).items() if name != "_held_view"}

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.compute_dtype is None else x.to(self.compute_dtype)
        y = nf4_linear(h, self.weight, _bias(self), training=self.training)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        weight = self.weight
        bits = 8 * weight.nbytes / weight.numel()
        size = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self.quant_type}, {bits:.3f} bits per weight"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Loads all parts of the weight, or none and says which does not fit."""
        own = {"nf4_layout": _layout(self.weight)}
        own |= {n: t for n in (*PARTS, "bias") if (t := getattr(self, n)) is not None}
        found = {n: state_dict[prefix + n] for n in own if prefix + n in state_dict}

        # PyTorch reports a bias, or a whole layer, that is missing.
        for n in own if found.keys() - {"bias"} else ():
            here = _describe(n, own[n], may_be_meta=True)
            there = _describe(n, found.get(n), may_be_meta=self.packed.is_meta)
            if there != here and (n != "bias" or n in found):
                args[-1].append(f"{prefix}{n}: the state dict holds {there}, the model {here}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


def _describe(name: str, t: Any, may_be_meta: bool) -> str:
    """What a part of a layer's state is: equal for parts that can replace each other."""
    if not isinstance(t, Tensor):
        return "nothing" if t is None else f"a {type(t).__name__}"
    if t.is_meta and not may_be_meta:
        return "no values (a tensor on the meta device)"
    if name == "nf4_layout" and t.shape == (5,) and not t.is_meta:
        o, i, dtype, block_size, codebook = full(t).tolist()
        dtype = dict(enumerate(DTYPES)).get(dtype, dtype)
        codebook = dict(enumerate(CODEBOOKS)).get(codebook, codebook)
        return f"a [{o}, {i}] weight of {dtype} in {codebook}, in blocks of {block_size}"
    kind = "floats" if name == "bias" and t.is_floating_point() else t.dtype
    infinite = t.dtype == torch.int32 and not t.is_meta and not _to_floats(full(t)).isfinite().all()
    return f"{tuple(t.shape)} of {kind}" + (", with NaN or infinity" if infinite else "")


def _to_parameter(t: Tensor | None) -> nn.Parameter | None:
    """Frozen and flat, floats as int32 bit patterns."""
    if t is None:
        return None
    bits = t.view(torch.int32) if t.dtype == torch.float32 else t
    return nn.Parameter(bits.reshape(-1), requires_grad=False)


def _to_floats(t: Any) -> Any:
    """The other way: int32 bit patterns as floats, and all else as it is."""
    return t.view(torch.float32) if isinstance(t, Tensor) and t.dtype == torch.int32 else t


def _layout(w: NF4Weight) -> Tensor:
    """Shape, dtype, block size and codebook, as integers that a state dict holds."""
    codebook = list(CODEBOOKS).index(w.quant_type)
    return torch.tensor([*w.shape, DTYPES.index(w.dtype), w.block_size, codebook])


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
        h = x if self.compute_dtype is None else x.to(self.compute_dtype)
        adapters: Any = self._modules["adapters"]
        lora = adapters[self.active[0]] if len(self.active) == 1 else None
        # The term of a single plain adapter is added in the same pass over y.
        if type(lora) is LoRA and (factors := _plain_factors(lora)):
            y = lora_linear(
                h,
                self.weight,
                *factors,
                lora.scale,
                _bias(self),
                lora.dropout if lora.training else 0.0,
                training=self.training,
            )
        else:
            y = super().forward(h)
        return y if self.compute_dtype is None else y.to(x.dtype)


def _bias(layer: NF4Linear) -> Tensor | None:
    """The bias, which may be no parameter but an attribute, as FSDP leaves it."""
    found = layer._parameters.get("bias")
    return layer.bias if found is None and "bias" not in layer._parameters else found


def _plain_factors(lora: LoRA) -> tuple[Tensor, Tensor] | None:
    """A and B of an adapter, or None if it has a bias or something has taken their place.

    Read from the dictionary: each attribute of a module takes half a microsecond to find.
    """
    found = lora._parameters.get
    A, B = found("A"), found("B")
    return None if A is None or B is None or found("bias") is not None else (A, B)


def adapter_class(layer: nn.Module, layer_name: str = "") -> type[LoRALayer]:
    """The class that `layer` has with adapters. A subclass of `LoRALayer` adds a kind of layer.

    Raises TypeError if there is none, or if an adapter cannot change what the layer computes.
    """
    if isinstance(layer, LoRALayer):
        return type(layer)
    kinds: list[Any] = LoRALayer.__subclasses__()
    kind = next((k for k in kinds if isinstance(layer, k.base_class)), LoRALinear)
    check_layer(layer, kind.base_class, layer_name)
    with_adapters = functools.partial(_subclass, kind)
    return check_change(layer, layer_name, with_adapters, ("adapters", "active"))


def check_quantizable(layer: Any, layer_name: str) -> None:
    """Raises TypeError, with the layer's name, if an NF4Linear could not stand for the layer."""
    check_layer(layer, nn.Linear, layer_name)
    check_change(layer, layer_name, lambda _: NF4Linear, (*PARTS, *_FORMAT))
    for base in type(layer).__mro__[: type(layer).__mro__.index(nn.Linear)]:
        for name in sorted(vars(base).keys() - _FORGOTTEN):
            if callable(getattr(nn.Linear, name, None)) and name != "__class__":
                _refuse(layer, layer_name, f"has a {name} of its own")


def check_change(
    layer: Any, layer_name: str, other: Callable[[Any], Any], taken: Sequence[str]
) -> type[Any]:
    """The class other(type(layer)). Raises TypeError unless the layer can become one of it."""
    weight, bias, size = layer.weight, layer.bias, (layer.out_features, layer.in_features)
    if is_lazy(weight):
        _refuse(layer, layer_name, "has no size yet, until the model has run once")
    if weight is None or weight.dtype not in DTYPES:
        _refuse(layer, layer_name, f"has a weight of {getattr(weight, 'dtype', None)}")
    if weight.shape != size or (bias is not None and bias.shape != size[:1]):
        _refuse(layer, layer_name, f"says that it is {size}, but its weight or bias is not")
    if clash := [n for n in taken if hasattr(layer, n)]:
        _refuse(layer, layer_name, f"has a {clash[0]!r} already")
    try:
        found: type[Any] = other(type(layer))
        object.__new__(type(layer)).__class__ = found
    except Exception as error:
        _refuse(layer, layer_name, f"cannot change its class ({error})")
    return found


def _refuse(layer: Any, layer_name: str, reason: str) -> NoReturn:
    at = f"{layer_name or 'the layer'} ({type(layer).__name__})"
    raise TypeError(f"{at} {reason}: leave it out with exclude=")


@functools.cache
def _subclass(kind: Any, base_class: Any) -> Any:
    """`kind` for a base layer of exactly `base_class`, which may be a subclass of nn.Linear."""
    if kind.base_class is base_class:
        return kind
    attributes = {"base_class": base_class, "__reduce_ex__": _reduce}
    return type(f"LoRA{base_class.__name__}", (kind, base_class), attributes)


def _reduce(layer: LoRALayer, protocol: Any) -> Any:
    """For pickle: a class made at run time is found by its base class."""
    return _empty, type(layer).__bases__, layer.__getstate__()  # type: ignore[no-untyped-call]


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


def become(layer: Any, new: nn.Module) -> None:
    """Makes `layer` what `new` is, in its place in the model. What is not the weight's stays."""
    change_class(layer, type(new))
    for name in (*_FORMAT, "_held_view", "weight", *PARTS):
        for held in (vars(layer), layer._buffers, layer._parameters):
            held.pop(name, None)
    layer._parameters = {**new._parameters, **layer._parameters}
    layer._buffers = {**new._buffers, **layer._buffers}
    vars(layer).update({n: v for n, v in vars(new).items() if not n.startswith("_")})


def change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Assigns the class, and the class's forward where an instance holds a bound copy of it."""
    layer.__class__ = cls
    # accelerate's hooks call `_old_forward`, and leave `forward` behind when they are removed.
    for attribute in ("forward", "_old_forward"):
        if inspect.ismethod(vars(layer).get(attribute)):
            vars(layer)[attribute] = types.MethodType(cls.forward, layer)
