"""What a base model is: as it came, or merged by minilora; and what an adapter was trained on.

A merged model says so in its config.json, under "minilora", which transformers keeps when it loads
and saves a model. An adapter file says whether its base was quantized.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files.adapters import base_name, trained_on
from minilora.files.peft_config import CONFIG as ADAPTER_CONFIG
from minilora.huggingface.bundled import DEMO_MODEL
from minilora.huggingface.messages import one_line
from minilora.huggingface.model_folder import CONFIG, is_4bit, is_hub_id

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
    """Returns whether to train on a quantized base: what was asked for, by default yes.

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
    stored = is_4bit(config if isinstance(config, Mapping) else config.to_dict())
    if quantize is None and not stored and merged is not None:
        raise ValueError(
            f"{source} is a merged model (of {one_line(merged.base, 80)} and "
            f"{one_line(merged.adapter, 80)}): quantizing it would undo most of the merge. Choose "
            "quantize=False (--no-quantize), or quantize=True (--quantize) to quantize anyway"
        )
    return True if quantize is None else quantize


@dataclass(frozen=True)
class BaseChoice:
    """Which base is loaded, and how it is prepared for an adapter.

    Attributes:
        name: a folder, a hub id or "smollm2".
        quantize: the options of `minilora.NF4Config`; None: the base stays as it is stored.
        notes: what the user should know about the choice.
        other_base: whether it is another base than the adapter was trained on.
        dense: whether a dense base was asked for: one that is stored in 4 bits is refused.
    """

    name: str
    quantize: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    other_base: bool = False
    dense: bool = False


def choose_base(
    model: str | None,
    adapter: str | None,
    quantize: bool | None,
    trust_remote_code: bool = False,
) -> BaseChoice:
    """Returns the base to load: what the adapter was trained on, unless asked for otherwise.

    Args:
        model: the name of the base; None: the one that the adapter names.
        adapter: an adapter's folder; None: the base alone.
        quantize: what was asked for; None: as it was.
        trust_remote_code: whether code of the base may run. Its name has to be given then: an
            adapter can name any model.

    Raises:
        FileNotFoundError: the adapter does not exist, or the folder that it names.
        ValueError: no model is given and the adapter does not name one, or its files are damaged.
    """
    notes = []
    name = model
    if name is None:
        name = _name_of_base(adapter, trust_remote_code)
        notes.append(f"base model: {one_line(name)} (from {one_line(adapter)}/{ADAPTER_CONFIG})")
    dense = quantize is False
    if adapter is None:
        return BaseChoice(name, {} if quantize else None, dense=dense)

    shown, trained = one_line(adapter), trained_on(adapter)
    if trained is None:
        if quantize is None:
            notes.append(
                f"{shown} does not say whether its base was quantized: the base stays dense "
                "(--quantize to quantize it)"
            )
        return BaseChoice(name, {} if quantize else None, tuple(notes), dense=dense)

    if quantize is None or quantize == trained.quantized:
        options = asdict(trained.usual) if trained.quantized else None
        return BaseChoice(name, options, tuple(notes), dense=dense)

    before, now = ("dense", "quantized") if quantize else ("quantized", "dense")
    notes.append(
        f"{shown} was trained on a {before} base, and this one is {now}, as requested: its answers "
        "and its hold-out loss can differ"
    )
    options = {} if quantize else None
    return BaseChoice(name, options, tuple(notes), other_base=True, dense=dense)


def _name_of_base(adapter: str | None, trust_remote_code: bool) -> str:
    """The name in an adapter's config, if it can be one: a folder that exists, or a hub id."""
    if adapter is None:
        raise ValueError(
            "no model given: pass --model, or an --adapter that records its base model"
        )

    name, shown = base_name(adapter), one_line(adapter)
    if name is None:
        raise ValueError(f"{shown} does not name its base: give --model")
    if trust_remote_code:
        raise ValueError(
            f"--trust-remote-code would run code of {one_line(name)}, because {shown} names it: if "
            "you trust that model, give it as --model"
        )
    # A folder on another machine (//host/share) would be asked for, with the user's credentials.
    remote = name.startswith(("//", "\\\\"))
    if name == DEMO_MODEL or (not remote and (Path(name).is_dir() or is_hub_id(name))):
        return name
    raise FileNotFoundError(
        f"{shown} was trained on {one_line(name)}, which does not exist here: give --model"
    )
