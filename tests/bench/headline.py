"""QLoRA's headline, a 65B model fine-tuned on one 48 GB GPU: real steps of a model of that shape.

    python tests/bench/headline.py                                  65B on a GPU capped at 48 GB
    python tests/bench/headline.py --shape 7b --tokens 256          the scaled twins on the CPU
    python tests/bench/headline.py --shape 33b --tokens 64
    python tests/bench/headline.py --shape 65b --tokens 16 --mapped /a/folder/with/34/GB

The weights are random and made in 4 bits: the model is built on the meta device, without memory,
and each linear layer becomes an `NF4Linear` of random codes whose weights have the variance of an
initialised layer, 1 / in_features. No layer is ever dense. Embedding, head and norms are bfloat16,
as QLoRA leaves them. A step is forward with gradient checkpointing, backward, and PagedAdamW over
adapters of rank 16 on all linear layers; the loss has to be finite and the adapters have to change.

With --mapped, the codes are in a file that the process maps and cannot write to: the system reads
them from the disk as the layers need them, and drops them when memory is short. The file is removed
afterwards.
"""

import argparse
import contextlib
import json
import mmap
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import side_by_side as bench
import torch
from sides import minilora_loss, minilora_training
from torch import Tensor, nn

# LLaMA (arXiv:2302.13971, table 2) and the intermediate sizes of the config.json files; the paper's
# 33B is named 30B there.
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "heads": 40},
    "33b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "heads": 52},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "heads": 64},
}
VOCABULARY = 32000
CAP = 48e9
RANK = 16

# n -> a uint8 tensor of n random bytes.
RandomBytes = Callable[[int], Tensor]


def config_of(shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig

    sizes = {name: size for name, size in shape.items() if name != "heads"}
    heads = {"num_attention_heads": shape["heads"], "vocab_size": VOCABULARY}
    return LlamaConfig(**(heads | sizes), tie_word_embeddings=False)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that are quantized: all but the output head."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def random_weight(O: int, I: int, codes: RandomBytes, device: torch.device) -> Any:
    """A double-quantized weight [O, I] of random codes, of variance about 1 / I."""
    import minilora
    from minilora.kernels.reference.codebooks import NF4

    blocks = -(-O * I // 64)
    groups = -(-blocks // 256)
    # W = level * absmax with random levels, and absmax between 0.5 and 1.5 times the offset.
    spread = sum(level**2 for level in NF4) / 16
    absmax = (I * spread) ** -0.5
    return minilora.NF4Weight(
        packed=codes(O * I // 2),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        absmax2=torch.full((groups,), 0.5 * absmax, device=device),
        offset=torch.tensor(absmax, device=device),
        shape=torch.Size((O, I)),
        dtype=torch.bfloat16,
    )


def build(config: Any, codes: RandomBytes, device: torch.device) -> nn.Module:
    """A model of 4-bit layers with random codes. Nothing dense is made but what stays dense."""
    from transformers import LlamaForCausalLM

    import minilora

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, linear in linears(model):
        weight = random_weight(linear.out_features, linear.in_features, codes, device)
        model.set_submodule(name, minilora.NF4Linear(weight))

    # What is still on the meta device: embedding, head, norms, and the rotary frequencies, which no
    # state dict holds and only the constructor computes.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                values = torch.ones(p.shape, dtype=p.dtype, device=device)
                if p.dim() > 1:
                    values.normal_(0, 0.02)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    bench.check("no tensor is left on the meta device", not any(p.is_meta for p in tensors(model)))
    return model


def tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


# -- where the codes come from -------------------------------------------------------------------


def in_memory(device: torch.device) -> RandomBytes:
    return lambda n: torch.randint(0, 256, (n,), dtype=torch.uint8, device=device)


@contextlib.contextmanager
def mapped_file(folder: Path, size: int) -> Iterator[RandomBytes]:
    """Random bytes from a file of `size` bytes that is mapped, and removed at the end.

    Raises:
        SystemExit: the disk has no room for it.
    """
    # Every layer starts on a page of its own.
    page = os.sysconf("SC_PAGE_SIZE")
    free = shutil.disk_usage(folder).free
    if free < size + (4 << 30):
        raise SystemExit(
            f"--mapped {folder}: the codes take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free there: name a folder on a larger disk"
        )
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".codes") as file:
        left = size
        while left > 0:
            chunk = os.urandom(min(left, 64 << 20))
            file.write(chunk)
            left -= len(chunk)
        file.flush()
        whole = _read_only(file.fileno(), size)
        at = 0

        def take(n: int) -> Tensor:
            nonlocal at
            part = whole[at : at + n]
            at += -(-n // page) * page
            bench.check("the file of codes is long enough", part.numel() == n)
            return part

        yield take


def _read_only(file: int, size: int) -> Tensor:
    """Maps a file. Pages that could be written to would need memory, and 32 GB of it be refused."""
    memory = mmap.mmap(file, size, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)


def mapped_size(model: nn.Module) -> int:
    """Bytes of the file: the codes of every layer, from a page's start."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(-(-layer.weight.numel() // 2 // page) * page for _, layer in linears(model))


# -- the steps -----------------------------------------------------------------------------------


def train(model: Any, tokens: int, steps: int, device: torch.device) -> bench.Result:
    """Real QLoRA steps. Returns losses, seconds of each step and the number of trained numbers."""
    import minilora

    minilora.inject(model, RANK)
    model.train()
    optimizer = minilora.PagedAdamW(minilora.adapter_parameters(model), lr=2e-4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=generator).to(device)

    loss_of, losses, seconds = minilora_loss(model), [], []
    with minilora_training(model, checkpointing=True):
        for _ in range(steps):
            start = time.perf_counter()
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
    trained = minilora.adapter_parameters(model)
    bench.check("the losses are finite", all(torch.tensor(losses).isfinite()))
    # Every B starts at zero.
    changed = all(layer.adapters["default"].B.any() for layer in adapted(model))
    bench.check("every adapter was trained", changed)
    return {"losses": losses, "seconds": seconds, "trained": sum(p.numel() for p in trained)}


def adapted(model: nn.Module) -> Iterator[Any]:
    from minilora.lora import LoRALayer

    yield from (module for module in model.modules() if isinstance(module, LoRALayer))


def on_gpu(shape: str, tokens: int, steps: int) -> bench.Result:
    """The steps on a GPU whose memory is capped at 48 GB."""
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    if total < CAP:
        raise SystemExit(f"this GPU has {total / 1e9:.0f} GB, and the headline needs 48")
    torch.cuda.set_per_process_memory_fraction(CAP / total)
    model = build(config_of(SHAPES[shape]), in_memory(device), device)
    result = train(model, tokens, steps, device)
    return result | {
        "where": f"{torch.cuda.get_device_name()} capped at {CAP / 1e9:.0f} GB",
        "peak": torch.cuda.max_memory_reserved(),
    }


def on_cpu(shape: str, tokens: int, steps: int, mapped: Path | None, threads: int) -> bench.Result:
    """The steps on the CPU; the peak is that of the process, its libraries included."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    config = config_of(SHAPES[shape])
    with contextlib.ExitStack() as stack:
        codes = in_memory(device)
        if mapped:
            from transformers import LlamaForCausalLM

            with torch.device("meta"):
                size = mapped_size(LlamaForCausalLM(config))
            codes = stack.enter_context(mapped_file(mapped, size))
        result = train(build(config, codes, device), tokens, steps, device)
        sizes = {"peak": bench.memory(), "anonymous": bench.memory("RssAnon")}
    return result | sizes | {"where": "CPU, mapped from disk" if mapped else "CPU"}


def line(shape: str, tokens: int, result: bench.Result) -> str:
    """One sentence for what a run took."""
    losses = ", ".join(f"{loss:.3f}" for loss in result["losses"])
    seconds = ", ".join(f"{each:.1f}" for each in result["seconds"])
    return (
        f"{shape}, {tokens} tokens, r={RANK}, {result['trained']:,} trained numbers, "
        f"{result['where']}: peak {result['peak'] / 1e9:.2f} GB; seconds per step {seconds}; "
        f"losses {losses}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="a twin on the CPU; default: 65b on a GPU")
    parser.add_argument("--tokens", type=int, help="default: 512 on a GPU, 64 on the CPU")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--mapped", type=Path, help="folder for a file of the codes, mapped")
    bench.add_options(parser)
    options = parser.parse_args()
    if options.child:
        arguments = json.loads(options.child)
        mapped = arguments["mapped"]
        print(json.dumps(on_cpu(**arguments | {"mapped": Path(mapped) if mapped else None})))
        return

    if options.shape is None and not torch.cuda.is_available():
        print(
            "no GPU here: the 65B model on a GPU capped at 48 GB was not run. The scaled twins run "
            "on the CPU: --shape 7b, 13b or 33b; --shape 65b --mapped FOLDER"
        )
        return
    bench.begin(parser, options)
    if options.shape is None:
        shape, tokens = "65b", options.tokens or 512
        result = on_gpu(shape, tokens, options.steps)
    else:
        shape, tokens = options.shape, options.tokens or 64
        arguments = {"shape": shape, "tokens": tokens, "steps": options.steps}
        arguments |= {"mapped": options.mapped and str(options.mapped.resolve())}
        result = bench.run(__file__, arguments, options.threads)
    print(line(shape, tokens, result))
    rows = {f"{shape}, {tokens} tokens": result | {"shape": shape, "tokens": tokens}}
    if options.store:
        # The other shapes stay.
        here = bench.file_name(bench.machine(options.threads))
        earlier = bench.RESULTS / here / "headline.json"
        rows = (json.loads(earlier.read_text())["rows"] if earlier.exists() else {}) | rows
    bench.finish("headline", {"rows": rows}, options)


if __name__ == "__main__":
    main()
