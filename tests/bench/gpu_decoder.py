"""A decoder of Llama's sizes that makes one token, for decoding eagerly and as a CUDA graph.

Every size is fixed and nothing depends on values: the position is a tensor, the keys and values of
all positions have their place from the start, and later ones are masked. It has no embedding, no
head and no rotary embedding: what is timed are the layers. Weights and adapters are random.

Dimension letters: B sequences, H heads, N positions, D the width of a head.
"""

from typing import Any

import headline
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora

RANK = 16


class Layer(nn.Module):
    """Attention over fixed keys and values, and the MLP."""

    def __init__(self, shape: dict[str, int], positions: int, device: torch.device) -> None:
        super().__init__()
        width, inner = shape["hidden_size"], shape["intermediate_size"]
        self.heads = shape["heads"]
        codes = headline.in_memory(device)

        def linear(O: int, I: int) -> minilora.NF4Linear:
            return minilora.NF4Linear(headline.random_weight(O, I, codes, device))

        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.gate, self.up = (linear(inner, width) for _ in range(2))
        self.down = linear(width, inner)

        kept = torch.zeros(1, self.heads, positions, width // self.heads, device=device)
        self.register_buffer("keys", kept.to(torch.bfloat16))
        self.register_buffer("values", kept.to(torch.bfloat16))

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:])
        q, k, v = (self._split(layer(normed)) for layer in (self.q, self.k, self.v))
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)

        attended = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        normed = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _split(self, t: Tensor) -> Tensor:
        # B H 1 D
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Decoder(nn.Module):
    """`layers` layers with adapters of rank 16 on all linear layers, for one sequence."""

    def __init__(
        self, shape: dict[str, int], layers: int, positions: int, device: torch.device
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, positions, device) for _ in range(layers))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long, device=device))
        self.register_buffer("positions", torch.arange(positions, device=device))
        minilora.inject(self, RANK)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 1, width], bfloat16: the next token's."""
        mask = (self.positions <= self.position)[None, None, None]
        for layer in self.layers:
            x = layer(x, self.position, mask)
        return x

    def start(self) -> None:
        """Forgets what was decoded."""
        self.position.zero_()
        for layer in self.layers:
            layer.keys.zero_()
            layer.values.zero_()


def decode(model: Decoder, step: Any, x: Tensor, out: Tensor, tokens: int) -> Tensor:
    """Makes `tokens` tokens, each from the last. `step()` computes `out` from `x`, in place."""
    for position in range(tokens):
        model.position.fill_(position)
        step()
        x.copy_(out)
    return out.clone()
