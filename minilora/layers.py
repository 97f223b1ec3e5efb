"""The two layers: parameters, and a short forward over functional.py.

A `LoRALinear` *adopts* its base: the base's parameters become its own under their old names, beside `lora_A` and `lora_B`. So
the base's keys in the state dict stay what they were, a tied head stays tied, and code that looks at `layer.weight` goes on
working. The emptied base waits in `LoRALinear.base` until `eject` fills it again.

Float constants of a quantized weight are stored as int32 bit patterns: `model.to(torch.bfloat16)`, `model.half()` and the mixed
precision of FSDP cast every float parameter, and would change the weights without a word.
"""

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from minilora.functional import linear, lora_linear, nf4_linear
from minilora.nf4 import DTYPES, NF4Weight, quantize_nf4

_LAYOUT = "nf4_layout"


def _frozen(t: Tensor | None) -> nn.Parameter | None:
    if t is None:
        return None
    bits = t.view(torch.int32) if t.dtype == torch.float32 else t
    return nn.Parameter(bits.reshape(-1), requires_grad=False)


def _floats(bits: Tensor | None) -> Tensor | None:
    return bits.view(torch.float32) if bits is not None and bits.dtype == torch.int32 else bits


def _layout(w: NF4Weight) -> Tensor:
    """Shape, dtype and block size as a tensor, so that they travel in any state dict and survive every cast."""
    return torch.tensor([*w.shape, DTYPES.index(w.dtype), w.block_size])


def _check_layout(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a state dict is loaded: refuses one that was made for another shape, dtype or block size."""
    errors: list[str] = rest[-1]
    found, mine = state.get(prefix + _LAYOUT), module.get_buffer(_LAYOUT)
    if found is not None and not mine.is_meta and not torch.equal(found.cpu(), mine.cpu()):
        errors.append(
            f"{prefix}{_LAYOUT}: the state dict holds {_describe(found)}, the model {_describe(mine)}"
        )


def _describe(layout: Tensor) -> str:
    o, i, dtype, block_size = layout.tolist()
    return f"an NF4 weight [{o}, {i}] of {DTYPES[dtype]} in blocks of {block_size}"


class NF4Linear(nn.Module):
    r"""A linear layer with a frozen weight in 4 bits: y = x W^T + bias.

    Args:
        weight: a quantized weight of shape [out_features, in_features].
        bias: [out_features] or None; stays dense.
        compute_dtype: the product's dtype, whatever the input's, which the output has again; None: as in `nf4_linear`.

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
            raise ValueError(
                f"a linear layer's weight has two dimensions, this one {tuple(weight.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        self.weight_dtype, self.block_size = weight.dtype, weight.block_size
        self.compute_dtype = compute_dtype
        for name, t in zip(("packed", "absmax", "absmax2", "offset"), weight.tensors, strict=True):
            self.register_parameter(name, _frozen(t))
        self.register_parameter("bias", bias)
        self.register_buffer(_LAYOUT, _layout(weight))
        self.register_load_state_dict_pre_hook(_check_layout)  # type: ignore[no-untyped-call]

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """Returns the quantized layer; `linear` keeps its dense weight. See `quantize_nf4` for arguments and errors."""
        new = cls(quantize_nf4(linear.weight, block_size, double_quant), linear.bias, compute_dtype)
        return new.train(linear.training)

    @property
    def weight(self) -> NF4Weight:
        """The quantized weight, sharing this layer's memory."""
        return _held(self)

    def forward(self, x: Tensor) -> Tensor:
        y = nf4_linear(x.to(self.compute_dtype or x.dtype), self.weight, self.bias)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        bits = 8 * self.weight.nbytes / self.weight.numel()
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, nf4, {bits:.3f} bits a weight"


def _held(module: Any) -> NF4Weight:
    """The NF4Weight that a layer with the parameters of NF4Linear holds."""
    absmax2, offset = _floats(module.absmax2), _floats(module.offset)
    return NF4Weight(
        module.packed,
        _floats(module.absmax),  # type: ignore[arg-type]
        absmax2,
        None if offset is None else offset.view(()),
        torch.Size((module.out_features, module.in_features)),
        module.weight_dtype,
        module.block_size,
    )


def check_base(base: nn.Module, name: str) -> None:
    """Raises TypeError unless `base` is a linear layer that an adapter can stand for."""
    at = f"{name or 'the base'} ({type(base).__name__})"
    if isinstance(base, LoRALinear):
        raise TypeError(f"{at} has an adapter already: minilora.merge or minilora.eject it first")
    if not isinstance(base, nn.Linear | NF4Linear):
        raise TypeError(f"{at} is not a linear layer: LoRA wraps nn.Linear and NF4Linear")
    if type(base).forward not in (nn.Linear.forward, NF4Linear.forward) or "forward" in vars(base):
        raise TypeError(
            f"{at} has a forward of its own, which an adapter would replace: leave it out with exclude="
        )
    if isinstance(base, nn.Linear) and not {"weight", "bias"} <= base._parameters.keys():
        raise TypeError(
            f"{at} computes its weight or bias (parametrized): remove the parametrization, or leave it out with exclude="
        )
    if (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
    ):
        raise TypeError(
            f"{at} has hooks, which would no longer run: remove them, inject, and register them again"
        )


def check_adapter(
    base: nn.Linear | NF4Linear, r: int, alpha: float | None, dropout: float, name: str
) -> None:
    """Raises ValueError unless rank, alpha and dropout make sense for `base`."""
    at = f"{name}: " if name else ""
    largest = min(base.in_features, base.out_features)
    if not isinstance(r, int) or not 1 <= r <= largest:
        size = f"[{base.out_features}, {base.in_features}]"
        raise ValueError(
            f"{at}r={r}: the rank of an update to a {size} layer is a whole number from 1 to {largest}"
        )
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(
            f"{at}alpha={alpha}: the update is scaled by alpha / r, so alpha must be above 0 and finite"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"{at}dropout={dropout}: a probability, at least 0 and less than 1")


def _draw(r: int, in_features: int, seed: int, name: str) -> Tensor:
    """A [r, in], Gaussian with standard deviation 1/r: the same whatever was drawn before it, on any device."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(r, in_features, generator=generator, device="cpu", dtype=torch.float32) / r


class LoRALinear(nn.Module):
    r"""A frozen linear layer and its low-rank update: y = x W^T + bias + (alpha / r) (x A^T) B^T.

    LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1). `lora_A` [r, in] starts Gaussian with standard deviation 1/r,
    `lora_B` [out, r] at zero, both float32 whatever the base: at the start the layer computes what its base computes.

    Args:
        base: an `nn.Linear` or `NF4Linear`. Its parameters move here and are frozen; `eject` gives them back.
        r: the rank, 1 <= r <= min(in_features, out_features).
        alpha: the update is scaled by alpha / r; None: 2 r.
        dropout: probability of dropping an element of x on the adapter's path, in training.
        name: with `seed`, decides the draw of A, whatever was drawn before it.
        seed: see name.

    Attributes:
        weight: the base's weight, a Parameter or an `NF4Weight`.
        scale: alpha / r.
        enabled: False: the layer computes its base alone (`minilora.disabled`).

    Raises:
        TypeError: the base is not a linear layer, or its class has a forward of its own, which the adapter would go round.
        ValueError: r, alpha or dropout out of range.

    Example:
        >>> base = torch.nn.Linear(64, 32)
        >>> x = torch.randn(5, 64)
        >>> before = base(x)
        >>> layer = LoRALinear(base, r=4)
        >>> bool((layer(x) == before).all()), sum(p.numel() for p in layer.parameters() if p.requires_grad)
        (True, 384)
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    compute_dtype: torch.dtype | None

    def __init__(
        self,
        base: nn.Linear | NF4Linear,
        r: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_base(base, name)
        check_adapter(base, r, alpha, dropout, name)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.alpha, self.dropout = r, float(2 * r if alpha is None else alpha), dropout
        self.scale = self.alpha / self.r
        self.enabled = True
        self.adapter_name = "default"
        device = base.weight.device
        A = nn.Parameter(_draw(self.r, self.in_features, seed, name).to(device))
        B = nn.Parameter(torch.zeros(self.out_features, self.r, device=device, dtype=torch.float32))
        self._adopt(base)  # last: what fails for want of memory fails before the base is emptied
        self.lora_A, self.lora_B = A, B
        self.train(base.training)

    def _adopt(self, base: nn.Linear | NF4Linear) -> None:
        self.compute_dtype = None
        if isinstance(base, NF4Linear):
            self.weight_dtype, self.block_size, self.compute_dtype = (
                base.weight_dtype,
                base.block_size,
                base.compute_dtype,
            )
            self.register_load_state_dict_pre_hook(_check_layout)  # type: ignore[no-untyped-call]
        for mine, theirs in ((self._parameters, base._parameters), (self._buffers, base._buffers)):
            for name, held in theirs.items():
                mine[name] = held  # type: ignore[assignment]
                theirs[name] = None
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.base = (base,)  # in a tuple: not a submodule, its parameters are here now

    @property
    def weight(self) -> nn.Parameter | NF4Weight:
        """What the base holds: its dense parameter, or its quantized weight."""
        dense = self._parameters.get("weight")
        return _held(self) if dense is None else dense

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.compute_dtype or x.dtype)
        p = self.dropout if self.training else 0.0
        if self.enabled:
            y = lora_linear(h, self.weight, self.lora_A, self.lora_B, self.scale, self.bias, p)
        else:
            y = linear(h, self.weight, self.bias)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def release(self) -> nn.Linear | NF4Linear:
        """Gives the base its parameters back and returns it; this layer is of no use afterwards."""
        (base,) = self.base
        for mine, theirs in ((self._parameters, base._parameters), (self._buffers, base._buffers)):
            for name in theirs:
                theirs[name] = mine.pop(name)  # type: ignore[assignment]
        return base.train(self.training)

    def extra_repr(self) -> str:
        kind = (
            "nf4"
            if isinstance(self.weight, NF4Weight)
            else str(self.weight.dtype).removeprefix("torch.")
        )
        return f"{self.in_features}, {self.out_features}, base={kind}, r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"
