"""What would go wrong in silence in a model that has our layers: refused, or switched off.

PyTorch reads the weights of some layers and never calls the layer, so that an adapter is bypassed.
`nn.MultiheadAttention` always does, and is refused. `nn.TransformerEncoderLayer` does in eval mode,
in a fused kernel that can be switched off. And `save_pretrained` of transformers would write keys
which `from_pretrained` does not know: it would load random weights, or a model without its adapter.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from minilora.layers import NF4Linear
from minilora.lora import LoRALayer
from minilora.targets import linear_layers, shortest_end

# What torch's encoder reads to choose a fused kernel, and the value that switches the kernel off.
FUSED_ENCODER = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def check_called(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises TypeError for a layer whose weight nn.MultiheadAttention reads without calling it."""
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside = {id(child) for attention in attentions for child in attention.children()}
    for name, layer in layers.items():
        if id(layer) in inside:
            part = f"{name} is part of nn.MultiheadAttention, which reads its weight"
            way_out = f"leave it out with exclude=({shortest_end(name, linear_layers(model))!r},)"
            raise TypeError(f"{part} and never calls it: {way_out}")


def guard(model: nn.Module) -> None:
    """Guards a model that has our layers, and takes the guards away from one that has none."""
    _guard_fused_encoders(model)
    _guard_save_pretrained(model)


def _guard_fused_encoders(model: nn.Module) -> None:
    """Switches off the kernels of torch's encoder that read our layers' weights, or on again.

    In eval mode nn.TransformerEncoderLayer hands the weights of linear1 and linear2 to one fused
    kernel instead of calling the layers, and nn.TransformerEncoder packs its input for it.
    """
    for module in model.modules():
        for kind, (attribute, off) in FUSED_ENCODER.items():
            if not isinstance(module, kind):
                continue
            if "_minilora_fused" in vars(module):
                setattr(module, attribute, vars(module).pop("_minilora_fused"))
            if any(isinstance(m, LoRALayer | NF4Linear) for m in module.modules()):
                module._minilora_fused = getattr(module, attribute)
                setattr(module, attribute, off)


def _guard_save_pretrained(model: nn.Module) -> None:
    """Replaces `save_pretrained` of each model, also inside this one, that would lose something."""
    for part in model.modules():
        if vars(part).get("save_pretrained") in (_refuse_adapters, _refuse_quantized):
            del part.save_pretrained
        if not hasattr(part, "save_pretrained"):
            continue
        if any(isinstance(m, LoRALayer) for m in part.modules()):
            vars(part)["save_pretrained"] = _refuse_adapters
        elif _is_quantized(part) and getattr(part, "hf_quantizer", None) is None:
            vars(part)["save_pretrained"] = _refuse_quantized


def release_quantizer(model: Any) -> None:
    """Lets transformers save a model in which nothing is in 4 bits any more as a dense one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not _is_quantized(model):
        quantizer.remove_quantization_config(model)


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(m, NF4Linear) for m in model.modules())


def _refuse_adapters(*args: Any, **options: Any) -> NoReturn:
    raise ValueError(
        "save_pretrained would write a model that reloads without its adapter: "
        "minilora.save_adapter(model, path) saves the adapter (in a Trainer, "
        "minilora.huggingface.AdapterCheckpoints does); after minilora.merge(model), "
        "save_pretrained writes the merged model"
    )


def _refuse_quantized(*args: Any, **options: Any) -> NoReturn:
    raise ValueError(
        "save_pretrained does not know the 4-bit layers and would write a model that reloads as a "
        "random one: minilora.save_quantized(model, path) writes it"
    )
