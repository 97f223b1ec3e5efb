"""merge: W + s B A, written back into the layers; and how much of the update its rounding keeps."""

import warnings
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minilora.bypass import guard_fused_encoders
from minilora.layers import NF4Linear, become, remove_adapter
from minilora.lora import LoRALayer
from minilora.nf4 import NF4Weight, quantize_nf4
from minilora.surgery import Model, check_class
from minilora.targets import adapted_layers, tied_parameters


def merge(
    model: Model, *, into: Literal["dense", "nf4"] = "dense", min_survival: float = 0.5
) -> Model:
    r"""Adds the active adapters to the weights, W + (alpha / r) B A, and removes them.

    A merged model has no extra latency (LoRA, arXiv:2106.09685, section 4.1).

    Args:
        into: "dense": plain `nn.Linear` in the base's dtype; a quantized base is decoded first.
            "nf4": the sum is quantized again, with a warning of what is kept: of an update
            smaller than the gap between two levels, most rounds away.
        min_survival: with "nf4", the fraction of a layer's update that must be kept,
            <W' - W, s B A> / |s B A|^2.

    Raises:
        ValueError: there is no adapter, or one that is not active; an adapter holds NaN or
            infinity; with "nf4" a base is dense or a layer would keep less than `min_survival`.

    Example:
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> type(merge(model)[0]).__name__
        'Linear'
    """
    if into not in ("dense", "nf4"):
        raise ValueError(f"into={into!r}: must be 'dense' or 'nf4'")
    layers = layers_to_merge(model)
    if into == "nf4":
        _merge_into_nf4(layers, min_survival)
    else:
        _merge_into_dense(model, layers)
    guard_fused_encoders(model)
    return model


def layers_to_merge(model: nn.Module) -> dict[str, Any]:
    """The adapted layers. Raises ValueError, with the layer's name, unless all can be merged."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        check_class(name, layer)
        for adapter_name, adapter in layer.adapters.items():
            if adapter_name not in layer.active:
                other = f"{name} also has the adapter {adapter_name!r}, which is not active"
                raise ValueError(f"{other} and would be lost: eject it, or minilora.use both")
            if not all(bool(p.isfinite().all()) for p in adapter.parameters()):
                reason = f"the adapter of {name} holds NaN or infinity"
                raise ValueError(f"{reason}: the training diverged, load an earlier checkpoint")
    return layers


def _merge_into_dense(model: nn.Module, layers: Mapping[str, Any]) -> None:
    tied = tied_parameters(model)
    for name, layer in layers.items():
        if others := tied.get(id(layer._parameters.get("weight"))):
            _untie(model, name, others)
        weight = merged_weight(layer).to(layer.weight.dtype)
        _remove_adapters(layer)
        if isinstance(layer, NF4Linear):
            _become_dense(layer)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def _become_dense(layer: NF4Linear) -> None:
    """Makes an NF4Linear an nn.Linear, whose weight is still to be set."""
    size = layer.in_features, layer.out_features
    dense = nn.Linear(*size, bias=False, device="meta").train(layer.training)
    dense.register_parameter("bias", layer.bias)
    become(layer, dense)
    for name in ("weight_dtype", "block_size", "quant_type", "compute_dtype"):
        delattr(layer, name)


@torch.no_grad()
def _merge_into_nf4(layers: Mapping[str, Any], min_survival: float) -> None:
    merged: dict[str, NF4Weight] = {}
    kept_of: dict[str, float] = {}
    for name, layer in layers.items():
        old = layer.weight
        if not isinstance(old, NF4Weight):
            raise ValueError(
                f"{name} has a dense base, and into='nf4' is for quantized ones: use into='dense'"
            )
        merged[name] = requantized(merged_weight(layer), old)
        kept_of[name] = survival(merged[name], dense_weight(old), update_of(layer))

    worst = sorted(kept_of, key=kept_of.__getitem__)[:5]
    kept = ", ".join(f"{name} {kept_of[name]:.1%}" for name in worst)
    kept += f"; median {median(kept_of.values()):.1%}"
    if kept_of[worst[0]] < min_survival:
        raise ValueError(
            "merging into NF4 would lose the update. Fraction of it that survives, worst first: "
            f"{kept}; less than min_survival={min_survival:.0%}. Merge into='dense', or keep the "
            "adapter beside the quantized model; merge_report(model) shows every layer."
        )

    for name, layer in layers.items():
        _remove_adapters(layer)
        new = NF4Linear(merged[name], layer.bias, layer.compute_dtype)
        become(layer, new.train(layer.training))
    warnings.warn(
        f"merged into NF4; fraction of the update that survives, worst first: {kept}",
        stacklevel=3,
    )


def _remove_adapters(layer: LoRALayer) -> None:
    for name in list(layer.adapters):
        remove_adapter(layer, name)


def _untie(model: nn.Module, name: str, names: str) -> None:
    """A merged head is no longer the embedding it was tied to, and the config must not say so."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    warnings.warn(f"{name} was merged, so {names} are no longer tied", stacklevel=4)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Returns W + s B A of the active adapters, float32 (float64 for a float64 base) [out, in]."""
    return _adapted(layer, dense_weight(layer.weight))


def _adapted(layer: Any, weight: Tensor) -> Tensor:
    for name in layer.active:
        weight = layer.adapters[name].merged_into(weight)
    return weight


def update_of(layer: Any) -> Tensor:
    """s B A, float32. By way of float64: W + s B A - W would lose the digits of a small one."""
    base = dense_weight(layer.weight).double()
    return (_adapted(layer, base) - base).float()


def dense_weight(weight: Tensor | NF4Weight) -> Tensor:
    """W [out, in], as exact as it is stored: in float32, or in float64 if it is."""
    if isinstance(weight, NF4Weight):
        return weight.dequantize(torch.float32)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def requantized(merged: Tensor, old: NF4Weight) -> NF4Weight:
    """W + s B A, rounded to the dtype that the base decodes to, quantized as the base was."""
    rounded = merged.to(old.dtype)
    return quantize_nf4(rounded, old.block_size, old.double_quantized, old.quant_type)


def survival(new: Tensor | NF4Weight, base: Tensor, update: Tensor) -> float:
    """<W' - W, dW> / |dW|^2: the fraction of the update dW that the new weight W' holds.

    1 for an update of zero.
    """
    size = float(update.square().sum())
    return float(((dense_weight(new) - base) * update).sum()) / size if size else 1.0
