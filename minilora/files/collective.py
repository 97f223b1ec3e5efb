"""Saving and loading a sharded model: every process takes part, and an error of one is one of all.

A process that raised alone would leave the others waiting for it. Between processes go short texts,
as JSON in tensors of bytes: nothing is pickled.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.sharded import full, is_sharded

# Bytes of what a process says, and characters of an error in it: a character may take four bytes.
_SAID, _MESSAGE = 1 << 13, 2000

# What saving and loading raise, the more special ones first; what is none of them is the last.
_KINDS: tuple[type[Exception], ...] = (FileNotFoundError, OSError, ValueError, TypeError)
_OTHER = RuntimeError


def writes(mesh: Any) -> bool:
    """Whether this process is the one that writes files: the first one of the mesh.

    Without a mesh each process that calls writes.
    """
    return mesh is None or not any(mesh.get_coordinate())


@contextmanager
def together(mesh: Any) -> Iterator[None]:
    """What every process of a mesh does alone: if it fails in one of them, all raise an error.

    The block must not communicate. Without a mesh it is just the block.

    Raises:
        FileNotFoundError, OSError, ValueError, TypeError, RuntimeError: as in the process that
            failed, which is named.
    """
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
    if mesh is not None:
        said = _everyone_says(mesh, _description(failed))
        if failed is None:
            _raise_first(said)
    if failed is not None:
        raise failed


def _description(error: BaseException | None) -> dict[str, Any]:
    """What the other processes have to know of an error."""
    if error is None:
        return {}
    kind = next((k for k in _KINDS if isinstance(error, k)), _OTHER).__name__
    return {"rank": dist.get_rank(), "kind": kind, "error": str(error)[:_MESSAGE]}


def _raise_first(said: list[dict[str, Any]]) -> None:
    kinds = {kind.__name__: kind for kind in _KINDS}
    for error in filter(None, said):
        raise kinds.get(error["kind"], _OTHER)(f"rank {error['rank']} failed: {error['error']}")


def check_same(mesh: Any, fingerprint: str, what: str) -> None:
    """Raises ValueError, in every process, unless all of them have the same fingerprint."""
    if mesh is None:
        return
    said = _everyone_says(mesh, {"rank": dist.get_rank(), "fingerprint": fingerprint})
    others = [s["rank"] for s in said if s["fingerprint"] != said[0]["fingerprint"]]
    if others:
        ranks = f"ranks {said[0]['rank']} and {others[0]}"
        raise ValueError(f"{what} is not the same on {ranks}: give all processes the same files")


def _everyone_says(mesh: Any, value: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process of a mesh says, in the order of the mesh. A collective."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    said = torch.frombuffer(bytearray(text.ljust(_SAID)), dtype=torch.uint8)
    said = said.to(mesh.device_type)
    for group in reversed(mesh.get_all_groups()):
        parts = [torch.empty_like(said) for _ in range(group.size())]
        dist.all_gather(parts, said, group=group)
        said = torch.stack(parts)
    return [json.loads(bytes(row.tolist())) for row in said.reshape(-1, _SAID).cpu()]


def gathered(tensors: Mapping[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    """Whole tensors of what may be sharded, {} in a process that does not write. A collective.

    Those that were sharded are in host memory.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = full(tensor)
        if writes(mesh):
            kept[name] = whole.cpu() if is_sharded(tensor) else whole
    return kept


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter another value; a sharded one takes the part of this process.

    No process communicates.
    """
    target: Any = parameter
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    target.copy_(value)
