"""load_base: the model under an adapter, dense or in 4 bits, as a run or a command needs it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder
from minilora.huggingface.loading import best_dtype, load_dense, named_errors
from minilora.huggingface.model_folder import is_4bit, read_config
from minilora.huggingface.pretrained import read_pretrained

# What a model consists of on the hub: no code, and no weights that are pickled.
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]


def stored_in_4bit(source: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Whether a model's weights are stored in bitsandbytes' 4 bits; only its config is read.

    Args:
        source, trust_remote_code: as for `load_dense`.

    Raises:
        ValueError: see `read_config`.
    """
    path = bundled_model_folder() if str(source) == DEMO_MODEL else source
    return is_4bit(read_config(path, trust_remote_code, allow_4bit=True))


def local_folder(source: str | Path) -> Path:
    """The folder of a model on this machine; the files of a hub id are downloaded first.

    Args:
        source: a folder, a hub id, or "smollm2", the bundled demo model.

    Raises:
        ValueError: they could not be downloaded.
    """
    if str(source) == DEMO_MODEL:
        return bundled_model_folder()
    if Path(source).is_dir():
        return Path(source)

    from huggingface_hub import snapshot_download

    with named_errors(source):
        return Path(snapshot_download(str(source), allow_patterns=_FILES))


def check_not_4bit(source: str | Path, stored: bool) -> None:
    """Raises ValueError if a model that has to be a dense base is stored in 4 bits."""
    if stored:
        raise ValueError(
            f"{source} is stored in 4 bits and cannot be a dense base: leave out quantize=False "
            "(--no-quantize), or give the model that it was made from"
        )


def load_base(
    source: str | Path,
    *,
    quantize: Mapping[str, Any] | None,
    dense: bool = False,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Returns (model, tokenizer) of a causal language model, dense or in 4 bits.

    A dense model that is to be quantized is quantized layer by layer as it is read, so that the
    memory never holds more than one dense weight beside those that stay dense. The bits are those
    of `load_dense` and then `minilora.quantize`. A model that is stored in 4 bits, by bitsandbytes
    or `save_quantized`, is taken as it is.

    Args:
        source: a folder, a hub id, or "smollm2", the bundled demo model.
        quantize: options of `minilora.NF4Config`; None: as it is stored.
        dense: refuse a model that is stored in 4 bits.
        device: where the model is; None: the CPU. Its dtype is `best_dtype` of the device, that of
            the products in a stored 4-bit model is the one that its config names.
        trust_remote_code: as for `load_dense`.

    Raises:
        ValueError: see `load_dense` and `minilora.load`; or the source has no tokenizer, or is
            stored in 4 bits and has to be dense.
    """
    device = device or torch.device("cpu")
    stored = stored_in_4bit(source, trust_remote_code=trust_remote_code)
    if dense:
        check_not_4bit(source, stored)
    if quantize is None and not stored:
        return load_dense(source, device=device, trust_remote_code=trust_remote_code)

    from minilora.huggingface.quantizer import NF4Config

    model, tokenizer = read_pretrained(
        source,
        quantization_config=None if stored else NF4Config(**(quantize or {})),
        dtype=best_dtype(device),
        compute_dtype=None,
        # Another device than the CPU needs accelerate.
        device=None if device.type == "cpu" else device,
        trust_remote_code=trust_remote_code,
        causal=True,
    )
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: copy that of the model it was made from")
    return model, tokenizer
