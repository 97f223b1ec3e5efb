"""The two files of an adapter, written and read without looking at a model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.files.atomic import atomic_files, partial_path
from minilora.files.hashing import sha256_of_file, sha256_of_tensors
from minilora.files.names import PEFT_PREFIX, canonical_name
from minilora.files.peft_config import CONFIG, read_config
from minilora.files.tensors import read_tensors, write_tensors

WEIGHTS = "adapter_model.safetensors"

# The metadata of the weights. PEFT's files have none of it and are read without.
_CONFIG_HASH = "adapter_config_sha256"
_TENSORS_HASH = "tensors_sha256"
_NAME = "minilora_name"

# A key of PEFT's: the layer, and which of its adapter's tensors this is.
_KEY = re.compile(r"(?P<layer>.+)\.(?P<end>lora_\w+(\.\w+)?)")
_A, _B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class SavedAdapter:
    """The contents of an adapter's folder.

    Attributes:
        name: the name that the adapter was saved under; "default" in files of PEFT's.
        config: adapter_config.json.
        layers: layer name -> end of PEFT's key -> tensor.
        whole: parameter name -> tensor, of parameters that were trained as a whole.
    """

    name: str
    config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]]
    whole: Mapping[str, Tensor]

    def rank(self, layer: str) -> int:
        """The rank of a layer's adapter."""
        return self.layers[layer][_A].shape[0]

    def changes_something(self) -> bool:
        """Whether any B is other than zero."""
        return any(bool(tensors[_B].any()) for tensors in self.layers.values())


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
        config_file.write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
        metadata = {
            _CONFIG_HASH: sha256_of_file(config_file),
            _TENSORS_HASH: sha256_of_tensors(tensors),
            _NAME: adapter.name,
        }
        write_tensors(weights_file, tensors, metadata)


def read_adapter(folder: Path, own_options: Mapping[str, Any]) -> SavedAdapter:
    """Reads both files and checks them without a model.

    Args:
        folder: the folder.
        own_options: what an adapter of the expected class says of itself (see `read_config`).

    Raises:
        FileNotFoundError: one of the two files does not exist.
        ValueError: a file is damaged, is not of a LoRA adapter, or asks for another kind of it;
            the two files do not belong together.
    """
    config = read_config(folder / CONFIG, own_options)
    tensors, metadata = _read_weights(folder)

    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = canonical_name(key)
        if match := _KEY.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["end"]] = tensor
        else:
            # PEFT saves a copy of an embedding that has an adapter.
            whole[name.replace(".base_layer.", ".")] = tensor

    _check_tensors(layers, folder / WEIGHTS)
    return SavedAdapter(metadata.get(_NAME, "default"), config, layers, whole)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the weights that belong to the config, and verifies both hashes if they are there."""
    path = folder / WEIGHTS
    tensors, metadata = read_tensors(path)
    config_hash = sha256_of_file(folder / CONFIG)

    # After a kill between the two renames, the new weights still have their temporary name.
    unfinished = partial_path(path)
    if metadata.get(_CONFIG_HASH, config_hash) != config_hash and unfinished.is_file():
        tensors, metadata = read_tensors(unfinished)

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


def _check_tensors(layers: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Raises ValueError unless every layer has an A and a B, and floating-point tensors alone."""
    if not layers:
        raise ValueError(f"{path} is not a LoRA adapter: it has no A and B")

    for layer, tensors in layers.items():
        if _A not in tensors or _B not in tensors:
            found = " and ".join(tensors)
            raise ValueError(
                f"{path} is not a LoRA adapter: for {layer} it has {found}, not {_A} and {_B}"
            )
        for end, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{path} is not a LoRA adapter: {end} of {layer} holds {tensor.dtype}"
                )
