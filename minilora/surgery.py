"""The file that edits a model: quantize, inject, eject, use; and `disabled` and `audit`.

Every function first checks all that it can and allocates all that it needs, then edits: a call that
is refused leaves the model as it was, and so does an error while it edits. Only `quantize`, which
frees each dense weight before the next, says how far it came if memory runs out. Merging is in
`merging.py`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minilora.checks import (
    check_bare,
    check_can_be_adapted,
    check_can_be_quantized,
    check_unwrapped,
    warn_of_ranks,
    warn_of_unreached,
)
from minilora.guards import guard
from minilora.layers import NF4Linear, add_adapter, become, remove_adapter
from minilora.lora import LoRA, LoRALayer
from minilora.nf4 import DTYPES, check_format, check_values
from minilora.targets import (
    Targets,
    adapted_layers,
    adapter_names,
    by_pattern,
    in_blocks,
    kept_in_float32,
    linear_layers,
    select_layers,
)
from minilora.whole import (
    add_whole,
    new_parameters,
    place_whole,
    remove_whole,
    select_parameters,
    whole_parameters,
)

Model = TypeVar("Model", bound=nn.Module)
Pattern = str | re.Pattern[str]


def quantize(
    model: Model,
    targets: Targets = "all-linear",
    *,
    exclude: Targets = (),
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    strict: bool = False,
) -> Model:
    r"""Makes linear layers 4-bit ones, in place; each dense weight is freed before the next.

    See `NF4Weight` for the format (QLoRA, arXiv:2305.14314, section 3). A bias stays dense.

    Args:
        model: any module.
        targets: "all-linear": all but the heads, and what transformers keeps in float32; a name or
            names, matched on the last part or a dotted end ("q_proj", "self_attn.q_proj"); a
            compiled regular expression (searched in the full name); or a callable
            (name, module) -> bool.
        exclude: what is left out, in the same ways.
        quant_type, block_size, double_quant: as for `quantize_nf4`.
        compute_dtype: dtype of the products. Default: the input's.
        strict: raise, and do not only warn, where "all-linear" cannot reach a part of the model,
            such as the experts of a mixture.

    Raises:
        ValueError, TypeError: a target matches nothing, or a layer (which is named) is quantized
            already, holds NaN or infinity, shares its weight, or computes something else.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> type(quantize(model)[0]).__name__
        'NF4Linear'
    """
    options = {"block_size": block_size, "double_quant": double_quant, "quant_type": quant_type}
    options |= {"compute_dtype": compute_dtype}
    for _ in quantize_steps(model, targets, exclude=exclude, strict=strict, **options):
        pass
    return model


def quantize_steps(
    model: nn.Module,
    targets: Targets = "all-linear",
    *,
    exclude: Targets = (),
    strict: bool = False,
    **options: Any,
) -> Iterator[tuple[int, int]]:
    """`quantize` as an iterator, for a progress bar: yields (layers done, layers in all)."""
    check_format(options.get("block_size", 64), options.get("quant_type", "nf4"))
    if (compute_dtype := options.get("compute_dtype")) not in (None, *DTYPES):
        raise TypeError(f"compute_dtype={compute_dtype}: choose one of {DTYPES}, or None")
    chosen = select_layers(model, targets, exclude, kept_in_float32(model))
    check_can_be_quantized(model, chosen)
    for name, layer in chosen.items():
        check_values(layer.weight, options.get("double_quant", True), f"{name}.weight")
    warn_of_unreached(model, targets, strict, "quantized", stacklevel=4)

    done = 0
    try:
        for layer in chosen.values():
            become(layer, NF4Linear.from_linear(layer, **options))
            done += 1
            yield done, len(chosen)
    except (RuntimeError, MemoryError) as error:
        rest = f"{done} of {len(chosen)} layers are quantized, from {next(iter(chosen))} on"
        error.args = (f"{error}\n{rest}: to go on, leave them out with exclude=", *error.args[1:])
        raise
    finally:
        guard(model)


def inject(
    model: Model,
    r: int = 8,
    *,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    dropout: float = 0.0,
    rank_pattern: Mapping[Pattern, int] | None = None,
    alpha_pattern: Mapping[Pattern, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    lora_bias: bool = False,
    train_also: Sequence[str] = (),
    name: str = "default",
    seed: int = 0,
    adapter: type[LoRA] = LoRA,
    strict: bool = False,
) -> Model:
    r"""Adds a LoRA adapter to linear layers, dense or quantized, in place, and freezes the rest.

    y = x W^T + (alpha / r) (x A^T) B^T (LoRA, arXiv:2106.09685, equation 3), A [r, in], B [out, r],
    float32. B starts at zero: until the first step the model computes what its base computes, bit
    for bit.

    A model may carry several adapters under different names. The new one becomes the active one,
    and `use` switches: only active adapters take part and are trained.

    Args:
        r: the rank.
        alpha: the update is scaled by alpha / r. Default: 2 * r.
        targets, exclude, strict: as for `quantize`.
        dropout: on the adapter's input, in training.
        rank_pattern, alpha_pattern: other ranks and alphas for some of the layers, by a name or a
            compiled regular expression, as in `targets`; the first that matches counts. The default
            alpha of another rank is twice that rank.
        layers_to_transform: only the layers in these of the model's repeated blocks.
        lora_bias: give each B a bias.
        train_also: names of modules or parameters (norms, embeddings, a head) to train whole. The
            base's own are put aside, and `disabled` and `eject` bring them back.
        name: the adapter's name, for switching and in error messages.
        seed: the draw of A depends on this and on the layer's name alone.
        adapter: the class of the adapter: `LoRA`, or a variant that is a subclass of it.

    Raises:
        ValueError: a target matches nothing (near misses are shown), an option is out of range for
            a layer, or the model has an adapter of this name already.
        TypeError: an adapter cannot change what a layer computes; it is named.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> model = inject(model, r=4)
        >>> [n for n, p in model.named_parameters() if p.requires_grad][:2]
        ['0.adapters.default.A', '0.adapters.default.B']
    """
    chosen = select_layers(model, targets, exclude)
    if layers_to_transform is not None:
        chosen = in_blocks(chosen, layers_to_transform)
    check_can_be_adapted(model, chosen, name)
    ranks = by_pattern(chosen, rank_pattern, "rank_pattern")
    alphas = by_pattern(chosen, alpha_pattern, "alpha_pattern")
    options = {"dropout": dropout, "seed": seed} | ({"bias": True} if lora_bias else {})
    adapters = {
        path: adapter.for_layer(
            layer, ranks.get(path, r), alpha=alphas.get(path, alpha), layer_name=path, **options
        )
        for path, layer in chosen.items()
    }
    warn_of_unreached(model, targets, strict, "adapted", stacklevel=3)
    return attach(model, adapters, name=name, train_also=train_also)


def attach(
    model: Model,
    adapters: Mapping[str, LoRA],
    *,
    name: str = "default",
    train_also: Sequence[str] = (),
    whole: Mapping[str, Tensor] | None = None,
) -> Model:
    """`inject` with ready-made adapters: {the layer's full name: its adapter}.

    `whole` has values for what is trained whole, by the full name of the parameter.
    """
    layers = linear_layers(model)
    check_can_be_adapted(model, {path: layers[path] for path in adapters}, name)
    also = new_parameters(model, {**select_parameters(model, train_also), **(whole or {})})
    if also or whole_parameters(model):
        check_bare(model, "parameters trained as a whole belong to a single adapter")
    warn_of_ranks(adapters)

    with undone_on_error(model):
        model.requires_grad_(False)
        for path, adapter in adapters.items():
            add_adapter(layers[path], name, adapter)
        add_whole(model, also)
        use(model, name)
        guard(model)
    return model


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Inside the block a model is edited. After an exception it is what it was before."""
    kinds = [(module, type(module)) for module in model.modules()]
    held = [t for m, _ in kinds for t in (vars(m), *vars(m).values()) if isinstance(t, dict)]
    tables = [(table, dict(table)) for table in held]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for module, kind in kinds:
            module.__class__ = kind
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)
        raise


def eject(model: Model, name: str | None = None) -> Model:
    """Takes out the adapter `name`, by default all of them. What `inject` froze stays frozen.

    Without any adapter left, the layers are what they were before, bit for bit.

    Raises:
        ValueError: the model has no such adapter.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> layer = model[0]
        >>> eject(inject(model))[0] is layer, type(layer).__name__
        (True, 'Linear')
    """
    layers = adapted_layers(model, name)
    for path, layer in layers.items():
        check_unwrapped(path, layer)
    with undone_on_error(model):
        for layer in layers.values():
            for each in list(layer.adapters) if name is None else [name]:
                remove_adapter(layer, each)
        if not adapter_names(model):
            remove_whole(model)
        guard(model)
    return model


def use(model: Model, *names: str) -> Model:
    """Makes these adapters the active ones: they take part, summed, and are trained. No name: none.

    Without an active adapter the model also computes with its base's parameters in the place of
    those of `train_also`.

    Raises:
        ValueError: the model has no adapter of that name.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> model = inject(inject(model, name="french"), name="german")
        >>> use(model, "french")[0].active
        ('french',)
    """
    layers, names = adapted_layers(model), tuple(dict.fromkeys(names))
    for name in names:
        adapted_layers(model, name)
    with undone_on_error(model):
        for layer in layers.values():
            layer.active = tuple(name for name in names if name in layer.adapters)
            for name, adapter in layer.adapters.items():
                adapter.requires_grad_(name in names)
        for p in whole_parameters(model).values():
            p.requires_grad_(bool(names))
        place_whole(model, trained=bool(names))
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes its base alone, compiled or not. Blocks may be nested.

    The base's own parameters are in the place of those of `train_also`.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> model = inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> with disabled(model):
        ...     y = model(torch.randn(2, 64))
    """
    before = {layer: layer.active for layer in adapted_layers(model).values()}
    try:
        for layer in before:
            layer.active = ()
        place_whole(model, trained=False)
        yield
    finally:
        for layer, active in before.items():
            # The block may have ejected adapters.
            if isinstance(layer, LoRALayer):
                layer.active = tuple(name for name in active if name in layer.adapters)
        place_whole(model, trained=any(before.values()))


def audit(model: nn.Module) -> list[str]:
    """After a backward: returns the layers whose active adapter got no gradient, [] if all is well.

    B of a layer that took part has a gradient other than zero (A's is zero at first, as B is). One
    without was bypassed: by a frozen path, by checkpointing without input gradients, or by a fused
    loss that reads `lm_head.weight`.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> model = inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> audit(model)
        ['0']
        >>> model(torch.randn(2, 64)).sum().backward()
        >>> audit(model)
        []
    """
    return [path for path, layer in adapted_layers(model).items() if not _took_part(layer)]


def _took_part(layer: LoRALayer) -> bool:
    adapters = [layer.adapters[name] for name in layer.active]
    gradients = [[p.grad for p in adapter.parameters()] for adapter in adapters]
    return all(any(g is not None and bool(g.any()) for g in found) for found in gradients)


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Returns what an optimizer trains: the active adapters and the parameters of `train_also`.

    With `name`, the parameters of that adapter alone.

    Raises:
        ValueError: the model has no such adapter.

    Example:
        >>> model = inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    """
    layers = adapted_layers(model, name).values()
    if name is None:
        return [p for p in model.parameters() if p.requires_grad]
    return [p for layer in layers for p in layer.adapters[name].parameters()]
