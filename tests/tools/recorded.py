"""A CUDA graph on the CPU: PyTorch's operators are recorded, and repeated on the same memory.

As on a GPU, what is recorded is not computed then: the memory that it writes is as before, and its
results hold no values until it is repeated. What Python decides and holds is not repeated. What
makes the CPU wait for the GPU is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# To compute these, or to know the size of their result, the CPU needs values from the GPU; the last
# brings a tensor from the CPU.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::lift_fresh",
}


# Methods that do so without an operator, where the tensor is on the CPU already.
READING = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}


class _Reads(TorchFunctionMode):
    """Refuses the methods of READING."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        if function in READING:
            raise _not_permitted(function.__name__)
        return function(*args, **(kwargs or {}))


def _not_permitted(name: str) -> RuntimeError:
    """PyTorch's error."""
    return RuntimeError(f"operation not permitted when stream is capturing: {name}")


class Recorder(TorchDispatchMode):
    """Records operators: the function, its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[Tensor, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        schema, kwargs = function._schema, kwargs or {}
        if schema.name in WAITING or _selects_by_a_mask(schema.name, args):
            raise _not_permitted(schema.name)

        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write and value not in self.before:
                self.before[value] = value.clone()
        results = function(*args, **kwargs)
        # A view, or what was written, is no new memory.
        is_new = not any(result.alias_info for result in schema.returns)
        new = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)] if is_new else []
        self.calls.append((function, args, kwargs, new))
        return results

    def as_before(self) -> None:
        """Takes back what was computed while it was recorded."""
        for _, _, _, new in self.calls:
            for t in new:
                t.fill_(torch.nan if t.is_floating_point() else 1)
        for t, value in self.before.items():
            t.copy_(value)

    def replay(self) -> None:
        for function, args, kwargs, new in self.calls:
            results = pytree.tree_leaves(function(*args, **kwargs))
            for place, result in zip(new, results, strict=False):
                place.copy_(result)


def _selects_by_a_mask(name: str, args: Any) -> bool:
    """Whether the size of what is read or written depends on the values of a mask."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
    # One number is written where the mask is, without counting its elements.
    return bool(masks) and (name == "aten::index" or args[2].numel() != 1)


def record(
    step: Callable[[], Any], device: torch.device | None = None
) -> tuple[Callable[[], None], Any]:
    """Stands for `minilora.huggingface.cuda_graph.record`."""
    recorder = Recorder()
    with torch.no_grad():
        with recorder, _Reads():
            results = step()
        recorder.as_before()
    return recorder.replay, results
