r"""Double quantization saves 0.37 bits per weight and costs nothing in loss.

The claim. Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3: quantizing the absmax values
too saves 0.373 bits per weight, without degrading performance.

    float32 absmax per 64 weights:                        32 / 64              = 0.500 bits
    8 bits per absmax, one float32 for 256 of them:       8 / 64 + 32 / (64 * 256) = 0.127 bits

What we run. SmolLM2-135M in bfloat16, in NF4 and in NF4 with double quantization: bits per weight,
and the loss on 24 shell commands (the demo's second task; other tools for each seed), untrained. A
tiny Llama in both forms of NF4 then learns 256 random facts with adapters of r = 16.

What would refute it: the loss changes by more than a tenth of what NF4 itself changes it by, or the
loss after training by more than 0.05 nats.
"""

import copy

import demo_model
import tiny
import torch
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture

import minilora

TITLE = "Double quantization costs nothing in loss"
PAPER = "QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3"
MODEL = "SmolLM2-135M; tiny Llama"
SEEDS = (0, 1, 2)

FORMS = {"bfloat16": None, "NF4": False, "NF4, double": True}


def run(seed: int, short: bool = False) -> Numbers:
    return added_error(seed) | learn(seed, short) | ({} if short else read_commands(seed))


def added_error(seed: int) -> Numbers:
    """What each step of quantizing changes normal weights by, relative to their norm."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
    plain, double = (
        minilora.dequantize_nf4(minilora.quantize_nf4(w, double_quant=form))
        for form in (False, True)
    )
    return {
        "error, NF4": ((plain - w).norm() / w.norm()).item(),
        "error, double": ((double - plain).norm() / w.norm()).item(),
    }


def read_commands(seed: int) -> Numbers:
    """Bits per weight of SmolLM2's linear layers, and its loss without training."""
    numbers = {}
    for form, double_quant in FORMS.items():
        model, tokenizer = demo_model.load()
        if double_quant is not None:
            minilora.quantize(model, double_quant=double_quant)
            numbers[f"bits, {form}"] = bits_per_weight(model)
        _, held_out = demo_model.examples(tokenizer, "shell", seed)
        numbers[f"untrained, {form}"] = demo_model.hold_out_loss(model, held_out)
    return numbers


def bits_per_weight(model: object) -> float:
    layers = [m for m in model.modules() if isinstance(m, minilora.NF4Linear)]
    stored = sum(p.nbytes for layer in layers for p in layer.parameters())
    return 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)


def learn(seed: int, short: bool) -> Numbers:
    """The loss on new facts after training on a quantized base."""
    base = tiny.make_base(seed, short)
    _, new = tiny.facts(seed, short)
    numbers = {}
    for form in ("NF4", "NF4, double"):
        packed = minilora.quantize(copy.deepcopy(base), double_quant=bool(FORMS[form]))
        tuned = tiny.fine_tuned(packed, new, 1 if short else 150, 4e-3, seed, 16)
        numbers[f"trained, {form}"] = tiny.measure(tuned, new)
    return numbers


def checks(results: list[Numbers]) -> list[Check]:
    if "bits, NF4" not in results[0]:
        return []

    def change(kind: str, first: str, second: str) -> list[float]:
        return [result[f"{kind}, {second}"] - result[f"{kind}, {first}"] for result in results]

    own = change("untrained", "NF4", "NF4, double")
    of_nf4 = change("untrained", "bfloat16", "NF4")
    trained = change("trained", "NF4", "NF4, double")
    of_double, of_codes = (over_seeds(results, f"error, {n}") for n in ("double", "NF4"))
    plain, double = (over_seeds(results, f"bits, {form}") for form in ("NF4", "NF4, double"))
    saved = [a - b for a, b in zip(plain, double, strict=True)]
    return [
        Check(
            says="the performance is not degraded",
            rule="without training, the mean loss changes by at most a tenth of what NF4 changes "
            "it by",
            measured=f"double quantization {spread(own)}, NF4 itself {spread(of_nf4)}",
            holds=abs(sum(own)) <= abs(sum(of_nf4)) / 10,
        ),
        Check(
            says="nor after training",
            rule="a tiny Llama's mean loss after training changes by at most 0.05 nats",
            measured=f"{spread(trained, 5)}",
            holds=abs(sum(trained)) / len(trained) <= 0.05,
        ),
        Check(
            says="it saves 0.373 bits per weight",
            rule="saved bits per weight, counted on SmolLM2's layers, are 0.373 to within 0.005",
            measured=f"{plain[0]:.3f} - {double[0]:.3f} = {saved[0]:.3f}",
            holds=all(abs(s - 0.373) <= 0.005 for s in saved),
        ),
        Check(
            says="8 bits are enough for an absmax",
            rule="it changes normal weights by less than a tenth of what NF4 changes them by, in "
            "every seed",
            measured=f"double quantization {spread(of_double, 4)}, NF4 {spread(of_codes, 4)} of "
            "the norm",
            holds=all(a < b / 10 for a, b in zip(of_double, of_codes, strict=True)),
            ours=True,
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    names = dict(enumerate(("bfloat16", "NF4", "NF4, double")))
    untrained = [(i, over_seeds(results, f"untrained, {form}")) for i, form in enumerate(FORMS)]
    trained = [
        (i, over_seeds(results, f"trained, {form}"))
        for i, form in enumerate(FORMS)
        if form != "bfloat16"
    ]
    panels = [
        Panel("", "loss on commands", {"SmolLM2, untrained": untrained}, names=names, joined=False),
        Panel("", "loss on new facts", {"tiny Llama, trained": trained}, names=names, joined=False),
    ]
    return draw("Loss with and without double quantization", panels)


if __name__ == "__main__":
    main(run, checks)
