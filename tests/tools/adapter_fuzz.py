"""What the fuzz family of adapter folders reads, writes and compares, without minilora's reader."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from fuzzing import Wrong
from helpers import adapters_of, same_bits
from torch import Tensor, nn

from minilora.files.hashing import sha256_of_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Patterns that hang in `re`. Those that `load_adapter` accepts match no layer of the models.
SLOW = ["(a+)+b", "(.*)*x", "((a|u|p|\\.)*)*$x", "(up|a|\\.|u)+z", "(a|a)(a|a)(a|a)(a|a)*b"]
SLOW += [r"(([\w.])+)+!", r"(\w|\.|a|u|p)*(\w|\.|u|p|a)*(\w|\.)*!", "((u|p|up)+)+[^a-z]"]


class Folder:
    """A folder as it will be written: the config, header entries with their bytes, metadata."""

    def __init__(self, path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, data = json.loads(data[8 : 8 + length]), data[8 + length :]
        self.config: Any = json.loads((path / CONFIG).read_text())
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors: dict[str, tuple[str, list[int], bytes]] = {
            key: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
            for key, e in header.items()
        }
        self.text: str | None = None

    def write(self, path: Path, hashes: str) -> None:
        """Writes both files; hashes are made to fit, left as they were, or left out."""
        text = self.text or json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        (path / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
        metadata = dict(self.metadata)
        if hashes == "none":
            metadata = {k: v for k, v in metadata.items() if not k.endswith("sha256")}
        if hashes == "fit":
            config_hash = hashlib.sha256((path / CONFIG).read_bytes()).hexdigest()
            metadata["adapter_config_sha256"] = config_hash
            metadata["contents_sha256"] = self._tensors_hash()

        header: dict[str, Any] = {"__metadata__": metadata}
        data = b""
        for key, (dtype, shape, raw) in self.tensors.items():
            header[key] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
        packed = json.dumps(header).encode()
        packed += b" " * (-len(packed) % 8)
        (path / WEIGHTS).write_bytes(len(packed).to_bytes(8, "little") + packed + data)

    def _tensors_hash(self) -> str:
        tensors = {k: as_tensor(*entry) for k, entry in self.tensors.items() if entry[0] in TORCH}
        return sha256_of_tensors({k: t for k, t in tensors.items() if t is not None})


def as_tensor(dtype: str, shape: list[int], raw: bytes) -> Tensor | None:
    if len(raw) != DTYPES[dtype] * math.prod(shape):
        return None
    if not raw:
        return torch.empty(shape, dtype=TORCH[dtype])
    return torch.frombuffer(bytearray(raw), dtype=TORCH[dtype]).reshape(shape)


def raw_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    tensors = {name: p.detach().clone() for name, p in named}
    return tensors | {name: b.clone() for name, b in model.named_buffers()}


def adapter_options(model: nn.Module) -> list[Any]:
    """What an adapter is besides tensors."""
    names = ("default", "other", "mine")
    return [
        (name, path, adapter.config(), adapter.training)
        for name in names
        for path, adapter in adapters_of(model, name).items()
    ]


def expected_alpha(config: dict[str, Any], layer: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        # The patterns that hang are refused, or match no name at all.
        if pattern not in SLOW and re.match(rf"(.*\.)?({pattern})$", layer):
            return float(alpha)
    alpha = config.get("lora_alpha")
    return 8.0 if alpha is None else float(alpha)


def judge_loaded(path: Path, model: nn.Module, before: dict[str, Tensor], name: str | None) -> None:
    """Raises Wrong unless the model has exactly what the folder says, and is else as before."""
    from safetensors import safe_open

    config = json.loads((path / CONFIG).read_bytes().decode())
    with safe_open(path / WEIGHTS, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key in list(tensors):
        for prefix in ("module.", "_orig_mod.", PREFIX):
            if key.startswith(prefix):
                tensors[key.removeprefix(prefix)] = tensors.pop(key)

    name = name or metadata.get("minilora_name", "default")
    found = adapters_of(model, name)
    layers = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    if found.keys() != layers:
        raise Wrong("silent", f"adapters on {sorted(found)}, files for {sorted(layers)}")

    after = state(model)
    mine = {f"{layer}.adapters.{name}.{end}" for layer in layers for end in ("A", "B")}
    for layer, adapter in found.items():
        for end in ("A", "B"):
            value = tensors.pop(f"{layer}.lora_{end}.weight").float()
            if not same_bits(after[f"{layer}.adapters.{name}.{end}"], value):
                raise Wrong("silent", f"{end} of {layer} is not that of the file")
            if not bool(value.isfinite().all()):
                raise Wrong("silent", f"{end} of {layer} is not finite")
        alpha, dropout = expected_alpha(config, layer), float(config.get("lora_dropout") or 0)
        if config.get("use_rslora") is True:
            # alpha / sqrt(r) as the alpha / r of a plain adapter.
            alpha *= math.sqrt(adapter.r)
        if (adapter.alpha, adapter.dropout) != (alpha, dropout):
            raise Wrong("silent", f"{layer}: {adapter}, the config: {alpha}, {dropout}")
        if not (0 < alpha < 3.5e38 and 0 <= dropout < 1):
            raise Wrong("silent", f"{layer}: alpha {alpha}, dropout {dropout}")

    saved = config.get("modules_to_save") or []
    biases = config.get("bias") in ("all", "lora_only")
    for key, value in tensors.items():
        module, _, end = key.rpartition(".")
        if end == "bias" and biases and same_bits(after[key], value.to(before[key].dtype)):
            continue
        module = module or key
        if not any(re.search(rf"{re.escape(m)}(\.|$)", module) for m in saved):
            raise Wrong("silent", f"{key} is overwritten, and modules_to_save is {saved}")
        if not same_bits(after[key], value.to(before[key].dtype)):
            raise Wrong("silent", f"{key} is not that of the file")
    for key, value in after.items():
        if key not in mine and key not in tensors and not same_bits(value, before.get(key)):
            raise Wrong("silent", f"{key} has changed")


def judge_claims(path: Path, unchanged: Folder, hashes: str, name: str | None) -> None:
    """Raises Wrong if files that have other contents were loaded under the hashes of the old."""
    if hashes != "kept":
        return
    now = Folder(path)
    if "contents_sha256" in now.metadata and now.tensors != unchanged.tensors:
        raise Wrong("silent", "other tensors under the hash of the old ones")
    if "adapter_config_sha256" in now.metadata and now.config != unchanged.config:
        raise Wrong("silent", "another config under the hash of the old one")
