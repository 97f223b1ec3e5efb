"""Loading a dense model and its tokenizer."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder


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
        ValueError: a GPU is asked for and PyTorch sees none.
    """
    available = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if available else "cpu")

    device = torch.device(name)
    if device.type == "cuda" and not available:
        raise ValueError(
            f"device={name!r}: this PyTorch ({torch.__version__}) sees no GPU; "
            "leave device out to run on the CPU"
        )
    return device


def load_dense(
    source: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[nn.Module, Any]:
    """Returns (model, tokenizer) of a causal language model.

    Args:
        source: a folder, a hub id, or "smollm2", the bundled demo model.
        dtype: of the weights; None: see `best_dtype`.
        device: where the model is moved to; None: the CPU.

    Raises:
        ValueError: transformers cannot load a causal language model from the source.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or torch.device("cpu")
    path = bundled_model_folder() if str(source) == DEMO_MODEL else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or best_dtype(device))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be loaded as a causal language model: {error}"
        ) from error
    return model.to(device), tokenizer


def release_checkpoint_memory(model: nn.Module) -> None:
    """Copies float parameters out of the memory-mapped checkpoint that they were loaded from.

    After `quantize`, embeddings and norms are all that is left there, and would keep the whole
    file in memory. Freed memory is returned to the operating system where the C library can.
    """
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()
    gc.collect()

    # glibc has malloc_trim, musl does not.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
