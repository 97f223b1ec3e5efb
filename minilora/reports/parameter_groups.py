"""The parameters of a model with adapters as FSDP2 divides and gathers them: group by group.

A group is a block of the model, or what is outside of the blocks. Each parameter is divided by
rows: n GPUs hold ceil(rows / n) rows each.
"""

from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from minilora.distributed.sharding import repeated_blocks
from minilora.kernels.reference.nf4 import GROUP
from minilora.layers import NF4Linear
from minilora.nf4 import PARTS
from minilora.reports.memory import FLOAT
from minilora.targets import linear_layers


@dataclass(frozen=True)
class Stored:
    """One parameter of a model, or one tensor of a weight in NF4.

    Attributes:
        kind: "quantized", "dense" or "adapters", as in a plan's bytes.
        rows: its first dimension.
        row_bytes: bytes of a row.
        trained: whether it has a gradient.
    """

    kind: str
    rows: int
    row_bytes: int
    trained: bool = False

    def shard_bytes(self, gpus: int) -> int:
        """Bytes on each GPU. The last shards are padded to the size of the first.

        Example:
            >>> Stored("adapters", rows=16, row_bytes=4, trained=True).shard_bytes(3)
            24
        """
        return -(-self.rows // gpus) * self.row_bytes


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together, and how many such groups the model has."""

    stored: tuple[Stored, ...]
    count: int = 1

    def shard_bytes(self, gpus: int) -> int:
        """Bytes of the parameters of one such group on each GPU."""
        return sum(one.shard_bytes(gpus) for one in self.stored)

    def gradient_bytes(self, gpus: int) -> int:
        """Bytes of their gradients on each GPU."""
        return sum(one.shard_bytes(gpus) for one in self.stored if one.trained)


@dataclass(frozen=True)
class Groups:
    """All parameters of a model.

    Attributes:
        root: those outside of the blocks; all, in a model without repeated blocks.
        blocks: those of each block. Blocks with the same parameters are counted in one group.
        aside: bytes of the base's parameters in whose place others are trained: they are no longer
            in the model, and are not divided.
    """

    root: Group = Group(())
    blocks: tuple[Group, ...] = ()
    aside: int = 0

    def __iter__(self) -> Iterator[Group]:
        return iter((self.root, *self.blocks))

    def shard_bytes(self, gpus: int) -> dict[str, int]:
        """Kind -> bytes on each GPU, with the gradients and AdamW's two states."""
        found = dict.fromkeys(("quantized", "dense", "adapters"), 0)
        for group in self:
            for one in group.stored:
                found[one.kind] += group.count * one.shard_bytes(gpus)
        found["dense"] += self.aside
        gradients = sum(group.count * group.gradient_bytes(gpus) for group in self)
        return {**found, "gradients": gradients, "optimizer": 2 * gradients}


@dataclass(frozen=True)
class Change:
    """What `quantize` and `inject` would do to a model.

    Attributes:
        in_nf4: names of the layers whose weight is in NF4, already or then.
        block_size, double_quant: of the layers that are not yet.
        ranks: name of each adapted layer -> its rank.
        lora_bias: whether B has a bias.
        also: names of the parameters in whose place a copy is trained.
    """

    in_nf4: Collection[str]
    block_size: int
    double_quant: bool
    ranks: Mapping[str, int]
    lora_bias: bool
    also: Sequence[str]


def read_groups(model: nn.Module, change: Change) -> Groups:
    """Returns the groups of a model after a change. A parameter that is tied counts once."""
    layers = linear_layers(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(parameters[name]) for name in change.also}

    found: list[tuple[str, Stored]] = []
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        layer = layers.get(owner)
        if owner in change.in_nf4 and last == "weight" and not isinstance(layer, NF4Linear):
            parts = nf4_parts(parameter.numel(), change.block_size, change.double_quant)
            found += [(name, part) for part in parts]
        else:
            packed = isinstance(layer, NF4Linear) and last in PARTS
            kind = "quantized" if packed else "dense"
            found.append((name, _stored(kind, parameter, id(parameter) in trained)))

    for name, rank in change.ranks.items():
        found += [(name, part) for part in _adapter(layers[name], rank, change.lora_bias)]
    aside = sum(parameters[name].nbytes for name in change.also)
    return replace(_grouped(found, repeated_blocks(model)), aside=aside)


def nf4_parts(n: int, block_size: int = 64, double_quant: bool = True) -> list[Stored]:
    """Returns the tensors of n weights in NF4, all of one dimension: see `nf4_bytes`."""
    codes, blocks = (n + 1) // 2, -(-n // block_size)
    sizes = [(codes, 1), (blocks, FLOAT)]
    if double_quant:
        sizes = [(codes, 1), (blocks, 1), (-(-blocks // GROUP), FLOAT), (1, FLOAT)]
    return [Stored("quantized", rows, size) for rows, size in sizes]


def _adapter(layer: Any, rank: int, bias: bool) -> list[Stored]:
    """A [r, in], B [out, r] and the bias [out], in float32."""
    sizes = [(rank, layer.in_features), (layer.out_features, rank)]
    sizes += [(layer.out_features, 1)] if bias else []
    return [Stored("adapters", rows, FLOAT * columns, trained=True) for rows, columns in sizes]


def _stored(kind: str, parameter: nn.Parameter, trained: bool) -> Stored:
    rows = parameter.shape[0] if parameter.ndim else 1
    return Stored(kind, rows, parameter.nbytes // max(rows, 1), trained)


def _grouped(named: Iterable[tuple[str, Stored]], blocks: Container[str]) -> Groups:
    """Groups parameters by the block that their names begin with."""
    root: list[Stored] = []
    in_block: dict[str, list[Stored]] = {}
    for name, one in named:
        above = (name[:i] for i, letter in enumerate(name) if letter == ".")
        block = next((path for path in above if path in blocks), None)
        (root if block is None else in_block.setdefault(block, [])).append(one)
    counts = Counter(map(tuple, in_block.values()))
    return Groups(Group(tuple(root)), tuple(Group(*item) for item in counts.items()))
