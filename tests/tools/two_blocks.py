"""A model of two blocks with norms, biases and parameters of its own, and a training of it."""

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.norm, self.input_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.input_norm(x)).tanh())
        return x + self.gain * self.norm(y)


class Model(nn.Module):
    """Two blocks, norms whose names end alike, a head of two outputs, and biases on some layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer(x)
        y: Tensor = self.scale * self.head(self.norm(x))
        return y


def make() -> Model:
    torch.manual_seed(0)
    model = Model().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


X = torch.sin(1.7 * torch.arange(40.0)).view(5, 8)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(X)
    return out


def trained(model: Any) -> Any:
    """What training leaves: other values for everything that is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model
