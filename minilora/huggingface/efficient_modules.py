r"""Norms and gated MLPs that keep less for the backward, and compute in fewer passes.

    RMSNorm    y = w n,  n = x r,  r = 1 / sqrt(mean(x^2) + eps)

    gated MLP  y = down(act(g) * u),  g = gate(x),  u = up(x)

The modules of transformers compute a norm in float32, and autograd keeps the float32 copy of x:
twice the bytes of a bfloat16 x. Here x itself is kept, and one r per token. Of a gated MLP autograd
keeps g, act(g) and u; here act(g) is computed again in the backward.

On the CPU, a norm and a product with SiLU are kernels of one pass (kernels/cpu/rms_norm.py and
swiglu.py), which round where PyTorch rounds. Of a norm, the mean may differ by its last bits; of
SiLU, exp, which no result in bfloat16 shows. Everything else gives the same bits: the formulas of
kernels/reference, and other activations by the module's own function.

A module is recognised by its structure, and then by its numbers: on random inputs its output has to
equal its formula's in every bit, in the dtype of the model. A norm whose weight is trained, and
every norm under autocast, computes as before.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.kernels.reference.rms_norm import Weighting, rms_norm
from minilora.losses.kernels import kernels_for

# How modules name the eps of a norm.
_EPS = ("variance_epsilon", "eps")

# Modules are compared on inputs of these sizes: small ones show an eps, large ones a clamp.
_SCALES = torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)

# Where modules keep the hooks of their calls.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# The linear layers of a gated MLP.
_GATED = ("gate_proj", "up_proj", "down_proj")


class _RMSNorm(torch.autograd.Function):
    """y = w n for a frozen w; keeps x in its own dtype, and r."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        eps: float,
        weighting: Weighting,
    ) -> Tensor:
        kernels = kernels_for("rms_norm", x, w)
        y, r = kernels.rms_norm(x, w, eps, weighting)
        ctx.save_for_backward(x, w, r)
        ctx.weighting = weighting
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, r = ctx.saved_tensors
        kernels = kernels_for("rms_norm", dy, x, w, r)
        dx = kernels.rms_norm_backward(dy, x, w, r, ctx.weighting)
        return dx, None, None, None


class _SwiGLU(torch.autograd.Function):
    """y = silu(g) * u; keeps g and u."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return kernels_for("swiglu", g, u).swiglu(g, u)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        g, u = ctx.saved_tensors
        return kernels_for("swiglu", dy, g, u).swiglu_backward(dy, g, u)


class _GatedProduct(torch.autograd.Function):
    """y = act(g) * u for any other activation; keeps g and u."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        u: Tensor,
        act: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.act = act
        return act(g) * u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        g, u = ctx.saved_tensors
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            activated = ctx.act(g)
        (dg,) = torch.autograd.grad(activated, g, dy * u)
        return dg, dy * activated.detach(), None


class EfficientModule:
    """Mixed into a module's class by `efficient_class`; `plain_class` is the class that it had.

    A copy of such a module, and a pickled one, are of the plain class.
    """

    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self.plain_class,), *reduced[2:])


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class EfficientNorm(EfficientModule):
    """An RMSNorm with a frozen weight."""

    # Both are set by `efficient_class`: what the norm computes, and in which dtype it was compared.
    weighting: Weighting
    probed: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        traced = torch.compiler.is_compiling()
        if traced or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        if norm.weight.requires_grad or x.dtype != self.probed:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        apply: Any = _RMSNorm.apply
        return apply(x, norm.weight, _eps(norm), self.weighting)  # type: ignore[no-any-return]


class EfficientGatedMLP(EfficientModule):
    """An MLP down(act(gate(x)) * up(x))."""

    # Set by `efficient_class`: the module's activation if that computes SiLU.
    silu: Callable[[Tensor], Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)  # type: ignore[misc, no-any-return]
        mlp: Any = self
        g, u, act = mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn
        if act is self.silu and not _has_hooks(act):
            product = _SwiGLU.apply(g, u)  # type: ignore[no-untyped-call]
        else:
            product = _GatedProduct.apply(g, u, act)  # type: ignore[no-untyped-call]
        return mlp.down_proj(product)  # type: ignore[no-any-return]


def _has_hooks(module: Any) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


def efficient_class(module: nn.Module) -> type[nn.Module] | None:
    """Returns a subclass of the module's class that keeps less; None: there is none.

    Args:
        module: any module. It is not changed, and neither its hooks nor its linear layers run.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaRMSNorm
        >>> efficient_class(LlamaRMSNorm(8)).__name__, efficient_class(nn.LayerNorm(8))
        ('EfficientLlamaRMSNorm', None)
    """
    # An instance with a forward of its own, as accelerate's hooks make it, would hide the class.
    if isinstance(module, EfficientModule) or "forward" in vars(module):
        return None
    if _is_norm(module):
        probed = module.weight.dtype
        for weighting in Weighting:
            if _same_norm(module, weighting):
                return _subclass(module, EfficientNorm, weighting=weighting, probed=probed)
    if _is_gated(module) and _same_gated(module):
        silu: Any = module.act_fn if _is_silu(module) else None
        return _subclass(module, EfficientGatedMLP, silu=staticmethod(silu))
    return None


def _subclass(module: nn.Module, mixin: type, **attributes: Any) -> type[nn.Module]:
    kind = type(module)
    attributes |= {"plain_class": kind, "__module__": __name__}
    return type(f"Efficient{kind.__name__}", (mixin, kind), attributes)


def _eps(module: nn.Module) -> float | None:
    found = [getattr(module, name, None) for name in _EPS]
    return found[0] if found[0] is not None else found[1]


def _is_norm(module: nn.Module) -> bool:
    """One weight vector, an eps, and nothing else that could take part."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None:
        return False
    if weight.dim() != 1 or weight.is_meta:
        return False
    parts = [*module.children(), *module.buffers()]
    return not parts and isinstance(_eps(module), float) and _takes_one_tensor(module)


def _is_gated(module: nn.Module) -> bool:
    """Three linear layers of these names, an activation without parameters, and nothing else."""
    activation = getattr(module, "act_fn", None)
    names = {name for name, _ in module.named_children()} - {"act_fn"}
    if names != set(_GATED) or not callable(activation):
        return False
    if not all(hasattr(getattr(module, name), "in_features") for name in _GATED):
        return False
    own: list[Tensor] = list(module.parameters(recurse=False))
    own += module.buffers(recurse=False)
    if isinstance(activation, nn.Module):
        own += activation.parameters()
    return not own and _takes_one_tensor(module)


def _takes_one_tensor(module: nn.Module) -> bool:
    """Not, for instance, a norm with a gate as a second argument."""
    return len(inspect.signature(module.forward).parameters) == 1


def _same_norm(module: Any, weighting: Weighting) -> bool:
    """Compares on a weight of its own: of a sharded one, a process has only a part."""
    size, like = len(module.weight), {"device": module.weight.device, "dtype": module.weight.dtype}
    generator = torch.Generator().manual_seed(0)
    x = _SCALES * torch.randn(3, 5, size, generator=generator)
    # One value alone has the largest n that there is, sqrt(I).
    x[-1, -1, 1:] = 0
    weight = (1 + torch.randn(size, generator=generator)).to(**like)

    sample: Any = copy.copy(module)
    sample.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}

    def formula(x: Tensor) -> Tensor:
        y, _ = rms_norm(x, weight, cast(float, _eps(module)), weighting)
        return y

    return _same_output(sample, formula, x.to(**like))


def _same_gated(module: nn.Module) -> bool:
    """Compares the classes on small linear layers, so that a large model costs nothing."""
    dtype = getattr(module, "gate_proj").weight.dtype  # noqa: B009
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {name: nn.Linear(8, 8, dtype=dtype) for name in _GATED}
        x = (torch.randn(3, 5, 8) * _SCALES).to(dtype)

    # Shares everything with the module but its linear layers.
    sample: Any = copy.copy(module)
    sample.__dict__["_modules"] = {**module._modules, **small}

    def formula(x: Tensor) -> Any:
        product = sample.act_fn(sample.gate_proj(x)) * sample.up_proj(x)
        return sample.down_proj(product)

    return _same_output(sample, formula, x)


@torch.no_grad()
def _is_silu(module: Any) -> bool:
    """Whether an MLP's activation gives the bits of SiLU for every finite bfloat16 number."""
    bits = torch.arange(1 << 16).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values[values.isfinite()].to(module.gate_proj.weight.dtype)
    return torch.equal(module.act_fn(values), F.silu(values))


@torch.no_grad()
def _same_output(module: nn.Module, formula: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether a function gives a module's bits; False: the module's forward wants something else.

    The forward is called and not the module, so that no hook sees the comparison.
    """
    with torch.autocast(x.device.type, enabled=False):
        try:
            expected = type(module).forward(module, x)
        except Exception:
            return False
        found = formula(x)
    same_dtype = isinstance(expected, Tensor) and found.dtype == expected.dtype
    return same_dtype and torch.equal(found, expected)
