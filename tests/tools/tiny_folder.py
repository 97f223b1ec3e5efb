"""A tiny model as transformers writes it, adapters for it and data: what the commands work on.

Made without pytest, for the fuzz families and for processes of their own.
"""

import functools
import json
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
from minilora.files.peft_config import CONFIG
from minilora.files.tensors import read_tensors, write_tensors

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NF4 = {"quant_type": "nf4", "block_size": 64, "double_quant": True}


def make_model_folder(path: Path, *, shards: bool = False, context: int = 512) -> Path:
    """Writes the model; with `shards`, as several files and an index."""
    from transformers import LlamaConfig, LlamaForCausalLM

    byte_tokenizer(CHATML).save_pretrained(path)
    config = LlamaConfig(
        **SIZES,
        vocab_size=258,
        max_position_embeddings=context,
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


def name_base(adapter: Path, base: Any) -> Path:
    """Edits an adapter's config so that it names this base; ...: no base.

    Its files are then like PEFT's, without hashes and without minilora's records.
    """
    path = adapter / CONFIG
    config = {**json.loads(path.read_text()), "base_model_name_or_path": base}
    if base is ...:
        del config["base_model_name_or_path"]
    path.write_text(json.dumps(config))
    tensors, _ = read_tensors(adapter / WEIGHTS)
    write_tensors(adapter / WEIGHTS, tensors, {})
    return adapter


@functools.cache
def shared() -> Path:
    """A folder, made once per process: "model", "shards", adapters, "data.jsonl", "prompts.txt"."""
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
    (root / "prompts.txt").write_text("say yes\n\nsay no, please\n")
    return root


_KEPT: list[Any] = []
