"""What the tests of adapters on disk share: the files' names, their contents, small models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minilora
from minilora.files.adapter_folder import WEIGHTS
from minilora.files.peft_config import CONFIG
from minilora.files.tensors import read_tensors
from minilora.lora import LoRA
from minilora.surgery import attach
from minilora.targets import adapted_layers, linear_layers


def contents(folder: Path) -> tuple[bytes, dict[str, str], dict[str, Tensor]]:
    """Config, metadata and tensors."""
    tensors, metadata = read_tensors(folder / WEIGHTS)
    return (folder / CONFIG).read_bytes(), metadata, tensors


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, LoRA]:
    """The adapters of that name by layer."""
    layers: dict[str, Any] = dict(adapted_layers(model, name))
    return {path: layer.adapters[name] for path, layer in layers.items()}


def attach_sizes(model: nn.Module, sizes: Mapping[str, tuple[int, float]]) -> nn.Module:
    """Adds adapters of different sizes: {layer: (r, alpha)}."""
    layers = linear_layers(model)
    return attach(
        model,
        {path: LoRA.for_layer(layers[path], r, alpha=alpha) for path, (r, alpha) in sizes.items()},
    )


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """What training leaves: every trainable parameter has another value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def nested() -> nn.ModuleDict:
    """Layers whose names are ends of one another: "up", "a.up", "a.a.up"."""
    deep = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    middle = nn.ModuleDict({"a": deep, "up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    return nn.ModuleDict({"a": middle, "up": nn.Linear(8, 8)})
