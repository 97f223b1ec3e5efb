r"""Rotary position embeddings in one pass, for the models of transformers.

The file of a model has a function `apply_rotary_pos_emb(q, k, cos, sin)`, which its attention
layers look up by that name: there is no interface to choose another one. `efficient_training` puts
one there that gives the same bits, so that another model of the same file notices nothing.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from minilora.kernels.reference import rotary as reference

_NAME = "apply_rotary_pos_emb"

# The probe: shapes of q, of k, and of cos and sin.
_PROBE = (2, 4, 5, 16), (2, 2, 5, 16), (2, 5, 16)

DTYPES = (torch.float32, torch.bfloat16)


class _Rotary(torch.autograd.Function):
    """q and k, [B, heads, L, D], turned; see kernels/reference/rotary.py."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        from minilora.kernels.cpu.rotary import rotary

        ctx.save_for_backward(cos, sin)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        from minilora.kernels.cpu.rotary import rotary

        cos, sin = ctx.saved_tensors
        back = reference.turned_back(sin)
        return rotary(dq, cos, back), rotary(dk, cos, back), None, None


class EfficientRotary:
    """In place of a file's `apply_rotary_pos_emb`, which it calls for all that it does not cover.

    Args:
        plain: the function.
        dtype: the dtype in which it gives the same bits.
    """

    def __init__(self, plain: Callable[..., Any], dtype: torch.dtype) -> None:
        self.plain, self.dtype = plain, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        if kwargs or traced or torch.is_autocast_enabled("cpu") or not self._covers(*args):
            return self.plain(*args, **kwargs)
        return _Rotary.apply(*args)  # type: ignore[no-untyped-call]

    def _covers(self, *args: Any) -> bool:
        """Whether these are q and k, [B, heads, L, D], and cos and sin, constant [B or 1, L, D]."""
        for t in args:
            if type(t) is not Tensor or not t.is_cpu or t.dtype != self.dtype:
                return False
        if [t.dim() for t in args] != [4, 4, 3, 3]:
            return False

        q, k, cos, sin = args
        B, _, L, D = q.shape
        if (k.shape[0], *k.shape[2:]) != (B, L, D) or cos.shape not in [(B, L, D), (1, L, D)]:
            return False
        return sin.shape == cos.shape and not (cos.requires_grad or sin.requires_grad)


def replace(model: nn.Module, dtype: torch.dtype) -> list[ModuleType]:
    """Replaces the function where it gives the bits of the formula; returns these files."""
    names = {type(module).__module__ for module in model.modules()}
    files = [sys.modules[n] for n in sorted(names) if n.startswith("transformers.models.")]

    replaced = []
    for file in files:
        plain = getattr(file, _NAME, None)
        if callable(plain) and not isinstance(plain, EfficientRotary) and _is_same(plain, dtype):
            setattr(file, _NAME, EfficientRotary(plain, dtype))
            replaced.append(file)
    return replaced


def restore(files: list[ModuleType]) -> None:
    """Puts the functions back that `replace` replaced."""
    for file in files:
        # Not if it was given yet another function in the meantime.
        function = getattr(file, _NAME)
        if isinstance(function, EfficientRotary):
            setattr(file, _NAME, function.plain)


@torch.no_grad()
def _is_same(plain: Callable[..., Any], dtype: torch.dtype) -> bool:
    """Whether a function gives the bits of the formula on random inputs."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator).to(dtype) for shape in (*_PROBE, _PROBE[-1])
    )
    try:
        found = plain(q, k, cos, sin)
    except Exception:
        # It wants other arguments.
        return False
    expected = reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)
    if not isinstance(found, tuple) or len(found) != len(expected):
        return False
    return all(map(_same_tensor, found, expected))


def _same_tensor(found: Any, expected: Tensor) -> bool:
    is_tensor = isinstance(found, Tensor) and found.dtype == expected.dtype
    return is_tensor and torch.equal(found, expected)
