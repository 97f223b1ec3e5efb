"""Adapter folders: built valid, as minilora or PEFT writes them, then changed in a few places.

A folder that is refused leaves the model as it was, bit for bit. One that is loaded gives exactly
what an independent reading of its two files says, and nothing else in the model has changed.
"""

import importlib
import json
import math
import os
import random
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapter_fuzz import (
    CONFIG,
    DTYPES,
    PREFIX,
    SLOW,
    TORCH,
    WEIGHTS,
    Folder,
    adapter_options,
    as_tensor,
    judge_claims,
    judge_loaded,
    raw_of,
    state,
)
from fuzzing import REFUSED, SAME, Wrong, attempt
from helpers import adapters_of, same_bits, snapshot
from torch import nn

import minilora

CI, SAMPLE, FULL = 120, 900, 3500


def make_model(kind: str) -> nn.Module:
    """Layers up, a.up, a.down, head, of which "4-bit" and "mixed" have some in 4 bits."""
    torch.manual_seed(0)
    inner = nn.Sequential(
        OrderedDict(up=nn.Linear(8, 8), norm=nn.LayerNorm(8), down=nn.Linear(8, 6, bias=False))
    )
    model = nn.Sequential(
        OrderedDict(up=nn.Linear(8, 8), norm=nn.LayerNorm(8), a=inner, head=nn.Linear(6, 4))
    )
    # Patterns that hang do so on long names.
    model.add_module("up" * 16, nn.Linear(4, 4))
    if kind == "half":
        model.half()
    if kind == "4-bit":
        minilora.quantize(model)
    if kind == "mixed":
        minilora.quantize(model, ["up"])
    return model


# Ways to change a folder. Each takes what it needs from the generator.

NAMES = ["up", "a.up", "a.down", "head", "norm", "a.norm", "a", "x", "", "up.weight", "q" * 3000]
NAMES += ["\x1b[2Jup", "\u202eup", "ü", "up\n", "..", "a.", "default", "\ud800"]
PATTERNS = ["up", "^up", r"a\.up", "a.up", r"^a\.up|head", ".*up", "(", "[", "*", "a{99999999999}"]
PATTERNS += [*SLOW, "(?P<x>up)", r"\1", "(?i)UP", "(" * 300 + ")" * 300, "u" * 20_000, "", "^", "$"]
ODD = [None, True, False, 0, -1, 1, 2, 3, 8, 9, 10**30, 10**400, 1e308, 1e39, 1e-320, 0.5, -0.5]
ODD += [float("nan"), float("inf"), "8", "", [], {}, ["up"], {"up": 2}, [[]], {"r": {"r": {}}}]
ODD += [[None], [1], "up", "all-linear", [""], "\x1b]0;x\x07"]
OPTIONS = ["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "modules_to_save"]
OPTIONS += ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"]
OPTIONS += ["peft_type", "bias", "use_dora", "use_rslora", "init_lora_weights", "loftq_config"]
OPTIONS += ["fan_in_fan_out", "task_type", "base_model_name_or_path", "tomorrow", "lora_bias"]


def config_value(f: Folder, rng: random.Random) -> None:
    f.config[rng.choice(OPTIONS)] = rng.choice(ODD)


def config_number(f: Folder, rng: random.Random) -> None:
    option, values = rng.choice(
        [("r", [1, 2, 3, 4, 7]), ("lora_alpha", [1, 2.5, 64, 1e-30]), ("lora_dropout", [0, 0.1])]
    )
    f.config[option] = rng.choice(values)


def config_pattern(f: Folder, rng: random.Random) -> None:
    option = rng.choice(["rank_pattern", "alpha_pattern"])
    pattern = rng.choice(PATTERNS + NAMES)
    value = rng.choice([1, 2, 3, 4, 5.5, *ODD]) if rng.random() < 0.5 else rng.choice([2, 3])
    f.config[option] = {**(f.config.get(option) or {}), pattern: value}


def config_targets(f: Folder, rng: random.Random) -> None:
    option = rng.choice(["target_modules", "target_modules", "exclude_modules", "modules_to_save"])
    several = [rng.choice(NAMES) for _ in range(rng.randint(0, 3))]
    f.config[option] = rng.choice([several, rng.choice(PATTERNS), rng.choice(NAMES)])


def config_layers(f: Folder, rng: random.Random) -> None:
    f.config["layers_to_transform"] = rng.choice([0, 1, [0], [1, 2], [], 10**9])
    f.config["layers_pattern"] = rng.choice([None, "a", ["a"], "layers", rng.choice(PATTERNS)])


def config_drop(f: Folder, rng: random.Random) -> None:
    del f.config[rng.choice(sorted(f.config))]


def config_text(f: Folder, rng: random.Random) -> None:
    good = json.dumps(f.config)
    deep = rng.choice([40, 900, 50_000])
    f.text = rng.choice(
        [
            good[:-1] + ', "tomorrow": ' + "[" * deep + "]" * deep + "}",
            good[:-1] + ', "r": 2}',
            good[:-1] + ', "loftq_config": ' + '{"a":' * 30 + "1" + "}" * 30 + "}",
            "\ufeff" + good,
            good[: rng.randrange(len(good))],
            good.replace('"', "'"),
            good[:-1] + ', "lora_alpha": ' + "9" * 5000 + "}",
            good[:-1] + ', "tomorrow": "' + "\\u202e" * 9000 + '"}',
            "[" + good + "]",
            "null",
            good + "\n\x00",
            good[:-1] + ', "\\ud800\\u001b[2J": 1}',
        ]
    )


def tensor_key(f: Folder, rng: random.Random) -> str:
    return rng.choice(sorted(f.tensors))


def tensor_drop(f: Folder, rng: random.Random) -> None:
    key = tensor_key(f, rng)
    stem = key.rpartition(".lora_")[0]
    whole = rng.random() < 0.5 and stem
    for k in [k for k in f.tensors if k == key or (whole and k.startswith(stem + "."))]:
        del f.tensors[k]


def tensor_rename(f: Folder, rng: random.Random) -> None:
    key = tensor_key(f, rng)
    layer = rng.choice(["up", "a.up", "a.down", "head", "norm", "x", "\x1b[2J", "b" * 2000])
    new = re.sub(r"model\.[\w.]*?\.(lora_|weight|bias)", rf"model.{layer}.\1", key)
    other = rng.choice([new, key.replace("lora_A", "lora_B"), key.removeprefix(PREFIX), "x"])
    f.tensors[other] = f.tensors.pop(key)


def tensor_swap(f: Folder, rng: random.Random) -> None:
    one, other = tensor_key(f, rng), tensor_key(f, rng)
    f.tensors[one], f.tensors[other] = f.tensors[other], f.tensors[one]


def tensor_twice(f: Folder, rng: random.Random) -> None:
    key = tensor_key(f, rng)
    prefix = rng.choice(["", "module.", "_orig_mod.", PREFIX + PREFIX])
    dtype, shape, raw = f.tensors[key]
    f.tensors[prefix + key.removeprefix(PREFIX)] = (dtype, shape, raw[::-1])


def tensor_value(f: Folder, rng: random.Random) -> None:
    key = tensor_key(f, rng)
    dtype, shape, raw = f.tensors[key]
    tensor = as_tensor(dtype, shape, raw) if dtype in TORCH else None
    if tensor is not None and tensor.numel():
        tensor = tensor.clone()
        value = rng.choice([math.nan, math.inf, -math.inf, 0.0, 1e-40, 65000.0, 1.5])
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
        f.tensors[key] = (dtype, shape, raw_of(tensor))


def tensor_dtype(f: Folder, rng: random.Random) -> None:
    key = tensor_key(f, rng)
    dtype, shape, raw = f.tensors[key]
    new = rng.choice(sorted(DTYPES))
    size = DTYPES[new] * math.prod(shape)
    if rng.random() < 0.5 and new in TORCH and dtype in TORCH:
        tensor = as_tensor(dtype, shape, raw)
        raw = raw if tensor is None else raw_of(tensor.to(TORCH[new]))
    f.tensors[key] = (new, shape, (raw * 8)[:size])


def tensor_shape(f: Folder, rng: random.Random) -> None:
    key = tensor_key(f, rng)
    dtype, shape, raw = f.tensors[key]
    new = rng.choice([[], [0], shape[::-1], [*shape, 1], [math.prod(shape)], [1], [2**40, 2**40]])
    if math.prod(new) < 1 << 20 and rng.random() < 0.7:
        raw = (raw * 8 + bytes(64))[: DTYPES[dtype] * math.prod(new)]
    f.tensors[key] = (dtype, new, raw)


TARGETS = ["up.weight", "up.bias", "a.norm.weight", "norm.bias", "head.weight", "a.down.weight"]
TARGETS += ["up.packed", "up.absmax", "up.offset", "a.down.packed", "up.nf4_layout", "x.weight"]
TARGETS += ["up.adapters.default.A", "up.adapters.other.B", "a.up.base_layer.weight", "weight"]


def tensor_base(f: Folder, rng: random.Random) -> None:
    """A parameter of the base, named by the config or not."""
    target = rng.choice(TARGETS)
    parameters = dict(make_model(rng.choice(["dense", "4-bit"])).named_parameters())
    like = parameters.get(target.replace(".base_layer", ""), torch.ones(8))
    value = torch.full(like.shape, 0.25) if like.is_floating_point() else torch.zeros(like.shape)
    dtype, tensor = rng.choice([("F32", value), ("F16", value.half())])
    if not like.is_floating_point():
        dtype = "U8" if like.dtype == torch.uint8 else "I32"
        tensor = torch.zeros(like.shape, dtype=like.dtype)
    f.tensors[PREFIX + target] = (dtype, list(tensor.shape), raw_of(tensor))
    if rng.random() < 0.4:
        f.config["modules_to_save"] = [target.rpartition(".")[0] or "weight"]


def metadata_value(f: Folder, rng: random.Random) -> None:
    base = {"quant_type": "nf4", "block_size": 64, "double_quant": True}
    odd = [
        base | {"block_size": 32},
        base | {"quant_type": "fp8"},
        base | {"quant_type": []},
        [],
        3,
    ]
    odd += [{}, base | {"others": {"up": {"quant_type": "dense"}}}, base | {"others": 3}]
    odd += [base | {"block_size": "64"}, {"quant_type": "dense"}, base, base | {"x": 1}]
    key = rng.choice(["minilora_base", "minilora_base", "minilora_name", "format", "x"])
    names = ["mine", "other", "", "a.b", "\x1b[2J", "\u202e", "n" * 5000, "keys", "é"]
    text = rng.choice(names) if key != "minilora_base" else json.dumps(rng.choice(odd))
    f.metadata[key] = text if rng.random() < 0.9 else "[" * rng.choice([10, 5000])


def metadata_drop(f: Folder, rng: random.Random) -> None:
    if f.metadata:
        del f.metadata[rng.choice(sorted(f.metadata))]


STRUCTURED: list[Callable[[Folder, random.Random], None]] = [
    *(config_value, config_number, config_pattern, config_targets, config_layers, config_drop),
    *(config_text, tensor_drop, tensor_rename, tensor_swap, tensor_twice, tensor_value),
    *(tensor_dtype, tensor_shape, tensor_base, tensor_base, metadata_value, metadata_drop),
]


def harm_bytes(path: Path, rng: random.Random) -> None:
    """Flips, cuts, insertions, other lengths and offsets, in one of the files."""
    file = path / rng.choice([CONFIG, WEIGHTS, WEIGHTS])
    data = bytearray(file.read_bytes())
    where = rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        data[where] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[where:]
    elif kind == 2:
        data[where:where] = rng.randbytes(rng.randint(1, 9))
    elif kind == 3:
        data[:8] = rng.choice([0, 1, 2**31, 2**63, len(data), 100_000_001]).to_bytes(8, "little")
    elif kind == 4:
        numbers = list(re.finditer(rb"\d+", data[:2000]))
        start, end = rng.choice([found.span() for found in numbers] or [(0, 1)])
        data[start:end] = str(rng.choice([0, 1, 7, 2**63, 2**64])).encode()
    else:
        del data[where : where + rng.randint(1, 16)]
    file.write_bytes(data)


def harm_files(path: Path, rng: random.Random) -> None:
    """A file that is missing, empty, a folder, a link, a pipe."""
    file = path / rng.choice([CONFIG, WEIGHTS])
    kind = rng.randrange(7)
    elsewhere = path / "elsewhere"
    file.rename(elsewhere)
    if kind == 1:
        file.write_bytes(b"")
    elif kind == 2:
        file.mkdir()
    elif kind == 3:
        file.symlink_to(elsewhere)
    elif kind == 4:
        file.symlink_to(rng.choice(["/dev/zero", "/nowhere", file.name, "."]))
    elif kind == 5:
        os.mkfifo(file)
    elif kind == 6:
        elsewhere.rename(file)
        planted = path / f".{CONFIG}.abcd1234.partial"
        planted.mkdir()
        (planted / WEIGHTS).write_bytes(rng.randbytes(99))


def build(path: Path, rng: random.Random) -> tuple[str, str]:
    """Saves a valid adapter; returns the kind of model and whether the folder is PEFT's."""
    kind = rng.choice(["dense", "dense", "4-bit", "mixed", "half"])
    model = make_model(kind)
    targets = rng.choice(["all-linear", ["up"], ["a.up", "head"], ["up", "down"]])
    also: Any = rng.choice([(), (), ["norm"], ["a.norm.bias"]])
    minilora.inject(model, r=rng.choice([2, 3]), alpha=4.0, targets=targets, train_also=also)
    adapters = list(adapters_of(model).values())
    if rng.random() < 0.3:
        adapters[0].alpha = 9.0
    generator = torch.Generator().manual_seed(rng.randrange(99))
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator))
    with warnings.catch_warnings():
        # What other programs do not serve is not in question.
        warnings.simplefilter("ignore")
        minilora.save_adapter(model, path)
    return kind, rng.choice(["ours", "ours", "peft"])


def receiver(kind: str, path: Path, rng: random.Random) -> nn.Module:
    """The model to load into: bare, with the same adapter already, or with another one."""
    model = make_model(kind)
    state = rng.choice(["bare", "bare", "same", "other"])
    if state == "same":
        minilora.load_adapter(model, path)
        with torch.no_grad():
            for p in minilora.adapter_parameters(model):
                p.mul_(-2)
    if state == "other":
        minilora.inject(model, r=1, targets=["up"], name="other")
    return model


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    path = folder / "adapter"
    kind, style = build(path, rng)
    model = receiver(kind, path, rng)
    if style == "peft":
        plain = Folder(path)
        plain.metadata = {"format": "pt"}
        plain.write(path, "none")
    unchanged = Folder(path)

    hashes, done = "kept", []
    way = rng.random()
    if way < 0.7:
        changed = Folder(path)
        hashes = "none" if style == "peft" else rng.choice(["fit", "fit", "none", "kept"])
        for change in rng.choices(STRUCTURED, k=rng.choice([1, 1, 2, 3])):
            with_context(change, changed, rng)
            done.append(change.__name__)
        changed.write(path, hashes)
    if 0.65 < way < 0.9:
        harm_bytes(path, rng)
        hashes = "bytes"
    if way > 0.88:
        harm_files(path, rng)

    name = rng.choice([None, None, None, "mine"])
    before, picture, said = state(model), snapshot(model), adapter_options(model)
    names = [str(path), CONFIG, WEIGHTS, "the adapter '", "name="]
    _, error = attempt(lambda: minilora.load_adapter(model, path, name), names)
    if error is not None:
        after = state(model)
        same = before.keys() == after.keys() and all(same_bits(after[k], before[k]) for k in before)
        if not same or snapshot(model) != picture or adapter_options(model) != said:
            raise Wrong("changed", f"{done}: {error}")
        return REFUSED
    judge_loaded(path, model, before, name)
    judge_claims(path, unchanged, hashes, name)
    return SAME


def with_context(change: Callable[..., None], folder: Folder, rng: random.Random) -> None:
    """Applies a change, unless an earlier one left nothing for it."""
    try:
        change(folder, rng)
    except (IndexError, KeyError, TypeError):
        if folder.tensors and folder.config:
            raise


# What is compiled and imported once does not count as the time of the first case.
make_model("4-bit")
importlib.import_module("regex")
