"""A dry run: which layers would get adapters, and how much memory the run needs."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from minilora.checks import (
    check_bare,
    check_can_be_adapted,
    check_can_be_quantized,
    warn_of_unreached,
)
from minilora.kernels.reference.nf4 import GROUP
from minilora.layers import NF4Linear
from minilora.lora import check_options
from minilora.nf4 import check_format
from minilora.reports.formatting import format_bytes
from minilora.reports.pictures import stacked_bar
from minilora.reports.tables import Table, group_layers
from minilora.surgery import Pattern
from minilora.targets import (
    Targets,
    by_pattern,
    in_blocks,
    kept_in_float32,
    linear_layers,
    select_layers,
    unreached_matrices,
)
from minilora.whole import select_parameters


@dataclass(frozen=True)
class Row:
    """One layer that would get an adapter.

    Attributes:
        name: the layer's full name.
        out_features, in_features: the size of its weight, [out, in].
        adapter_parameters: r (in + out), and out more for the bias of B.
        base_bytes: memory of the frozen weight.
    """

    name: str
    out_features: int
    in_features: int
    adapter_parameters: int
    base_bytes: int


@dataclass(frozen=True, repr=False)
class Plan:
    """The result of `plan`. It prints as a table; a notebook adds a bar of the memory.

    Attributes:
        model: the model's class, or the folder or hub id that it comes from.
        r: the rank.
        quantize: whether layers would be in NF4.
        rows: the layers that would get an adapter.
        left_out: linear layers that would not.
        unreached: parameters in matrices outside of linear layers, as those of a mixture's experts:
            they stay dense and get no adapter.
        parameters: the model's parameters; a tied one counts once.
        trainable: the parameters that would be trained.
        bytes: memory by kind: "quantized", "dense" (whatever is not quantized), "adapters",
            "gradients", "optimizer" (AdamW's two states).
    """

    model: str
    r: int
    quantize: bool
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    unreached: int
    parameters: int
    trainable: int
    bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Weights, adapters, gradients and optimizer states.

        Activations are not included; they depend on batch size and sequence length.
        """
        return sum(self.bytes.values())

    def table(self) -> Table:
        """One row per name and size."""
        share = self.trainable / self.parameters
        title = (
            f"{self.model}: {self.parameters:,} parameters, "
            f"{self.trainable:,} trainable ({share:.2%})"
        )

        rows = []
        for kind, layers in group_layers(self.rows).items():
            adapter = sum(row.adapter_parameters for row in layers)
            base = sum(row.base_bytes for row in layers)
            rows.append((*kind, f"{len(layers)}", f"{adapter:,}", format_bytes(base)))

        below = [f"total {format_bytes(self.total_bytes)}, plus activations"]
        if self.left_out:
            below.insert(0, f"no adapter: {_shortened(self.left_out)}")
        if self.unreached:
            share = self.unreached / self.parameters
            kept = f"{self.unreached:,} parameters ({share:.0%}) outside of linear layers"
            below.insert(0, f"no adapter, not quantized: {kept}, as the experts of a mixture")

        head = ("layer", "out x in", "count", "adapter", "base")
        return Table(title, head, tuple(rows), tuple(below))

    def _held(self) -> dict[str, int]:
        return {kind: n for kind, n in self.bytes.items() if n}

    def __repr__(self) -> str:
        kinds = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in self._held().items())
        table = self.table()
        return str(replace(table, below=(*table.below, kinds)))

    def _repr_html_(self) -> str:
        held = self._held()
        labels = {kind: format_bytes(n) for kind, n in held.items()}
        return self.table().html(stacked_bar(held, labels))


def _shortened(names: Sequence[str]) -> str:
    """The first four of the names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def nf4_bytes(n: int, block_size: int = 64, double_quant: bool = True) -> int:
    """Returns the bytes of n weights in NF4.

    4 bits per weight; a float32 absmax per block or, with double quantization, 8 bits per block,
    a float32 absmax2 per group of 256 blocks and one float32 offset.

    Example:
        >>> nf4_bytes(4096 * 4096) * 8 / 4096**2
        4.126955032348633
    """
    codes = (n + 1) // 2
    blocks = -(-n // block_size)
    if not double_quant:
        return codes + 4 * blocks

    groups = -(-blocks // GROUP)
    return codes + blocks + 4 * groups + 4


def plan(
    model: nn.Module | Any,
    r: int = 8,
    *,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    rank_pattern: Mapping[Pattern, int] | None = None,
    alpha_pattern: Mapping[Pattern, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    lora_bias: bool = False,
    train_also: Sequence[str] = (),
    quantize: bool | Targets = True,
    block_size: int = 64,
    double_quant: bool = True,
    strict: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Returns what `quantize` and `inject` would do with these arguments, and the memory of a run.

    Nothing is changed. Matrices that neither of the two reaches, such as the experts of a mixture,
    are counted and warned of.

    Args:
        model: a module on any device, the meta device included; a transformers config; or a
            folder or hub id, of which only the config is read.
        r, alpha, targets, exclude, train_also, strict: as for `inject`.
        rank_pattern, alpha_pattern, layers_to_transform, lora_bias: as for `inject`.
        quantize: True: what `targets` and `exclude` mean is in NF4. False: the base stays as it is.
            Targets: these layers are in NF4, whichever get an adapter (`finetune` quantizes
            "all-linear").
        block_size, double_quant: as for `quantize`.
        trust_remote_code: run the Python files that come with a folder or hub id.

    Raises:
        ValueError, TypeError: what `quantize` and `inject` would raise, such as a target that
            matches nothing, or matrices outside of linear layers with strict=True.

    Example:
        >>> p = plan(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)), r=4)
        >>> p.trainable, [row.name for row in p.rows]
        (800, ['0', '1'])
    """
    check_format(block_size, "nf4")
    name, model = _named_model(model, trust_remote_code)

    adapted = select_layers(model, targets, exclude)
    if layers_to_transform is not None:
        adapted = in_blocks(adapted, layers_to_transform)
    ranks = _checked_ranks(model, adapted, r, alpha, rank_pattern, alpha_pattern)
    quantized_targets = targets if quantize is True else quantize
    to_quantize = _layers_to_quantize(model, quantized_targets, exclude)
    in_nf4 = to_quantize | _quantized_layers(model)
    named = select_parameters(model, train_also)
    also = list({id(p): p for p in named.values()}.values())

    base_bytes = _base_bytes(adapted | in_nf4, in_nf4.keys(), block_size, double_quant)
    rows = tuple(
        _row(path, layer, ranks[path], lora_bias, base_bytes[path])
        for path, layer in adapted.items()
    )
    adapter_parameters = sum(row.adapter_parameters for row in rows)
    gradients = 4 * adapter_parameters + sum(p.nbytes for p in also)
    # What is trained whole has a copy beside the base's.
    dense = sum(p.nbytes for p in model.parameters()) + sum(p.nbytes for p in also)
    dense -= sum(layer.weight.nbytes for layer in in_nf4.values())

    warn_of_unreached(model, targets, strict, "quantized or adapted", stacklevel=3)

    return Plan(
        model=name,
        r=r,
        quantize=bool(to_quantize),
        rows=rows,
        left_out=tuple(path for path in linear_layers(model) if path not in adapted),
        unreached=sum(p.numel() for p in unreached_matrices(model).values()),
        parameters=_count_parameters(model),
        trainable=adapter_parameters + sum(p.numel() for p in also),
        bytes={
            "quantized": sum(base_bytes[path] for path in in_nf4),
            "dense": dense,
            "adapters": 4 * adapter_parameters,
            "gradients": gradients,
            "optimizer": 2 * gradients,
        },
    )


def _checked_ranks(
    model: nn.Module,
    adapted: Mapping[str, Any],
    r: int,
    alpha: float | None,
    rank_pattern: Mapping[Pattern, int] | None,
    alpha_pattern: Mapping[Pattern, float] | None,
) -> dict[str, int]:
    """The rank that each layer's adapter would have, after the checks of `inject`."""
    check_can_be_adapted(model, adapted, "default")
    check_bare(model)

    ranks = dict.fromkeys(adapted, r) | by_pattern(adapted, rank_pattern, "rank_pattern")
    alphas = by_pattern(adapted, alpha_pattern, "alpha_pattern")
    for name, rank in ranks.items():
        check_options(rank, alphas.get(name, alpha), 0.0, name)
    return ranks


def _layers_to_quantize(
    model: nn.Module, targets: bool | Targets, exclude: Targets
) -> dict[str, Any]:
    """The layers that `quantize` would change, after its checks; layers in NF4 stay in NF4."""
    if isinstance(targets, bool):
        return {}
    chosen = select_layers(model, targets, exclude, kept_in_float32(model))
    already = _quantized_layers(model)
    dense = {name: layer for name, layer in chosen.items() if name not in already}
    check_can_be_quantized(model, dense)
    return chosen


def _quantized_layers(model: nn.Module) -> dict[str, Any]:
    layers = linear_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, NF4Linear)}


def _row(name: str, layer: Any, r: int, lora_bias: bool, base_bytes: int) -> Row:
    bias = layer.out_features if lora_bias else 0
    return Row(
        name=name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        adapter_parameters=r * (layer.in_features + layer.out_features) + bias,
        base_bytes=base_bytes,
    )


def _base_bytes(
    layers: Mapping[str, Any], in_nf4: Collection[str], block_size: int, double_quant: bool
) -> dict[str, int]:
    """The bytes of each layer's weight, as it is stored or as it would be in NF4."""
    found = {name: layer.weight.nbytes for name, layer in layers.items()}
    for name in in_nf4:
        layer = layers[name]
        if not isinstance(layer, NF4Linear):
            size = layer.in_features * layer.out_features
            found[name] = nf4_bytes(size, block_size, double_quant)
    return found


def _count_parameters(model: nn.Module) -> int:
    """Counts weights, not stored elements: a quantized layer counts as the dense one."""
    quantized = _quantized_layers(model).values()
    stored = {
        id(p)
        for layer in quantized
        for p in (layer.packed, layer.absmax, layer.absmax2, layer.offset)
    }
    dense = sum(p.numel() for p in model.parameters() if id(p) not in stored)
    return dense + sum(int(layer.weight.numel()) for layer in quantized)


def _named_model(source: Any, trust_remote_code: bool) -> tuple[str, nn.Module]:
    """Returns (name, model). A config or a model's name gives a model on the meta device."""
    if isinstance(source, nn.Module):
        return type(source).__name__, source

    from minilora.huggingface.loading import empty_model

    model = empty_model(source, trust_remote_code=trust_remote_code)
    is_name = isinstance(source, str | os.PathLike)
    return str(source) if is_name else type(model).__name__, model
