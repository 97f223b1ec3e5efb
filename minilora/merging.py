"""merge: W + s B A, written back into the layers; and how much of the update its rounding keeps."""

import warnings
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minilora.checks import check_not_sharded, check_unwrapped
from minilora.guards import guard, release_quantizer
from minilora.layers import NF4Linear, become, remove_adapter
from minilora.nf4 import NF4Weight, check_values, quantize_nf4
from minilora.surgery import Model, undone_on_error
from minilora.targets import adapted_layers, adapter_names, tied_parameters
from minilora.whole import remove_whole, untied_names

_MERGED = "_minilora_merged"


def merge(
    model: Model, *, into: Literal["dense", "nf4"] = "dense", min_survival: float = 0.5
) -> Model:
    r"""Adds the active adapters to the weights, W + (alpha / r) B A, and removes them.

    What `train_also` trained stays as it is. A model that was merged already is left alone.

    A merged model has no extra latency (LoRA, arXiv:2106.09685, section 4.1). All merged weights
    are computed before the first layer changes, so they need memory beside the base.

    Args:
        into: "dense": plain `nn.Linear` in the base's dtype; a quantized base is decoded first.
            "nf4": the sum is quantized again, with a warning of what is kept: of an update
            smaller than the gap between two levels, most rounds away.
        min_survival: with "nf4", the fraction of a layer's update that must be kept,
            <W' - W, s B A> / |s B A|^2.

    Raises:
        ValueError: there is no adapter, or one that is not active; an adapter or a merged weight
            holds NaN or infinity; a layer is sharded or has no values, or has no bias to which that
            of B could be added, or is tied to another in a way that a transformers model cannot
            undo; with "nf4" a base is dense or a layer would keep less than `min_survival`.

    Example:
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> type(merge(model)[0]).__name__
        'Linear'
    """
    if into not in ("dense", "nf4"):
        raise ValueError(f"into={into!r}: must be 'dense' or 'nf4'")
    if _MERGED in vars(model) and not adapter_names(model):
        return model
    layers = layers_to_merge(model)
    if into == "nf4":
        new = _merged_into_nf4(layers, min_survival)
    else:
        new = {name: nn.Parameter(_merged(name, layer), False) for name, layer in layers.items()}
    biases = {name: _merged_bias(layer) for name, layer in layers.items()}
    untied = _check_untying(model, layers)

    with undone_on_error(model):
        remove_whole(model, keep=True)
        for name, layer in layers.items():
            for adapter_name in list(layer.adapters):
                remove_adapter(layer, adapter_name)
            layer.bias = biases[name]
            _set_weight(layer, new.pop(name))
        vars(model)[_MERGED] = True
        guard(model)
        if untied and _says_tied(model):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    release_quantizer(model)
    return model


def layers_to_merge(model: nn.Module) -> dict[str, Any]:
    """The adapted layers. Raises ValueError, with the layer's name, unless all can be merged."""
    layers = adapted_layers(model)
    check_not_sharded(
        model,
        "save the adapter with minilora.save_adapter, and merge it in one process, into the base "
        "with minilora.load_adapter",
    )
    for name, layer in layers.items():
        check_unwrapped(name, layer)
        for p in layer.parameters():
            if p.is_meta or type(p.detach()) is not Tensor:
                kind = "on the meta device" if p.is_meta else f"a {type(p.detach()).__name__}"
                reason = f"a parameter of {name} is {kind}"
                raise ValueError(f"{reason}: merge a model of ordinary tensors, with values")
        adapters: dict[str, Any] = dict(layer.adapters)
        for adapter_name, adapter in adapters.items():
            if adapter_name not in layer.active:
                other = f"{name} also has the adapter {adapter_name!r}, which is not active"
                raise ValueError(f"{other} and would be lost: eject it, or minilora.use both")
            if not all(bool(p.isfinite().all()) for p in adapter.parameters()):
                reason = f"the adapter of {name} holds NaN or infinity"
                raise ValueError(f"{reason}: the training diverged, load an earlier checkpoint")
            if adapter.bias_delta() is not None and layer.bias is None:
                reason = f"{name} has no bias, to which that of its adapter could be added"
                raise ValueError(f"{reason}: keep the adapter beside the model")
    return layers


@torch.no_grad()
def _merged_bias(layer: Any) -> nn.Parameter | None:
    """The layer's bias with those of its active adapters; the same object where they have none."""
    changes = [layer.adapters[name].bias_delta() for name in layer.active]
    if all(change is None for change in changes):
        bias: nn.Parameter | None = layer.bias
        return bias
    total = layer.bias + sum(change for change in changes if change is not None)
    return nn.Parameter(total.to(layer.bias.dtype), False)


def _merged(name: str, layer: Any) -> Tensor:
    """W + s B A in the base's dtype."""
    old = layer.weight
    merged = merged_weight(layer).to(old.dtype)
    if merged.shape != old.shape:
        sizes = f"{tuple(merged.shape)}, not {tuple(old.shape)}"
        raise ValueError(f"{name}: the adapter made a merged weight of shape {sizes}")
    if not merged.isfinite().all():
        reason = f"the merged weight of {name} holds NaN or infinity in {old.dtype}"
        raise ValueError(f"{reason}: convert the model to a wider dtype first")
    return merged


@torch.no_grad()
def _merged_into_nf4(layers: Mapping[str, Any], min_survival: float) -> dict[str, Any]:
    merged: dict[str, NF4Weight] = {}
    kept_of: dict[str, float] = {}
    for name, layer in layers.items():
        old = layer.weight
        if not isinstance(old, NF4Weight):
            reason = f"{name} has a dense base, and into='nf4' is for quantized ones"
            raise ValueError(f"{reason}: use into='dense'")
        dense = _merged(name, layer)
        check_values(dense, old.double_quantized, f"the merged weight of {name}")
        merged[name] = requantized(dense, old)
        kept_of[name] = survival(merged[name], dense_weight(old), update_of(layer))

    worst = sorted(kept_of, key=kept_of.__getitem__)[:5]
    kept = ", ".join(f"{name} {kept_of[name]:.1%}" for name in worst)
    kept += f"; median {median(kept_of.values()):.1%}"
    if not all(survived >= min_survival for survived in kept_of.values()):
        raise ValueError(
            "merging into NF4 would lose the update. Fraction of it that survives, worst first: "
            f"{kept}; less than min_survival={min_survival:.0%}. Merge into='dense', or keep the "
            "adapter beside the quantized model; merge_report(model) shows every layer."
        )

    message = f"merged into NF4; fraction of the update that survives, worst first: {kept}"
    warnings.warn(message, stacklevel=3)
    return merged


def _set_weight(layer: Any, weight: Any) -> None:
    """Gives a layer without adapters its merged weight, dense or in 4 bits."""
    if isinstance(weight, NF4Weight):
        become(layer, NF4Linear(weight, layer.bias, layer.compute_dtype).train(layer.training))
    elif isinstance(layer, NF4Linear):
        size = layer.in_features, layer.out_features
        dense = nn.Linear(*size, bias=False, device="meta").train(layer.training)
        dense._parameters = {"weight": weight, "bias": layer.bias}
        become(layer, dense)
    else:
        layer.weight = weight


def _check_untying(model: nn.Module, layers: Mapping[str, Any]) -> bool:
    """Whether weights that are one in the base will no longer be: a head and the embedding.

    Raises ValueError where the files of a transformers model could not say so. Its config knows a
    single tie, of one embedding and one head; whatever else is tied, loading would tie again.
    """
    tied, apart = tied_parameters(model), untied_names(model)
    messages = []
    for path, layer in layers.items():
        if names := tied.get(id(layer._parameters.get("weight"))):
            messages.append((names, f"{path} was merged, so {{}} are no longer tied"))
    if apart:
        messages.append((apart, "{} were trained apart and are no longer tied"))
    for names, message in messages:
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        head = len(owners) == 2 and any(isinstance(m, nn.Embedding) for m in owners)
        if hasattr(model, "tie_weights") and not (head and _says_tied(model)):
            reason = f"{', '.join(names)} share a weight, and merging would untie them"
            raise ValueError(f"{reason}: eject the adapter, or merge one that leaves them alone")
        warnings.warn(message.format(" and ".join(names)), stacklevel=3)
    return bool(messages)


def _says_tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


@torch.no_grad()
def merged_weight(layer: Any, base: Tensor | None = None) -> Tensor:
    """Returns W + s B A [out, in] of the active adapters, with W = `base` or `dense_weight`."""
    weight = dense_weight(layer.weight) if base is None else base
    for name in layer.active:
        weight = layer.adapters[name].merged_into(weight)
    return weight


def update_of(layer: Any) -> Tensor:
    """s B A, float32. By way of float64: W + s B A - W would lose the digits of a small one."""
    base = dense_weight(layer.weight).double()
    return (merged_weight(layer, base) - base).float()


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
