"""Errors of one process that all have to know of."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def all_or_none(what: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside the block each process works on its own; if one of them fails, all raise.

    Otherwise the others would go on to the next collective, and wait there.

    Args:
        what: what is done, for the message, as "load its shards".
        device: where the processes communicate: a GPU's, if they do so through NCCL.

    Raises:
        RuntimeError: another process failed; its error says why.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> with all_or_none("compute"):
        ...     answer = 6 * 7
        >>> dist.destroy_process_group()
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found

    size = dist.get_world_size()
    failed = torch.tensor(size if error is None else dist.get_rank(), device=device)
    dist.all_reduce(failed, dist.ReduceOp.MIN)
    if error is not None:
        raise error
    if failed < size:
        raise RuntimeError(f"process {int(failed)} could not {what}: its own error says why")
