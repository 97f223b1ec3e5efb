r"""QLoRA from scratch: a language model in 4 bits, fine-tuned through a low-rank adapter.

    y = x W^T + (alpha / r) (x A^T) B^T        W [O, I] is frozen; A [r, I] and B [O, r] are trained

LoRA (arXiv:2106.09685) freezes the weight W of a layer and trains two thin matrices A and B beside
it. QLoRA (arXiv:2305.14314) also stores the frozen W in 4.127 bits per weight. This file does both
with nothing but PyTorch, in half a minute on a CPU. Read it from top to bottom: adapter, 4-bit
format, a small GPT that writes sentences, and in main() a lesson in the word order of Yoda.
"""

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

BLOCK, GROUP = 64, 256  # of NF4: weights per absmax, and absmax values per absmax2
CONTEXT, WIDTH = 40, 128  # of the GPT: characters per sentence, and numbers per character


class LoRA(nn.Module):
    """A frozen layer and a trained change of its weight, the product of two thin matrices."""

    def __init__(self, base, r, alpha):
        super().__init__()
        O, I = base.weight.shape
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        # B is zero: before training, the layer computes exactly what the frozen one does.
        self.A = nn.Parameter(torch.randn(r, I) / math.sqrt(I))
        self.B = nn.Parameter(torch.zeros(O, r))

    def forward(self, x):  # [..., I] -> [..., O]
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T

    def merge(self):
        """A plain layer that computes the same: its weight is W + (alpha / r) B A."""
        merged = nn.Linear(self.A.shape[1], self.B.shape[0], bias=False)
        merged.weight.data = (self.base.weight + self.scale * self.B @ self.A).detach()
        return merged


# NF4, "4-bit NormalFloat": 16 quantiles of the normal distribution, which weights resemble, divided
# by the largest. The eighth is zero: 7 even steps of probability lead up to it, 8 more to the end.
# Quantiles of 0 and 1 are infinite, so both ends are cut by half a step, the mean of 1/30 and 1/32.
inset = (1 / 30 + 1 / 32) / 2
below = torch.linspace(inset, 0.5, 8, dtype=torch.float64)
above = torch.linspace(0.5, 1 - inset, 9, dtype=torch.float64)[1:]
quantiles = torch.special.ndtri(torch.cat([below, above]))
NF4 = (quantiles / quantiles.max()).float()


def quantize(W, levels=NF4):  # [O, I] -> uint8 [O I / 2], float32 [O I / 64]
    """Stores each weight as the nearest level, and for each block its absmax, the largest |w|."""
    blocks = W.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    distance = ((blocks / absmax)[:, :, None] - levels).abs()
    # The index of a level takes 4 bits, so two of them share a byte.
    code = distance.argmin(dim=2).to(torch.uint8).flatten()
    return code[0::2] << 4 | code[1::2], absmax.flatten()


def dequantize(packed, absmax, levels=NF4):  # -> float32 [O I / 64, 64]
    code = torch.stack([packed >> 4, packed & 15], dim=1)
    return levels[code.int()].view(-1, BLOCK) * absmax[:, None]


def double_quantize(absmax):  # float32 [b] -> int8 [b / 256, 256], float32 [b / 256, 1], float32
    """Stores absmax in 8 bits: all are similar, so only the distance from their mean is stored."""
    mean = absmax.mean()
    groups = (absmax - mean).view(-1, GROUP)
    absmax2 = groups.abs().amax(dim=1, keepdim=True)
    return (127 * groups / absmax2).round().to(torch.int8), absmax2, mean


def double_dequantize(code, absmax2, mean):  # -> float32 [b]
    return (code * absmax2 / 127 + mean).flatten()


class NF4Linear(nn.Module):
    """A frozen layer that stores W in 4 bits, and dequantizes it in each forward pass."""

    def __init__(self, W):
        super().__init__()
        self.shape = W.shape
        packed, absmax = quantize(W)
        stored = packed, *double_quantize(absmax)
        self.packed, self.code, self.absmax2, self.mean = map(nn.Buffer, stored)

    @property
    def weight(self):  # [O, I]
        absmax = double_dequantize(self.code, self.absmax2, self.mean)
        return dequantize(self.packed, absmax).view(self.shape)

    def forward(self, x):  # [..., I] -> [..., O]
        return x @ self.weight.T


def describe(name, W, restored, *stored):
    bits = 8 * sum(tensor.nbytes for tensor in stored) / W.numel()
    error = (restored.view_as(W) - W).norm() / W.norm()
    print(f"{name:18} {bits:.3f} bits per weight, relative error {error:.4f}")


# A small GPT, to have something to fine-tune. Its tokens are ASCII characters.
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):  # [batch, time, WIDTH]
        h = F.layer_norm(x, [WIDTH])
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True)
        x = x + self.o(h)
        return x + self.down(F.relu(self.up(F.layer_norm(x, [WIDTH]))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(128, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 128, bias=False)

    def forward(self, ids):  # [batch, time] -> logits [batch, time, 128]
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        return self.head(F.layer_norm(self.blocks(x), [WIDTH]))

    def loss(self, ids):  # in nats per sentence
        logits = self(ids[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / len(ids)


def convert(model, make):
    """A copy of the model with make(layer) for each layer: it quantizes, injects and merges."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            setattr(block, name, make(layer))
    return model


# The text: sentences of five words, each one of eight, in the usual order or in Yoda's.
ADJECTIVES = "old young small tall happy wise brave quick".split()
NOUNS = "dog cat bird king girl fox witch horse".split()
VERBS = "sees likes finds helps calls draws meets asks".split()
PLAIN = "the {0} {1} {2} the {3} {4}."
YODA = "the {3} {4} the {0} {1} {2}."


def encode(texts):  # -> [len(texts), time]
    return torch.tensor([list(text.encode()) for text in texts])


def train(model, ids, steps, lr):
    losses = []
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    for step in range(steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = model.loss(ids[torch.randint(len(ids), [32])])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"  step {step:3}  loss {losses[-1]:6.2f}")
    return losses


@torch.no_grad()
def report(title, model, plain, yoda):
    print(f"{title}: loss {model.loss(plain):.2f} on plain text, {model.loss(yoda):.2f} on Yoda's")
    for text in ("the old dog ", "the wise king "):
        while len(text) < CONTEXT and not text.endswith("."):
            text += chr(model(encode([text]))[0, -1].argmax())
        print(f"  {text}")


def main():
    torch.manual_seed(0)
    print("The 16 levels of NF4", NF4, sep="\n")
    W, even = torch.randn(1024, 1024), torch.linspace(-1, 1, 16)
    packed, absmax = quantize(W, even)
    describe("16 even levels", W, dequantize(packed, absmax, even), packed, absmax)
    packed, absmax = quantize(W)
    describe("NF4", W, dequantize(packed, absmax), packed, absmax)
    layer = NF4Linear(W)
    describe("NF4, 8-bit absmax", W, layer.weight, *layer.buffers())

    words = list(itertools.product(ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS))
    words = [words[i] for i in torch.randperm(len(words))]
    plain = encode(PLAIN.format(*w).ljust(CONTEXT) for w in words)
    yoda = encode(YODA.format(*w).ljust(CONTEXT) for w in words)
    held_out = plain[:256], yoda[:256]
    print(f"Pretraining. A perfect model's loss is log {len(words)} = {math.log(len(words)):.2f}")
    model = GPT()
    train(model, plain[256:], steps=250, lr=3e-3)
    report("pretrained", model, *held_out)
    quantized = convert(model, lambda layer: NF4Linear(layer.weight.detach())).requires_grad_(False)
    report("quantized", quantized, *held_out)

    tuned = convert(quantized, lambda layer: LoRA(layer, r=4, alpha=8))
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in model.parameters())
    print(f"Fine-tuning {trained:,} parameters, {share:.1%} of the model's")
    train(tuned, yoda[256:], steps=200, lr=1e-2)
    report("fine-tuned", tuned, *held_out)
    merged = convert(tuned, LoRA.merge)
    difference = (merged(held_out[1]) - tuned(held_out[1])).abs().max()
    print(f"merged: logits differ by at most {difference:.1e}")
    report("adapter removed", convert(tuned, lambda layer: layer.base), *held_out)


if __name__ == "__main__":
    main()
