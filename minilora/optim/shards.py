r"""Parameters that are sharded over several processes (FSDP2), as `torch.distributed` DTensors.

AdamW works element by element, so each process updates the part of each parameter that it has, and
pages the states of that part: nothing here communicates. The states are DTensors, sharded as their
parameter, which is what `torch.optim.AdamW` makes of them, and what the state dict functions of
`torch.distributed.checkpoint` gather and distribute.

`torch.distributed.tensor` takes half a second to import. Where it is not imported, there is no
DTensor.
"""

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(t: object) -> "TypeIs[DTensor]":
    """Whether this is a tensor that several processes share, as `fully_shard` makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(t, getattr(module, "DTensor", ()))


def local(t: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which may be empty; any other tensor as it is.

    It shares the memory. The autograd graph does not see it.
    """
    if not is_sharded(t):
        return t
    with torch.no_grad():
        return t.to_local()


def same_sharding(a: Tensor, b: Tensor) -> bool:
    """Whether every process has the same part of both; two ordinary tensors are whole."""
    if not (is_sharded(a) and is_sharded(b)):
        return not (is_sharded(a) or is_sharded(b))
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def local_part(value: Tensor, param: Tensor) -> Tensor:
    """This process's part of `value`, which is whole, or sharded as `param` is."""
    if is_sharded(param) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        # No process sends: each has the whole value.
        mesh, placements = param.device_mesh, param.placements
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    return local(value)


def describe_sharding(t: Tensor) -> str:
    """What an error says of a tensor beside its dtype, shape and device."""
    return f", sharded as {t.placements}" if is_sharded(t) else ""
