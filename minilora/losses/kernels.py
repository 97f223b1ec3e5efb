"""The choice between the fused kernels of the CPU and the operations of the reference."""

import importlib
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def kernels_for(file: str, *tensors: Tensor) -> Any:
    """The kernels for these tensors: on the CPU fused ones, elsewhere PyTorch's operations.

    Also where something watches these operations (a dispatch mode), or takes their place (a
    subclass of Tensor).
    """
    plain = all(t.is_cpu and type(t) in (Tensor, nn.Parameter) for t in tensors)
    backend = "cpu" if plain and not is_in_torch_dispatch_mode() else "reference"
    return importlib.import_module(f"minilora.kernels.{backend}.{file}")
