"""A dry run: what `inject` and `quantize` would touch and what the run will hold in memory, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from minilora.layers import NF4Linear, check_adapter
from minilora.nf4 import check_block_size
from minilora.ops import GROUP
from minilora.reports.tables import Table, alike, stack
from minilora.surgery import check_bare, check_site, check_untied, parameters_named, tied_names
from minilora.targets import DEFAULT_EXCLUDE, LINEAR, Targets, resolve, sites


@dataclass(frozen=True)
class Row:
    """One layer that would be wrapped: its name and size [out, in], the adapter's parameters, the base's bytes."""

    name: str
    out_features: int
    in_features: int
    adapter_parameters: int
    base_bytes: int


@dataclass(frozen=True, repr=False)
class Plan:
    """What `plan` found. It prints as a table; in a notebook the bytes are drawn below it.

    Attributes:
        rows: the layers that would get an adapter.
        left_out: linear layers that would not.
        parameters: the model's parameters, a tied one counted once.
        trainable: parameters that would be trained.
        bytes: by kind: "quantized", "dense" (what stays as it is), "adapters", "gradients", "optimizer" (AdamW's two states).
    """

    model: str
    r: int
    quantize: bool
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    parameters: int
    trainable: int
    bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Weights, adapters, gradients and optimizer; activations come on top and depend on batch and length."""
        return sum(self.bytes.values())

    def table(self) -> Table:
        """The layers, those of one name and size in one row."""
        rows = []
        for kind, layers in alike(self.rows).items():
            adapters, base = (
                sum(row.adapter_parameters for row in layers),
                sum(row.base_bytes for row in layers),
            )
            rows.append((*kind, f"{len(layers)}", f"{adapters:,}", amount(base)))
        below = [f"together {amount(self.total_bytes)}, and the activations"]
        if self.left_out:
            more = f" and {len(self.left_out) - 4} more" if len(self.left_out) > 4 else ""
            below.insert(0, f"left out: {', '.join(self.left_out[:4])}{more}")
        share = self.trainable / self.parameters
        title = f"{self.model}: {self.parameters:,} parameters, {self.trainable:,} to train ({share:.2%})"
        return Table(
            title, ("layer", "out x in", "count", "adapter", "base"), tuple(rows), tuple(below)
        )

    def __repr__(self) -> str:
        kinds = ", ".join(f"{kind} {amount(n)}" for kind, n in self.bytes.items() if n)
        table = self.table()
        return str(replace(table, below=(*table.below, kinds)))

    def _repr_html_(self) -> str:
        held = {kind: n for kind, n in self.bytes.items() if n}
        return self.table().html(stack(held, {kind: amount(n) for kind, n in held.items()}))


def amount(n: float) -> str:
    """Bytes as a person reads them, in powers of ten: 12.3 MB."""
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("kB", "MB"):
        n /= 1000
        if n < 1000:
            return f"{n:.1f} {unit}"
    return f"{n / 1000:.2f} GB"


def nf4_bytes(n: int, block_size: int = 64, double_quant: bool = True) -> int:
    """Bytes of n weights in NF4: 4 bits each, an absmax a block, and with double quantization an absmax2 a group of 256.

    Example:
        >>> nf4_bytes(4096 * 4096) * 8 / 4096**2
        4.126955032348633
    """
    blocks = -(-n // block_size)
    constants = blocks + 4 * -(-blocks // GROUP) + 4 if double_quant else 4 * blocks
    return (n + 1) // 2 + constants


def plan(
    model: nn.Module | Any,
    r: int = 8,
    *,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    train_also: Sequence[str] = (),
    quantize: bool | Targets = True,
    block_size: int = 64,
    double_quant: bool = True,
) -> Plan:
    """Returns what `quantize` and `inject` with these arguments would do, and the bytes that a run holds. Changes nothing.

    Args:
        model: a module, on any device (the meta device too); a transformers config; or a folder or hub name, of which the config
            alone is read.
        r, alpha, targets, exclude, train_also: as for `inject`.
        quantize: the layers with an adapter in NF4; False: the base as it is; targets of its own: those in NF4, whatever has an
            adapter (`finetune` quantizes "all-linear").
        block_size, double_quant: as for `quantize`.

    Raises:
        ValueError: what `inject` would raise: a target that matches nothing, a rank that a layer cannot have.

    Example:
        >>> p = plan(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)), r=4)
        >>> p.trainable, [row.name for row in p.rows]
        (800, ['0', '1'])
    """
    check_block_size(block_size)
    title = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    if not isinstance(model, nn.Module):
        model = _on_meta(model)
        title = type(model).__name__ if "\n" in title else title
    chosen = resolve(model, targets, exclude)
    check_bare(model)
    tied = tied_names(model)
    size = {"quantized": 0, "dense": sum(p.nbytes for p in model.parameters())}
    in_nf4 = (
        {}
        if quantize is False
        else chosen
        if quantize is True
        else resolve(model, quantize, exclude)
    )
    rows = []
    for name, site in (chosen | in_nf4 | sites(model, (NF4Linear,))).items():
        layer = site.layer
        if name in chosen:
            check_site(name, site)
            check_adapter(layer, r, alpha, 0.0, name)
        nbytes: int = layer.weight.nbytes
        if name in in_nf4:
            check_untied(name, site, tied)
        if isinstance(layer, NF4Linear) or name in in_nf4:
            size["dense"] -= nbytes
            if not isinstance(layer, NF4Linear):
                nbytes = nf4_bytes(layer.in_features * layer.out_features, block_size, double_quant)
            size["quantized"] += nbytes
        if name in chosen:
            rows.append(
                Row(
                    name,
                    layer.out_features,
                    layer.in_features,
                    r * (layer.in_features + layer.out_features),
                    nbytes,
                )
            )
    adapters = sum(row.adapter_parameters for row in rows)
    also = parameters_named(model, train_also)
    trainable = adapters + sum(p.numel() for p in also)
    size["adapters"] = 4 * adapters
    size["gradients"] = 4 * adapters + sum(p.nbytes for p in also)
    size["optimizer"] = 2 * size["gradients"]
    return Plan(
        model=title,
        r=r,
        quantize=bool(in_nf4),
        rows=tuple(rows),
        left_out=tuple(name for name in sites(model, LINEAR) if name not in chosen),
        parameters=_count(model),
        trainable=trainable,
        bytes=size,
    )


def _count(model: nn.Module) -> int:
    """Weights, not stored elements: a quantized layer counts as the dense one it stands for."""
    ours = [site.layer for site in sites(model, (NF4Linear,)).values()]
    packed = {
        id(p) for layer in ours for p in (layer.packed, layer.absmax, layer.absmax2, layer.offset)
    }
    dense = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return dense + sum(int(layer.in_features * layer.out_features) for layer in ours)


def _on_meta(source: Any) -> nn.Module:
    """A transformers config, or the name of a model, as an empty model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = (
        AutoConfig.from_pretrained(source)
        if isinstance(source, str) or hasattr(source, "__fspath__")
        else source
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
