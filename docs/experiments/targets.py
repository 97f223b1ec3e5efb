r"""Adapters belong on all linear layers; on q and v alone no rank makes up for it.

The claim. Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 4 and figure 2: with LLaMA 7B on
Alpaca, adapters on query and value alone stay behind full fine-tuning, and adapters on all linear
layers of a transformer block match it, where the rank makes no difference (appendix A).

What we run. A tiny Llama learns 256 random facts in 150 steps: full fine-tuning, adapters on all
linear layers, on q_proj and v_proj, and on the three layers of the MLP, with two learning rates
each, of which the better one counts. They are compared at the same rank, and with about as many
parameters,

    r (in + out), summed over the layers:
        17,408 (all, r = 4)    16,384 (q and v, r = 16)    16,128 (MLP, r = 7)

What would refute it: q and v with as many parameters come as close to full fine-tuning.
"""

import tiny
from chart import Panel, draw
from claim import Check, Numbers, main, over_seeds, spread
from svg import Picture

import minilora

TITLE = "All linear layers, not q and v alone"
PAPER = "QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 4, figure 2"
MODEL = "tiny Llama"
SEEDS = (0, 1, 2)

WHERE = {
    "all linear": "all-linear",
    "q and v": ["q_proj", "v_proj"],
    "MLP": ["gate_proj", "up_proj", "down_proj"],
}
RANKS = {"all linear": (1, 4, 16), "q and v": (4, 16, 64), "MLP": (2, 7, 28)}
RATES = (4e-3, 1e-2)
FULL_RATES = (3e-3, 6e-3)


def run(seed: int, short: bool = False) -> Numbers:
    base = tiny.make_base(seed, short)
    _, new = tiny.facts(seed, short)
    steps = 1 if short else 150

    def loss(lr: float, r: int | None, **options: object) -> float:
        return tiny.measure(tiny.fine_tuned(base, new, steps, lr, seed, r, **options), new)

    numbers = {"full": min(loss(lr, None) for lr in FULL_RATES)}
    for where, targets in WHERE.items():
        # The start and the scaling of PEFT: neither depends on the rank more than alpha / r does.
        options = {"targets": targets, "alpha": 32, "adapter": tiny.PaperLoRA}
        for r in RANKS[where]:
            numbers[f"{where}, r={r}"] = min(loss(lr, r, **options) for lr in RATES)
            model = minilora.inject(tiny.new_model(seed), r=r, targets=targets)
            count = sum(p.numel() for p in minilora.adapter_parameters(model))
            numbers[f"{where}, r={r}, parameters"] = count
    return numbers


def checks(results: list[Numbers]) -> list[Check]:
    full, everywhere = over_seeds(results, "full"), over_seeds(results, "all linear, r=4")
    as_many, same_rank = (over_seeds(results, f"q and v, r={r}") for r in (16, 4))
    inside = over_seeds(results, "MLP, r=7")
    most = over_seeds(results, "all linear, r=16")
    both = f"all linear with r = 4 {spread(everywhere)}"
    return [
        Check(
            says="q and v alone stay behind, whatever the rank",
            rule="the loss of q and v with r = 16 is above that of all linear layers with r = 4, "
            "which has as many parameters, in every seed",
            measured=f"q and v {spread(as_many)}, {both}",
            holds=all(a > b for a, b in zip(as_many, everywhere, strict=True)),
        ),
        Check(
            says="also with the same rank",
            rule="the same with r = 4 on both sides",
            measured=f"q and v {spread(same_rank)}, {both}",
            holds=all(a > b for a, b in zip(same_rank, everywhere, strict=True)),
        ),
        Check(
            says="all linear layers match full fine-tuning",
            rule="with r = 16, the loss is at most 0.05 nats above that of full fine-tuning in "
            "every seed",
            measured=f"all linear with r = 16 {spread(most)}, full {spread(full)}",
            holds=all(a <= b + 0.05 for a, b in zip(most, full, strict=True)),
        ),
        Check(
            says="on all layers, the rank makes no difference",
            rule="all linear layers with r = 16 are at most 0.05 nats better than with r = 4 in "
            "every seed",
            measured=f"r = 4 {spread(everywhere)}, r = 16 {spread(most)}",
            holds=all(a <= b + 0.05 for a, b in zip(everywhere, most, strict=True)),
        ),
        Check(
            says="the attention needs adapters too, and q and v are not only the wrong layers",
            rule="the loss of the MLP's layers with r = 7 is above that of all linear layers with "
            "r = 4, which has as many parameters, in every seed",
            measured=f"MLP {spread(inside)}, {both}",
            holds=all(a > b for a, b in zip(inside, everywhere, strict=True)),
            ours=True,
        ),
    ]


def figure(results: list[Numbers]) -> Picture:
    series = {
        where: [
            (results[0][f"{where}, r={r}, parameters"], over_seeds(results, f"{where}, r={r}"))
            for r in RANKS[where]
        ]
        for where in WHERE
    }
    ends = [x for points in series.values() for x, _ in points]
    series["full"] = [(x, over_seeds(results, "full")) for x in (min(ends), max(ends))]
    panel = Panel(
        "trained parameters of the adapters",
        "loss of new facts",
        series,
        log_x=True,
        log_y=True,
        ticks=(5000, 10000, 20000, 50000),
    )
    return draw("Loss by where the adapters are, and by their number of parameters", [panel])


if __name__ == "__main__":
    main(run, checks)
