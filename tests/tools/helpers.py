"""What several test files need: random tensors, equality of bits, a picture of a model's state."""

from typing import Any

import torch
from torch import Tensor, nn

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A Gaussian tensor, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(found: Any, expected: Any) -> bool:
    """Equal in dtype, shape and every bit; of tensors or of tuples of them.

    0.0 is not -0.0, and a NaN equals itself.
    """
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same_bits, found, expected))
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    integer = INTEGER[expected.itemsize]
    bits = [t.detach().cpu().contiguous().view(integer) for t in (found, expected)]
    return torch.equal(*bits)


def snapshot(model: nn.Module) -> list[Any]:
    """Modules by identity and class; parameters by identity, requires_grad and version counter.

    Two snapshots are equal if and only if nothing edited the model between them.
    """
    modules = [(n, id(m), type(m), m.training) for n, m in model.named_modules()]
    parameters = [
        (n, id(p), p.requires_grad, p._version)
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, list(model.state_dict())]
