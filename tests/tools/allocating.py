"""Memory of a test's own in the place of what torch.empty and Tensor.new_empty allocate."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# PyTorch's, before it is replaced.
torch_empty = torch.empty


@contextlib.contextmanager
def allocating_with(empty: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, `empty`, which is called as torch.empty is, allocates in the place of both."""

    def new_empty(like: Tensor, *size: Any, **kind: Any) -> Tensor:
        return empty(*size, **{"dtype": like.dtype, "device": like.device} | kind)

    both = (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(Tensor, "new_empty", new_empty),
    )
    with both[0], both[1]:
        yield
