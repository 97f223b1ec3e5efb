"""docs/experiments: a short run of each, every rule can fail, and the page is what is stored."""

import importlib
import json
import sys
from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sizes import ROOT

EXPERIMENTS_FOLDER = ROOT / "docs" / "experiments"
Numbers = dict[str, float]


def load(name: str) -> ModuleType:
    """A script of docs/experiments; they stand beside each other and are no package."""
    folders = [str(EXPERIMENTS_FOLDER), str(ROOT / "docs")]
    before = [*sys.path]
    sys.path[:0] = folders
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before


reproduce, claim = load("reproduce"), load("claim")
NAMES = reproduce.EXPERIMENTS


@pytest.fixture(autouse=True)
def path() -> Iterator[None]:
    """`experiment(name)` imports a script by its name."""
    before = [*sys.path]
    sys.path[:0] = [str(EXPERIMENTS_FOLDER), str(ROOT / "docs")]
    yield
    sys.path[:] = before


def stored_numbers(name: str) -> list[Numbers]:
    return [result["numbers"] for result in reproduce.stored(name)]


# -- the rules -----------------------------------------------------------------------------------


def as_the_paper_says() -> dict[str, Numbers]:
    """Numbers of one seed with which every check holds; nobody measured them."""
    rate = load("learning_rate")
    return {
        "rank": {"demo, before": 6.0, "demo, r=1": 0.2, "demo, r=16": 0.1}
        | {f"facts, r={r}": 1.0 / r for r in (1, 2, 4, 8, 16)},
        "targets": {"full": 0.1}
        | {f"all linear, r={r}": 0.12 for r in (1, 4, 16)}
        | {f"q and v, r={r}": 0.5 for r in (4, 16, 64)}
        | {f"MLP, r={r}": 0.2 for r in (2, 7, 28)},
        "learning_rate": {
            f"{task}, {rate.method(r)}, {lr:g}": 1 + abs(i - (best if r else 1))
            for task, best in (("facts", 3), ("rule", 4))
            for r in (None, *rate.RANKS)
            for i, lr in enumerate(rate.RATES if r else rate.FULL_RATES)
        },
        "datatypes": {
            f"{kind}, {name}{', 64' if kind == 'normal' else ''}": value
            for kind in ("normal", "trained", "loss")
            for name, value in (
                ("NF4", 0.1), ("FP4 (E3M0)", 0.11), ("FP4 (E2M1)", 0.12), ("int4", 0.13),
            )
        }
        | {"loss, float32": 0.01},
        "double_quantization": {
            "bits, NF4": 4.5, "bits, NF4, double": 4.127,
            "untrained, bfloat16": 4.0, "untrained, NF4": 4.5, "untrained, NF4, double": 4.51,
            "trained, NF4": 0.1, "trained, NF4, double": 0.11,
            "error, NF4": 0.09, "error, double": 0.002,
        },
        "qlora": {
            "bfloat16, before": 5.6, "NF4, before": 6.3,
            "bfloat16, 24 steps": 0.20, "NF4, 24 steps": 0.30,
            "bfloat16, 72 steps": 0.10, "NF4, 72 steps": 0.11,
        },
        "forgetting": forgetting(old_of_r16=1.0),
        "rank_stabilized": {
            "LoRA, r=4": 1.1, "LoRA, r=16": 1.0, "LoRA, r=64": 1.0, "LoRA, r=128": 1.0,
            "rsLoRA, r=4": 1.0, "rsLoRA, r=16": 0.5, "rsLoRA, r=64": 0.3, "rsLoRA, r=128": 0.2,
            "LoRA, best rate": 0.5, "rsLoRA, best rate": 0.2,
        },
        "merged_latency": {"base": 10.0, "adapter": 13.0, "merged": 10.1},
    }  # fmt: skip


def forgetting(old_of_r16: float) -> Numbers:
    """Full fine-tuning ends at 0.1 on new facts and 3 on old ones, r = 4 at 0.3 and 2."""
    module = load("forgetting")
    numbers = {}
    ends = {"full": (0.1, 3.0), "r=4": (0.3, 2.0), "r=16": (0.1, 2.9), "r=64": (0.1, 2.9)}
    for method, (new, old) in ends.items():
        for place, lr in enumerate(module.RATES[method]):
            at = f"{method}, {lr:g}"
            numbers[f"new, {at}"] = 0.5 if place == 0 else new
            numbers[f"old, {at}"] = 1.0 if place == 0 else old
            numbers[f"norm, {at}"] = numbers[f"largest, {at}"] = 1.0
    numbers[f"old, r=16, {module.RATES['r=16'][0]:g}"] = old_of_r16
    return numbers


# Experiment, number of the check, and the numbers that refute it.
REFUTED: list[tuple[str, int, Numbers]] = [
    ("rank", 0, {"demo, r=1": 0.5}),
    ("rank", 1, {"facts, r=1": 0.1}),
    ("targets", 0, {"q and v, r=16": 0.11}),
    ("targets", 1, {"q and v, r=4": 0.11}),
    ("targets", 2, {"all linear, r=16": 0.2}),
    ("targets", 3, {"all linear, r=16": 0.06}),
    ("targets", 4, {"MLP, r=7": 0.11}),
    ("learning_rate", 0, {"facts, full, 0.0032": 0.5}),
    ("learning_rate", 1, {"facts, r=4, 0.002": 0.1, "facts, r=64, 0.016": 0.1}),
    ("learning_rate", 2, {"rule, full, 0.0128": 0.1}),
    ("datatypes", 0, {"normal, FP4 (E2M1), 64": 0.09}),
    ("datatypes", 1, {"normal, int4, 64": 0.09}),
    ("datatypes", 2, {"normal, int4, 64": 0.115}),
    ("datatypes", 3, {"normal, FP4 (E3M0), 64": 0.125}),
    ("datatypes", 4, {"loss, int4": 0.09}),
    ("double_quantization", 0, {"untrained, NF4, double": 4.6}),
    ("double_quantization", 1, {"trained, NF4, double": 0.2}),
    ("double_quantization", 2, {"bits, NF4, double": 4.2}),
    ("double_quantization", 3, {"error, double": 0.02}),
    ("qlora", 0, {"NF4, 72 steps": 0.2}),
    ("qlora", 1, {"NF4, before": 5.65}),
    ("qlora", 2, {"NF4, 24 steps": 0.21}),
    ("forgetting", 0, {f"new, r=4, {1e-3 * 2**n:g}": 0.05 for n in range(1, 5)}),
    ("forgetting", 1, {f"old, r=4, {1e-3 * 2**n:g}": 3.1 for n in range(1, 5)}),
    ("forgetting", 2, {"old, r=16, 0.001": 1.2}),
    ("rank_stabilized", 0, {"LoRA, r=128": 0.1}),
    ("rank_stabilized", 1, {"rsLoRA, r=128": 0.6}),
    ("rank_stabilized", 2, {"LoRA, r=128": 0.8}),
    ("rank_stabilized", 3, {"LoRA, best rate": 0.22}),
    ("merged_latency", 0, {"merged": 10.6}),
    ("merged_latency", 1, {"adapter": 10.5}),
]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_as_the_paper_has_them_agree(name: str) -> None:
    checks = reproduce.experiment(name).checks([as_the_paper_says()[name]] * 3)
    assert not checks[0].ours
    assert [check.says for check in checks if not check.holds] == []
    assert claim.verdict(checks) == claim.AGREES


@pytest.mark.parametrize(("name", "place", "numbers"), REFUTED)
def test_numbers_that_refute_a_check_fail_it(name: str, place: int, numbers: Numbers) -> None:
    before = as_the_paper_says()[name]
    assert numbers.keys() <= before.keys()
    checks = reproduce.experiment(name).checks([before | numbers] * 3)
    assert not checks[place].holds
    expected = claim.AGREES if checks[place].ours else claim.IN_PART
    assert claim.verdict(checks) == (expected if place else claim.FAILS)


def test_every_check_is_refuted_once() -> None:
    for name, numbers in as_the_paper_says().items():
        count = len(reproduce.experiment(name).checks([numbers]))
        assert [place for other, place, _ in REFUTED if other == name] == [*range(count)], name


def test_without_checks_there_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="nothing to judge"):
        claim.verdict(load("rank").checks([{"facts, r=1": 3.0}]))


def test_the_best_rate_is_the_lowest_point_of_a_parabola() -> None:
    best_rate = load("learning_rate").best_rate
    losses = {lr: exp((log(lr) - log(5e-3)) ** 2) for lr in (1e-3, 2e-3, 4e-3, 8e-3)}
    assert best_rate(losses) == pytest.approx(5e-3)
    assert best_rate({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}) == 1e-3


# -- the experiments -----------------------------------------------------------------------------

# On SmolLM2, which short runs leave out.
LARGE = ("demo, ", "bits, ", "untrained, ")


# Their short runs take as long as all others together.
LONG = ("rank", "double_quantization")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.soak] if name in LONG else [])
        for name in NAMES
        if name != "qlora"
    ],
)
def test_a_short_run_finds_the_numbers_that_are_stored(name: str) -> None:
    module = reproduce.experiment(name)
    found = module.run(0, True)
    expected = {key for key in stored_numbers(name)[0] if not key.startswith(LARGE)}
    assert found.keys() == expected
    assert all(isinstance(value, float | int) and value == value for value in found.values())


def test_a_seed_decides_the_numbers() -> None:
    tiny = load("tiny")

    def loss(seed: int) -> float:
        base, (_, new) = tiny.make_base(seed, short=True), tiny.facts(seed, short=True)
        return tiny.measure(tiny.fine_tuned(base, new, 2, 1e-2, seed, r=4), new)

    assert loss(1) == loss(1) != loss(2)


def test_a_quantized_weight_is_the_nearest_level() -> None:
    import torch

    import minilora

    module = load("datatypes")
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    packed = minilora.quantize_nf4(w, double_quant=False)
    ours = module.quantized(w, module.LEVELS["NF4"], 64)
    torch.testing.assert_close(ours, minilora.dequantize_nf4(packed), rtol=1e-6, atol=0)


# -- running and storing -------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def run(seed: int, short: bool) -> Numbers:
        ran.append(seed)
        if ran == [0, 1]:
            raise KeyboardInterrupt
        return {"loss": float(seed)}

    fake = SimpleNamespace(SEEDS=(0, 1, 2), run=run)
    monkeypatch.setattr(reproduce, "experiment", lambda name: fake)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_missing("rank", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rank-0.json"]
    assert reproduce.run_missing("rank", tmp_path) == [1, 2]
    assert reproduce.run_missing("rank", tmp_path) == []
    assert ran == [0, 1, 1, 2]
    assert [r["numbers"]["loss"] for r in reproduce.stored("rank", tmp_path)] == [0, 1, 2]


# -- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Any:
    return load("reproductions_page")


def test_the_page_is_what_the_stored_results_give(page: Any, tmp_path: Path) -> None:
    text = page.PAGE.read_text()
    assert page.render(text) == text, "python docs/experiments/reproductions_page.py"
    page.draw_figures(tmp_path)
    stored, drawn = (
        {p.name: p.read_text() for p in folder.glob("*.svg")} for folder in (page.FIGURES, tmp_path)
    )
    assert drawn == stored and len(drawn) == len(NAMES)


def test_other_results_give_another_page(page: Any, tmp_path: Path) -> None:
    for path in reproduce.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        if result["experiment"] == "merged_latency":
            result["numbers"] |= {"merged": 2 * result["numbers"]["base"]}
        (tmp_path / path.name).write_text(json.dumps(result))
    text = page.render(page.PAGE.read_text(), tmp_path)
    section = text.split("<!-- merged_latency -->")[1].split("<!-- /merged_latency -->")[0]
    assert f"**{claim.FAILS}**" in section


def test_a_claim_without_all_seeds_is_not_judged(page: Any, tmp_path: Path) -> None:
    path = reproduce.path_of("rank", 0)
    (tmp_path / path.name).write_text(path.read_text())
    assert page.judged("rank", tmp_path) == "1 of 3 seeds have been run"
    assert "seeds have been run" not in page.PAGE.read_text()


def test_every_script_says_what_would_refute_the_claim() -> None:
    for name in NAMES:
        module = reproduce.experiment(name)
        text = module.__doc__ or ""
        assert all(word in text for word in ("The claim.", "What we run.", "would refute it:")), (
            name
        )
        assert len(module.SEEDS) >= 3, name
    large = [n for n in NAMES if "SmolLM2-135M" in reproduce.experiment(n).MODEL]
    assert len(large) <= 3
