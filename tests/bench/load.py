"""Loading a model in 4 bits: memory and time of minilora and of transformers with bitsandbytes.

    python tests/bench/load.py

Two loads: SmolLM2-135M from a float32 file into bfloat16, and a model of TinyLlama-1.1B's shape
with random weights from bfloat16 shards into float32. Each runs in a process of its own. This one
reads the memory of that process from /proc while it loads, and prints the peak above the start.

Anonymous memory (RssAnon) is what a process needs; pages of a mapped file, which RSS counts as
well, can be taken away at any time. Nothing is printed unless both sides have the same packed
bytes.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# As TinyLlama/TinyLlama-1.1B-Chat-v1.0's config.json says.
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}

# Name -> how its folder is made, the dtype it is loaded in.
Case = tuple[Callable[[Path], None], torch.dtype]


def smollm2(folder: Path) -> None:
    """The bundled model in float32, as one file."""
    from transformers import AutoModelForCausalLM

    from minilora.huggingface.bundled import bundled_model_folder

    model = AutoModelForCausalLM.from_pretrained(bundled_model_folder(), dtype=torch.float32)
    model.save_pretrained(folder)


def tinyllama(folder: Path) -> None:
    """Random weights of 1.1 billion parameters in bfloat16, one shard per layer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**TINYLLAMA, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    places = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            shape = model.get_parameter(name).shape
            values = torch.randn(shape, generator=generator).mul_(0.02)
            tensors[name] = (values if len(shape) > 1 else values + 1).to(torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CASES: dict[str, Case] = {
    "SmolLM2-135M, float32 file into bfloat16": (smollm2, torch.bfloat16),
    "1.1B parameters, bfloat16 file into float32": (tinyllama, torch.float32),
}


def minilora_config(dtype: torch.dtype) -> Any:
    import minilora
    from minilora.huggingface.quantizer import NF4Config

    minilora.quantize_nf4(torch.randn(64, 64, dtype=dtype))
    return NF4Config()


def bitsandbytes_config(dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import quantize_4bit
    from transformers import BitsAndBytesConfig

    quantize_4bit(torch.randn(64, 64, dtype=dtype), quant_type="nf4", compress_statistics=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


SIDES: dict[str, Callable[[torch.dtype], Any]] = {
    "minilora": minilora_config,
    "bitsandbytes": bitsandbytes_config,
}


def load(side: str, folder: str, dtype: torch.dtype) -> None:
    """In a process of its own: loads when it is told to, says how long it took and what it has."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # What either side imports and compiles on first use is not part of a load.
    config, _ = SIDES[side](dtype), LlamaForCausalLM
    print("ready", flush=True)
    sys.stdin.readline()

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}), flush=True)
    sys.stdin.readline()

    digest = hashlib.sha256()
    for name, module in model.named_modules():
        packed = getattr(module, "packed", getattr(module, "weight", None))
        if isinstance(packed, torch.Tensor) and packed.dtype == torch.uint8:
            digest.update(name.encode() + packed.view(-1).numpy().tobytes())
    dtypes = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
    print(json.dumps({"packed": digest.hexdigest(), "dtypes": dtypes}), flush=True)


def memory(pid: int) -> dict[str, float]:
    """MiB of a process: anonymous memory, and all that is resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(entries[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS")}


def measure(side: str, folder: Path, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """Runs one load and follows its memory."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--threads", str(threads)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **pipes) as child:
        assert child.stdin and child.stdout
        if child.stdout.readline() != "ready\n":
            sys.exit(f"{side} could not start")
        first = memory(child.pid)
        peak = dict(first)
        child.stdin.write("\n")
        child.stdin.flush()

        os.set_blocking(child.stdout.fileno(), False)
        while not (line := child.stdout.readline()):
            if child.poll() is not None:
                sys.exit(f"{side} ended while it loaded")
            now = memory(child.pid)
            peak = {name: max(peak[name], now[name]) for name in peak}
            time.sleep(0.001)
        os.set_blocking(child.stdout.fileno(), True)
        last = memory(child.pid)
        result = json.loads(line)
        child.stdin.write("\n")
        child.stdin.flush()
        result |= json.loads(child.stdout.readline())
    result["peak"] = peak["RssAnon"] - first["RssAnon"]
    result["peak, with file pages"] = peak["VmRSS"] - first["VmRSS"]
    result["afterwards"] = last["RssAnon"] - first["RssAnon"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--side", choices=SIDES, help="load one (what each process runs)")
    parser.add_argument("--folder")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        load(args.side, args.folder, getattr(torch, args.dtype))
        return

    if not Path("/proc/self/status").exists():
        sys.exit("memory is read from /proc, which this system does not have")
    packages = ("torch", "transformers", "bitsandbytes", "numba")
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    print(f"{platform.machine()}, {args.threads} threads; {versions}")
    print("peak above the start, MiB\n")
    print("| load | side | anonymous | with file pages | afterwards | seconds |")
    print("|---|---|---|---|---|---|")
    for name, (make, dtype) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            rows = {side: measure(side, Path(folder), dtype, args.threads) for side in SIDES}
        compare(name, rows)


def compare(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Prints one load, unless the two sides differ in what they loaded."""
    ours, theirs = rows["minilora"], rows["bitsandbytes"]
    for what in ("packed", "dtypes"):
        if ours[what] != theirs[what]:
            sys.exit(f"{name}: the sides differ in {what}: {ours[what]}, {theirs[what]}")
    figures = ("peak", "peak, with file pages", "afterwards")
    for side, row in rows.items():
        cells = [f"{row[figure]:,.0f}" for figure in figures] + [f"{row['seconds']:.2f}"]
        print(f"| {name} | {side} | {' | '.join(cells)} |")
    share = [ours[figure] / theirs[figure] for figure in (*figures, "seconds")]
    print(f"| | ours / theirs | {' | '.join(f'{value:.2f}' for value in share)} |", flush=True)


if __name__ == "__main__":
    main()
