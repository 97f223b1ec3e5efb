"""A hundred steps of minilora and of peft + bitsandbytes in float32: the same loss at every step.

    python tests/bench/losses.py

bitsandbytes quantizes SmolLM2-135M and saves it; minilora reads those bytes. Both sides start from
the same adapter (r = 8 on all linear layers, B = 0) and take the same steps with AdamW on the same
text, a different piece of it at every step. The script fails if two losses differ by more than
1e-3.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import side_by_side as bench
from sides import (
    OURS,
    THEIRS,
    Case,
    Side,
    child_arguments,
    import_libraries,
    minilora_loss,
    peft_side,
    set_adapters,
    smollm2,
    text_ids,
)

STEPS, BOUND = 100, 1e-3
CASE = Case(dtype="float32", batch=1, length=64)


def quantize(folder: Path, out: Path) -> None:
    """bitsandbytes' 4-bit model, as a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


def ours(folder: Path) -> Side:
    """minilora on the bytes that bitsandbytes wrote."""
    import minilora

    model: Any = minilora.load(folder)[0]
    minilora.inject(model, CASE.rank, alpha=CASE.alpha)
    return Side(model.train(), minilora_loss(model))


def train(side: str, folder: Path, quantized: Path, steps: int, threads: int) -> bench.Result:
    """The losses of one side, in this process."""
    import torch

    torch.set_num_threads(threads)
    import_libraries(side, folder)
    built = ours(quantized) if side == OURS else peft_side(folder, CASE)
    bench.check("adapters", set_adapters(built.model) > 0)

    optimizer = torch.optim.AdamW(built.trained, lr=1e-4)
    losses = []
    for step in range(steps):
        ids = text_ids(folder, CASE.batch, CASE.length, offset=step * CASE.length)
        loss = built.loss(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses}


def compare(folder: Path, options: argparse.Namespace) -> bench.Result:
    """Both sides; ends the script if they are apart."""
    with tempfile.TemporaryDirectory() as temporary:
        common = {"folder": str(folder), "quantized": temporary}
        bench.run(__file__, common, options.threads)
        found = {}
        for side in (OURS, THEIRS):
            arguments = common | {"side": side, "steps": options.steps}
            found[side] = bench.run(__file__, arguments, options.threads)["losses"]
    bench.check_close("float32", found[OURS], found[THEIRS], BOUND)
    apart = [abs(a - b) for a, b in zip(found[OURS], found[THEIRS], strict=True)]
    return {"bound": BOUND, "largest difference": max(apart), "losses": found}


def summary(results: bench.Result) -> str:
    """One paragraph."""
    losses = results["losses"][OURS]
    return (
        f"{len(losses)} steps in float32, {CASE.batch} x {CASE.length} tokens, the same bytes, "
        f"adapter and text: the losses differ by {results['largest difference']:.1e} at most "
        f"(bound {results['bound']:g}), while they fall from {losses[0]:.3f} to {losses[-1]:.3f}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    bench.add_options(parser)
    options = parser.parse_args()
    if options.child:
        arguments = child_arguments(options.child)
        arguments["quantized"] = Path(arguments["quantized"])
        if "side" in arguments:
            print(json.dumps(train(**arguments)))
        else:
            quantize(arguments["folder"], arguments["quantized"])
            print("{}")
        return

    # Losses do not depend on what else runs.
    options.noisy = not options.store
    bench.begin(parser, options)
    results = compare(options.model or smollm2(), options)
    print(summary(results))
    bench.finish("losses", results, options)


if __name__ == "__main__":
    sys.exit(main())
