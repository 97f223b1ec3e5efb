"""The calculator's formulas in JavaScript equal those of plan, over a grid of runs."""

import json
import random
import re
import shutil
import subprocess
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import browser
import pytest

import minilora
from minilora.reports.largest_batch import RESERVED, largest_batch
from minilora.reports.memory import Run, full_finetuning
from minilora.reports.shapes import SHAPES, shape_config

pytest.importorskip("transformers", reason="the shapes are models of transformers'")

FORMULAS = Path(__file__).resolve().parents[2] / "docs/javascripts/memory.js"
NODE = shutil.which("node")

# One of each kind, and one of each peculiarity: tied, grouped keys, biases, norms of heads.
MODELS = ["smollm2-135m", "tinyllama", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b"]
DTYPES = {2: "bfloat16", 4: "float32"}


def evaluate(expression: str) -> Any:
    """The value of an expression after memory.js, by node or, where there is none, Chromium."""
    code = FORMULAS.read_text()
    if NODE:
        program = f"{code}\nconsole.log(JSON.stringify({expression}))"
        done = subprocess.run(
            [NODE, "-"], input=program, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    pytest.importorskip("playwright", reason="without node, the formulas run in a browser")
    if not browser.CHROMIUM:
        pytest.skip("there is neither node nor chromium here")
    with browser.chromium() as chromium:
        page = chromium.new_page()
        return page.evaluate(f"() => {{ {code}\nreturn {expression}; }}")


def grid(count: int) -> list[dict[str, Any]]:
    """Runs as the calculator describes them, the same at every call."""
    draw = random.Random(14)
    kinds = list(product(MODELS, ("qlora", "lora", "full"), (False, True)))
    draw.shuffle(kinds)
    return [
        {
            "model": model,
            "method": method,
            "checkpointing": checkpointing,
            "r": draw.choice([1, 8, 13, 64, 256]),
            "batchSize": draw.choice([1, 3, 16]),
            "length": draw.choice([1, 100, 512, 4096]),
            "dropout": draw.random() < 0.3,
            "accumulate": draw.random() < 0.3,
            "pagedOptimizer": draw.random() < 0.3,
            "efficient": draw.random() < 0.5,
            "c": draw.choice([2, 4]),
        }
        for model, method, checkpointing in (kinds[i % len(kinds)] for i in range(count))
    ]


@cache
def empty(name: str, dtype: str) -> Any:
    from minilora.huggingface.loading import empty_model

    config = shape_config(name)
    config.dtype = dtype
    return empty_model(config)


def planned(run: dict[str, Any]) -> tuple[Run, Any]:
    plan = minilora.plan(
        empty(run["model"], DTYPES[run["c"]]),
        run["r"],
        quantize=run["method"] == "qlora",
        batch_size=run["batchSize"],
        length=run["length"],
        checkpointing=run["checkpointing"],
        dropout=0.1 * run["dropout"],
        grad_accum=1 + run["accumulate"],
        paged_optimizer=run["pagedOptimizer"],
        efficient=run["efficient"],
    )
    assert plan.run
    full = full_finetuning(plan.run, plan.parameters)
    return (full if run["method"] == "full" else plan.run), plan


def test_the_calculator_and_plan_agree_on_60_runs() -> None:
    runs = grid(60)
    found = evaluate(f"{json.dumps(runs)}.map(memory)")
    for run, answer in zip(runs, found, strict=True):
        expected, plan = planned(run)
        phase, most = expected.peak()
        assert answer["phases"] == expected.phases(), run
        assert (answer["phase"], answer["peak"]) == (phase, most), run
        assert answer["parameters"] == plan.parameters
        trained = plan.parameters if run["method"] == "full" else plan.trainable
        assert answer["trainable"] == trained
    assert {answer["phase"] for answer in found} >= {"loss", "backward"}


def test_the_largest_batch_is_the_same() -> None:
    runs = [run for run in grid(60) if run["c"] == 2][:6]
    for gigabytes in (2, 24):
        memory = gigabytes * 10**9
        found = evaluate(f"{json.dumps(runs)}.map((run) => largestBatch(run, {memory}))")
        assert found == [largest_batch(planned(run)[0], memory - RESERVED) for run in runs]


def test_the_calculator_has_the_shapes_of_plan() -> None:
    rows = {
        name: [*(sizes[key] for key in KEYS), *([sizes["head_dim"]] if "head_dim" in sizes else [])]
        for name, sizes in SHAPES.items()
    }
    stored = dict(re.findall(r'^  "([\w.-]+)": (\[.*\]),$', FORMULAS.read_text(), re.MULTILINE))
    found = {name: json.loads(row) for name, row in stored.items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}," for name, row in rows.items()]
    assert found == rows, "docs/javascripts/memory.js needs\n" + "\n".join(lines)


# The order of the numbers in a row of the calculator's SHAPES.
KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
