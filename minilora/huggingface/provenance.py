"""What a base model is: as it came, or merged by minilora; and what an adapter was trained on.

A merged model says so in its config.json, under "minilora", which transformers keeps when it loads
and saves a model. An adapter file says whether its base was quantized.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files.adapters import trained_on
from minilora.huggingface.messages import one_line
from minilora.huggingface.model_folder import CONFIG

_KEY = "minilora"


@dataclass(frozen=True)
class Merged:
    """What a merged model is made from.

    Attributes:
        base: name of the base model.
        adapter: name of the adapter's folder.
        quantized: whether the base was in NF4, dequantized for the merge.
    """

    base: str
    adapter: str
    quantized: bool


def mark_merged(model: nn.Module, merged: Merged) -> None:
    """Writes into a model's config, which `save_pretrained` saves, that it is a merged model.

    Example:
        >>> from types import SimpleNamespace
        >>> model = torch.nn.Linear(2, 2)
        >>> model.config = SimpleNamespace()
        >>> mark_merged(model, Merged("base", "my-adapter", quantized=True))
        >>> merged_from(model.config).base
        'base'
    """
    config: Any = model.config
    setattr(config, _KEY, {"merged": True, **asdict(merged)})


def merged_from(config: Any) -> Merged | None:
    """Returns what a merged model is made from; None for any other model.

    Args:
        config: a transformers config, or the contents of config.json.

    Raises:
        ValueError: the record is there and cannot be read.
    """
    record = config.get(_KEY) if isinstance(config, Mapping) else getattr(config, _KEY, None)
    if record is None:
        return None

    kinds = {"merged": bool, "base": str, "adapter": str, "quantized": bool}
    values = record if isinstance(record, Mapping) else {}
    if {key: type(value) for key, value in values.items()} != kinds or not values["merged"]:
        raise ValueError(f"{CONFIG}: {_KEY}={one_line(record, 80)} is not what minilora writes")
    return Merged(values["base"], values["adapter"], values["quantized"])


def decide_quantize(quantize: bool | None, config: Any, source: str | Path) -> bool:
    """Returns whether to quantize a base before training: what was asked for, by default yes.

    Args:
        quantize: what was asked for; None: the default.
        config: the model's config, or the contents of config.json.
        source: the model's name.

    Raises:
        ValueError: nothing was asked for and the model is a merged one. Its updates are small, and
            quantizing would round most of them away.

    Example:
        >>> decide_quantize(None, {}, "a-model"), decide_quantize(False, {}, "a-model")
        (True, False)
    """
    merged = merged_from(config)
    if quantize is None and merged is not None:
        raise ValueError(
            f"{source} is a merged model (of {one_line(merged.base, 80)} and "
            f"{one_line(merged.adapter, 80)}): quantizing it would undo most of the merge. Choose "
            "quantize=False (--no-quantize), or quantize=True (--quantize) to do it all the same"
        )
    return True if quantize is None else quantize


@dataclass(frozen=True)
class BaseChoice:
    """How a base is prepared for an adapter.

    Attributes:
        quantize: the options of `minilora.quantize`; None: the base stays dense.
        note: what the user should know about the choice; empty if nothing.
        other_base: whether it is another base than the adapter was trained on.
    """

    quantize: dict[str, Any] | None
    note: str = ""
    other_base: bool = False


def choose_base(adapter: str | Path | None, quantize: bool | None) -> BaseChoice:
    """Returns how to prepare the base: as the adapter was trained, unless asked for otherwise.

    Args:
        adapter: an adapter's folder; None: the base alone.
        quantize: what was asked for; None: as it was.

    Raises:
        FileNotFoundError: the adapter's weights do not exist.
        ValueError: they cannot be read.
    """
    if adapter is None:
        return BaseChoice({} if quantize else None)

    trained = trained_on(adapter)
    if trained is None:
        note = (
            f"{one_line(adapter)} does not say whether its base was quantized: the base stays dense"
        )
        note = f"{note} (--quantize to quantize it)" if quantize is None else ""
        return BaseChoice({} if quantize else None, note)

    if quantize is None or quantize == trained.quantized:
        return BaseChoice(asdict(trained.usual) if trained.quantized else None)

    before, now = ("dense", "quantized") if quantize else ("quantized", "dense")
    note = (
        f"{one_line(adapter)} was trained on a {before} base, and this one is {now}, as asked for: "
        "its answers and its hold-out loss can differ"
    )
    return BaseChoice({} if quantize else None, note, other_base=True)
