"""Sharding a model: each process holds a part of every parameter (PyTorch's FSDP2, `fully_shard`).

A block's parameters are gathered right before it computes, and freed right after; the gradients of
its adapters are averaged over the processes and end where the shards are. Small blocks are gathered
several at a time. So a process needs the memory of its shards, and of one or two whole groups. What
lies outside the blocks (embedding, last norm and head) is one more group, which stays gathered from
the beginning of the forward pass to the end of the backward pass: the head is needed last in the
one and first in the other.

A 4-bit weight consists of parameters of its own: bytes, and constants as int32 bit patterns.
`fully_shard` shards them as it does all others, and its mixed precision casts floats alone, so
what is gathered has the same bits as before. Packed in 4 bits, the base is also a quarter of what
16 bits would send over the wire.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minilora.layers import NF4Linear

Model = TypeVar("Model", bound=nn.Module)

# Bytes of the parameters that are gathered together, at least.
GATHERED = 8 << 20


def shard(
    model: Model, mesh: DeviceMesh | None = None, *, dtype: torch.dtype | None = None
) -> Model:
    """Shards the parameters of a model over processes, block by block. Changes it in place.

    Every process of the mesh calls it, with an equal model. Adapters are injected before; the
    optimizer is made after, from the parameters that the model has then: DTensors. Gradients are
    averages over the processes, as with `DistributedDataParallel`. Every forward and backward pass
    communicates, so all processes have to make the same number of them.

    Args:
        model: with or without adapters, and quantized or dense. On the meta device it is sharded
            without values: each process then loads its own shards.
        mesh: the processes, in one dimension; or in two, to shard over the second and replicate
            over the first. Default: all, on the CPU if they communicate through gloo and on the
            accelerator otherwise. The model is moved there.
        dtype: of the computation. Float parameters are cast to it as they are gathered, frozen ones
            too; shards, gradients and 4-bit weights stay as they are. Default: no casts.

    Raises:
        ValueError: there is no process group; the model has no repeated blocks or is sharded
            already; a parameter is a scalar; those to be trained differ in dtype.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()  # torchrun sets up several processes, this is only one
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> block = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> model = minilora.quantize(torch.nn.Sequential(block(), block()))
        >>> model = shard(minilora.inject(model))
        >>> type(model[0][0].packed).__name__
        'DTensor'
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 64])
        >>> dist.destroy_process_group()
    """
    mesh = mesh or all_processes()
    blocks = repeated_blocks(model)
    _check(model, blocks)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)

    groups = grouped(blocks)
    # The rest comes last: a group takes the parameters that no group has taken before.
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if mesh.device_type == "cpu":
        _gather_ahead(model, groups)
    model.register_forward_hook(_reshard_without_backward)

    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            # It would keep the memory of the whole weight.
            vars(layer).pop("_held_view", None)
    return model


def grouped(blocks: Mapping[str, nn.Module]) -> list[list[nn.Module]]:
    """Blocks that are gathered together: neighbors in one list, until they have `GATHERED` bytes.

    A collective takes some milliseconds, however little it sends. A block of a large model is a
    group of its own.

    Args:
        blocks: what `repeated_blocks` returns.
    """
    groups: list[list[nn.Module]] = []
    size, before = GATHERED, ""
    for name, block in blocks.items():
        parent = name.rpartition(".")[0]
        if size >= GATHERED or parent != before:
            groups.append([])
            size = 0
        groups[-1].append(block)
        size += sum(p.nbytes for p in block.parameters())
        before = parent
    return groups


def blocks_together(size: int) -> int:
    """Returns how many blocks of this many bytes are gathered together."""
    return max(1, -(-GATHERED // max(size, 1)))


def _gather_ahead(model: Any, groups: list[list[Any]]) -> None:
    """gloo gathers a group while another one computes, as NCCL does without being told."""
    model._set_unshard_async_op(True)
    for group, following in pairwise(groups):
        group[0].set_modules_to_forward_prefetch([following[0]])


def _reshard_without_backward(model: nn.Module, *_: object) -> None:
    """What is outside the blocks would stay gathered, and in the dtype of the computation."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a model consists of for the most part, by name: {} if it has none.

    They are what an `nn.ModuleList` holds, or an `nn.Sequential` with two modules of one class;
    layers that have no layers inside are left out, and so are the lists inside of a block.

    Example:
        >>> block = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> layers = torch.nn.ModuleList([block(), block()])
        >>> list(repeated_blocks(torch.nn.ModuleDict({"head": block(), "layers": layers})))
        ['layers.0', 'layers.1']
    """
    found: dict[str, nn.Module] = {}
    # One module may have several names.
    seen: set[int] = set()

    def search(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        blocks = _blocks_of(module)
        for name, child in module.named_children():
            full = f"{path}.{name}" if path else name
            if name in blocks:
                found[full] = child
            else:
                search(full, child)

    search("", model)
    return found


def load_shards(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Gives a model that was sharded on the meta device its values, shard by shard.

    Nothing is communicated: of each whole tensor a process keeps its own rows, in memory of their
    own. Of a tensor in a memory-mapped file, no other row is read.

    Args:
        tensors: name of a parameter, by any that it has in the model, and its whole value.

    Raises:
        ValueError: there is no such parameter, it has another shape, or a parameter gets no value.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            places.setdefault(id(p), []).append((module, name))

    done: set[int] = set()
    for name, whole in tensors:
        old = parameters.get(name)
        if not isinstance(old, DTensor):
            raise ValueError(f"the model has no parameter {name} that is sharded")
        if whole.shape != old.shape:
            sizes = f"{tuple(whole.shape)}, the model needs {tuple(old.shape)}"
            raise ValueError(f"{name} has the shape {sizes}")
        new = _with_values(old, whole)
        for module, own_name in places[id(old)]:
            module.register_parameter(own_name, new)
        done.add(id(old))

    if missing := [name for name, p in parameters.items() if id(p) not in done]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"there is no value for {missing[0]}{more}")


def local_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What this process holds of each parameter, by the parameter's name."""
    for name, p in model.named_parameters():
        yield name, p.to_local() if isinstance(p, DTensor) else p


def _with_values(p: DTensor, whole: Tensor) -> nn.Parameter:
    mesh, placements = p.device_mesh, p.placements
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
    own = part.to(mesh.device_type, p.dtype, copy=True)
    value = DTensor.from_local(own, mesh, placements, shape=p.shape, stride=p.stride())
    return nn.Parameter(value, requires_grad=p.requires_grad)


def _blocks_of(module: nn.Module) -> set[str]:
    """The names of the children that are blocks."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return set()
    # A list among them cannot be called, and a layer's own weight may be read without a call.
    kinds = {
        name: type(child)
        for name, child in module.named_children()
        if not isinstance(child, nn.ModuleList) and any(True for _ in child.children())
    }
    is_repeated = len(set(kinds.values())) < len(kinds)
    return set(kinds) if is_repeated or isinstance(module, nn.ModuleList) else set()


def _check(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    kind = type(model).__name__
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(f"{kind} is sharded already: fully_shard was called on a part of it")
    if not blocks:
        raise ValueError(
            f"{kind} has no repeated blocks, no ModuleList of modules with layers: call "
            "torch.distributed.fsdp.fully_shard on its parts, and then on the model"
        )

    trained: dict[torch.dtype, str] = {}
    for name, p in model.named_parameters():
        if p.ndim == 0:
            raise ValueError(f"{name} is a scalar, which cannot be sharded: give it the shape [1]")
        if p.requires_grad:
            trained.setdefault(p.dtype, name)
    if len(trained) > 1:
        found = " and ".join(f"{name} ({dtype})" for dtype, name in trained.items())
        raise ValueError(f"parameters to be trained differ in dtype: {found}. Convert one of them")


def all_processes(device_type: str | None = None) -> DeviceMesh:
    """Returns all processes in one dimension, with the device that they compute on.

    Args:
        device_type: "cpu", "cuda" or another. Default: the CPU if they communicate through gloo,
            the accelerator otherwise.

    Raises:
        ValueError: there is no process group.
    """
    if not dist.is_initialized():
        raise ValueError(
            "there is no process group: start the script with torchrun, and call "
            "torch.distributed.init_process_group before"
        )
    if device_type is None:
        accelerator = torch.accelerator.current_accelerator()
        on_cpu = accelerator is None or dist.get_backend() == dist.Backend.GLOO
        device_type = "cpu" if on_cpu or accelerator is None else accelerator.type
    return init_device_mesh(device_type, (dist.get_world_size(),))
