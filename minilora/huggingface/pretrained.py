"""load: any transformers model and its tokenizer, dense or in bitsandbytes' 4 bits."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder
from minilora.huggingface.checkpoint_files import check_finite
from minilora.huggingface.loading import (
    named_errors,
    pick_device,
    read_model,
    read_tokenizer,
    recorded_name,
    try_out,
)
from minilora.huggingface.model_folder import (
    check_architecture,
    check_weights,
    is_4bit,
    read_config,
)

# Files of which a tokenizer has at least one.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "spiece*")

_CLASS_NAME = re.compile(r"[A-Z]\w*", re.ASCII)
_CAUSAL = re.compile(r"\w+(ForCausalLM|LMHeadModel)", re.ASCII)


def load(
    path_or_id: str | Path,
    *,
    quantization_config: Any = None,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Returns (model, tokenizer): a transformers model that is dense, or in 4 bits, or becomes so.

    The model is of the class that its config names. One in 4 bits was made by bitsandbytes or
    `minilora.save_quantized`, NF4 or FP4, double-quantized or not; its bytes are taken as they are,
    without bitsandbytes.

    Weights are read from safetensors files alone, layer by layer, and none is made up: the files
    have to hold exactly the tensors that the model's config needs. No code of the model's is run
    unless `trust_remote_code` allows it.

    Args:
        path_or_id: a folder, a hub id, or "smollm2", the bundled demo model.
        quantization_config: a `minilora.NF4Config`: quantize a dense model while it is read.
        dtype: of what is not in 4 bits. Default: the one that the model was saved in.
        compute_dtype: of the products of a model that is in 4 bits already. Default: the one that
            its config names, and float32 if it names none, as in transformers.
        device: where the layers are read to, and quantized. Default: the CPU.
        trust_remote_code: as for `load_dense`.

    Returns:
        The model in eval mode, as transformers loads it, and its tokenizer: None if the folder has
        none.

    Raises:
        ValueError: the model is quantized in another way, or needs code that is not allowed; a file
            is missing, damaged or pickled; its weights do not fit its config or are not finite; a
            layer in 4 bits is not what bitsandbytes writes; a dense weight cannot be quantized.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=64))
        >>> folder = minilora.save_quantized(minilora.quantize(model), tmp / "quantized")
        >>> model, tokenizer = minilora.load(folder)
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'NF4Linear'
    """
    return read_pretrained(
        path_or_id,
        quantization_config=quantization_config,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        causal=False,
    )


def read_pretrained(
    path_or_id: str | Path,
    *,
    quantization_config: Any,
    dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
    device: torch.device | str | None,
    trust_remote_code: bool,
    causal: bool,
) -> tuple[nn.Module, Any]:
    """`load`, of a causal language model if `causal` is set, whatever class the config names."""
    path = bundled_model_folder() if str(path_or_id) == DEMO_MODEL else path_or_id
    contents = read_config(path, trust_remote_code, allow_4bit=True, causal=causal)
    stored = contents["quantization_config"] if is_4bit(contents) else None
    if stored is not None and quantization_config is not None:
        raise ValueError(
            f"{path_or_id} is in 4 bits already: leave out quantization_config (compute_dtype sets "
            "the dtype of its products)"
        )
    if stored is None and compute_dtype is not None:
        raise ValueError(
            f"compute_dtype is for a model in 4 bits, which {path_or_id} is not: give "
            "quantization_config=minilora.NF4Config(compute_dtype=...) to quantize it"
        )

    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if device is not None:
        options["device_map"] = {"": pick_device(str(device))}

    with named_errors(path_or_id, " as a causal language model" if causal else ""):
        cls, config = _described(path, contents, trust_remote_code, causal)
        if Path(path).is_dir():
            check_weights(Path(path))
        if stored is not None:
            named = compute_dtype or stored.get("bnb_4bit_compute_dtype") or "float32"
            options["config"] = _read_by_us(config, named)

        tokenizer = read_tokenizer(path, trust_remote_code) if has_tokenizer(path) else None
        model = read_model(cls, path, **options)
        check_finite(model)
        if causal or _CAUSAL.fullmatch(type(model).__name__):
            try_out(model)
    model.config._name_or_path = recorded_name(path_or_id)
    return model, tokenizer


def _described(
    path: str | Path, contents: Mapping[str, Any], trust_remote_code: bool, causal: bool
) -> tuple[Any, Any]:
    """The class that reads a model, and its config. Raises unless they make a model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cls = AutoModelForCausalLM if causal else _model_class(contents)
    trust = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, **trust)
    # Without memory: the weights may be another model's.
    with torch.device("meta"):
        model = cls.from_config(config, **trust) if hasattr(cls, "from_config") else cls(config)
    check_architecture(contents, model)
    return cls, config


def _model_class(contents: Mapping[str, Any]) -> Any:
    """The class of transformers' that a config names; by default, a causal language model's."""
    import transformers

    names = contents.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if "auto_map" in contents or _CAUSAL.fullmatch(name) or not _CLASS_NAME.fullmatch(name):
        return transformers.AutoModelForCausalLM

    found: Any = getattr(transformers, name, None)
    base: Any = transformers.PreTrainedModel
    if not inspect.isclass(found) or not issubclass(found, base):
        raise ValueError(f"its config.json names {name}, which transformers has no model of")
    named: Any = found
    if named.config_class.model_type != contents.get("model_type"):
        raise ValueError(f"its config.json names {name}, which is no {contents.get('model_type')}")
    return named


def _read_by_us(config: Any, compute_dtype: Any) -> Any:
    """A config that makes transformers read a folder in 4 bits with our quantizer."""
    from minilora.huggingface.quantizer import METHOD

    config.quantization_config = {"quant_method": METHOD, "compute_dtype": compute_dtype}
    return config


def has_tokenizer(path: str | Path) -> bool:
    folder = Path(path)
    return not folder.is_dir() or any(any(folder.glob(name)) for name in _TOKENIZER_FILES)
