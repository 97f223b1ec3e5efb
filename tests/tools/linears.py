"""Linear layers with random values, and an adapter over a dense or a quantized one."""

from typing import Any

import torch
from torch import nn

from minilora import LoRALinear, NF4Linear, QLoRALinear


def random_linear(
    o: int = 12, i: int = 20, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear:
    """A layer whose weight [o, i] and bias are Gaussian, the same for the same seed."""
    layer = nn.Linear(i, o, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return layer


def with_adapter(base: nn.Module, **options: Any) -> Any:
    """A new layer with an adapter, over a dense or a quantized base."""
    kind: Any = QLoRALinear if isinstance(base, NF4Linear) else LoRALinear
    return kind(base, **options)
