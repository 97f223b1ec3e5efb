r"""QLoRA reaches what LoRA reaches on a 16-bit base.

The claim. Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 4, tables 3 and 4: NF4 with
double quantization replicates 16-bit LoRA and 16-bit full fine-tuning (5-shot MMLU of LLaMA, mean
of 7B to 65B: 53.0 with bfloat16, 53.1 with NF4 and double quantization).

What we run. The demo: SmolLM2-135M learns to read orders, with adapters of r = 16 on all linear
layers, on the base as it is distributed, in bfloat16, and on the base in NF4 with double
quantization. Both have the same adapters at the start, the same examples and learning rates:

    y = W x + s B A x        W in bfloat16, or decoded from 4 bits

72 steps are one pass over the demo's 288 examples. 24 steps, which end while the loss still falls,
show which way the difference goes.

What would refute it: a mean difference of more than 0.05 nats per completion token after the pass.
"""

from statistics import mean

import demo_model
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture

import minilora

TITLE = "QLoRA equals LoRA on a 16-bit base"
PAPER = "QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 4, tables 3 and 4"
MODEL = "SmolLM2-135M"
SEEDS = (0, 1, 2)

# 72 steps of four examples: all of them, once.
LENGTHS = (24, 72)
BASES = ("bfloat16", "NF4")


def run(seed: int, short: bool = False) -> Numbers:
    numbers = {}
    for base in BASES:
        for steps in LENGTHS[:1] if short else LENGTHS:
            model, tokenizer = demo_model.load()
            if base == "NF4":
                minilora.quantize(model)
            training, held_out = demo_model.examples(tokenizer, "orders", seed)
            held_out = held_out[:2] if short else held_out
            if steps == LENGTHS[0]:
                numbers[f"{base}, before"] = demo_model.hold_out_loss(model, held_out)
            demo_model.fine_tune(model, training, 16, seed, steps=1 if short else steps)
            numbers[f"{base}, {steps} steps"] = demo_model.hold_out_loss(model, held_out)
    return numbers


def checks(results: list[Numbers]) -> list[Check]:
    def gaps(when: str) -> list[float]:
        return [result[f"NF4, {when}"] - result[f"bfloat16, {when}"] for result in results]

    before, early, after = gaps("before"), gaps("24 steps"), gaps("72 steps")
    dense, packed = (over_seeds(results, f"{base}, 72 steps") for base in BASES)
    return [
        Check(
            says="4 bits with adapters reach what 16 bits reach",
            rule="the mean difference of the hold-out losses after 72 steps is at most 0.05 nats",
            measured=f"bfloat16 {spread(dense)}, NF4 {spread(packed)}, difference {spread(after)}",
            holds=abs(mean(after)) <= 0.05,
        ),
        Check(
            says="the adapters make up for what quantizing has lost",
            rule="the difference after 72 steps is less than a tenth of that before, in every seed",
            measured=f"difference before {spread(before)}, after {spread(after)}",
            holds=all(abs(b) < abs(a) / 10 for a, b in zip(before, after, strict=True)),
        ),
        Check(
            says="what is left gets smaller with more steps",
            rule="the mean difference after 72 steps is less than half of that after 24",
            measured=f"after 24 steps {spread(early)}, after 72 {spread(after)}",
            holds=abs(mean(after)) < abs(mean(early)) / 2,
            ours=True,
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    when = ("before", *(f"{steps} steps" for steps in LENGTHS))
    names = {float(x): name for x, name in enumerate(when)}
    series = {
        base: [(x, over_seeds(results, f"{base}, {name}")) for x, name in enumerate(when)]
        for base in BASES
    }
    panels = [
        Panel("", "hold-out loss", series, names=names),
        Panel("", "hold-out loss", {b: points[1:] for b, points in series.items()}, names=names),
    ]
    return draw("Hold-out loss on a base in bfloat16 and on a base in NF4", panels)


if __name__ == "__main__":
    main(run, checks)
