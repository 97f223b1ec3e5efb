"""What a model's folder says about itself, read and checked before anything of it is loaded.

transformers takes a folder at its word. It would run code that the folder brings or names, unpickle
weights, add an adapter that lies beside them, and read files from elsewhere. Here a folder is data
and nothing else, unless `trust_remote_code=True` allows its code.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minilora.files.json_file import read_json
from minilora.huggingface.checkpoint_files import check_same
from minilora.huggingface.messages import one_line

CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Of the index of a very large model, which has some megabytes.
_MOST_BYTES = 64 << 20

# The implementations of attention and experts that are transformers' own code. Any other name in
# a config makes it fetch a kernel from the hub and run it.
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")

# owner/name, or a name alone.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)

# What a model is built from one by one: a count that is absurd would never end.
_COUNTED = re.compile(r"(^|_)(layers?|blocks?|experts?|heads?)$", re.ASCII)
_MOST = 10_000

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_config(
    source: str | Path,
    trust_remote_code: bool = False,
    *,
    allow_4bit: bool = False,
    causal: bool = True,
) -> dict[str, Any]:
    """Returns the config of a model's folder or hub id, after all checks; no weights are read.

    Args:
        source: a folder or a hub id.
        trust_remote_code: allow implementations that the config names and transformers does not
            have.
        allow_4bit: accept a model that bitsandbytes, or `minilora.save_quantized`, has put in 4
            bits.
        causal: it has to be a causal language model.

    Raises:
        ValueError: there is no readable config; the model is quantized already, is not a causal
            language model, or would run code; the folder holds an adapter, or weights that are
            pickled, missing or elsewhere. The message names the file and the key.
    """
    folder = Path(source)
    if folder.is_dir():
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
        _check_files(folder, config or {})
        if config is None:
            raise ValueError(f"{folder / CONFIG} does not exist: {folder} is not a model's folder")
    elif folder.exists():
        raise ValueError(f"{source} is a file: give the folder of a model, or a hub id")
    else:
        config = _hub_config(source)

    readable = allow_4bit and is_4bit(config)
    rest = {**config, "quantization_config": None} if readable else config
    _check_config(source, rest, trust_remote_code)
    if causal:
        _check_causal(source, config)
    return config


def is_4bit(config: Mapping[str, Any]) -> bool:
    """Whether a model's config says that its layers are in bitsandbytes' 4 bits.

    Example:
        >>> is_4bit({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
        True
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return False
    return found.get("quant_method") == "bitsandbytes" and found.get("load_in_4bit") is True


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a model on the hub.

    Example:
        >>> is_hub_id("owner/name"), is_hub_id("/home/somebody/name"), is_hub_id("../name")
        (True, False, False)
    """
    return _HUB_ID.fullmatch(name) is not None


def _hub_config(source: str | Path) -> dict[str, Any]:
    from transformers import PreTrainedConfig
    from transformers.utils import find_adapter_config_file

    try:
        if not is_hub_id(str(source)):
            raise ValueError("there is no such folder")
        config, _ = PreTrainedConfig.get_config_dict(str(source))
        adapter = find_adapter_config_file(str(source))
    except Exception as error:
        raise ValueError(
            f"{one_line(source)} cannot be loaded as a causal language model: {one_line(error)}"
        ) from error
    if adapter is not None:
        _refuse_adapter(source)
    return dict(config)


def _check_config(source: str | Path, config: Mapping[str, Any], trust: bool) -> None:
    for key, value in _items_of(config):
        if key in ("quantization_config", "compression_config") and value is not None:
            _refuse_quantized(source, key, value)
        if isinstance(value, int) and value > _MOST and _COUNTED.search(key):
            count = f"{one_line(key, 40)}={one_line(value, 40)}"
            raise ValueError(f"{source} cannot be a model: its {CONFIG} says {count}")

    if not trust:
        _check_implementations(source, config)


def _check_causal(source: str | Path, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    if any(str(name).endswith("ForMaskedLM") for name in _as_list(architectures)):
        raise ValueError(
            f"{source} is not a causal language model: its {CONFIG} says "
            f"architectures={one_line(architectures, 80)}"
        )


def _refuse_quantized(source: str | Path, key: str, value: Any) -> None:
    method = one_line(value.get("quant_method") if isinstance(value, Mapping) else value, 80)
    raise ValueError(
        f"{source} is quantized already ({key} in its {CONFIG}: {method}): give the model's 16-bit "
        "original. Of quantized models, minilora.load reads those in bitsandbytes' 4 bits"
    )


def _check_implementations(source: str | Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if a config names an implementation that transformers would fetch."""
    for key, value in _items_of(config):
        if not _IMPLEMENTATION.fullmatch(key):
            continue
        names = value.values() if isinstance(value, Mapping) else _as_list(value)
        foreign = [n for n in names if n is not None and n not in _OWN_IMPLEMENTATIONS]
        if foreign:
            raise ValueError(
                f"{source} asks for code from elsewhere ({key} in its {CONFIG}: "
                f"{one_line(foreign[0], 80)}): remove the key, or allow it with "
                "trust_remote_code=True (--trust-remote-code)"
            )


def _items_of(config: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The keys and values of a config and of the configs that are nested in it."""
    # The configs of a multimodal model are two levels deep.
    if isinstance(config, Mapping) and depth < 10:
        for key, value in config.items():
            yield key, value
            yield from _items_of(value, depth + 1)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def check_architecture(config: Mapping[str, Any], model: object) -> None:
    """Raises ValueError if a config's architectures and its model type are not of one family.

    transformers goes by the model type, and loads what fits by name.
    """
    named = _as_list(config.get("architectures"))
    kind = type(model).__name__
    if named and _family(kind) not in map(_family, named):
        raise ValueError(
            f"its {CONFIG} contradicts itself: model_type={one_line(config.get('model_type'), 40)} "
            f"is a {kind}, and architectures={one_line(named, 80)}"
        )


def _family(name: object) -> str:
    """llama, of LlamaForCausalLM, LlamaModel or LlamaLMHeadModel."""
    return re.sub(r"(For\w+|(LMHead|PreTrained)?Model)$", "", str(name)).lower()


def _check_files(folder: Path, config: Mapping[str, Any]) -> None:
    if (folder / _ADAPTER_CONFIG).exists():
        _refuse_adapter(folder)

    named = config.get("transformers_weights")
    if named is not None and named not in (_WEIGHTS, _INDEX):
        raise ValueError(
            f"{folder / CONFIG} names other weights than {_WEIGHTS} "
            f"(transformers_weights={one_line(named, 80)}): remove the key"
        )
    if any(folder.glob("shard-*.safetensors")):
        raise ValueError(
            f"{folder} is a distributed checkpoint (shard-*.safetensors): gather it first, with "
            "from_pretrained and save_pretrained"
        )


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors weights; what they hold is not looked at."""
    return (folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file()


def check_weights(folder: Path) -> list[Path]:
    """Returns the safetensors files that hold a folder's weights: a single one, or shards.

    Raises:
        ValueError: there are none, or they are not in the folder; or there are both and they
            differ, as after saving a model in shards where another one had been saved. Readers
            take the single file, which would be the old one.
    """
    single = folder / _WEIGHTS
    if not single.is_file():
        return _shards(folder)
    if (folder / _INDEX).is_file():
        # Some models are published as both, and a folder may have an index alone.
        named = {folder / name for name in _named_by_index(folder)} - {single}
        check_same(single, sorted(path for path in named if path.is_file()))
    return [single]


def _shards(folder: Path) -> list[Path]:
    if not (folder / _INDEX).is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ValueError(
                f"{folder / one_line(pickled[0], 80)} is a pickle, which can run code, and is not "
                f"loaded: convert it to {_WEIGHTS}"
            )
        raise ValueError(f"{folder} has no weights: neither {_WEIGHTS} nor {_INDEX}")

    names = _named_by_index(folder)
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / one_line(name, 80)} does not exist; {_INDEX} names it")
    return [folder / name for name in names]


def _named_by_index(folder: Path) -> list[str]:
    """The names of the files in a folder's index."""
    shards = read_json(folder / _INDEX, _MOST_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / _INDEX} has no weight_map: no tensor can be found")
    names = sorted({str(shard) for shard in shards.values()})
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / _INDEX} names {one_line(name, 80)}, which is not a safetensors file in "
                "its folder"
            )
    return names


def _refuse_adapter(source: str | Path) -> None:
    raise ValueError(
        f"{source} holds an adapter ({_ADAPTER_CONFIG}), not a model alone: give it as the "
        "adapter (--adapter), and its base model as the model"
    )
