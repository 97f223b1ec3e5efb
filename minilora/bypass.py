"""Where PyTorch reads a layer's weight and never calls the layer, so that an adapter is bypassed.

`nn.MultiheadAttention` always does, and is refused. `nn.TransformerEncoderLayer` does in eval mode,
in a fused kernel that can be switched off.
"""

from collections.abc import Mapping

from torch import nn

from minilora.layers import NF4Linear
from minilora.lora import LoRALayer

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
            way_out = f"leave it out with exclude=({name.rpartition('.')[2]!r},)"
            raise TypeError(f"{part} and never calls it: {way_out}")


def guard_fused_encoders(model: nn.Module) -> None:
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
