"""Loading a dense causal language model and its tokenizer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder
from minilora.huggingface.checkpoint_files import check_dense, stored_dtypes
from minilora.huggingface.heap import return_freed_memory
from minilora.huggingface.messages import one_line
from minilora.huggingface.model_folder import (
    CONFIG,
    check_architecture,
    check_weights,
    has_weights,
    is_4bit,
    read_config,
)
from minilora.huggingface.quantized_folder import quantize_empty


def best_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 if the device multiplies it in hardware, float32 otherwise.

    Emulated bfloat16 is slower than float32.
    """
    if device.type != "cpu":
        return torch.bfloat16

    can = torch.cpu.get_capabilities()
    in_hardware = any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if in_hardware else torch.float32


def pick_device(name: str | None) -> torch.device:
    """Returns the device of that name; None: the GPU if available, otherwise the CPU.

    Raises:
        ValueError: this machine, or this PyTorch, has no such device; the message says which it
            has.
    """
    available = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if available else "cpu")

    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()) if available)]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name in here or (name == "cuda" and available):
        return torch.device(name)

    if name.startswith("cuda") and not available:
        raise ValueError(
            f"device={one_line(name, 40)!r}: this PyTorch ({torch.__version__}) sees no GPU; "
            "leave device out to run on the CPU"
        )
    raise ValueError(f"device={one_line(name, 40)!r}: this machine has {', '.join(here)}")


def load_dense(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Returns (model, tokenizer) of a causal language model.

    Weights are read from safetensors files alone, and no code of the model's is run unless
    `trust_remote_code` allows it.

    Args:
        source: a folder, a hub id, or "smollm2", the bundled demo model.
        dtype: of the weights; None: see `best_dtype`.
        device: where the model is moved to; None: the CPU.
        trust_remote_code: run the Python files that come with the model. They can do anything that
            you can.

    Raises:
        ValueError: transformers cannot load a causal language model from the source; the model is
            quantized already, needs code that is not allowed, or its weights are pickled, do not
            fit its config, or give logits that are not finite.
    """
    from transformers import AutoModelForCausalLM

    device = device or torch.device("cpu")
    path = bundled_model_folder() if str(source) == DEMO_MODEL else source
    # What the config describes, without memory: it may be another model than the weights are of.
    empty_model(path, trust_remote_code=trust_remote_code)
    if Path(path).is_dir():
        check_weights(Path(path))

    with named_errors(source):
        tokenizer = read_tokenizer(path, trust_remote_code)
        options = {"dtype": dtype or best_dtype(device), "trust_remote_code": trust_remote_code}
        model = read_model(AutoModelForCausalLM, path, **options).to(device)
        try_out(model)
    model.config._name_or_path = recorded_name(source)
    return model, tokenizer


def recorded_name(source: str | Path) -> str:
    """What the files of the model's adapters call their base.

    A folder by its full path, which means the same folder wherever it is read; the bundled model by
    its name, and not by the path of this user's cache.
    """
    if str(source) != DEMO_MODEL and Path(source).is_dir():
        return str(Path(source).absolute())
    return str(source)


def load_config(
    source: str | Path, *, trust_remote_code: bool = False, allow_4bit: bool = False
) -> Any:
    """Returns the transformers config of a model, checked; no weights are read.

    Args:
        source, trust_remote_code: as for `load_dense`.
        allow_4bit: see `read_config`.

    Raises:
        ValueError: see `read_config`, or transformers does not know the kind of model.
    """
    from transformers import AutoConfig

    path = bundled_model_folder() if str(source) == DEMO_MODEL else source
    read_config(path, trust_remote_code, allow_4bit=allow_4bit)
    with named_errors(source):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def empty_model(
    source: Any, *, trust_remote_code: bool = False, allow_4bit: bool = False
) -> nn.Module:
    """Returns a causal language model on the meta device: all its layers, and no weights.

    Args:
        source: a transformers config; or a folder or hub id, of which only the config is read.
        trust_remote_code: as for `load_dense`.
        allow_4bit: see `read_config`. What is stored in 4 bits is then an `NF4Linear`.

    Raises:
        ValueError: transformers has no causal language model for the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    trust: Any = {"trust_remote_code": trust_remote_code}
    model: nn.Module
    if not isinstance(source, str | os.PathLike):
        with named_errors(type(source).__name__), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source, **trust)
        return model

    contents = read_config(Path(source), trust_remote_code, allow_4bit=allow_4bit)
    with named_errors(source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **trust)
        model = AutoModelForCausalLM.from_config(config, **trust)
        check_architecture(contents, model)
        if is_4bit(contents):
            quantize_empty(model, contents["quantization_config"])
    return model


@contextmanager
def named_errors(source: object, kind: str = " as a causal language model") -> Iterator[None]:
    """Errors inside the block name the model. A folder can make transformers raise almost any."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{one_line(source)} cannot be loaded{kind}: {_reason(error)}") from error


def read_tokenizer(path: str | Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def read_model(cls: Any, path: str | Path, **options: Any) -> Any:
    """A model by `cls.from_pretrained`. Raises ValueError unless its weights fit its config."""
    from safetensors import SafetensorError

    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        # Another shape is an error below, which names the tensor.
        model, found = cls.from_pretrained(path, ignore_mismatched_sizes=True, **options)
    except SafetensorError:
        # It does not say which file is damaged.
        stored_dtypes(_weight_files(path))
        raise

    # transformers fills what is missing, or has another shape, with random numbers, and ignores
    # what is left over.
    for kind, means in _MISFITS.items():
        if misfits := sorted(map(_described, found.get(kind) or ())):
            more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
            raise ValueError(
                f"its weights do not fit its config.json, which {means} {misfits[0]}{more}"
            )
    # A quantizer has checked what it reads.
    if getattr(model, "hf_quantizer", None) is None:
        check_dense(_weight_files(path), model)
    return model


def _weight_files(path: str | Path) -> list[Path]:
    """The weights of a folder, or of a hub id that has been loaded and is in the cache."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        return check_weights(Path(path))
    config = cached_file(str(path), CONFIG, local_files_only=True)
    snapshot = Path(config).parent
    # transformers may have read what the hub converted, which is kept elsewhere.
    return check_weights(snapshot) if has_weights(snapshot) else []


def _described(misfit: Any) -> str:
    """A tensor's name; with both shapes, if transformers says them."""
    if isinstance(misfit, str):
        return misfit
    name, stored, needed = misfit
    return f"{name}: {tuple(needed)} instead of {tuple(stored)}"


@torch.no_grad()
def try_out(model: Any) -> None:
    """Computes one token: much of what is wrong in a config shows only then."""
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    if not model(input_ids=token).logits.isfinite().all():
        raise ValueError("its logits are not finite: NaN or infinity among its weights")


# What transformers says of a loaded checkpoint -> what it means.
_MISFITS = {
    "mismatched_keys": "needs another shape of",
    "missing_keys": "needs",
    "unexpected_keys": "has no place for",
}


def _reason(error: Exception) -> str:
    """An error's text; with its type, if it is one that is not meant to be read."""
    text = one_line(error)
    return text if isinstance(error, OSError | ValueError) and text else one_line(repr(error))


def release_checkpoint_memory(model: nn.Module) -> None:
    """Copies float parameters out of the memory-mapped checkpoint that they were loaded from.

    After `quantize`, embeddings and norms are all that is left there, and would keep the whole
    file in memory. Freed memory is returned to the operating system where the C library can.
    """
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()
    return_freed_memory()
