"""Small transformers models in folders, of sizes that bitsandbytes' CPU kernels decode rightly.

bitsandbytes 0.50.2 decodes other values than it encoded where a row is not whole blocks: here every
in_features is a multiple of 64.
"""

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}

# Name -> class of the model, class of its config, options of the config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2, with biases": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "gpt_neox, embed_out": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2},
    ),
    # Saved under other names than the model's own.
    "llava, renamed": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **SIZES},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 8,
            },
            "image_token_index": 127,
        },
    ),
    "bert, two labels": ("BertForSequenceClassification", "BertConfig", {"num_labels": 2}),
}


def make_model(name: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A random model in eval mode, the same for the same seed."""
    import transformers

    model, config, own = MODELS[name]
    sizes = {} if "text_config" in own else SIZES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, config)(**{**sizes, **own, **options})
        return getattr(transformers, model)(made).eval()


def make_folder(path: Path, name: str = "llama", *, shards: bool = False, **options: Any) -> Path:
    """Writes a model of `make_model`; with `shards` as several files and an index."""
    model = make_model(name, **options)
    model.save_pretrained(path, max_shard_size="50KB" if shards else "5GB")
    return path


def store_in_4bit(folder: Path, path: Path) -> Path:
    """Writes the model of a folder in 4 bits, with its tokenizer, as another folder."""
    import minilora
    from minilora.huggingface import load_dense

    model, tokenizer = load_dense(folder)
    minilora.save_quantized(minilora.quantize(model), path)
    tokenizer.save_pretrained(path)
    return path


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """What a model says of a few random tokens. bitsandbytes' differ from training in eval mode."""
    tokens = torch.randint(0, 120, (2, 9), generator=torch.Generator().manual_seed(seed))
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found
