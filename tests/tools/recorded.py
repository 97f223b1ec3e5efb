"""A CUDA graph on the CPU: PyTorch's operators are recorded, and repeated on the same memory.

As on a GPU, what is recorded is not computed then: the memory that it writes is as before, and its
results hold no values until it is repeated. What Python decides and holds is not repeated. What
makes the CPU wait for the GPU is refused, as far as it can be told on a CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.huggingface import cuda_graph

# To compute these, or to know the size of their result, the CPU needs values from the GPU; the last
# brings a tensor from the CPU.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::allclose",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::lift_fresh",
}

# Methods that do so without an operator, where the tensor is on the CPU already.
READING = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}


class _RefusingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = function._schema.name
        if name in WAITING or _selects_by_a_mask(name, args):
            raise RuntimeError("called a synchronizing CUDA operation")
        return function(*args, **(kwargs or {}))


class _RefusingMethods(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        if function in READING:
            raise RuntimeError("called a synchronizing CUDA operation")
        return function(*args, **(kwargs or {}))


def _selects_by_a_mask(name: str, args: Any) -> bool:
    """Whether the size of what is read or written depends on the values of a mask."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
    # One number is written where the mask is, without counting its elements.
    return bool(masks) and (name == "aten::index" or args[2].numel() != 1)


@contextmanager
def refuse_to_wait() -> Iterator[None]:
    """Stands for `minilora.huggingface.cuda_graph.refuse_to_wait`."""
    with _RefusingOperators(), _RefusingMethods():
        yield


class _Recorder(TorchDispatchMode):
    """Records operators: the function, its arguments and its results in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.before: dict[Tensor, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                for t in _tensors(value):
                    self.before.setdefault(t, t.clone())

        given = {_memory(t) for t in _tensors((args, kwargs))}
        results = function(*args, **kwargs)
        # In the place of each tensor that is a view of an argument, or an argument: None.
        new = [t if _memory(t) not in given else None for t in _tensors(results)]
        self.calls.append((function, args, kwargs, new))
        return results

    def as_before(self) -> None:
        """Takes back what was computed while it was recorded."""
        for _, _, _, new in self.calls:
            for t in filter(torch.is_tensor, new):
                t.fill_(torch.nan if t.is_floating_point() else 1)
        for t, value in self.before.items():
            t.copy_(value)

    def replay(self) -> None:
        for function, args, kwargs, new in self.calls:
            results = _tensors(function(*args, **kwargs))
            for place, result in zip(new, results, strict=True):
                if place is not None:
                    place.copy_(result)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def record(
    step: Callable[[], Any], device: torch.device | None = None
) -> tuple[Callable[[], None], Any]:
    """Stands for `minilora.huggingface.cuda_graph.record`."""
    recorder = _Recorder()
    with torch.no_grad():
        with refuse_to_wait(), recorder:
            results = step()
        recorder.as_before()
    return recorder.replay, results


def stand_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`decode_graph` takes models on the CPU from now on, and records them here."""
    monkeypatch.setattr(cuda_graph, "check_device", lambda model: None)
    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(cuda_graph, "refuse_to_wait", refuse_to_wait)
