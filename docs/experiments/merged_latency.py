r"""Merging costs nothing in latency.

The claim. Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1, "No Additional Inference Latency":
W + (alpha / r) B A has the shape of W, so a merged model is as fast as the base. An adapter that is
a layer of its own is not (section 3 and table 1, of bottleneck adapters: up to 30 % at batch 1).

    two products more per layer:  y = x W^T + s (x A^T) B^T        merged:  y = x (W + s B A)^T

What we run. Six layers in the shape of SmolLM2-135M with random weights, float32: the time of one
token, batch 1, one thread, of the base, with adapters of r = 16 on all linear layers, and merged.
The three take turns, 200 rounds per seed. Other programs can only make a round slower, so the
lower quartile of the rounds counts.

What would refute it: merged is more than 5 % slower than the base in a seed.
"""

import copy
import statistics
import time
from typing import Any

import torch
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture
from torch import Tensor

import minilora

TITLE = "Merging costs nothing in latency"
PAPER = "LoRA (Hu et al. 2021, arXiv:2106.09685), section 4.1 and table 1"
MODEL = "SmolLM2's shape, random weights"
SEEDS = (0, 1, 2)

SIDES = ("base", "adapter", "merged")
ROUNDS = 200


def new_model(seed: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).eval()


def three_models(seed: int, layers: int) -> dict[str, Any]:
    """The base; with adapters that change something; with the same ones merged."""
    base = new_model(seed, layers)
    adapter = minilora.inject(copy.deepcopy(base), r=16, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in minilora.adapter_parameters(adapter):
            parameter.normal_(std=0.02, generator=generator)
    merged = minilora.merge(copy.deepcopy(adapter))
    # A copy as the others are: where a weight lies in memory shows in its speed.
    return {"base": copy.deepcopy(base), "adapter": adapter.eval(), "merged": merged.eval()}


@torch.no_grad()
def run(seed: int, short: bool = False) -> Numbers:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(three_models(seed, layers=1 if short else 6), seed, short)
    finally:
        torch.set_num_threads(threads)


def measure(models: dict[str, Any], seed: int, short: bool) -> Numbers:
    """Milliseconds of each model, in alternating order.

    Raises:
        ValueError: the merged model computes something else than the unmerged one.
    """
    token = torch.tensor([[seed + 1]])

    def logits(side: str) -> Tensor:
        return models[side](input_ids=token, use_cache=False).logits

    # A wrong result is not timed.
    difference = (logits("adapter") - logits("merged")).abs().max().item()
    changed = (logits("adapter") - logits("base")).abs().max().item()
    if difference > changed / 100:
        raise ValueError(f"merged differs from unmerged by {difference}, from base by {changed}")

    milliseconds: dict[str, list[float]] = {side: [] for side in SIDES}
    warm, rounds = (1, 3) if short else (10, ROUNDS)
    for turn in range(warm + rounds):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            start = time.perf_counter()
            logits(side)
            if turn >= warm:
                milliseconds[side].append(1e3 * (time.perf_counter() - start))
    return {side: statistics.quantiles(times, n=4)[0] for side, times in milliseconds.items()}


def checks(results: list[Numbers]) -> list[Check]:
    def ratio(side: str) -> list[float]:
        return [result[side] / result["base"] for result in results]

    times = ", ".join(f"{side} {spread(over_seeds(results, side), 2)} ms" for side in SIDES)
    return [
        Check(
            says="a merged model is as fast as the base",
            rule="merged over base is at most 1.05 in every seed",
            measured=f"{spread(ratio('merged'), 2)}; {times}",
            holds=max(ratio("merged")) <= 1.05,
        ),
        Check(
            says="an adapter that is a part of its own costs time",
            rule="unmerged over base is at least 1.1 in every seed",
            measured=spread(ratio("adapter"), 2),
            holds=min(ratio("adapter")) >= 1.1,
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    names = dict(enumerate(("base", "unmerged adapters", "merged")))
    series = {"one token": [(i, over_seeds(results, side)) for i, side in enumerate(SIDES)]}
    panel = Panel("", "milliseconds", series, names=names, joined=False)
    return draw("The time of one token: base, with adapters, merged", [panel])


if __name__ == "__main__":
    main(run, checks)
