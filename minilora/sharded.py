"""Models that FSDP2 (`fully_shard`) has sharded: each process has a part of each parameter.

Such a parameter is a DTensor. Its shape is that of the whole, and an operation on it may be a
collective: every process has to call it, or the others wait. `torch.distributed.tensor` takes half
a second to import; where nothing has imported it, nothing is sharded.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(t: Any) -> bool:
    """Whether this is a DTensor."""
    return isinstance(t, _class("torch.distributed.tensor", "DTensor"))


def full(t: Tensor) -> Tensor:
    """The whole of a sharded tensor, a collective; any other tensor as it is."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        # The part may be offloaded to the CPU, where the mesh's backend cannot gather it.
        sharded: Any = t.detach()
        whole: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return whole


def sharding_of(model: nn.Module) -> Any:
    """The mesh of devices that a model is sharded over; None if it is not.

    What FSDP2 has gathered for computing is freed: such a parameter is an ordinary tensor, in the
    dtype that computes, until it is sharded again.
    """
    for module in model.modules():
        if isinstance(module, _class("torch.distributed.fsdp", "FSDPModule")):
            module.reshard()
    sharded: Any = next(filter(is_sharded, model.parameters()), None)
    return None if sharded is None else sharded.device_mesh


def _class(module: str, name: str) -> Any:
    """A class of a module that may not be imported: then of nothing."""
    return getattr(sys.modules.get(module), name, ())
