"""A tiny model as transformers writes it, adapters for it and data: what the commands work on.

Made without pytest, for the fuzz families and for processes of their own.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

# Read once, when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from byte_level import CHATML, byte_tokenizer

import minilora
from minilora.files.adapter_folder import WEIGHTS
from minilora.files.tensors import read_tensors, write_tensors

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NF4 = {"quant_type": "nf4", "block_size": 64, "double_quant": True}


def make_model_folder(path: Path, *, shards: bool = False) -> Path:
    """Writes the model; with `shards`, as several files and an index."""
    from transformers import LlamaConfig, LlamaForCausalLM

    byte_tokenizer(CHATML).save_pretrained(path)
    config = LlamaConfig(
        **SIZES,
        vocab_size=258,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=257,
        eos_token_id=256,
        pad_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path, max_shard_size="20KB" if shards else "5GB")
    return path


def make_adapter(model_folder: Path, path: Path, base: Any, seed: int = 1) -> Path:
    """Writes an adapter whose B is not zero and whose file says what its base was.

    Args:
        base: options of `quantize`, "dense", or None: a file that does not say, as PEFT's.
    """
    from minilora.huggingface import load_dense

    model, _ = load_dense(model_folder, dtype=torch.float32)
    if isinstance(base, dict):
        minilora.quantize(model, **base)
    minilora.inject(model, r=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in minilora.adapter_parameters(model):
            parameter.normal_(std=0.2, generator=generator)
    minilora.save_adapter(model, path)

    if base is None:
        tensors, metadata = read_tensors(path / WEIGHTS)
        del metadata["minilora_base"]
        write_tensors(path / WEIGHTS, tensors, metadata)
    return path


@functools.cache
def shared() -> Path:
    """A folder, made once per process: "model", "shards", the adapters, "data.jsonl"."""
    keep = tempfile.TemporaryDirectory(prefix="minilora-tiny-")
    _KEPT.append(keep)
    root = Path(keep.name)
    model = make_model_folder(root / "model")
    make_model_folder(root / "shards", shards=True)
    make_adapter(model, root / "on-nf4", NF4)
    make_adapter(model, root / "on-dense", "dense")
    make_adapter(model, root / "says-nothing", None)
    line = '{"prompt": "say %s", "completion": "%s"}\n'
    words = ("yes", "no", "perhaps", "later")
    text = "".join(line % (word, word.upper()) for word in 3 * words)
    (root / "data.jsonl").write_text(text)
    return root


_KEPT: list[Any] = []
