"""State dicts and safetensors files of 4-bit models, damaged, loaded into a 4-bit model.

A layer takes all parts of its weight, bit for bit as the state dict has them, or none, and then the
error names the key. PyTorch loads layer by layer: what is asserted of a refusal is that no refused
layer has changed.
"""

import itertools
import json
import random
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from fuzzing import REFUSED, SAME, Wrong, attempt
from helpers import randomize, same_bits
from safetensors import SafetensorError
from torch import Tensor, nn

import minilora
from minilora import NF4Linear

CI, SAMPLE, FULL = 200, 700, 1500
SECONDS, MEGABYTES = 2, 200

PARTS = ("packed", "absmax", "absmax2", "offset", "nf4_layout")
State = dict[str, Any]

# Kernels are compiled when they are first used, which is no case's fault.
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    minilora.quantize_nf4(torch.ones(64, dtype=dtype)).dequantize(torch.float32)
    minilora.quantize_nf4(torch.ones(64, dtype=dtype), double_quant=False).dequantize(torch.float32)


def build(draw: random.Random, seed: int) -> nn.Module:
    """A small 4-bit model; its structure is `draw`'s, its values the seed's."""
    torch.manual_seed(seed)
    sizes = [draw.choice([5, 16, 24]) for _ in range(3)]
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    bias = draw.random() < 0.6
    layers = [nn.Linear(i, o, bias=bias, dtype=dtype) for i, o in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers, nn.LayerNorm(sizes[-1], dtype=dtype))
    block, double = draw.choice([32, 64]), draw.random() < 0.6
    minilora.quantize(model, block_size=block, double_quant=double)
    if draw.random() < 0.4:
        randomize(minilora.inject(model, r=2, seed=seed), seed=seed)
    return model


# Each changes a state dict in one place; returns the key that it changed.


def other_dtype(draw: random.Random, state: State, key: str) -> None:
    dtypes = [torch.float32, torch.float16, torch.int64, torch.int8, torch.int32, torch.uint8]
    state[key] = state[key].to(draw.choice([d for d in dtypes if d != state[key].dtype]))


def other_shape(draw: random.Random, state: State, key: str) -> None:
    t = state[key]
    flat = t.reshape(-1)
    state[key] = draw.choice([flat[:-1], torch.cat([flat, flat[:1]]), t[None], flat[:0]])


def missing(draw: random.Random, state: State, key: str) -> None:
    del state[key]


def not_a_tensor(draw: random.Random, state: State, key: str) -> None:
    state[key] = draw.choice([None, 3, [1, 2], "x", state[key].tolist()])


def bits(draw: random.Random, state: State, key: str) -> None:
    """Some bytes are other ones: the state dict of another weight, or NaN."""
    t = state[key].clone().contiguous()
    raw = t.reshape(-1).view(torch.uint8)
    for _ in range(draw.randint(1, 4)):
        if raw.numel():
            raw[draw.randrange(raw.numel())] = draw.randrange(256)
    state[key] = t


def infinite(draw: random.Random, state: State, key: str) -> None:
    t = state[key].clone()
    value = draw.choice([torch.nan, torch.inf, -torch.inf])
    if t.dtype == torch.int32:
        t.view(-1)[draw.randrange(t.numel())] = torch.tensor(value).view(torch.int32)
    elif t.is_floating_point():
        t.view(-1)[0] = value
    state[key] = t


def layout(draw: random.Random, state: State, key: str) -> None:
    prefix = key.rpartition(".")[0]
    key = prefix + ".nf4_layout"
    if key in state and state[key].numel() == 5:
        state[key] = state[key].clone()
        state[key][draw.randrange(5)] = draw.choice([-1, 0, 1, 2, 7, 64, 2**40, -(2**63)])


def swapped(draw: random.Random, state: State, key: str) -> None:
    other = draw.choice(list(state))
    state[key], state[other] = state[other], state[key]


def renamed(draw: random.Random, state: State, key: str) -> None:
    state[draw.choice([key + "x", "x." + key, key.replace("0.", "7.")])] = state.pop(key)


def extra(draw: random.Random, state: State, key: str) -> None:
    prefix = key.rpartition(".")[0]
    state[f"{prefix}.{draw.choice(['weight', 'absmax3', 'quant_map', 'absmax2'])}"] = torch.ones(3)


def strided(draw: random.Random, state: State, key: str) -> None:
    """The same values in another memory layout."""
    state[key] = torch.stack([state[key], state[key]], -1)[..., 0]


def meta(draw: random.Random, state: State, key: str) -> None:
    state[key] = state[key].to("meta")


MUTATIONS = (other_dtype, other_shape, missing, not_a_tensor, bits, infinite, layout, swapped)
MUTATIONS += (renamed, extra, strided, meta)


def run(seed: int, folder: Path) -> str:
    draw = random.Random(seed)
    structure = draw.randrange(2**32)
    saved = build(random.Random(structure), 1)
    model = build(random.Random(structure), 2)
    if draw.random() < 0.1:
        saved = build(random.Random(structure + 1), 1)
    state: State = {k: t.detach().clone() for k, t in saved.state_dict().items()}

    if draw.random() < 0.3:
        found = through_a_file(draw, state, folder)
        if found is None:
            return REFUSED
        state = found
    else:
        for _ in range(draw.choice([0, 1, 1, 1, 2])):
            parts = [
                k for k in state if k.rpartition(".")[2] in PARTS and torch.is_tensor(state[k])
            ]
            key = draw.choice(parts if parts and draw.random() < 0.8 else list(state))
            if torch.is_tensor(state[key]) and not state[key].is_meta:
                draw.choice(MUTATIONS)(draw, state, key)
    return load(model, state, strict=draw.random() < 0.6)


def through_a_file(draw: random.Random, state: State, folder: Path) -> State | None:
    """The state dict from a file whose bytes or header were damaged; None if it cannot be read."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file(state, path)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    kind = draw.choice(["byte", "header", "header", "cut"])
    if kind == "byte":
        data[draw.randrange(8 + length, len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    else:
        header = json.loads(data[8 : 8 + length])
        one, two = draw.choice(list(header)), draw.choice(list(header))
        field = draw.choice(["dtype", "shape", "data_offsets"])
        header[one][field] = header[two][field]
        text = json.dumps(header).encode()
        data = bytearray(struct.pack("<Q", len(text)) + text + data[8 + length :])
    path.write_bytes(data)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError):
        return None


def parts_of(layer: NF4Linear) -> dict[str, Tensor]:
    held = {**layer._parameters, **layer._buffers}
    return {n: t.detach().clone() for n, t in held.items() if t is not None}


def load(model: nn.Module, state: State, strict: bool) -> str:
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    before = {n: parts_of(m) for n, m in layers.items()}
    names = [*state, *model.state_dict(), "state_dict"]
    _, error = attempt(lambda: model.load_state_dict(state, strict=strict), names, (RuntimeError,))

    refused = False
    for name, layer in layers.items():
        now = parts_of(layer)
        given = {n: state.get(f"{name}.{n}") for n in now}
        taken = all(t is None or _equal(now[n], t) for n, t in given.items())
        parts = [n for n in now if n in PARTS]
        whole = taken and all(given[n] is not None for n in parts)
        kept = all(map(same_bits, now.values(), before[name].values()))
        absent = all(given[n] is None for n in parts)
        if not whole and not kept and not (absent and taken):
            raise Wrong("changed", f"{name} holds parts of two weights")
        if not whole and not absent:
            refused = True
            if f"{name}." not in str(error):
                raise Wrong("silent", f"{name} was not loaded, and no error names it")
        if not layer.weight.dequantize(torch.float32).isfinite().all():
            raise Wrong("silent", f"{name} holds NaN or infinity")
    return REFUSED if error or refused else SAME


def _equal(now: Tensor, given: Any) -> bool:
    """Whether a part is what the state dict gave; a bias is cast to the model's dtype."""
    if not isinstance(given, Tensor) or given.is_meta or given.shape != now.shape:
        return False
    return same_bits(now, given.to(now.dtype))
