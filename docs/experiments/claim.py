"""How a claim is judged, and what every experiment of this folder has.

An experiment is a module with

    TITLE, PAPER, MODEL         what the page says of it
    SEEDS                       it is run once with each
    run(seed, short)            -> numbers by name; `short` is for tests: smaller, and no result
    checks(results)             -> a list of `Check`: the rules, applied to the numbers of all seeds
    figure(results)             -> a picture of the same numbers

A rule is fixed in the source, and its words stand on the page next to what was measured. The first
check of a list is the claim itself; the others are what the paper says beside it.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

Numbers = dict[str, float]
Run = Callable[[int, bool], Numbers]

AGREES, IN_PART, FAILS = "agrees", "agrees in part", "does not at this scale"


@dataclass(frozen=True)
class Check:
    """One thing that a paper says.

    Attributes:
        says: the statement.
        rule: when it holds here; otherwise it is refuted.
        measured: what was found, with the spread over the seeds.
        holds: whether the numbers obey the rule.
        ours: whether it is a question of ours, about the reason; it has no part in the verdict.
    """

    says: str
    rule: str
    measured: str
    holds: bool
    ours: bool = False


def verdict(checks: Sequence[Check]) -> str:
    """The claim agrees if all that the paper says holds, and does not if the first check fails.

    Raises:
        ValueError: there are no checks, as after a short run.

    Example:
        >>> verdict([Check("a", "b", "c", True), Check("d", "e", "f", False)])
        'agrees in part'
    """
    if not checks:
        raise ValueError("there is nothing to judge")
    if all(check.holds or check.ours for check in checks):
        return AGREES
    return IN_PART if checks[0].holds else FAILS


def over_seeds(results: Sequence[Numbers], name: str) -> list[float]:
    """A number of every seed."""
    return [result[name] for result in results]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean of the seeds, with the lowest and the highest.

    Example:
        >>> spread([0.1, 0.2, 0.3], digits=2)
        '0.20 (0.10 to 0.30)'
    """
    low, middle, high = (f"{v:,.{digits}f}" for v in (min(values), mean(values), max(values)))
    return f"{middle} ({low} to {high})"


def main(run: Run, checks: Callable[[list[Numbers]], list[Check]]) -> None:
    """What a script of this folder does on its own: one seed, its numbers and its checks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few seconds; proves nothing")
    options = parser.parse_args()

    numbers = run(options.seed, options.short)
    print(json.dumps(numbers, indent=1))
    for check in checks([numbers]):
        print(f"{'holds' if check.holds else 'fails'}: {check.says} ({check.measured})")
