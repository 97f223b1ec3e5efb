r"""At high ranks LoRA's scaling alpha / r stops learning; alpha / sqrt(r) does not.

The claim. Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
arXiv:2312.03732, figure 1: with s = alpha / r, Llama 2 7B ends with about the same perplexity at
every rank from 4 to 2048; with s = alpha / sqrt(r), a higher rank gives a lower one.

    LoRA: W' = W + (alpha / r) B A        rsLoRA: W' = W + (alpha / sqrt(r)) B A

What we run. A tiny Llama learns 256 random facts in 150 steps with ranks 4 to 128 (its width),
alpha = 8 and a learning rate of 2e-3 for all; A starts uniform in +-1/sqrt(in), as in PEFT.
minilora's own start, with a standard deviation of 1/r, has another dependence on the rank. For the
reason, both at the highest rank with four learning rates.

What would refute it: at the highest rank rsLoRA learns no more than LoRA, or no more than at r = 4.
"""

import tiny
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture

TITLE = "At high ranks rsLoRA learns more than LoRA"
PAPER = "rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), figure 1"
MODEL = "tiny Llama"
SEEDS = (0, 1, 2)

RANKS = (4, 16, 64, 128)
ALPHA, LR = 8.0, 2e-3
RATES = (2e-3, 8e-3, 1.6e-2, 3.2e-2)


class RSLoRA(tiny.PaperLoRA):
    """LoRA with s = alpha / sqrt(r)."""

    @property
    def scale(self) -> float:
        return self.alpha / self.r**0.5


METHODS = {"LoRA": tiny.PaperLoRA, "rsLoRA": RSLoRA}


def run(seed: int, short: bool = False) -> Numbers:
    base = tiny.make_base(seed, short)
    _, new = tiny.facts(seed, short)

    def loss(method: str, r: int, lr: float) -> float:
        options = {"alpha": ALPHA, "adapter": METHODS[method]}
        tuned = tiny.fine_tuned(base, new, 1 if short else 150, lr, seed, r, **options)
        return tiny.measure(tuned, new)

    numbers = {}
    for method in METHODS:
        for r in RANKS:
            numbers[f"{method}, r={r}"] = loss(method, r, LR)
        at_rates = [loss(method, RANKS[-1], lr) for lr in RATES[1:]]
        numbers[f"{method}, best rate"] = min(numbers[f"{method}, r={RANKS[-1]}"], *at_rates)
    return numbers


def checks(results: list[Numbers]) -> list[Check]:
    def at(method: str, r: int) -> list[float]:
        return over_seeds(results, f"{method}, r={r}")

    low, high = RANKS[0], RANKS[-1]
    plain, stable = at("LoRA", high), at("rsLoRA", high)
    tuned = {method: over_seeds(results, f"{method}, best rate") for method in METHODS}
    apart = [b - a for a, b in zip(tuned["rsLoRA"], tuned["LoRA"], strict=True)]
    gains = [a / b for a, b in zip(at("LoRA", 16), plain, strict=True)]
    return [
        Check(
            says="at high ranks rsLoRA learns more",
            rule=f"with r = {high}, the loss of rsLoRA is below that of LoRA in every seed",
            measured=f"LoRA {spread(plain)}, rsLoRA {spread(stable)}",
            holds=all(a < b for a, b in zip(stable, plain, strict=True)),
        ),
        Check(
            says="a higher rank gives rsLoRA a lower loss",
            rule=f"the loss with r = {high} is below half of that with r = {low} in every seed",
            measured=f"r = {low} {spread(at('rsLoRA', low))}, r = {high} {spread(stable)}",
            holds=all(b < a / 2 for a, b in zip(at("rsLoRA", low), stable, strict=True)),
        ),
        Check(
            says="and gives LoRA nothing",
            rule=f"from r = 16 to r = {high}, the loss of LoRA falls by less than a tenth in every "
            "seed",
            measured=f"r = 16 {spread(at('LoRA', 16))}, r = {high} {spread(plain)}",
            holds=all(gain < 1 / 0.9 for gain in gains),
        ),
        Check(
            says="the scaling is more than another learning rate",
            rule=f"with r = {high} and the best of four learning rates for each, LoRA is more than "
            "0.05 nats behind in every seed",
            measured=f"LoRA {spread(tuned['LoRA'])}, rsLoRA {spread(tuned['rsLoRA'])}",
            holds=all(difference > 0.05 for difference in apart),
            ours=True,
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    series = {
        method: [(r, over_seeds(results, f"{method}, r={r}")) for r in RANKS] for method in METHODS
    }
    highest = f"best of four rates, r={RANKS[-1]}"
    best = {
        method: [(i, over_seeds(results, f"{method}, best rate"))]
        for i, method in enumerate(METHODS)
    }
    panels = [
        Panel("rank, one learning rate for all", "loss of new facts", series, log_x=True),
        Panel(highest, "loss of new facts", best, names=dict(enumerate(METHODS))),
    ]
    return draw("Loss by rank, with the scalings alpha / r and alpha / sqrt(r)", panels)


if __name__ == "__main__":
    main(run, checks)
