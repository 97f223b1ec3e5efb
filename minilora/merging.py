"""merge: W + (alpha / r) B A, written back into the layers. `merge_report` says first what the rounding leaves of the update."""

import warnings
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from minilora.kernels.reference import lora as reference
from minilora.layers import LoRALinear, NF4Linear
from minilora.nf4 import NF4Weight, quantize_nf4
from minilora.surgery import Model, adapted, route, tied_names
from minilora.targets import Site


def merge(
    model: Model, *, into: Literal["dense", "nf4"] = "dense", min_survival: float = 0.5
) -> Model:
    r"""Adds the adapters to the weights they adapt, W + (alpha / r) B A, and removes them (LoRA, arXiv:2106.09685, section 4.1).

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
    if into not in ("dense", "nf4"):
        raise ValueError(f"into={into!r}: 'dense' or 'nf4'")
    found = _finite(model)
    if into == "nf4":
        _merge_nf4(found, min_survival)
    else:
        _merge_dense(model, found)
    route(model)
    return model


def _finite(model: nn.Module) -> dict[str, Site]:
    found = adapted(model)
    for name, site in found.items():
        if not all(bool(p.isfinite().all()) for p in (site.layer.lora_A, site.layer.lora_B)):
            raise ValueError(
                f"the adapter of {name} holds NaN or infinity: the training diverged, load an earlier checkpoint"
            )
    return found


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
            dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta").train(
                base.training
            )
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
    dense = _dense(layer.weight)
    A, B = layer.lora_A.detach().to(dense.dtype), layer.lora_B.detach().to(dense.dtype)
    return reference.merged_weight(dense, A, B, layer.scale)


def _dense(weight: Tensor | NF4Weight) -> Tensor:
    """W [out, in], as exact as it is stored: in float32, or in float64 if it is."""
    if isinstance(weight, NF4Weight):
        return weight.dequantize(torch.float32)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _update(layer: LoRALinear) -> Tensor:
    """s B A, float32 [out, in]."""
    return layer.scale * (layer.lora_B.detach().float() @ layer.lora_A.detach().float())


def _requantized(merged: Tensor, old: NF4Weight) -> NF4Weight:
    """W + s B A, rounded to the dtype that the base is decoded to, quantized as the base was."""
    return quantize_nf4(merged.to(old.dtype), old.block_size, old.absmax2 is not None)


def _survival(new: Tensor | NF4Weight, base: Tensor, update: Tensor) -> float:
    """<W' - W, s B A> / |s B A|^2: the share of the update that the new weight W' holds. 1 for an update of zero."""
    size = float(update.square().sum())
    return float(((_dense(new) - base) * update).sum()) / size if size else 1.0


@dataclass(frozen=True)
class MergeRow:
    """One adapted layer: its update's size |s B A| / |W| (Frobenius), and the share of it that each kind of merge would keep."""

    name: str
    out_features: int
    in_features: int
    update: float
    dense: float
    nf4: float | None


def measure_merge(model: nn.Module) -> tuple[MergeRow, ...]:
    """Layer by layer, how much of the adapters' updates `merge` would keep. Changes nothing."""
    rows = []
    for name, site in _finite(model).items():
        layer = site.layer
        old, update, merged = layer.weight, _update(layer), merged_weight(layer)
        base = _dense(old)
        dense = _survival(merged.to(old.dtype), base, update)
        nf4 = (
            _survival(_requantized(merged, old), base, update)
            if isinstance(old, NF4Weight)
            else None
        )
        rows.append(
            MergeRow(
                name,
                layer.out_features,
                layer.in_features,
                float(update.norm() / base.norm()),
                dense,
                nf4,
            )
        )
    return tuple(rows)


def _merge_nf4(found: dict[str, Site], min_survival: float) -> None:
    merged: dict[str, NF4Weight] = {}
    survival: dict[str, float] = {}
    for name, site in found.items():
        if not isinstance(old := site.layer.weight, NF4Weight):
            raise ValueError(
                f"{name} has a dense base: merge(into='nf4') is for quantized ones, use into='dense'"
            )
        merged[name] = _requantized(merged_weight(site.layer), old)
        survival[name] = _survival(merged[name], _dense(old), _update(site.layer))
    worst = sorted(survival, key=survival.__getitem__)[:5]
    report = (
        ", ".join(f"{name} {survival[name]:.1%}" for name in worst)
        + f"; median {median(survival.values()):.1%}"
    )
    if survival[worst[0]] < min_survival:
        raise ValueError(
            f"merging into NF4 would lose the update: of it survives, at worst: {report}; less than "
            f"min_survival={min_survival:.0%}. Merge into='dense', or keep the adapter beside the quantized model; "
            "merge_report(model) shows every layer."
        )
    for name, site in found.items():
        base = site.layer.release()
        site.replace(NF4Linear(merged[name], base.bias, base.compute_dtype).train(base.training))
    warnings.warn(f"merged into NF4; of the update survives, at worst: {report}", stacklevel=3)
