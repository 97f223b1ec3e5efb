"""A faster and smaller training step for transformers models, with the same result.

    attention      in blocks that stay in cache, and again in the backward    attention.py
    rotary         one pass, which writes nothing but its result              rotary.py
    norms, MLPs    fewer passes, and fewer tensors kept for the backward      efficient_modules.py
    memory         of one step is kept for the next one                       heap.py

`efficient_training` looks for what it knows how to replace, compares each replacement with the
original on random inputs, and leaves alone whatever it does not recognise. On leaving, everything
is as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from minilora.huggingface import attention, rotary
from minilora.huggingface.efficient_modules import EfficientModule, EfficientNorm, efficient_class
from minilora.huggingface.heap import freed_memory_is_kept

# The probe of the attention: two rows of tokens, the second with padding at its end.
_PROBE = (2, attention.MIN_LENGTH + 8)
_PADDING = 5

# Root mean square of the logits' difference, of that of the logits themselves. Two attentions with
# different roundings differ by 1 % in a deep bfloat16 model; with another mask by 100 %.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Replaced:
    """What was replaced.

    Whether the attention, and the rotary embeddings; the number of norms, and of gated MLPs.
    """

    attention: bool
    rotary: bool
    norms: int
    mlps: int

    def __str__(self) -> str:
        found = ["attention"] if self.attention else []
        found += ["rotary embeddings"] if self.rotary else []
        found += [f"{self.norms} norms"] if self.norms else []
        found += [f"{self.mlps} MLPs"] if self.mlps else []
        return ", ".join(found) or "nothing"


@contextmanager
def efficient_training(model: nn.Module) -> Iterator[Replaced]:
    """Inside the block, training takes less time and memory for the same loss.

    The error of each part against float64 is no larger than that of PyTorch's operations. Rotary
    embeddings and gated MLPs give the same bits; with SiLU in float32 on the CPU, the last ones may
    differ. Only the attention of models that use "sdpa" is replaced, on the CPU, where it can be
    compared on two rows of tokens. Everything goes together with gradient checkpointing,
    generation, saving and loading; what torch.compile traces, it traces as the model was before. A
    deep copy of the model has the plain modules. With glibc, the process keeps the memory of a step
    for the next one.

    Args:
        model: a transformers model, with adapters or without, or a module that contains one.

    Returns:
        What was replaced, in words with `str`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1
        ... )
        >>> model = minilora.inject(LlamaForCausalLM(config), r=2).train()
        >>> with efficient_training(model) as replaced:
        ...     model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
        >>> str(replaced)
        'attention, rotary embeddings, 5 norms, 2 MLPs'
    """
    changed: list[nn.Module] = []
    implementations = _implementations(model)
    files = _replace_rotary(model)
    try:
        for module in model.modules():
            kind = efficient_class(module)
            if kind is not None:
                module.__class__ = kind
                changed.append(module)

        norms = sum(isinstance(module, EfficientNorm) for module in changed)
        mlps = len(changed) - norms
        replaced = Replaced(_replace_attention(model), bool(files), norms, mlps)
        with freed_memory_is_kept():
            yield replaced
    finally:
        _restore(implementations)
        rotary.restore(files)
        for module in changed:
            # Not if it was given yet another class in the meantime.
            if isinstance(module, EfficientModule):
                module.__class__ = module.plain_class  # type: ignore[assignment]


def _transformers_model(model: nn.Module) -> Any:
    """The outermost transformers model in a module, or None."""
    from transformers import PreTrainedModel

    found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next(found, None)


def _implementations(model: nn.Module) -> list[tuple[Any, str | None]]:
    """Every config in a model with the name of its attention, the outer ones first."""
    whole = _transformers_model(model)
    if whole is None:
        return []
    found: dict[int, Any] = {}
    for module in whole.modules():
        if (config := getattr(module, "config", None)) is not None:
            _collect(config, found)
    return [(config, config._attn_implementation) for config in found.values()]


def _collect(config: Any, found: dict[int, Any]) -> None:
    if id(config) in found or not hasattr(config, "_attn_implementation"):
        return
    found[id(config)] = config
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            _collect(part, found)


def _restore(implementations: list[tuple[Any, str | None]]) -> None:
    # The outer config's setter changes the inner ones: from the outside inwards.
    for config, name in implementations:
        if config._attn_implementation != name:
            config._attn_implementation = name


def _replace_rotary(model: nn.Module) -> list[ModuleType]:
    """Replaces the rotary embeddings of a model on the CPU; returns what `rotary.restore` needs."""
    whole = _transformers_model(model)
    if whole is None or whole.device.type != "cpu" or whole.dtype not in rotary.DTYPES:
        return []
    return rotary.replace(model, whole.dtype)


def _replace_attention(model: nn.Module) -> bool:
    """Switches the model's attention if the logits stay the same; returns whether it did."""
    whole = _transformers_model(model)
    if whole is None or not _can_be_probed(whole):
        return False

    before = _implementations(model)
    expected = _logits(whole)
    whole.set_attn_implementation(attention.register())
    found = _logits(whole)
    if expected is not None and found is not None:
        error = (found - expected).norm() / expected.norm()
        if error <= _TOLERANCE[whole.dtype]:
            return True
    _restore(before)
    return False


def _can_be_probed(whole: Any) -> bool:
    """A decoder or encoder over token ids, on the CPU, whose attention is "sdpa" throughout."""
    embedding = whole.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.weight.device.type != "cpu":
        return False
    if whole.config.is_encoder_decoder or whole.dtype not in _TOLERANCE:
        return False
    if not attention.is_supported(whole.dtype):
        return False
    names = {name for _, name in _implementations(whole)}
    return names == {"sdpa"} and whole._can_set_attn_implementation()


@torch.no_grad()
def _logits(whole: Any) -> Tensor | None:
    """The logits of the tokens that are not padding, in float64; None: it needs other inputs."""
    words = whole.get_input_embeddings().num_embeddings
    ids = torch.arange(_PROBE[0] * _PROBE[1]).view(_PROBE) * 7919 % words
    real = torch.ones_like(ids)
    real[1, -_PADDING:] = 0
    try:
        # Dropout draws the same each time, and nothing from the caller's generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = whole(input_ids=ids, attention_mask=real)[0]
    except Exception:
        # It needs more than tokens: a picture, for instance.
        return None
    return out[real.bool()].double() if out.shape[:2] == ids.shape else None
