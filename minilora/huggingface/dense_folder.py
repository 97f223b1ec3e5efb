"""Quantizing a dense folder into a folder in 4 bits, without the model in memory.

`minilora.load` with an `NF4Config` quantizes as it reads too, but holds the whole model in the end.
Here a layer is read and quantized, and is written with the others of its file. So a model that fits
no single process can be prepared for `load_sharded`.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.checks import check_can_be_quantized
from minilora.files.atomic import atomic_folder, write_text
from minilora.files.bitsandbytes import to_tensors
from minilora.files.tensors import write_tensors
from minilora.huggingface.checkpoint_files import opened_file
from minilora.huggingface.loading import empty_model, load_config, named_errors, read_tokenizer
from minilora.huggingface.model_folder import check_weights, read_config
from minilora.huggingface.pretrained import has_tokenizer
from minilora.huggingface.quantized_folder import empty_layer, quantization_config_of
from minilora.huggingface.sharded_folder import names_in_model
from minilora.layers import become
from minilora.nf4 import check_values, quantize_nf4
from minilora.targets import kept_in_float32, select_layers

_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"


def quantize_folder(
    source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None
) -> Path:
    """Writes a dense causal language model as a folder in 4 bits, file by file.

    The folder has the tensors, bit for bit, of `minilora.load` with a `minilora.NF4Config()` and
    this dtype, followed by `minilora.save_quantized`, in as many files as the dense one.

    Args:
        source: a folder of safetensors files.
        target: the folder to write; it must not exist.
        dtype: as for `minilora.load`; weights are cast to it before they are quantized.

    Returns:
        The new folder.

    Raises:
        ValueError: transformers cannot load a causal language model from the source, or would
            convert its tensors; a weight cannot be quantized; the target exists.
        OSError: the target cannot be written.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=64))
        >>> model.save_pretrained(tmp / "dense")
        >>> folder = quantize_folder(tmp / "dense", tmp / "quantized")
        >>> type(minilora.load(folder)[0].model.layers[0].mlp.up_proj).__name__
        'NF4Linear'
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists: choose another folder, or remove it")
    with ExitStack() as opened:
        with named_errors(source):
            read_config(source)
            files = {
                path.name: opened.enter_context(opened_file(path)) for path in check_weights(source)
            }
            keys = [key for file in files.values() for key in file.keys()]  # noqa: SIM118
            model = _empty(source, dtype)
            names = names_in_model(model, keys, ())
            chosen = _chosen_layers(model)
            tokenizer = read_tokenizer(source, False) if has_tokenizer(source) else None

        with atomic_folder(target) as temporary:
            written = {}
            dtypes = {name: t.dtype for name, t in model.state_dict().items()}
            for name, file in files.items():
                tensors: dict[str, Tensor] = {}
                for key in file.keys():  # noqa: SIM118
                    own = names[key]
                    with named_errors(source):
                        value = file.get_tensor(key).to(dtypes[own])
                        layer = own.removesuffix(".weight")
                        tensors |= _quantized(key, value) if layer in chosen else {key: value}
                write_tensors(temporary / name, tensors, {})
                written[name] = {key: t.nbytes for key, t in tensors.items()}
            if len(files) > 1:
                write_text(temporary / _INDEX, _index(written))
            _write_config(model, chosen, temporary)
            if (source / _GENERATION).is_file():
                shutil.copyfile(source / _GENERATION, temporary / _GENERATION)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    return target


def _chosen_layers(model: Any) -> dict[str, Any]:
    """The linear layers that are quantized: what `from_pretrained` with an NF4Config would take."""
    from minilora.huggingface.quantizer import tied_layers

    shared, embeddings = tied_layers(model)
    chosen = select_layers(model, "all-linear", (), embeddings | kept_in_float32(model))
    check_can_be_quantized(model, chosen)
    if tied := [name for name in chosen if name in shared]:
        raise ValueError(f"{tied[0]} shares its weight with another layer and would be untied")
    return chosen


def _quantized(key: str, dense: Tensor) -> dict[str, Tensor]:
    check_values(dense, True, key)
    return to_tensors(key.removesuffix(".weight"), quantize_nf4(dense))


def _index(written: dict[str, dict[str, int]]) -> str:
    """Which file each tensor is in, as transformers writes it."""
    total = sum(sum(sizes.values()) for sizes in written.values())
    places = {key: name for name, sizes in written.items() for key in sizes}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)


def _write_config(model: Any, chosen: dict[str, Any], folder: Path) -> None:
    for layer in chosen.values():
        become(layer, empty_layer(layer, "nf4", double_quant=True))
    model.config.quantization_config = quantization_config_of(model)
    model.config.save_pretrained(folder)


def _empty(source: Path, dtype: torch.dtype | None) -> Any:
    config = load_config(source)
    if dtype is not None:
        config.dtype = dtype
    return empty_model(config)
