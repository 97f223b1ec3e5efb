r"""The rank hardly matters where a behavior is learned, and does where facts are.

The claim. Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
section 7.2, table 6: a rank of 1 on W_q and W_v does as well as 64 on WikiSQL and MultiNLI. The
other side: Schulman et al. 2025, "LoRA Without Regret" (Thinking Machines Lab), section "LoRA
rank": an adapter falls behind once the data is more than it has capacity for.

What we run. (1) The demo: SmolLM2-135M in NF4 learns to read orders, 36 steps, r = 1 and r = 16 on
all linear layers. (2) A tiny Llama learns 256 random facts of 20 bits by heart, 200 steps, with
ranks 1 to 16; each rank has the better of two learning rates. The update is s B A, and it has
r (in + out) numbers.

What would refute it: r = 1 gets less than 95 % of the improvement of r = 16 on the demo, or it
remembers about as well as r = 16.
"""

import demo_model
import tiny
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture

import minilora

TITLE = "The rank hardly matters on the demo, and does for memorizing"
PAPER = (
    "LoRA (Hu et al. 2021, arXiv:2106.09685), section 7.2, table 6; "
    '"LoRA Without Regret" (Schulman et al. 2025, Thinking Machines Lab)'
)
MODEL = "SmolLM2-135M; tiny Llama"
SEEDS = (0, 1, 2)

DEMO_RANKS = (1, 16)
RANKS = (1, 2, 4, 8, 16)
RATES = (2e-3, 6e-3)


def run(seed: int, short: bool = False) -> Numbers:
    return memorize(seed, short) | ({} if short else read_orders(seed))


def read_orders(seed: int) -> Numbers:
    """Hold-out loss before training, and after it with each rank."""
    numbers = {}
    for r in DEMO_RANKS:
        model, tokenizer = demo_model.load()
        minilora.quantize(model)
        training, held_out = demo_model.examples(tokenizer, "orders", seed)
        if r == DEMO_RANKS[0]:
            numbers["demo, before"] = demo_model.hold_out_loss(model, held_out)
        demo_model.fine_tune(model, training, r, seed)
        numbers[f"demo, r={r}"] = demo_model.hold_out_loss(model, held_out)
    return numbers


def memorize(seed: int, short: bool) -> Numbers:
    """Loss on the new facts that were trained on, by rank."""
    base = tiny.make_base(seed, short)
    _, new = tiny.facts(seed, short)
    steps = 1 if short else 200
    return {
        f"facts, r={r}": min(
            tiny.measure(tiny.fine_tuned(base, new, steps, lr, seed, r), new) for lr in RATES
        )
        for r in RANKS
    }


def checks(results: list[Numbers]) -> list[Check]:
    if "demo, before" not in results[0]:
        return []
    before = over_seeds(results, "demo, before")
    first, last = (over_seeds(results, f"demo, r={r}") for r in DEMO_RANKS)
    shares = [(b - x) / (b - y) for b, x, y in zip(before, first, last, strict=True)]
    one, many = over_seeds(results, "facts, r=1"), over_seeds(results, f"facts, r={RANKS[-1]}")
    return [
        Check(
            says="a rank of 1 is enough for a behavior",
            rule="on the demo, r = 1 gets 95 % of the improvement of r = 16 in every seed",
            measured=f"share {spread(shares)}; loss from {spread(before, 2)} to "
            f"{spread(first)} with r = 1, to {spread(last)} with r = 16",
            holds=min(shares) >= 0.95,
        ),
        Check(
            says="memorizing needs rank",
            rule="with r = 1, the loss on the facts is twice that with r = 16 in every seed",
            measured=f"loss {spread(one)} with r = 1, {spread(many)} with r = 16; "
            f"{tiny.UNKNOWN:.2f} is guessing",
            holds=all(a >= 2 * b for a, b in zip(one, many, strict=True)),
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    def points(task: str, ranks: tuple[int, ...]) -> list[tuple[float, list[float]]]:
        return [(r, over_seeds(results, f"{task}, r={r}")) for r in ranks]

    panels = [
        Panel(
            "rank", "hold-out loss of the demo", {"demo": points("demo", DEMO_RANKS)}, True, top=4
        ),
        Panel("rank", "loss of new facts", {"facts": points("facts", RANKS)}, True, top=4),
    ]
    return draw("Loss by rank, where a behavior is learned and where facts are", panels)


if __name__ == "__main__":
    main(run, checks)
