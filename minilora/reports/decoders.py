"""Finds the sizes of a decoder in its modules, for the formulas of memory.py.

The modules say more than the name of an architecture: which linear layers a block has, which of
them share an input, and what is normalized.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.reports.memory import Adapters, Decoder
from minilora.targets import linear_layers, unreached_matrices


def read_decoder(model: nn.Module) -> Decoder:
    """Returns the sizes of a causal language model from transformers.

    Raises:
        ValueError: its blocks are not an attention and an MLP of linear layers, each with norms.
    """
    name, block, count = _blocks(model)
    parts = _parts(block)
    unreached = unreached_matrices(model)
    if len(parts) != 2 or any(path.startswith(name) for path in unreached):
        raise _unknown(model, "its blocks are not one attention and one MLP of linear layers")

    config = _text_config(model)
    hidden = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 0))
    head = getattr(config, "head_dim", None) or hidden // max(1, heads)
    key_heads = getattr(config, "num_key_value_heads", None) or heads

    attention, mlp = parts
    width = mlp.last.in_features
    before = sum(layer.out_features for layer in mlp.first.values())
    if attention.last.in_features != heads * head or before not in (width, 2 * width):
        raise _unknown(model, "the sizes of its attention or MLP are not those of its config")

    norms = _norms(block)
    weights = [getattr(norm, "weight", None) for norm in norms.values()]
    if any(weight is None for weight in weights):
        raise _unknown(model, "one of its norms has no weight")

    # Those of queries and keys normalize head by head.
    per_head = {"q_norm": heads, "k_norm": key_heads}
    vectors = {}
    for path, norm in norms.items():
        by_head = norm.weight.numel() == head
        vectors[path] = per_head.get(path.rpartition(".")[2], 1) if by_head else 1

    return Decoder(
        hidden=hidden,
        layers=count,
        heads=heads,
        attention=heads * head,
        keys=key_heads * head,
        width=width,
        vocabulary=int(config.vocab_size),
        gated=before == 2 * width,
        norms=sum(norms[path].weight.numel() * n for path, n in vectors.items()),
        vectors=sum(vectors.values()),
        rms=not any(isinstance(norm, nn.LayerNorm) for norm in norms.values()),
    )


def read_adapters(model: nn.Module, ranks: Mapping[str, int]) -> Adapters:
    """Returns what adapters of these ranks have in all blocks, and keep in one.

    Args:
        model: a model that `read_decoder` can read.
        ranks: name of each adapted layer -> its rank. If blocks differ, their mean is returned.
    """
    blocks, block, count = _blocks(model)
    layers = linear_layers(model)
    inside = [name for name in ranks if name.startswith(f"{blocks}.")]
    adapted = {_in_block(name, blocks) for name in inside}

    # The first layers of a part share one input; the last has its own.
    attention, mlp = _parts(block)
    shared = 0
    for part in (attention, mlp):
        if adapted & part.first.keys():
            shared += next(iter(part.first.values())).in_features
    output = attention.last.in_features if attention.last_name in adapted else 0
    product = mlp.last.in_features if mlp.last_name in adapted else 0

    parameters = 0
    for name, r in ranks.items():
        parameters += r * (layers[name].in_features + layers[name].out_features)
    return Adapters(
        parameters=parameters,
        ranks=sum(ranks[name] for name in inside) // count,
        inputs=shared + output + product,
        output=output,
        product=product,
        dropped=sum(layers[name].in_features for name in inside) // count,
    )


@dataclass(frozen=True)
class _Part:
    """The linear layers of an attention or an MLP: those before the last, and the last."""

    first: dict[str, Any]
    last_name: str
    last: Any


def _in_block(name: str, blocks: str) -> str:
    """The name of a layer within its block: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return name.removeprefix(f"{blocks}.").partition(".")[2]


def _blocks(model: nn.Module) -> tuple[str, nn.Module, int]:
    """The name of the list of blocks, the first of them, and their number."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    expected = getattr(_text_config(model), "num_hidden_layers", None)
    for name, blocks in lists.items():
        kinds = {_sizes(block) for block in blocks}
        if len(blocks) == expected and len(kinds) == 1 and any(kinds):
            return name, blocks[0], len(blocks)
    raise _unknown(model, "it is not built of blocks with the same linear layers")


def _sizes(block: nn.Module) -> tuple[tuple[str, int, int], ...]:
    layers = _linears(block)
    return tuple((path, layer.in_features, layer.out_features) for path, layer in layers)


def _linears(block: nn.Module) -> Iterable[tuple[str, Any]]:
    return linear_layers(block).items() if not isinstance(block, nn.Linear) else ()


def _parts(block: nn.Module) -> list[_Part]:
    """A block's linear layers, those with the same parent together."""
    siblings: dict[str, dict[str, Any]] = {}
    for path, layer in _linears(block):
        siblings.setdefault(path.rpartition(".")[0], {})[path] = layer

    parts = []
    for layers in siblings.values():
        last_name, last = layers.popitem()
        if layers:
            parts.append(_Part(layers, last_name, last))
    return parts


def _norms(block: nn.Module) -> dict[str, Any]:
    named = block.named_modules()
    return {path: norm for path, norm in named if "norm" in type(norm).__name__.lower()}


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _unknown(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"the activations of {type(model).__name__} cannot be planned: {why}; leave out "
        "batch_size and length"
    )
