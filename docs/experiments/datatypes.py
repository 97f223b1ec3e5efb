r"""Four bits per weight: NormalFloat4 loses less than FP4, and FP4 less than int4.

The claim. Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, "QLoRA: Efficient Finetuning of
Quantized LLMs", arXiv:2305.14314, section 3, table 2: mean perplexity of 27 models 27.41 with NF4
(and double quantization), 29.48 and 31.07 with the FP4 formats E3M0 and E2M1, 34.34 with int4.

What we run. Weights from the normal distribution, in blocks of 64 with one absmax each, as the
paper has them. A type is a set of levels in [-1, 1], and a weight becomes the nearest one:

    w -> absmax(block) * level nearest to w / absmax(block)

    error = sqrt(mean (w - w')^2) / sqrt(mean w^2)

We measure the error and not perplexity: what a model makes of the error depends on the model. The
same is measured over block sizes and on the weights of a tiny Llama, with what its loss becomes.

What would refute it: a seed in which the order of the errors is another one.
"""

import torch
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture
from tiny import facts, make_base, measure
from torch import Tensor

from minilora.kernels.reference.codebooks import FP4, NF4

TITLE = "NF4 loses less than FP4, and FP4 less than int4"
PAPER = "QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3, table 2"
MODEL = "normal weights; tiny Llama"
SEEDS = (0, 1, 2)

# int4: equal steps, symmetric around zero. E3M0: a sign and three bits of exponent, powers of two.
LEVELS = {
    "NF4": NF4,
    "FP4 (E2M1)": tuple(set(FP4)),
    "FP4 (E3M0)": (0.0, *(sign * 2.0**-n for n in range(7) for sign in (1, -1))),
    "int4": tuple(n / 7 for n in range(-7, 8)),
}
BLOCK = 64
BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantized(w: Tensor, levels: tuple[float, ...], block: int) -> Tensor:
    """Every weight as the nearest level of its block."""
    rows = w.flatten().reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    table = torch.tensor(levels, dtype=w.dtype).sort().values
    thresholds = (table[1:] + table[:-1]) / 2
    return (table[torch.bucketize(rows / absmax, thresholds)] * absmax).reshape(w.shape)


def relative_error(w: Tensor, levels: tuple[float, ...], block: int) -> float:
    return ((w - quantized(w, levels, block)).norm() / w.norm()).item()


def run(seed: int, short: bool = False) -> Numbers:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2**16 if short else 2**22, generator=generator)
    numbers = {
        f"normal, {name}, {block}": relative_error(w, levels, block)
        for name, levels in LEVELS.items()
        for block in BLOCKS
    }
    return numbers | on_trained_weights(seed, short)


def on_trained_weights(seed: int, short: bool) -> Numbers:
    """The mean error on the weights of a tiny Llama, and its loss on the facts that it knows."""
    model = make_base(seed, short)
    known, _ = facts(seed, short)
    weights = {name: p.detach() for name, p in model.named_parameters() if "_proj" in name}
    numbers = {"loss, float32": measure(model, known)}
    for kind, levels in LEVELS.items():
        errors = [relative_error(W, levels, BLOCK) for W in weights.values()]
        numbers[f"trained, {kind}"] = sum(errors) / len(errors)
        for name, W in weights.items():
            model.get_parameter(name).data = quantized(W, levels, BLOCK)
        numbers[f"loss, {kind}"] = measure(model, known)
    return numbers


def checks(results: list[Numbers]) -> list[Check]:
    def error(name: str) -> list[float]:
        return over_seeds(results, f"normal, {name}, {BLOCK}")

    def below(first: str, second: str, says: str) -> Check:
        pairs = list(zip(error(first), error(second), strict=True))
        return Check(
            says=says,
            rule=f"the error of {first} is below that of {second} in every seed",
            measured=f"{first} {spread(error(first), 4)}, {second} {spread(error(second), 4)}",
            holds=all(a < b for a, b in pairs),
        )

    losses = {kind: over_seeds(results, f"loss, {kind}") for kind in ("float32", *LEVELS)}
    others = [min(result[f"loss, {kind}"] for kind in [*LEVELS][1:]) for result in results]
    return [
        below("NF4", "FP4 (E2M1)", "perplexity 27.41 with NF4, 31.07 with E2M1"),
        below("NF4", "int4", "perplexity 27.41 with NF4, 34.34 with int4"),
        below("FP4 (E2M1)", "int4", "perplexity 31.07 with E2M1, 34.34 with int4"),
        below("FP4 (E3M0)", "FP4 (E2M1)", "perplexity 29.48 with E3M0, 31.07 with E2M1"),
        Check(
            says="a model is best with NF4",
            rule="a tiny Llama has a lower loss in NF4 than in the other three in every seed",
            measured=", ".join(f"{kind} {spread(found)}" for kind, found in losses.items()),
            holds=all(a < b for a, b in zip(losses["NF4"], others, strict=True)),
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    series = {
        name: [(block, over_seeds(results, f"normal, {name}, {block}")) for block in BLOCKS]
        for name in LEVELS
    }
    losses = {
        kind: [(place, over_seeds(results, f"loss, {kind}"))] for place, kind in enumerate(LEVELS)
    }
    short = dict(enumerate(("NF4", "E2M1", "E3M0", "int4")))
    panels = [
        Panel(
            "weights per block",
            "relative error of normal weights",
            series,
            log_x=True,
            ticks=(16, 64, 256, 1024, 4096),
        ),
        Panel("blocks of 64", "loss of a tiny Llama", losses, names=short),
    ]
    return draw("The error of four data types by block size, and a model's loss", panels)


if __name__ == "__main__":
    main(run, checks)
