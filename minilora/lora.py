r"""LoRA: train a low-rank update of a frozen layer (Hu et al. 2021, arXiv:2106.09685).

Full fine-tuning of a linear layer y = W x learns a new W: as many numbers as the old one. LoRA
freezes W and learns the *difference* as a product of two thin matrices:

    y = W x + s B A x        A [r, in]    B [out, r]    s = alpha / r

Why it is enough: fine-tuning changes W by a matrix of low "intrinsic rank" (section 7). A starts
Gaussian and B at zero, so before the first step the layer computes exactly what it did. After
training, s B A can be added to W (`merging.py`), and inference costs nothing extra.

What it costs: for a 4096 x 4096 layer and r = 8, A and B are 65,536 trainable numbers in place of
16.8 million, 0.4 %, and gradients and optimizer states exist for them alone. W has to be there all
the same; QLoRA holds it in 4 bits (`nf4.py`).

How it is built: an adapter is an object of its own (`LoRA`), and a layer that carries adapters is
still the same layer. `minilora.inject` changes the layer's *class*, from `nn.Linear` to
`LoRALinear`, and moves nothing: state dicts, tied weights, hooks and sharding stay as they were.
"""

import copy
import math
import zlib
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Adapter = TypeVar("Adapter", bound="LoRA")


class LoRA(nn.Module):
    r"""One adapter, x -> s B A dropout(x) with s = alpha / r (LoRA, section 4.1).

    Args:
        in_features, out_features: sizes of the layer that it adapts.
        r: rank of the update.
        alpha: the update is scaled by alpha / r. Default: 2 * r.
        dropout: probability of zeroing an element of x, in training.
        bias: give B a bias b, s (B A x + b), which PEFT calls `lora_bias`.
        seed, layer_name: they alone decide the draw of A: the same in any model, on any device.
        device: of A and B.

    Shapes:
        A [r, in_features], B [out_features, r], bias [out_features] or None, float32 whatever the
        layer's dtype.
        x [..., in_features] -> [..., out_features], in x's dtype or autocast's.

    Raises:
        ValueError: r, alpha or dropout is out of range; the layer is named.

    Example:
        >>> adapter = LoRA(64, 32, r=4, alpha=8)
        >>> adapter(torch.randn(5, 64)).shape, adapter.scale
        (torch.Size([5, 32]), 2.0)
    """

    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        seed: int = 0,
        layer_name: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_options(r, alpha, dropout, layer_name)
        self.r, self.dropout = r, dropout
        self.alpha = float(2 * r if alpha is None else alpha)
        self.seed = zlib.crc32(f"{seed} {layer_name}".encode())

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))

        self.A, self.B = empty(r, in_features), empty(out_features, r)
        self.register_parameter("bias", empty(out_features) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A again, and zeros B and its bias: what `to_empty` leaves is arbitrary."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        A = torch.randn(self.A.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.A.copy_(A / self.r)
        for zero in (self.B, self.bias):
            if zero is not None:
                zero.zero_()

    @classmethod
    def for_layer(cls: type[Adapter], layer: Any, r: int = 8, **options: Any) -> Adapter:
        """An adapter for a linear layer, on its device. A variant may read the layer's weight."""
        return cls(layer.in_features, layer.out_features, r, device=layer.weight.device, **options)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        update = self.scale * (x @ A.T) @ B.T
        bias = self.bias_delta()
        return update if bias is None else update + bias.to(update.dtype)

    def adapt(self, y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """What `layer` computes from x with this adapter; without, it computes y."""
        update: Tensor = self(x)
        return y + update

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update as a matrix, s B A [out_features, in_features], computed in `dtype`."""
        return self.scale * (self.B.to(dtype) @ self.A.to(dtype))

    def merged_into(self, W: Tensor) -> Tensor:
        """W + s B A, in W's dtype."""
        return W + self.delta(W.dtype)

    def bias_delta(self) -> Tensor | None:
        """What the layer's own bias changes by: s times the bias of B. None: B has none."""
        return None if self.bias is None else self.scale * self.bias

    def tensors(self) -> dict[str, nn.Parameter]:
        """What a file holds of this adapter, under PEFT's names."""
        bias = {} if self.bias is None else {"lora_B.bias": self.bias}
        return {"lora_A.weight": self.A, "lora_B.weight": self.B, **bias}

    def config(self) -> dict[str, Any]:
        """What PEFT's adapter_config.json says of this adapter."""
        bias = {} if self.bias is None else {"lora_bias": True}
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **bias}

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class LoRALayer(nn.Module):
    """Mixed in before a layer's own class: the layer's output, changed by its active adapters.

    Attributes:
        base_class: class of the layer without adapters.
        adapters: the adapters by name.
        active: names of those that take part; () leaves the base layer alone.
    """

    base_class: ClassVar[type[nn.Module]]
    adapters: nn.ModuleDict
    active: tuple[str, ...]

    def __init__(self, base: nn.Module, r: int = 8, **options: Any) -> None:
        check_layer(base, self.base_class, options.get("layer_name", ""))
        nn.Module.__init__(self)
        for name, value in vars(base).items():
            if name not in ("forward", "_old_forward", "_hf_hook"):
                vars(self)[name] = copy.copy(value) if isinstance(value, dict) else value
        self.requires_grad_(False)
        adapter = LoRA.for_layer(self, r, **options)
        self.adapters = nn.ModuleDict({"default": adapter.train(base.training)})
        self.active = ("default",)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        for name in self.active:
            y = self.adapters[name].adapt(y, x, self)  # type: ignore[operator]
        return y


class LoRALinear(LoRALayer, nn.Linear):
    r"""A linear layer with adapters: y = W x + b + s B A dropout(x), summed over the active ones.

    `minilora.inject` makes one of each `nn.Linear` of a model, in place. `LoRALinear(base, r=8)`
    makes a new layer, which shares and freezes the parameters of `base`; `base` still works. It
    takes the options of `LoRA`.

    Raises:
        TypeError: the base is not an `nn.Linear`, or an adapter cannot change what it computes.
        ValueError: an option is out of range.

    Example:
        >>> layer = LoRALinear(torch.nn.Linear(64, 32), r=4)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        384
    """

    base_class = nn.Linear


def check_options(r: int, alpha: float | None, dropout: float, layer_name: str = "") -> None:
    """Raises ValueError, with the layer's name, unless there are adapters with these options."""
    at = f"{layer_name}: " if layer_name else ""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"{at}r={r}: the rank is a whole number from 1")
    known = alpha is None or isinstance(alpha, int | float)
    if not known or (alpha is not None and not (alpha > 0 and math.isfinite(alpha))):
        raise ValueError(f"{at}alpha={alpha}: must be positive and finite (scaling is alpha / r)")
    if not 0 <= dropout < 1:
        raise ValueError(f"{at}dropout={dropout}: must be a probability below 1")


def check_layer(layer: Any, base_class: type[nn.Module], layer_name: str = "") -> None:
    """Raises TypeError unless an adapter can change what the layer computes."""
    at = f"{layer_name or 'the layer'} ({type(layer).__name__})"
    if isinstance(layer, LoRALayer):
        raise TypeError(f"{at} has an adapter already: minilora.inject adds a second one")
    if not isinstance(layer, base_class):
        raise TypeError(f"{at} is not a linear layer: this adapter is for {base_class.__name__}")

    # accelerate's hooks keep the layer's own forward in `_old_forward`.
    forward, kind = vars(layer).get("_old_forward", layer.forward), type(layer)
    calls = "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__setattr__"
    own = [n for n in calls if n in vars(layer) or getattr(kind, n) is not getattr(base_class, n)]
    if own or getattr(forward, "__func__", None) is not base_class.forward:
        raise TypeError(f"{at} has a {[*own, 'forward'][0]} of its own: leave it out with exclude=")
    weight, stored = layer.weight, layer._parameters
    computed = isinstance(weight, Tensor) and weight is not stored.get("weight")
    if computed or layer.bias is not stored.get("bias"):
        raise TypeError(f"{at} is parametrized: remove the parametrization, or exclude the layer")
