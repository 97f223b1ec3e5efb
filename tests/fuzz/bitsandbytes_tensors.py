"""bitsandbytes' tensors of a 4-bit layer, damaged, read as a weight.

They are read bit for bit as they stand there, or refused with the layer's name. A weight that is
read is finite and of the shape that its text says.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from fuzzing import REFUSED, SAME, Wrong, attempt
from helpers import same_bits
from torch import Tensor

import minilora
from minilora.files.bitsandbytes import from_tensors, quantized_layers, to_tensors

CI, SAMPLE, FULL = 200, 1000, 3000
SECONDS, MEGABYTES = 2, 200

LAYER = "model.layers.0.fc"
Tensors = dict[str, Any]

# Kernels are compiled when they are first used, which is no case's fault.
for double in (False, True):
    minilora.quantize_nf4(torch.ones(64), double_quant=double).dequantize()

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2, 3, 32, 63, 64, 128, 2**40, 2**70, 10**400, 0.5, 64.0, 1e300),
    *(float("nan"), float("inf"), "", "nf4", "fp4", "float32", "bfloat16", "float64", "64"),
    *([], [8], [8, 16], [8, -16], [8.0, 16], [[8, 16]], [0, 0], [2**40, 2**40], {}, "\x1b[2J"),
)


def build(draw: random.Random) -> tuple[Tensors, str]:
    """The tensors of a small weight, and the key of their text."""
    shape = draw.choice([(8, 16), (5, 7), (64, 300), (1, 1), (33, 512)])
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(99))).to(dtype)
    quant_type, block_size = draw.choice(["nf4", "fp4"]), draw.choice([32, 64, 4096])
    w = minilora.quantize_nf4(x, block_size, draw.random() < 0.6, quant_type)
    tensors: Tensors = {key: t.clone() for key, t in to_tensors(LAYER, w).items()}
    return tensors, next(key for key in tensors if "quant_state" in key)


# Each changes the tensors in one place.


def text(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    """An entry of the text is another value, missing or new."""
    try:
        state = json.loads(bytes(tensors[state_key].tolist()))
        entry = draw.choice([*state, "new"])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError):
        # Something else has changed it before.
        return
    if draw.random() < 0.2:
        state.pop(entry, None)
    else:
        state[entry] = draw.choice(VALUES)
    tensors[state_key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def flip(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    raw = tensors[key].reshape(-1).view(torch.uint8)
    for _ in range(draw.randint(1, 4)):
        raw[draw.randrange(raw.numel())] = draw.randrange(256)


def cast(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    dtypes = (torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.int8)
    tensors[key] = tensors[key].to(draw.choice(dtypes))


def shape(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    flat = tensors[key].reshape(-1)
    tensors[key] = draw.choice([flat[:-1], torch.cat([flat, flat[:1]]), flat[None], flat[:0]])


def drop(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    del tensors[key]


def rename(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    new = (key + "x", key.replace("nf4", "fp4"), f"{LAYER}.weight.SCB", f"{LAYER}.weight.\x1b[2J")
    tensors[draw.choice(new)] = tensors.pop(key)


def swap(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    other = draw.choice(list(tensors))
    tensors[key], tensors[other] = tensors[other], tensors[key]


def infinite(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    if tensors[key].is_floating_point() and tensors[key].numel():
        tensors[key].view(-1)[0] = draw.choice([torch.nan, torch.inf, -torch.inf, 3e38])


def no_tensor(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    tensors[key] = draw.choice([None, 3, [1, 2], "x"])


def meta(draw: random.Random, tensors: Tensors, key: str, state_key: str) -> None:
    tensors[key] = tensors[key].to("meta")


MUTATIONS = (text, text, text, flip, cast, shape, drop, rename, swap, infinite, no_tensor, meta)


def run(seed: int, folder: Path) -> str:
    draw = random.Random(seed)
    tensors, state_key = build(draw)
    for _ in range(draw.choice([0, 1, 1, 1, 2])):
        key = draw.choice(list(tensors))
        if isinstance(tensors[key], Tensor) and not tensors[key].is_meta and tensors[key].numel():
            draw.choice(MUTATIONS)(draw, tensors, key, state_key)

    before = dict(tensors)
    quantized_layers(tensors)
    w, error = attempt(lambda: from_tensors(LAYER, tensors), [LAYER], (ValueError,))
    if any(tensors.get(key) is not value for key, value in before.items()):
        raise Wrong("changed", "reading took tensors away")
    if error is not None:
        return REFUSED
    if w.packed.numel() != (w.numel() + 1) // 2:
        raise Wrong("silent", f"{w.packed.numel()} bytes for a weight of {tuple(w.shape)}")
    if not w.dequantize(torch.float32).isfinite().all():
        raise Wrong("silent", "the weight holds NaN or infinity")
    again = to_tensors(LAYER, w)
    for key, tensor in tensors.items():
        # The text and the tables may be written in another way, and absmax in another dtype.
        is_data = key.endswith((".weight", "absmax")) and tensor.dtype == again[key].dtype
        if is_data and not same_bits(tensor.flatten(), again[key].flatten()):
            raise Wrong("silent", f"{key} was read as something else")
    return SAME
