"""4-bit weights as bitsandbytes stores them in a state dict, without bitsandbytes.

A layer `fc` whose weight has n values in b blocks has these tensors:

    fc.weight                                uint8 [ceil(n/2), 1]: the packed codes
    fc.weight.absmax                         float32 [b]; double-quantized: uint8 codes [b]
    fc.weight.quant_map                      float32 [16]: the codebook
    fc.weight.nested_absmax                  double-quantized only, float32 [ceil(b/256)]
    fc.weight.nested_quant_map               double-quantized only, float32 [256]: MAP8
    fc.weight.quant_state.bitsandbytes__nf4  uint8: a JSON object with the rest; for FP4 __fp4

Codes, blocks and groups are laid out as in an `NF4Weight`, so nothing is computed in either
direction and no bit changes. Names and keys are those of `QuantState.as_dict` and `from_dict` in
functional.py of bitsandbytes 0.50.2.

The packed codes may come in another dtype (`bnb_4bit_quant_storage`): the same bytes, seen as
floats that FSDP can shard.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minilora.files.json_file import parse_json
from minilora.files.text import shown, shown_value
from minilora.kernels.reference.codebooks import MAP8, levels
from minilora.kernels.reference.nf4 import GROUP
from minilora.nf4 import BLOCK_SIZES, NF4Weight

_ABSMAX, _CODEBOOK = "weight.absmax", "weight.quant_map"
_ABSMAX2, _MAP8 = "weight.nested_absmax", "weight.nested_quant_map"
_STATE = "weight.quant_state.bitsandbytes__"

_QUANT_TYPES = ("nf4", "fp4")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What a layer in 4 bits has, and no other does.
_KEY = re.compile(r"((?P<layer>.+)\.)?weight\.((nested_)?(absmax|quant_map)|quant_state\..+)")

# A state has 160 bytes.
_MOST_BYTES = 10_000


def to_tensors(layer: str, weight: NF4Weight) -> dict[str, Tensor]:
    """Returns the tensors of a layer's weight by their keys in a state dict.

    The weight's own tensors are not copied.

    Args:
        layer: name of the layer, as in `model.named_modules()`.
        weight: on any device, NF4 or FP4, of float32, bfloat16 or float16.

    Raises:
        ValueError: bitsandbytes has no such weight: it was float64, or has another codebook; or it
            has no values yet.

    Example:
        >>> tensors = to_tensors("fc", minilora.quantize_nf4(torch.randn(32, 64)))
        >>> tensors["fc.weight"].shape, tensors["fc.weight.absmax"].dtype
        (torch.Size([1024, 1]), torch.uint8)
        >>> print(bytes(tensors["fc.weight.quant_state.bitsandbytes__nf4"].tolist()).decode()[:53])
        {"quant_type": "nf4", "blocksize": 64, "dtype": "floa
    """
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        reason = f"{layer}: bitsandbytes has no 4-bit weights of {dtype}, only of {known}"
        raise ValueError(f"{reason}: convert the model before it is quantized")
    if weight.quant_type not in _QUANT_TYPES:
        reason = f"{layer}: bitsandbytes has no codebook {weight.quant_type!r}"
        raise ValueError(f"{reason}, only {' and '.join(map(repr, _QUANT_TYPES))}")

    if weight.packed.is_meta:
        raise ValueError(f"{layer} is on the meta device and has no values: load the model first")

    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": dtype,
        "shape": list(weight.shape),
    }
    # Clones: a safetensors file refuses tensors that share memory.
    tensors = {
        "weight": weight.packed.view(-1, 1),
        _ABSMAX: weight.absmax,
        _CODEBOOK: levels(weight.quant_type).clone(),
    }
    if weight.absmax2 is not None and weight.offset is not None:
        tensors |= {_ABSMAX2: weight.absmax2, _MAP8: MAP8.clone()}
        state |= {
            "nested_blocksize": GROUP,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
    tensors[_STATE + weight.quant_type] = _to_bytes(state)
    prefix = f"{layer}." if layer else ""
    return {prefix + key: tensor for key, tensor in tensors.items()}


def quantized_layers(keys: Iterable[str]) -> set[str]:
    """Returns the names of the layers that have a 4-bit weight, from the keys of a state dict.

    Example:
        >>> sorted(quantized_layers(["a.weight", "fc.weight", "fc.weight.absmax", "fc.bias"]))
        ['fc']
    """
    return {match["layer"] or "" for key in keys if (match := _KEY.fullmatch(key))}


def from_tensors(layer: str, tensors: Mapping[str, Tensor]) -> NF4Weight:
    """Returns the weight of a layer from tensors of a state dict; the inverse of `to_tensors`.

    The tensors are not copied. Those of other layers may be among them.

    Args:
        layer: name of the layer; "" if the keys begin with "weight".
        tensors: with values, on one device.

    Raises:
        ValueError: they are not a 4-bit weight of bitsandbytes: something is missing, left over,
            misshapen or not finite, or of a format that bitsandbytes does not write. The message
            names the layer.

    Example:
        >>> w = minilora.quantize_nf4(torch.randn(32, 64), quant_type="fp4")
        >>> again = from_tensors("fc", to_tensors("fc", w))
        >>> again.quant_type, torch.equal(again.dequantize(), w.dequantize())
        ('fp4', True)
    """
    try:
        return _from_tensors(_own(layer, tensors))
    except ValueError as error:
        at = shown(layer) or "the layer"
        raise ValueError(f"{at}: not a 4-bit weight of bitsandbytes: {error}") from error


def _own(layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the layer's weight, by keys that begin with "weight"."""
    prefix = f"{layer}." if layer else ""
    key = f"{prefix}weight"
    found = [name for name in tensors if name == key or name.startswith(f"{key}.")]
    own = {name.removeprefix(prefix): tensors[name] for name in found}
    for name, tensor in own.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{shown(name)} is a {type(tensor).__name__}, not a tensor")
    return own


def _from_tensors(tensors: dict[str, Tensor]) -> NF4Weight:
    states = [key for key in tensors if key.startswith("weight.quant_state.")]
    if len(states) != 1:
        found = ", ".join(map(shown, sorted(states))) or "no weight.quant_state"
        raise ValueError(f"it has {found}, where one is needed")

    quant_type = states[0].removeprefix(_STATE)
    if quant_type not in _QUANT_TYPES:
        raise ValueError(f"{shown(states[0])} is neither NF4 nor FP4")

    state = _from_bytes(tensors[states[0]])
    _check_entry(state, "quant_type", quant_type)
    block_size = _entry(state, "blocksize", BLOCK_SIZES)
    dtype = _DTYPES[_entry(state, "dtype", tuple(_DTYPES))]
    shape = _shape(state)

    n = math.prod(shape)
    blocks = math.ceil(n / block_size)
    is_double = _ABSMAX2 in tensors or _MAP8 in tensors or "nested_offset" in state
    names = {"weight", _ABSMAX, _CODEBOOK, states[0], *((_ABSMAX2, _MAP8) if is_double else ())}
    _check_names(tensors, names)

    packed = _packed(tensors["weight"], math.ceil(n / 2))
    _check_map(tensors, _CODEBOOK, levels(quant_type))
    if not is_double:
        absmax = _floats(tensors, _ABSMAX, blocks)
        return NF4Weight(packed, absmax, None, None, shape, dtype, block_size, quant_type)

    _check_entry(state, "nested_blocksize", GROUP)
    _check_entry(state, "nested_dtype", "float32")
    _check_map(tensors, _MAP8, MAP8)
    codes = tensors[_ABSMAX]
    if codes.dtype != torch.uint8 or codes.numel() != blocks:
        raise ValueError(f"{_describe(tensors, _ABSMAX)}, not uint8 of {blocks} values")
    absmax2 = _floats(tensors, _ABSMAX2, math.ceil(blocks / GROUP))
    offset = torch.tensor(_offset(state), dtype=torch.float32, device=packed.device)
    # No level of MAP8 is larger than 1.
    if not bool((absmax2.abs() + offset.abs()).isfinite().all()):
        raise ValueError(f"{_ABSMAX2} and nested_offset together are infinity")
    constants = codes.reshape(-1), absmax2, offset
    return NF4Weight(packed, *constants, shape, dtype, block_size, quant_type)


def _to_bytes(state: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.numel() > _MOST_BYTES or tensor.is_meta:
        kind = f"{tensor.numel()} values of {tensor.dtype}"
        raise ValueError(f"weight.quant_state is {kind}, not JSON of at most {_MOST_BYTES} bytes")
    return parse_json(bytes(tensor.flatten().tolist()), "weight.quant_state")


def _entry(state: Mapping[str, Any], key: str, known: tuple[Any, ...]) -> Any:
    """The value of a key, which has to be one of those known."""
    value = state.get(key)
    # True equals 1, and is not one.
    if not any(type(value) is type(k) and value == k for k in known):
        choices = ", ".join(map(str, known))
        raise ValueError(f"its {key} is {shown_value(value)}, not {choices}")
    return value


def _check_entry(state: Mapping[str, Any], key: str, expected: Any) -> None:
    _entry(state, key, (expected,))


def _shape(state: Mapping[str, Any]) -> torch.Size:
    sizes = state.get("shape")
    if not isinstance(sizes, list) or not all(type(s) is int and s > 0 for s in sizes):
        raise ValueError(f"its shape is {shown_value(sizes)}")
    if math.prod(sizes) >= 2**63:
        raise ValueError(f"its shape is {shown_value(sizes)}, more than any file holds")
    return torch.Size(sizes)


def _offset(state: Mapping[str, Any]) -> float:
    offset: Any = state.get("nested_offset")
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise ValueError(f"its nested_offset is {shown_value(offset)}, not a finite number")
    return float(offset)


def _check_names(tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"it has no {', '.join(missing)}")
    if left_over := sorted(tensors.keys() - expected):
        raise ValueError(f"it also has {', '.join(map(shown, left_over))}")
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"{shown(empty[0])} is on the meta device and has no values")


def _packed(stored: Tensor, nbytes: int) -> Tensor:
    """The packed codes, uint8 [nbytes], from any storage dtype."""
    flat = stored.reshape(-1)
    if flat.nbytes != nbytes or flat.is_complex() or flat.dtype == torch.bool:
        found = f"weight has {flat.nbytes} bytes of {flat.dtype}"
        raise ValueError(f"{found}, where its shape needs {nbytes}")
    return flat.view(torch.uint8)


def _floats(tensors: Mapping[str, Tensor], key: str, count: int) -> Tensor:
    """A tensor of `count` finite numbers, as float32."""
    tensor = tensors[key]
    if not tensor.is_floating_point() or tensor.numel() != count:
        raise ValueError(f"{_describe(tensors, key)}, not float32 of {count} values")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{key} holds NaN or infinity")
    return tensor.reshape(-1).float()


def _check_map(tensors: Mapping[str, Tensor], key: str, expected: Tensor) -> None:
    """Raises ValueError unless a table of levels is the expected one.

    bitsandbytes computes MAP8 when it is imported; on some processors the last bit differs.
    """
    found = _floats(tensors, key, len(expected))
    if not torch.allclose(found, expected.to(found.device), rtol=1e-6, atol=0):
        raise ValueError(f"{key} holds other levels: it was quantized with another codebook")


def _describe(tensors: Mapping[str, Tensor], key: str) -> str:
    return f"{key} is {tensors[key].dtype} of {tensors[key].numel()} values"
