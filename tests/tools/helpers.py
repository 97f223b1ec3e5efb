"""What several test files need: random tensors, equality of bits, a picture of a model's state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import minilora
from minilora.lora import LoRALayer
from minilora.targets import heads, tied_parameters

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A Gaussian tensor, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(found: Any, expected: Any) -> bool:
    """Equal in dtype, shape and every bit; of tensors or of tuples of them.

    0.0 is not -0.0, and a NaN equals itself.
    """
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same_bits, found, expected))
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    integer = INTEGER[expected.itemsize]
    bits = [t.detach().cpu().contiguous().view(integer) for t in (found, expected)]
    return torch.equal(*bits)


def snapshot(model: nn.Module) -> list[Any]:
    """Modules by identity and class; parameters by identity, requires_grad and version counter.

    Two snapshots are equal if and only if nothing edited the model between them.
    """
    modules = [(n, id(m), type(m), m.training) for n, m in model.named_modules()]
    parameters = [
        (n, id(p), p.requires_grad, p._version)
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, list(model.state_dict())]


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The model's adapter of that name by layer, {} if it has none."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}
    return {n: m.adapters[name] for n, m in layers.items() if name in m.adapters}


def randomize(
    model: nn.Module, name: str = "default", seed: int = 0, size: float = 1.0
) -> nn.Module:
    """Gives an adapter's B values other than zero, as training does; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters_of(model, name).values():
            adapter.B.copy_(size * torch.randn(adapter.B.shape, generator=generator))
    return model


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
}
ENCODER = {k: SMALL[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
ENCODER["num_attention_heads"] = 4
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}

# transformers' model type -> (auto class, config).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("AutoModelForCausalLM", SMALL),
    "gemma3_text": ("AutoModelForCausalLM", SMALL),
    "bert": ("AutoModelForMaskedLM", ENCODER | {"vocab_size": 96}),
    "t5": ("AutoModelForSeq2SeqLM", T5),
    "vit": ("AutoModelForImageClassification", ENCODER | {"image_size": 16, "patch_size": 8}),
}


def tiny_model(name: str, layers: int = 2) -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """A random model of one of ARCHITECTURES in eval mode, and what calls it: model -> logits."""
    import transformers

    kind, options = ARCHITECTURES[name]
    depth = {"num_layers" if name == "t5" else "num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(name, **options | depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind).from_config(config).eval()

    ids = torch.arange(16).reshape(2, 8) * 7 % 96
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids[:, :4]
    if name == "vit":
        inputs = {"pixel_values": gaussian(2, 3, 16, 16)}
    return model, lambda model: model(**inputs).logits


def quantize_untied(model: nn.Module) -> nn.Module:
    """Quantizes every linear layer but the head and those that share their weight."""
    tied, left_out = tied_parameters(model), heads(model)

    def chosen(name: str, layer: nn.Module) -> bool:
        return id(layer.weight) not in tied and name not in left_out

    return minilora.quantize(model, chosen)


class Shared(nn.Module):
    """One layer under two parents, at two depths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(12, 12)
        self.inner = nn.Sequential(layer, nn.Tanh())
        self.outer = layer
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.outer(self.inner(x)))
        return y
