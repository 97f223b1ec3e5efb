"""A dry run: which layers would get adapters, and how much memory the run needs."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from minilora.checks import (
    check_bare,
    check_can_be_adapted,
    check_can_be_quantized,
    warn_of_unreached,
)
from minilora.layers import NF4Linear
from minilora.lora import check_options
from minilora.nf4 import check_format
from minilora.reports.decoders import read_adapters, read_decoder
from minilora.reports.memory import READ_WINDOW, Batch, Run
from minilora.reports.memory import nf4_bytes as nf4_bytes
from minilora.reports.parameter_groups import Change, read_groups
from minilora.reports.plan_result import Plan as Plan
from minilora.reports.plan_result import Row as Row
from minilora.reports.shapes import is_shape, shape_config, suggesting_shapes
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

# No batch is larger: more is a mistake in typing.
LARGEST = 10**9


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
    batch_size: int | None = None,
    length: int | None = None,
    checkpointing: bool | None = None,
    dropout: float = 0.0,
    grad_accum: int = 1,
    paged_optimizer: bool = False,
    efficient: bool = True,
) -> Plan:
    """Returns what `quantize` and `inject` would do with these arguments, and the memory of a run.

    With a batch size and a length, the plan also counts activations and logits, and says which
    phase of a run needs the most memory: loading, the loss, the backward pass or the optimizer's
    step.

    Nothing is changed. Matrices that neither of the two reaches, such as the experts of a mixture,
    are counted and warned of.

    Args:
        model: a module on any device, the meta device included; a transformers config; a folder or
            hub id, of which only the config is read, and which may be stored in 4 bits; or the name
            of a well-known shape, such as "llama-65b" (see minilora/reports/shapes.py).
        r, alpha, targets, exclude, train_also, strict: as for `inject`.
        rank_pattern, alpha_pattern, layers_to_transform, lora_bias: as for `inject`.
        quantize: True: what `targets` and `exclude` mean is in NF4. False: the base stays as it is.
            Targets: these layers are in NF4, whichever get an adapter (`finetune` quantizes
            "all-linear").
        block_size, double_quant: as for `quantize`.
        trust_remote_code: run the Python files that come with a folder or hub id.
        batch_size, length: number of sequences in a forward pass, and tokens per sequence.
        checkpointing: gradient checkpointing. Default: with a base in NF4, as `finetune` does.
        dropout: as for `inject`.
        grad_accum: number of forward passes per step: with more than one, the gradients of the
            first are there while the next is computed.
        paged_optimizer: the optimizer's states are in host memory, as `PagedAdamW` moves them
            there, and not counted.
        efficient: the training step of `finetune`, which keeps less and computes the loss in
            chunks. False: the modules and the loss of transformers.

    Raises:
        ValueError, TypeError: what `quantize` and `inject` would raise, such as a target that
            matches nothing, or matrices outside of linear layers with strict=True. Also if a batch
            is given for a model that is not a decoder of linear layers, or one of its sizes is
            missing or out of range.

    Example:
        >>> p = plan(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)), r=4)
        >>> p.trainable, [row.name for row in p.rows]
        (800, ['0', '1'])
        >>> p = plan("llama-7b", r=16, batch_size=4, length=512)
        >>> p.peak_phase, round(p.total_bytes / 1e9, 1)
        ('backward', 5.3)
    """
    check_format(block_size, "nf4")
    _check_batch(batch_size, length, grad_accum)
    name, model = named_model(model, trust_remote_code)

    adapted = select_layers(model, targets, exclude)
    if layers_to_transform is not None:
        adapted = in_blocks(adapted, layers_to_transform)
    ranks = _checked_ranks(model, adapted, r, alpha, dropout, rank_pattern, alpha_pattern)
    quantized_targets = targets if quantize is True else quantize
    to_quantize = _layers_to_quantize(model, quantized_targets, exclude)
    in_nf4 = to_quantize | _quantized_layers(model)
    named = select_parameters(model, train_also)
    # A tied parameter has several names.
    also = {id(p): path for path, p in named.items()}.values()

    base_bytes = _base_bytes(adapted | in_nf4, in_nf4.keys(), block_size, double_quant)
    rows = tuple(
        _row(path, layer, ranks[path], lora_bias, base_bytes[path])
        for path, layer in adapted.items()
    )
    adapter_parameters = sum(row.adapter_parameters for row in rows)
    gradients = 4 * adapter_parameters + sum(named[path].nbytes for path in also)
    # What is trained whole has a copy beside the base's.
    dense = sum(p.nbytes for p in model.parameters()) + sum(named[path].nbytes for path in also)
    dense -= sum(layer.weight.nbytes for layer in in_nf4.values())

    warn_of_unreached(model, targets, strict, "quantized or adapted", stacklevel=3)

    change = Change(in_nf4.keys(), block_size, double_quant, ranks, lora_bias, tuple(also))
    found = Plan(
        model=name,
        r=r,
        quantize=bool(to_quantize),
        rows=rows,
        left_out=tuple(path for path in linear_layers(model) if path not in adapted),
        unreached=sum(p.numel() for p in unreached_matrices(model).values()),
        parameters=_count_parameters(model),
        trainable=adapter_parameters + sum(named[path].numel() for path in also),
        bytes={
            "quantized": sum(base_bytes[path] for path in in_nf4),
            "dense": dense,
            "adapters": 4 * adapter_parameters,
            "gradients": gradients,
            "optimizer": 2 * gradients,
        },
        groups=read_groups(model, change),
        grad_accum=grad_accum,
    )
    batch = _batch(model, batch_size, length, checkpointing, bool(in_nf4), dropout, efficient)
    if batch is None:
        return found

    window = _read_window(to_quantize)
    run = _run(found, model, ranks, batch, window, paged_optimizer, grad_accum > 1)
    return found.with_run(run)


def _check_batch(batch_size: Any, length: Any, grad_accum: Any) -> None:
    """Raises ValueError unless there are such numbers of sequences, tokens and batches."""
    given = {"batch_size": batch_size, "length": length, "grad_accum": grad_accum}
    for name, n in given.items():
        if n is None and name != "grad_accum":
            continue
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= LARGEST:
            raise ValueError(f"{name}={n!r}: must be a whole number, 1 ... {LARGEST:,}")
    if (batch_size is None) != (length is None):
        alone, missing = ("batch_size", "length") if batch_size else ("length", "batch_size")
        flag = missing.replace("_", "-")
        raise ValueError(
            f"{alone}={given[alone]} without {missing}: activations depend on both; give "
            f"{missing} (--{flag}) as well, or neither"
        )


def _batch(
    model: nn.Module,
    size: int | None,
    length: int | None,
    checkpointing: bool | None,
    in_nf4: bool,
    dropout: float,
    efficient: bool,
) -> Batch | None:
    """The batch of a run. None: only what does not depend on it is planned."""
    if size is None or length is None:
        return None
    floats = [p for p in model.parameters() if p.is_floating_point()]
    return Batch(
        size=size,
        length=length,
        checkpointing=in_nf4 if checkpointing is None else checkpointing,
        dropout=dropout > 0,
        compute_bytes=floats[0].element_size(),
        efficient=efficient,
        quantized=in_nf4,
    )


def _run(
    planned: Plan,
    model: nn.Module,
    ranks: Mapping[str, int],
    batch: Batch,
    window: int,
    paged_optimizer: bool,
    accumulate: bool,
) -> Run:
    """What a run of the planned model holds, and its batch."""
    count = planned.bytes
    optimizer = 0 if paged_optimizer else count["optimizer"]
    base = {"quantized": count["quantized"], "dense": count["dense"]}
    return Run(
        held={**base, "adapters": count["adapters"], "optimizer": optimizer},
        gradients=count["gradients"],
        loading={**base, "reading": window},
        decoder=read_decoder(model),
        adapters=read_adapters(model, ranks),
        batch=batch,
        accumulate=accumulate,
    )


def _read_window(to_quantize: Mapping[str, Any]) -> int:
    """The bytes of dense weights that are in memory while these layers are read and quantized."""
    sizes = [
        layer.weight.nbytes for layer in to_quantize.values() if not isinstance(layer, NF4Linear)
    ]
    return min(sum(sizes), max(READ_WINDOW, *sizes)) if sizes else 0


def _checked_ranks(
    model: nn.Module,
    adapted: Mapping[str, Any],
    r: int,
    alpha: float | None,
    dropout: float,
    rank_pattern: Mapping[Pattern, int] | None,
    alpha_pattern: Mapping[Pattern, float] | None,
) -> dict[str, int]:
    """The rank that each layer's adapter would have, after the checks of `inject`."""
    check_can_be_adapted(model, adapted, "default")
    check_bare(model)

    ranks = dict.fromkeys(adapted, r) | by_pattern(adapted, rank_pattern, "rank_pattern")
    alphas = by_pattern(adapted, alpha_pattern, "alpha_pattern")
    for name, rank in ranks.items():
        check_options(rank, alphas.get(name, alpha), dropout, name)
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


def named_model(source: Any, trust_remote_code: bool = False) -> tuple[str, nn.Module]:
    """Returns (name, model). A config or a model's name gives a model on the meta device."""
    if isinstance(source, nn.Module):
        return type(source).__name__, source

    from minilora.huggingface.loading import empty_model

    if is_shape(source) and not Path(source).is_dir():
        return source, empty_model(shape_config(source))

    with suggesting_shapes(source):
        model = empty_model(source, trust_remote_code=trust_remote_code, allow_4bit=True)
    is_name = isinstance(source, str | os.PathLike)
    return str(source) if is_name else type(model).__name__, model
