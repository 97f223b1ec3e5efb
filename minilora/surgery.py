"""The room that edits a user's model: quantize, inject, eject (and merge, in merging.py); and two that look or switch.

Every function first checks all that it can, then edits: a refused call leaves the model as it was.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from minilora.layers import LoRALinear, NF4Linear, check_adapter, check_base
from minilora.nf4 import check_block_size
from minilora.targets import DEFAULT_EXCLUDE, Site, Targets, is_named, near_misses, resolve, sites

Model = TypeVar("Model", bound=nn.Module)


# ---- quantize


def quantize(
    model: Model,
    targets: Targets = "all-linear",
    *,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Model:
    r"""Replaces linear layers by 4-bit ones, in place, layer by layer; each dense weight is freed as it goes.

    What a layer's weight becomes says `NF4Weight` (QLoRA, arXiv:2305.14314, section 3); its bias stays dense.

    Args:
        model: any module; its `nn.Linear` layers are found by `targets`.
        targets: "all-linear"; a name or names, matched on the last part or a dotted end ("q_proj", "self_attn.q_proj");
            a compiled regular expression (searched in the full name); or a callable (name, module) -> bool.
        exclude: names left out; the default leaves out the head of "all-linear" and gives way to targets that name it.
        quant_type: "nf4".
        block_size: weights that share an absmax.
        double_quant: 4.127 bits a weight in place of 4.5.
        compute_dtype: the products' dtype; None: the input's.

    Returns:
        The model.

    Raises:
        ValueError: a target matches nothing; a layer is quantized already; a weight holds NaN or infinity (the layer is
            named) or is tied to another one.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> type(quantize(model)[0]).__name__
        'NF4Linear'
    """
    for _ in quantize_steps(
        model,
        targets,
        exclude=exclude,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
    ):
        pass
    return model


def quantize_steps(
    model: nn.Module,
    targets: Targets = "all-linear",
    *,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, int]]:
    """`quantize` as an iterator, for a progress bar: yields (layers done, layers in all) after each layer."""
    if quant_type != "nf4":
        raise ValueError(f"quant_type={quant_type!r}: minilora quantizes to 'nf4'")
    check_block_size(block_size)
    chosen = resolve(model, targets, exclude)
    tied = tied_names(model)
    for name, site in chosen.items():
        _check_quantizable(name, site, tied)
    for done, site in enumerate(chosen.values(), start=1):
        layer = site.layer
        site.replace(
            NF4Linear.from_linear(
                layer, block_size=block_size, double_quant=double_quant, compute_dtype=compute_dtype
            )
        )
        site.layer = None  # the last reference: the dense weight is freed here
        del layer
        yield done, len(chosen)
    route(model)


def _check_quantizable(name: str, site: Site, tied: Mapping[int, str]) -> None:
    if isinstance(site.layer, NF4Linear):
        raise ValueError(
            f"{name} is quantized already: leave it out with exclude=, or quantize a fresh model"
        )
    if isinstance(site.layer, LoRALinear):
        raise ValueError(
            f"{name} has an adapter: quantize the model first, inject afterwards (or minilora.eject it)"
        )
    check_site(name, site)
    check_untied(name, site, tied)
    weight = site.layer.weight
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the model first")
    if not all(math.isfinite(bound.float()) for bound in weight.detach().aminmax()):
        raise ValueError(
            f"{name}.weight holds NaN or infinity and cannot be quantized: mend the checkpoint, or exclude it"
        )


def check_untied(name: str, site: Site, tied: Mapping[int, str]) -> None:
    """Raises ValueError if the layer's weight stands in another module too."""
    if (names := tied.get(id(site.layer._parameters.get("weight")))) is not None:
        raise ValueError(
            f"{name} shares its weight with another layer ({names}): quantizing would untie them; exclude it"
        )


def tied_names(model: nn.Module) -> dict[int, str]:
    """Parameters that stand in more than one module: id -> their names."""
    names: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(path, recurse=False):
            names.setdefault(id(p), {})[id(module)] = name
    return {key: " and ".join(found.values()) for key, found in names.items() if len(found) > 1}


def check_site(name: str, site: Site) -> None:
    check_base(site.layer, name)
    for parent, _ in site.places:
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"{name}: nn.MultiheadAttention reads this layer's weight and never calls the layer, so what is put here would be "
                f"gone round without a word. Leave it out: exclude=({name.rpartition('.')[2]!r},)"
            )


def route(model: nn.Module) -> None:
    """Switches off the paths of torch's encoder that read the weights of our layers without calling them, or on again.

    In eval mode nn.TransformerEncoderLayer hands the weights of linear1 and linear2 to one fused kernel, and
    nn.TransformerEncoder packs its input for it.
    """
    switches = {
        nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
        nn.TransformerEncoder: ("use_nested_tensor", False),
    }
    for module in model.modules():
        for kind, (attribute, off) in switches.items():
            if isinstance(module, kind):
                ours = any(isinstance(m, LoRALinear | NF4Linear) for m in module.modules())
                if ours and not hasattr(module, "_minilora_fast_path"):
                    module._minilora_fast_path = getattr(module, attribute)
                    setattr(module, attribute, off)
                elif not ours and hasattr(module, "_minilora_fast_path"):
                    setattr(module, attribute, module._minilora_fast_path)
                    del module._minilora_fast_path


# ---- inject, eject


@dataclass(frozen=True)
class AdapterSpec:
    """What one layer's adapter is made from: rank, alpha (None: 2 r), dropout."""

    r: int
    alpha: float | None = None
    dropout: float = 0.0


def inject(
    model: Model,
    r: int = 8,
    *,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    dropout: float = 0.0,
    train_also: Sequence[str] = (),
    name: str = "default",
    seed: int = 0,
) -> Model:
    r"""Puts a LoRA adapter on linear layers, dense or quantized, in place, and freezes all the rest.

    y = x W^T + (alpha / r) (x A^T) B^T (LoRA, arXiv:2106.09685, equation 3), A [r, in], B [out, r], float32. The model computes
    what it computed before, to the bit, until the first step: B starts at zero.

    Args:
        model: any module.
        r: the rank.
        alpha: the update is scaled by alpha / r; None: 2 r.
        targets, exclude: as for `quantize`.
        dropout: on the adapters' input, in training.
        train_also: names of modules or parameters (norms, embeddings, a head) that stay trainable, whole.
        name: the adapter's name, for error messages and saved files. A model carries one adapter at a time.
        seed: the draw of A depends on this and on the layer's name alone.

    Returns:
        The model.

    Raises:
        ValueError: a target matches nothing (near misses are shown), r, alpha or dropout are out of range for a layer, or the
            model has an adapter already.
        TypeError: a layer that an adapter could not stand for, by name.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = inject(model, r=4)
        >>> [n for n, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
    """
    chosen = resolve(model, targets, exclude)
    return attach(
        model,
        {n: AdapterSpec(r, alpha, dropout) for n in chosen},
        train_also=train_also,
        name=name,
        seed=seed,
    )


def attach(
    model: Model,
    specs: Mapping[str, AdapterSpec],
    *,
    train_also: Sequence[str] = (),
    name: str = "default",
    seed: int = 0,
) -> Model:
    """`inject` with a rank, alpha and dropout for each layer: {full name: AdapterSpec}."""
    check_bare(model)
    everything = sites(model)
    for path, spec in specs.items():
        check_site(path, everything[path])
        check_adapter(everything[path].layer, spec.r, spec.alpha, spec.dropout, path)
    also = parameters_named(model, train_also)
    trained = [p for p in model.parameters() if p.requires_grad]
    made: list[tuple[Site, LoRALinear]] = []
    try:
        for path, spec in specs.items():
            base = everything[path].layer
            layer = LoRALinear(
                base, spec.r, alpha=spec.alpha, dropout=spec.dropout, name=path, seed=seed
            )
            layer.adapter_name = name
            made.append((everything[path], layer))
    except BaseException:  # out of memory half way: give every base its parameters back
        for _, layer in made:
            layer.release()
        for p in trained:
            p.requires_grad_(True)
        raise
    model.requires_grad_(False)
    for site, layer in made:
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
        site.replace(layer)
    for p in also:
        p.requires_grad_(True)
    route(model)
    return model


def check_bare(model: nn.Module) -> None:
    """Raises ValueError if the model has an adapter."""
    if held := adapters(model):
        first, layer = next(iter(held.items()))
        raise ValueError(
            f"the model has the adapter {layer.adapter_name!r} on {len(held)} layers already ({first}, ...): "
            "minilora.merge or minilora.eject it first"
        )


def parameters_named(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The float parameters of the modules, or the parameters, that `names` mean."""
    found: list[nn.Parameter] = []
    names = (names,) if isinstance(names, str) else names
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for wanted in names:
        inside = [
            p for n, p in parameters.items() if any(is_named(n[:i], wanted) for i in _ends(n))
        ]
        floats = [p for p in inside if p.is_floating_point()]
        if not floats:
            near = near_misses(wanted, [n for n, _ in model.named_modules() if n])
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"train_also={wanted!r} names no module or parameter with floating-point weights.{hint}"
            )
        found += floats
    return list({id(p): p for p in found}.values())


def _ends(name: str) -> list[int]:
    """Lengths of the dotted prefixes of a name, its own length included."""
    return [i for i, c in enumerate(name) if c == "."] + [len(name)]


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns the layers that carry an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapted(model: nn.Module) -> dict[str, Site]:
    found = sites(model, (LoRALinear,))
    if not found:
        raise ValueError("the model has no adapter: minilora.inject or minilora.load_adapter first")
    return found


def eject(model: Model) -> Model:
    """Takes the adapters out: the base again, its layers the same objects, bit for bit. What `inject` froze stays frozen.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> layer = model[0]
        >>> eject(inject(model))[0] is layer
        True
    """
    for site in adapted(model).values():
        site.replace(site.layer.release())
    route(model)
    return model


# ---- look, switch


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes its base alone, y = x W^T + bias, compiled or not. Blocks may be nested.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> model = inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> with disabled(model):
        ...     y = model(torch.randn(2, 64))
    """
    layers = [site.layer for site in adapted(model).values()]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.enabled = was


def audit(model: nn.Module) -> list[str]:
    """After a backward: returns the names of the adapters that got no gradient, [] when all is well.

    B of a layer that took part has a gradient other than zero from the first step on (A's is zero at first, because B is). One
    without was gone round: a frozen path, checkpointing without input gradients, a fused loss that reads `lm_head.weight`.

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
    return [
        name
        for name, site in adapted(model).items()
        if all(
            p.grad is None or not bool(p.grad.any()) for p in (site.layer.lora_A, site.layer.lora_B)
        )
    ]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns what there is to train: the adapters, float32, and the parameters of `train_also`. For an optimizer.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> model = inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    """
    adapted(model)
    return [p for p in model.parameters() if p.requires_grad]
