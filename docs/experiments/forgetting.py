r"""LoRA learns less and forgets less.

The claim. Biderman et al. 2024, "LoRA Learns Less and Forgets Less", arXiv:2405.09673: on code and
mathematics, LoRA with low ranks stays behind full fine-tuning (section 4.1) and keeps more of what
the base could do (section 4.2). Each method has its best learning rate. Where they have learned the
same, they have forgotten the same: both are on one curve of learning and forgetting (section 4.3).

What we run. A tiny Llama that knows 512 random facts learns 256 others in 150 steps: full
fine-tuning with seven learning rates, and LoRA with r = 4, 16 and 64 with five. Learned is the loss
on the new facts; forgotten is the loss on the old ones, of which training shows none. To see why,
also the norms of the update, Delta W = s B A for LoRA, as means over the linear layers:

    |Delta W|_F = sqrt(sum of sigma_k^2)        |Delta W|_2 = sigma_1

What would refute it: with the best rates, LoRA with r = 4 learns as much, or forgets as much.
"""

from itertools import pairwise
from statistics import mean
from typing import Any

import tiny
import torch
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture

TITLE = "LoRA learns less and forgets less"
PAPER = "Biderman et al. 2024, arXiv:2405.09673, sections 4.1 to 4.3"
MODEL = "tiny Llama"
SEEDS = (0, 1, 2)

RATES = {
    "full": tuple(2e-4 * 2**n for n in range(7)),
    "r=4": tuple(1e-3 * 2**n for n in range(5)),
    "r=16": tuple(1e-3 * 2**n for n in range(5)),
    "r=64": tuple(1e-3 * 2**n for n in range(5)),
}
MEASURES = ("new", "old", "norm", "largest")

# Where two methods are compared that have learned the same: nats of the new facts.
EQUAL = 0.5


def run(seed: int, short: bool = False) -> Numbers:
    base = tiny.make_base(seed, short)
    old, new = tiny.facts(seed, short)
    numbers = {}
    for method, rates in RATES.items():
        r = None if method == "full" else int(method.removeprefix("r="))
        for lr in rates:
            options = {"alpha": 32, "adapter": tiny.PaperLoRA} if r else {}
            model = tiny.fine_tuned(base, new, 1 if short else 150, lr, seed, r, **options)
            at = f"{method}, {lr:g}"
            numbers[f"new, {at}"] = tiny.measure(model, new)
            numbers[f"old, {at}"] = tiny.measure(model, old)
            numbers[f"norm, {at}"], numbers[f"largest, {at}"] = update_norms(model, base)
    return numbers


@torch.no_grad()
def update_norms(model: Any, base: Any) -> tuple[float, float]:
    """The mean Frobenius norm and the mean largest singular value of the layers' updates."""
    before = dict(base.named_modules())
    norms, largest = [], []
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            adapters = getattr(layer, "adapters", None)
            full = layer.weight - before[name].weight
            delta = adapters["default"].delta() if adapters else full
            norms.append(delta.norm().item())
            largest.append(torch.linalg.matrix_norm(delta, 2).item())
    return sum(norms) / len(norms), sum(largest) / len(largest)


def at_best(result: Numbers, method: str, measure: str) -> float:
    """A measure at the learning rate with which the method learns most."""
    best = min(RATES[method], key=lambda lr: result[f"new, {method}, {lr:g}"])
    return result[f"{measure}, {method}, {best:g}"]


def at_equal(result: Numbers, method: str, measure: str) -> float:
    """A measure where the loss of the new facts is `EQUAL`, between two learning rates.

    Raises:
        ValueError: no two neighboring learning rates have it between them.
    """
    for low, high in pairwise(RATES[method]):
        a, b = (result[f"new, {method}, {lr:g}"] for lr in (low, high))
        if a >= EQUAL >= b:
            share = (a - EQUAL) / (a - b)
            first, second = (result[f"{measure}, {method}, {lr:g}"] for lr in (low, high))
            return first + share * (second - first)
    raise ValueError(f"{method}: no learning rates around a loss of {EQUAL}")


def checks(results: list[Numbers]) -> list[Check]:
    def best(method: str, measure: str) -> list[float]:
        return [at_best(result, method, measure) for result in results]

    def equal(method: str, measure: str) -> list[float]:
        return [at_equal(result, method, measure) for result in results]

    def listed(values: dict[str, list[float]], digits: int = 2) -> str:
        return ", ".join(f"{name} {spread(found, digits)}" for name, found in values.items())

    new = {method: best(method, "new") for method in RATES}
    old = {method: best(method, "old") for method in RATES}
    same = {method: equal(method, "old") for method in ("full", "r=16", "r=64")}
    sizes = {method: equal(method, "largest") for method in ("full", "r=16", "r=64")}
    norms = {method: equal(method, "norm") for method in ("full", "r=16", "r=64")}
    return [
        Check(
            says="LoRA with a low rank learns less",
            rule="with the best rates, the loss of new facts is higher with r = 4 than with full "
            "fine-tuning in every seed",
            measured=listed(new),
            holds=all(a > b for a, b in zip(new["r=4"], new["full"], strict=True)),
        ),
        Check(
            says="and forgets less",
            rule="with the same rates, the loss of old facts is lower with r = 4 than with full "
            "fine-tuning in every seed",
            measured=listed(old),
            holds=all(a < b for a, b in zip(old["r=4"], old["full"], strict=True)),
        ),
        Check(
            says="both are on one curve of learning and forgetting",
            rule=f"where both have a loss of {EQUAL} on new facts, that of old ones with r = 16 is "
            "within 10 % of that with full fine-tuning in every seed",
            measured=f"loss of old facts: {listed(same)}; norm of the update: {listed(norms)}; "
            f"its largest singular value: {listed(sizes)}",
            holds=all(
                abs(a - b) <= 0.1 * b for a, b in zip(same["r=16"], same["full"], strict=True)
            ),
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    def points(method: str, measure: str) -> list[tuple[float, list[float]]]:
        """Up to the learning rate with which most is learned: higher ones are unstable."""
        found = []
        for lr in RATES[method]:
            new = mean(over_seeds(results, f"new, {method}, {lr:g}"))
            if found and new > found[-1][0]:
                break
            found.append((new, over_seeds(results, f"{measure}, {method}, {lr:g}")))
        return found

    panels = [
        Panel(
            "loss of new facts, mean of the seeds",
            title,
            {method: points(method, measure) for method in RATES},
            log_x=True,
            ticks=(0.1, 1.0),
        )
        for measure, title in (("old", "loss of old facts"), ("largest", "largest singular value"))
    ]
    return draw("What is learned and what is forgotten, by learning rate, up to the best", panels)


if __name__ == "__main__":
    main(run, checks)
