"""What the layers under an adapter were when it was trained: dense, or in 4 bits and how.

An adapter corrects the base that it saw. On another one it computes something else, and nothing
fails: so it is written down with the adapter, and compared when the adapter is loaded.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minilora.kernels.reference.codebooks import CODEBOOKS
from minilora.layers import NF4Linear


@dataclass(frozen=True)
class Format:
    """How a layer's weight is stored.

    Attributes:
        quant_type: the codebook ("nf4"), or "dense".
        block_size, double_quant: as for `quantize`; 0 and False for a dense layer.
    """

    quant_type: str
    block_size: int = 0
    double_quant: bool = False

    def __str__(self) -> str:
        if self == DENSE:
            return "dense"
        absmax = "double-quantized" if self.double_quant else "not double-quantized"
        return f"{self.quant_type} (blocks of {self.block_size}, {absmax})"


DENSE = Format("dense")


@dataclass(frozen=True)
class Base:
    """The formats of the layers that have an adapter.

    Attributes:
        usual: the format of most of them.
        others: those of the remaining layers, by name.
    """

    usual: Format
    others: Mapping[str, Format]

    @property
    def quantized(self) -> bool:
        """Whether most of the layers are in 4 bits."""
        return self.usual != DENSE

    def format(self, layer: str) -> Format:
        return self.others.get(layer, self.usual)


def base_of(layers: Mapping[str, Any]) -> Base:
    """The base that these layers are, by name, with adapters or without."""
    formats = {name: _format(layer) for name, layer in layers.items()}
    usual = Counter(formats.values()).most_common(1)[0][0]
    return Base(usual, {name: form for name, form in formats.items() if form != usual})


def _format(layer: Any) -> Format:
    if not isinstance(layer, NF4Linear):
        return DENSE
    return Format(layer.quant_type, layer.block_size, layer.absmax2 is not None)


def to_json(base: Base) -> str:
    """The text that a file's metadata hold."""
    others = {name: asdict(form) for name, form in sorted(base.others.items())}
    return json.dumps(asdict(base.usual) | ({"others": others} if others else {}))


def from_json(text: str) -> Base:
    """The inverse of `to_json`.

    Raises:
        ValueError: it is something else.
    """
    try:
        facts = json.loads(text)
        others = facts.pop("others", {})
        base = Base(Format(**facts), {name: Format(**f) for name, f in others.items()})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("it is not a record of minilora's") from error

    for form in (base.usual, *base.others.values()):
        _check(form)
    return base


def _check(form: Format) -> None:
    numbers = type(form.block_size) is int and type(form.double_quant) is bool
    quantized = form.quant_type in tuple(CODEBOOKS) and form.block_size > 0 if numbers else False
    if form != DENSE and not quantized:
        raise ValueError("it names a format that minilora does not have")
