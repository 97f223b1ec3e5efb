"""Loading a folder into shards: no process ever holds the whole model.

The model is made on the meta device, gets its 4-bit layers and adapters there, and is sharded.
Then each process reads its own rows of every tensor: the files are memory-mapped, and all but those
rows stay on the disk. So a dense model that is to be quantized is quantized into a folder before
(`quantize_folder`): a row of an NF4 weight is no row of the dense one.

transformers shards as it loads, too (`DistributedConfig`), by a plan that the model's config has to
contain, and has no place for the parts of a 4-bit weight.
"""

import copy
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minilora.distributed import all_processes, load_shards, local_parts, shard
from minilora.files.bitsandbytes import from_tensors, quantized_layers
from minilora.files.collective import together
from minilora.huggingface.checkpoint_files import check_all_finite, drop_pages, opened_file
from minilora.huggingface.heap import return_freed_memory
from minilora.huggingface.loading import (
    empty_model,
    load_config,
    named_errors,
    read_tokenizer,
    recorded_name,
)
from minilora.huggingface.model_folder import check_weights, is_4bit
from minilora.huggingface.pretrained import has_tokenizer
from minilora.layers import NF4Linear, become
from minilora.lora import LoRA
from minilora.nf4 import NF4Weight
from minilora.surgery import inject

# Bytes of tensors after which the pages of the files are let go.
_DROP_EVERY = 64 << 20


def load_sharded(
    folder: str | Path,
    mesh: DeviceMesh | None = None,
    *,
    adapter: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    gathered_dtype: torch.dtype | None = None,
) -> tuple[nn.Module, Any]:
    """Returns (model, tokenizer): a causal language model, sharded as it is loaded.

    Every process calls it. Each reads from the folder what it will hold, so the processes need no
    more memory together than one that loads the whole model. Adapters have to be injected before a
    model is sharded, which is why it is done here; they start as on one device.

    Args:
        folder: a model in 4 bits, written by `minilora.save_quantized`, `quantize_folder`, or
            transformers with bitsandbytes; or a dense one, which stays dense.
        mesh: as for `minilora.distributed.shard`.
        adapter: options of `minilora.inject`, {} for its defaults. Default: no adapter.
        dtype, compute_dtype: as for `minilora.load`.
        gathered_dtype: the `dtype` of `minilora.distributed.shard`, of mixed precision.

    Returns:
        The model, frozen but for its adapters, in eval mode; and its tokenizer, None if the folder
        has none.

    Raises:
        ValueError: what `minilora.load`, `inject` and `shard` raise; the model has other tensors
            than its files, which transformers would convert. If one process fails, all do; the
            message names it.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=64))
        >>> folder = minilora.save_quantized(minilora.quantize(model), tmp / "quantized")
        >>> model, tokenizer = load_sharded(folder, adapter={"r": 4})
        >>> type(model.model.layers[0].mlp.up_proj.packed).__name__
        'DTensor'
        >>> dist.destroy_process_group()
    """
    mesh = mesh or all_processes()
    with ExitStack() as files:
        with together(mesh), named_errors(folder):
            paths = check_weights(Path(folder))
            stored = _opened_tensors(paths, files)
            model, names = _empty(Path(folder), stored, dtype, compute_dtype)
            adapters = _inject(model, adapter)
            _compute_buffers(model)
        shard(model, mesh, dtype=gathered_dtype)
        with together(mesh), named_errors(folder):
            load_shards(model, _tensors(stored, names, adapters, paths))
            check_all_finite(local_parts(model))
            tokenizer = read_tokenizer(folder, False) if has_tokenizer(folder) else None
    return_freed_memory()
    config: Any = model.config
    config._name_or_path = recorded_name(folder)
    return model, tokenizer


def _opened_tensors(paths: Iterable[Path], files: ExitStack) -> dict[str, Any]:
    """The opened file of each stored tensor, by the tensor's name."""
    opened = [files.enter_context(opened_file(path)) for path in paths]
    return {key: file for file in opened for key in file.keys()}  # noqa: SIM118


def _empty(
    folder: Path,
    stored: Mapping[str, Any],
    dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
) -> tuple[nn.Module, dict[str, str]]:
    """The model on the meta device, and the stored name of each dense tensor and 4-bit weight."""
    config = load_config(folder, allow_4bit=True)
    if is_4bit(config.to_dict()):
        named = config.quantization_config.get("bnb_4bit_compute_dtype") or "float32"
        compute_dtype = compute_dtype or getattr(torch, named)
        del config.quantization_config
    if dtype is not None:
        config.dtype = dtype
    model: Any = empty_model(config)
    model.eval()

    layers = quantized_layers(stored)
    names = names_in_model(model, stored, layers)
    # As transformers casts it: what a model keeps in float32 whatever its dtype.
    plan: Any = model._get_dtype_plan(model.dtype)
    kept = [pattern for pattern, kind in plan.items() if kind == torch.float32]
    for name, p in model.named_parameters():
        if p.is_floating_point() and any(re.search(pattern, name) for pattern in kept):
            p.data = p.data.float()

    for layer in sorted(layers):
        weight = _read_weight(layer, stored)
        name = names[f"{layer}.weight"].removesuffix(".weight")
        linear: Any = model.get_submodule(name)
        if not isinstance(linear, nn.Linear) or linear.weight.shape != weight.shape:
            raise ValueError(f"{name} is no linear layer of shape {tuple(weight.shape)}")
        become(linear, NF4Linear(weight.to("meta"), None, compute_dtype))
    return model, names


def names_in_model(model: Any, stored: Iterable[str], layers: Collection[str]) -> dict[str, str]:
    """Stored name -> the model's, of all tensors but the parts of 4-bit weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    parts = {f"{layer}.weight." for layer in layers}

    names = {}
    for key in stored:
        if f"{key.partition('.weight.')[0]}.weight." in parts:
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if pattern is not None:
            raise ValueError(
                f"transformers converts {key} as it loads, which cannot be done in shards: load "
                "the whole model, with minilora.load or without --shard"
            )
        if name not in own:
            raise ValueError(f"the model ({type(model).__name__}) has no place for {key}")
        names[key] = name
    return names


def _read_weight(layer: str, stored: Mapping[str, Any]) -> NF4Weight:
    """A 4-bit weight in the memory-mapped file."""
    weight = f"{layer}.weight"
    keys = [key for key in stored if key == weight or key.startswith(f"{weight}.")]
    return from_tensors(layer, {key: stored[key].get_tensor(key) for key in keys})


def _inject(model: nn.Module, options: Mapping[str, Any] | None) -> dict[str, LoRA]:
    """Injects adapters on the meta device; returns copies of them by their names in the model."""
    model.requires_grad_(False)
    if options is None:
        return {}
    if options.get("train_also"):
        raise ValueError("train_also: a model that is loaded in shards trains adapters alone")
    inject(model, **options)
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    return {name: copy.deepcopy(adapter) for name, adapter in found.items()}


def _compute_buffers(model: Any) -> None:
    """Gives the buffers values that no file holds, such as the frequencies of rotary positions."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for p in model.parameters():
        # transformers initializes no others.
        p._is_hf_initialized = True
    model.initialize_weights()


def _tensors(
    stored: Mapping[str, Any],
    names: Mapping[str, str],
    adapters: Mapping[str, LoRA],
    paths: Iterable[Path],
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and whole value; those of files are memory-mapped."""
    files = {os.path.realpath(path) for path in paths}
    held = 0
    layers = quantized_layers(stored)
    for key, name in names.items():
        layer = key.removesuffix(".weight")
        if layer in layers:
            weight = NF4Linear(_read_weight(layer, stored))
            prefix = name.removesuffix("weight")
            yield from ((prefix + part, p.data) for part, p in weight.named_parameters())
            held += weight.packed.nbytes
        else:
            dense = stored[key].get_tensor(key)
            yield name, dense
            held += dense.nbytes
        if held >= _DROP_EVERY:
            drop_pages(files)
            held = 0

    for path, empty in adapters.items():
        drawn = empty.to_empty(device="cpu")
        drawn.reset_parameters()
        yield from ((f"{path}.{name}", p.data) for name, p in drawn.named_parameters())
