"""merge: W + (alpha / r) B A, written back into the layers. Into NF4 again it reports what the rounding leaves of the update."""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from minilora.kernels.reference import lora as reference
from minilora.modules import LoRALinear, NF4Linear
from minilora.surgery import Model, adapted, route, tied_names
from minilora.targets import Site
from minilora.weight import NF4Weight, quantize_nf4


def merge(model: Model, *, into: Literal["dense", "nf4"] = "dense", min_survival: float = 0.5) -> Model:
    r"""Adds the adapters to the weights they adapt, W + (alpha / r) B A, and removes them.

    Args:
        model: an injected model.
        into: "dense": plain `nn.Linear` in the base's dtype, a quantized base is decoded first. "nf4": the sum is quantized
            again. That loses most of a small update: one smaller than the gap between two levels rounds away.
        min_survival: with "nf4", the share of a layer's update that has to come through, <W' - W, s B A> / |s B A|^2.

    Returns:
        The model. With "nf4" a warning reports what survived, layer by layer at worst.

    Raises:
        ValueError: there is no adapter; an adapter holds NaN or infinity; with "nf4" a base is dense or a layer would keep less
            than `min_survival`.

    Example:
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> type(merge(model)[0]).__name__
        'Linear'
    """
    found = adapted(model)
    if into not in ("dense", "nf4"):
        raise ValueError(f"into={into!r}: 'dense' or 'nf4'")
    for name, site in found.items():
        if not all(bool(p.isfinite().all()) for p in (site.layer.lora_A, site.layer.lora_B)):
            raise ValueError(f"the adapter of {name} holds NaN or infinity: the training diverged, load an earlier checkpoint")
    if into == "nf4":
        _merge_nf4(found, min_survival)
    else:
        _merge_dense(model, found)
    route(model)
    return model


def _merge_dense(model: nn.Module, found: dict[str, Site]) -> None:
    tied = tied_names(model)
    for name, site in found.items():
        layer = site.layer
        if (weight := layer._parameters.get("weight")) is not None and id(weight) in tied:
            _untie(model, name, tied[id(weight)])
        dtype = layer.weight.dtype
        merged = nn.Parameter(merged_weight(layer).to(dtype), requires_grad=False)
        base = layer.release()
        if isinstance(base, NF4Linear):
            dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta").train(base.training)
            dense.register_parameter("bias", base.bias)
            base = dense
        base.weight = merged
        site.replace(base)


def _untie(model: nn.Module, name: str, names: str) -> None:
    """A merged head is another matrix than the embedding it was tied to; a config that says otherwise would undo the merge."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    warnings.warn(f"{name} was merged, so {names} are no longer tied", stacklevel=4)


def merged_weight(layer: LoRALinear) -> Tensor:
    """Returns W + s B A of one layer, float32 [out, in]."""
    weight = layer.weight
    dense = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.detach()
    wide = torch.promote_types(dense.dtype, torch.float32)
    dense, A, B = dense.to(wide), layer.lora_A.detach().to(wide), layer.lora_B.detach().to(wide)
    return reference.merged_weight(dense, A, B, layer.scale)


def _merge_nf4(found: dict[str, Site], min_survival: float) -> None:
    merged: dict[str, NF4Weight] = {}
    survival: dict[str, float] = {}
    for name, site in found.items():
        layer, old = site.layer, site.layer.weight
        if not isinstance(old, NF4Weight):
            raise ValueError(f"{name} has a dense base: merge(into='nf4') is for quantized ones, use into='dense'")
        new = quantize_nf4(merged_weight(layer).to(old.dtype), old.block_size, old.absmax2 is not None)
        update = layer.scale * (layer.lora_B.detach().float() @ layer.lora_A.detach().float())
        moved = new.dequantize(torch.float32) - old.dequantize(torch.float32)
        size = float(update.square().sum())
        survival[name] = float((moved * update).sum()) / size if size else 1.0
        merged[name] = new
    worst = sorted(survival, key=survival.__getitem__)[:5]
    report = ", ".join(f"{name} {survival[name]:.1%}" for name in worst)
    median = sorted(survival.values())[len(survival) // 2]
    if survival[worst[0]] < min_survival:
        raise ValueError(
            f"merging into NF4 would lose the update: of it survives {report} (median {median:.1%}), less than "
            f"min_survival={min_survival:.0%}. Merge into='dense', or keep the adapter beside the quantized model."
        )
    for name, site in found.items():
        base = site.layer.release()
        site.replace(NF4Linear(merged[name], base.bias, base.compute_dtype).train(base.training))
    warnings.warn(f"merged into NF4; of the update survives, at worst: {report}; median {median:.1%}", stacklevel=3)
