"""The two files of an adapter, written and read without looking at a model."""

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.files.atomic import atomic_files, unfinished
from minilora.files.base import Base, from_json, to_json
from minilora.files.hashing import sha256_of_file, sha256_of_tensors
from minilora.files.names import PEFT_PREFIX, names_in_file
from minilora.files.peft_config import CONFIG, config_file, read_config
from minilora.files.tensors import read_metadata, read_tensors, write_tensors
from minilora.files.text import shown

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"

# The metadata of the weights. PEFT's files have none of it and are read without.
_CONFIG_HASH = "adapter_config_sha256"
_TENSORS_HASH = "contents_sha256"
_NAME = "minilora_name"
_BASE = "minilora_base"
_TRAINED = "minilora_trained"

# A key of PEFT's: the layer, and which of its adapter's tensors this is.
_KEY = re.compile(r"(?P<layer>.+)\.(?P<end>lora_\w+(\.\w+)?)")
_A, _B, _B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_LONGEST_KEY = 1000

# What A and B may be stored in.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class SavedAdapter:
    """The contents of an adapter's folder.

    Attributes:
        name: the name that the adapter was saved under; "default" in files of PEFT's.
        config: adapter_config.json.
        layers: layer name -> end of PEFT's key -> tensor.
        whole: parameter name -> tensor, of parameters that were trained whole.
        trained: the names of those parameters; None: the config alone says so, and some may be
            copies of the base's. Before writing, `whole` has names as they stand in the file.
        base: what the adapter was trained on; None: the file does not say.
    """

    name: str
    config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]]
    whole: Mapping[str, Tensor]
    base: Base | None = None
    trained: Collection[str] | None = None

    def rank(self, layer: str) -> int:
        """The rank of a layer's adapter."""
        return self.layers[layer][_A].shape[0]

    def changes_something(self) -> bool:
        """Whether an adapter changes its layer, or there are parameters of the model itself."""
        return bool(self.whole) or self.trains_adapters()

    def fingerprint(self) -> str:
        """A hash of the config and of all values."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for _, tensors in sorted({**self.layers, "": self.whole}.items()):
            total.update(sha256_of_tensors(tensors).encode())
        return total.hexdigest()

    def trains_adapters(self) -> bool:
        """Whether any B, or its bias, is other than zero."""
        ends = (_B, _B_BIAS)
        tensors = [held[end] for held in self.layers.values() for end in ends if end in held]
        return any(bool(tensor.any()) for tensor in tensors)


def write_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Writes both files atomically, with checksums of both in the weights' metadata.

    Raises:
        OSError: the disk is full or the folder cannot be written to; existing files stay.
    """
    tensors = {
        f"{PEFT_PREFIX}{layer}.{end}": tensor
        for layer, held in adapter.layers.items()
        for end, tensor in held.items()
    }
    tensors |= {PEFT_PREFIX + name: tensor for name, tensor in adapter.whole.items()}

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_files(folder / CONFIG, folder / WEIGHTS) as (config_file, weights_file):
        text = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
        config_file.write_text(text, encoding="utf-8")
        metadata = {
            _CONFIG_HASH: sha256_of_file(config_file),
            _TENSORS_HASH: sha256_of_tensors(tensors),
            _NAME: adapter.name,
        }
        if adapter.base is not None:
            metadata[_BASE] = to_json(adapter.base)
        if adapter.trained:
            metadata[_TRAINED] = json.dumps(sorted(adapter.trained))
        write_tensors(weights_file, tensors, metadata)


def read_adapter(
    folder: Path, own_options: Mapping[str, Any], known: Collection[str] = ()
) -> SavedAdapter:
    """Reads both files and checks them without a model.

    Args:
        folder: the folder.
        own_options: what an adapter of the expected class says of itself (see `read_config`).
        known: canonical names of the model's modules and parameters, which say what in a key
            belongs to a wrapper (see `names_in_file`).

    Raises:
        FileNotFoundError: one of the two files does not exist.
        ValueError: a file is damaged, is not of a LoRA adapter, or asks for another kind of it;
            the two files do not belong together.
    """
    config = read_config(folder / CONFIG, own_options)
    tensors, metadata = _read_weights(folder)
    parts = {
        key: _parts_of(key, folder) for key in tensors if not _is_repeated(key, tensors, known)
    }
    names = names_in_file({where for where, _ in parts.values()}, known)

    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, (where, end) in parts.items():
        name = names[where]
        held = layers.setdefault(name, {}) if end else whole
        if (end or name) in held:
            twice = f"{name}.{end}" if end else name
            raise ValueError(f"{folder / WEIGHTS} holds {shown(twice)} twice, under two prefixes")
        held[end or name] = tensors[key]

    _check_layers(layers, folder / WEIGHTS)
    name = metadata.get(_NAME, "default")
    base, trained = _read_base(metadata, folder), _read_trained(metadata, folder)
    return SavedAdapter(name, config, layers, whole, base, trained)


def read_base(folder: Path) -> Base | None:
    """What the adapter in a folder was trained on; None: the file does not say.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`.
    """
    return _read_base(read_metadata(_weights_of(folder)), folder)


def _read_base(metadata: Mapping[str, str], folder: Path) -> Base | None:
    if (text := metadata.get(_BASE)) is None:
        return None
    try:
        return from_json(text)
    except ValueError as error:
        reason = f"{_BASE} is {shown(text)}, and {error}"
        raise ValueError(f"{folder / WEIGHTS} is damaged: {reason}") from error


def _read_trained(metadata: Mapping[str, str], folder: Path) -> list[str] | None:
    if (text := metadata.get(_TRAINED)) is None:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        names = json.loads(text)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    raise ValueError(
        f"{folder / WEIGHTS} is damaged: {_TRAINED} is {shown(text)}, no list of names"
    )


def _parts_of(key: str, folder: Path) -> tuple[str, str]:
    """(layer, end) of the key of an adapter's tensor, (parameter, "") of any other key."""
    if len(key) > _LONGEST_KEY:
        raise ValueError(f"{folder / WEIGHTS} holds {shown(key)}, a name of {len(key)} characters")
    match = _KEY.fullmatch(key)
    return (match["layer"], match["end"]) if match else (key, "")


def _is_repeated(key: str, tensors: Mapping[str, Tensor], known: Collection[str]) -> bool:
    """Whether this is a bias of a module that PEFT saves whole, which it has written already.

    With bias="all" it writes the bias that was trained twice, and that of the base.
    """
    if key.removeprefix(PEFT_PREFIX) in known:
        return False
    if (base := key.replace(".original_module.", ".")) != key:
        return base in tensors
    tensor = tensors[key]
    # The adapter's name stands there too, but at the end of a key.
    for part in (r"\.modules_to_save\.", r"\.modules_to_save\.[^.]+\."):
        other = tensors.get(re.sub(part, ".", key), tensor)
        if other is not tensor and other.dtype == tensor.dtype and torch.equal(other, tensor):
            return True
    return False


def _weights_of(folder: Path) -> Path:
    """The file with the weights that belong to the config.

    After a kill between the two renames, the new weights are still where they were written.
    """
    path = folder / WEIGHTS
    config_hash = sha256_of_file(config_file(folder))
    if not path.exists() and (folder / _PICKLED).exists():
        raise FileNotFoundError(
            f"{path} does not exist, and {_PICKLED} is a pickle, which can run any code when it is "
            "opened: minilora reads safetensors alone. Where you trust the file, load it with peft "
            "and save it again: PeftModel.from_pretrained(model, folder).save_pretrained(folder)"
        )
    if read_metadata(path).get(_CONFIG_HASH, config_hash) == config_hash:
        return path
    for candidate in unfinished(folder / CONFIG, WEIGHTS):
        # One that is not whole is of another write.
        with contextlib.suppress(OSError, ValueError):
            if read_metadata(candidate).get(_CONFIG_HASH) == config_hash:
                return candidate
    return path


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the weights that belong to the config, and verifies both hashes if they are there."""
    path = _weights_of(folder)
    tensors, metadata = read_tensors(path)
    config_hash = sha256_of_file(folder / CONFIG)

    expected = metadata.get(_TENSORS_HASH)
    if expected is not None and sha256_of_tensors(tensors) != expected:
        raise ValueError(
            f"{path} is damaged: its weights are not those that were saved; copy or save it again"
        )
    if metadata.get(_CONFIG_HASH, config_hash) != config_hash:
        raise ValueError(
            f"{folder / CONFIG} is not the config that {WEIGHTS} was saved with: "
            "restore it, or save the adapter again"
        )
    return tensors, metadata


def _check_layers(layers: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Raises ValueError unless every layer has an A and a B, finite matrices that go together."""
    if not layers:
        raise ValueError(f"{path} is not a LoRA adapter: it has no A and B")

    for layer, tensors in layers.items():
        at = f"{path} is not a LoRA adapter"
        if _A not in tensors or _B not in tensors:
            found = shown(" and ".join(tensors))
            raise ValueError(f"{at}: for {shown(layer)} it has {found}, not {_A} and {_B}")
        for end, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{at}: {shown(end)} of {shown(layer)} holds {tensor.dtype}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{path}: {shown(end)} of {shown(layer)} holds NaN or infinity")
        shapes = [list(tensors[end].shape) for end in (_A, _B)]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"{at}: for {shown(layer)} it has A {shapes[0]} and B {shapes[1]}")
