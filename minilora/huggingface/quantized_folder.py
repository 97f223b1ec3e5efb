"""A quantized transformers model as a folder in bitsandbytes' layout.

It is the folder that transformers itself writes for a model loaded with `load_in_4bit=True`, so
whatever reads those reads it: `minilora.load`, transformers with bitsandbytes, vLLM. Not a layout
of our own: transformers takes a folder with an unknown `quant_method` for a dense model, finds none
of its weights, and leaves random ones with a line in the log.

transformers writes the files (shards, tied weights, generation config). What is added here is the
names of bitsandbytes' tensors, the entry `quantization_config` of config.json, and two checks:
before, that transformers would read the same layers as 4-bit ones; after, that every 4-bit weight
is in the files, before the folder is put in its place.
"""

import copy
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora import ops
from minilora.files.atomic import atomic_folder
from minilora.files.bitsandbytes import from_tensors, quantized_layers, to_tensors
from minilora.files.tensors import read_tensors
from minilora.layers import NF4Linear
from minilora.nf4 import PARTS, NF4Weight
from minilora.targets import adapter_names, linear_layers

# The state of an NF4Linear that a 4-bit weight is made of.
_OWN_KEYS = (*PARTS, "nf4_layout")

# What a weights file of an earlier save is called.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

# bitsandbytes multiplies in no other.
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save_quantized(
    model: nn.Module, path: str | Path, *, max_shard_size: int | str = "5GB"
) -> Path:
    """Writes a quantized transformers model as a folder in bitsandbytes' 4-bit layout.

    `minilora.load` reads it, and so does transformers with bitsandbytes:
    `AutoModelForCausalLM.from_pretrained(path)`. Weights keep their bits, NF4 or FP4. Layers that
    are dense stay dense, the head or layers that an adapter was merged into. The dtype that 4-bit
    layers multiply in is theirs (`compute_dtype`) or else the model's, and is written down too.

    The folder is either complete or as it was. If it exists, the model in it is replaced, and other
    files, such as a tokenizer's, stay.

    Args:
        model: a transformers model with layers quantized by `minilora.quantize`, and no adapters.
        path: the folder.
        max_shard_size: larger models are split into files of at most this size, in bytes or as
            "5GB".

    Returns:
        The folder.

    Raises:
        TypeError: it is not a transformers model.
        ValueError: the model has adapters, or no quantized layer; bitsandbytes or transformers
            could not read a layer (which is named); the folder is the current one.
        OSError: the disk is full or the folder cannot be written to.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=64))
        >>> folder = save_quantized(minilora.quantize(model), tmp / "quantized")
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    from safetensors import SafetensorError

    layers = _layers_to_save(model)
    state, config = state_dict_of(model), quantization_config_of(model)
    folder = _target(path)
    try:
        with atomic_folder(folder) as temporary:
            # A method of its own on the model may refuse: this one knows what to write.
            cls: Any = type(model)
            with _quantization_config(model, config):
                cls.save_pretrained(
                    model, temporary, state_dict=state, max_shard_size=max_shard_size
                )
            _check_files(temporary, layers)
            _keep_other_files(folder, temporary)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    return Path(path)


def state_dict_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, with 4-bit weights as bitsandbytes' tensors. Nothing is copied.

    Raises:
        ValueError: bitsandbytes has no such weight; the message names the layer.
    """
    layers = dict(_quantized(model))
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        layer, _, part = key.rpartition(".")
        if layer not in layers or part not in _OWN_KEYS:
            state[key] = tensor
        elif part == PARTS[0]:
            state |= to_tensors(layer, layers[layer].weight)
    return state


def quantization_config_of(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of config.json, with which transformers loads the same layers.

    Every 4-bit layer's file says for itself how it was quantized. What stands here is the format of
    most of them, the dtype that all multiply in, and the linear layers that are dense.

    Raises:
        ValueError: no config of bitsandbytes' describes the model, or nothing is quantized.
    """
    layers = dict(_quantized(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer to describe")
    formats = Counter((m.quant_type, m.absmax2 is not None) for m in layers.values())
    (quant_type, double_quant), _ = formats.most_common(1)[0]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": _compute_dtype(model, layers),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _dense_layers(model, layers),
    }


def quantize_empty(model: Any, config: Mapping[str, Any]) -> None:
    """Puts 4-bit layers without values where a `quantization_config` says that the files have them.

    Their bytes are those of the files, with blocks of 64 weights: bitsandbytes' default, of which
    the config says nothing.

    Args:
        model: a transformers model on the meta device.
        config: what `quantization_config_of` returns, or transformers with bitsandbytes writes.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = HfQuantizer.get_modules_to_not_convert(
        model, config.get("llm_int8_skip_modules"), model._keep_in_fp32_modules
    )
    quant_type = config.get("bnb_4bit_quant_type", "fp4")
    for name, layer in linear_layers(model).items():
        if not should_convert_module(name, skipped):
            continue
        double_quant = bool(config.get("bnb_4bit_use_double_quant"))
        model.set_submodule(name, empty_layer(layer, quant_type, double_quant))


def empty_layer(layer: Any, quant_type: str, double_quant: bool) -> NF4Linear:
    """What a linear layer on the meta device is in 4 bits, without values too."""
    dense = layer.weight
    packed, absmax = ops.quantize(dense, 64, quant_type)
    constants: tuple[Any, Any, Any] = absmax, None, None
    if double_quant:
        constants = ops.double_quantize(absmax)
    weight = NF4Weight(packed, *constants, dense.shape, dense.dtype, 64, quant_type)
    return NF4Linear(weight, layer.bias)


def _quantized(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, NF4Linear))


def _layers_to_save(model: nn.Module) -> dict[str, NF4Linear]:
    """The 4-bit layers by name. Raises TypeError or ValueError unless the model can be saved."""
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{kind} is not a transformers model and has no config.json: save its state_dict() "
            "with safetensors.torch.save_file and load it with load_state_dict; of a wrapper, pass "
            "the model inside"
        )
    if names := adapter_names(model):
        raise ValueError(
            f"{kind} has adapters ({', '.join(map(repr, names))}), for which bitsandbytes' layout "
            "has no place: save them with minilora.save_adapter and the model before inject or "
            "after minilora.eject, or merge them first"
        )

    layers = dict(_quantized(model))
    if not layers:
        raise ValueError(
            f"{kind} has no quantized layer: minilora.quantize(model) first, or save it dense with "
            "model.save_pretrained"
        )
    every = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, NF4Linear)]
    if twice := sorted(set(every) - layers.keys()):
        raise ValueError(
            f"{twice[0]} is a quantized layer that the model has under another name as well, which "
            "bitsandbytes cannot load: leave it out with minilora.quantize(..., exclude=)"
        )
    return layers


def _compute_dtype(model: Any, layers: Mapping[str, NF4Linear]) -> str:
    """The one dtype that all 4-bit layers multiply in."""
    found: dict[torch.dtype, str] = {}
    for name, layer in layers.items():
        found.setdefault(layer.compute_dtype or model.dtype, name)

    described = " and ".join(f"{dtype} ({name})" for dtype, name in found.items())
    if len(found) > 1:
        raise ValueError(
            f"4-bit layers multiply in {described}, and config.json states one dtype for all: "
            "give them one compute_dtype"
        )
    dtype = next(iter(found))
    if dtype not in _COMPUTE_DTYPES:
        raise ValueError(f"4-bit layers multiply in {described}, which bitsandbytes cannot do")
    return str(dtype).removeprefix("torch.")


def _dense_layers(model: nn.Module, layers: Mapping[str, NF4Linear]) -> list[str]:
    """The dense layers among those that transformers replaces by 4-bit ones unless it is told.

    It reads a name as a pattern that also means the layers below it and those of the same ending; a
    name that would mean a 4-bit layer too is written as a regular expression for itself alone.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    def is_skipped(name: str, patterns: list[str]) -> bool:
        return not should_convert_module(name, patterns)

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    if unreadable := [name for name in layers if is_skipped(name, kept)]:
        raise ValueError(
            f"transformers always reads {unreadable[0]} as a dense layer in float32: leave it out "
            "with minilora.quantize(..., exclude=)"
        )
    dense = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    return [
        f"^{re.escape(name)}$" if any(is_skipped(layer, [name]) for layer in layers) else name
        for name in dense
    ]


def _target(path: str | Path) -> Path:
    """The folder to write. Raises ValueError if replacing it would take the current folder away."""
    folder = Path(path).resolve()
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{path} is the current folder, or holds it: choose another")
    return folder


@contextmanager
def _quantization_config(model: Any, quantization_config: dict[str, Any]) -> Iterator[None]:
    """Inside the block the model has a config with this entry; saving may change that one only."""
    original = model.config
    model.config = copy.deepcopy(original)
    model.config.quantization_config = quantization_config
    try:
        yield
    finally:
        model.config = original


def _check_files(folder: Path, layers: Mapping[str, NF4Linear]) -> None:
    """Raises ValueError unless the files hold all 4-bit weights.

    transformers renames, splits and joins weights of some models as it writes them.
    """
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        # A layer's tensors may be in two of them.
        tensors |= read_tensors(file)[0]
    written = (from_tensors(name, tensors) for name in quantized_layers(tensors))
    shapes = Counter(weight.shape for weight in written)

    expected = Counter(layer.weight.shape for layer in layers.values())
    if shapes != expected:
        missing = next(iter(expected - shapes), None)
        raise ValueError(
            f"transformers wrote {shapes.total()} of {len(layers)} 4-bit weights as such (of shape "
            f"{missing} not all): this model's files have other layers than the model"
        )


def _keep_other_files(old: Path, new: Path) -> None:
    """Links, or copies, what a folder holds besides a model into the one that will replace it."""
    for path in old.iterdir() if old.is_dir() else ():
        target = new / path.name
        if target.exists() or _WEIGHTS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(path, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        # Not every file system has hard links.
        shutil.copy2(source, target, follow_symlinks=False)
