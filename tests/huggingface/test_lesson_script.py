"""The usual QLoRA script runs, on a real model, with its calls of peft and bitsandbytes replaced.

Both scripts are those of docs/how-to/transformers.md.
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import needs_model

import minilora

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "transformers.md"

REPLACED = {
    "BitsAndBytesConfig",
    "prepare_model_for_kbit_training",
    "LoraConfig",
    "get_peft_model",
    "model.merge_and_unload",
}
OURS = {"minilora.NF4Config", "minilora.inject", "minilora.merge"}
STEP_3 = "# 3. Train (Standard Trainer)\n# ...\n"


def scripts() -> tuple[str, str]:
    """The usual script, and the one with minilora."""
    found = re.findall(r'^```python(?: title="[^"]*")?\n(.*?)^```$', PAGE.read_text(), re.M | re.S)
    theirs, ours = (block for block in found if STEP_3 in block)
    return theirs, ours


def calls(script: str) -> dict[str, str]:
    """What a script calls -> the call as it stands there."""
    nodes = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)]
    return {ast.unparse(node.func): ast.unparse(node) for node in nodes}


def test_five_calls_are_replaced_by_three_and_nothing_else_changes() -> None:
    theirs, ours = (calls(script) for script in scripts())
    assert theirs.keys() - ours.keys() == REPLACED
    assert ours.keys() - theirs.keys() == OURS
    for name in theirs.keys() & ours.keys():
        assert theirs[name].replace("bnb_config", "nf4_config") == ours[name]
    steps = [re.findall(r"^# .*$", script, re.M) for script in scripts()]
    assert steps[0] == steps[1]


def train(model: Any) -> list[float]:
    """What stands at "Standard Trainer": two steps on a few tokens; returns the losses."""
    from transformers import Trainer, TrainingArguments

    tokens = torch.arange(100, 116)
    rows = [{"input_ids": tokens, "labels": tokens}] * 4
    arguments = TrainingArguments(
        "unused",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@needs_model
def test_the_script_runs_on_a_real_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="device_map and Trainer need it")
    from minilora.huggingface.bundled import bundled_model_folder

    monkeypatch.chdir(tmp_path)
    _, script = scripts()
    script = re.sub(r'"HuggingFaceTB/[^"]+"', repr(str(bundled_model_folder())), script)
    before, after = script.split(STEP_3)

    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(before, str(PAGE), "exec"), names)
    model = names["model"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 30
    assert all(".adapters." in name for name in trained)

    losses = train(model)
    assert len(losses) == 2 and losses[1] < losses[0]
    # B starts at zero, and Trainer has cleared the gradients.
    moved = [bool(p.any()) for name, p in model.named_parameters() if name.endswith(".B")]
    assert moved == [True] * 60
    tokens = torch.arange(100, 116)[None]
    model.eval()
    with torch.no_grad():
        expected = model(tokens).logits

    exec(compile(after, str(PAGE), "exec"), names)
    merged, _ = minilora.load("merged_model")
    kinds = {n: type(m).__name__ for n, m in merged.model.layers[0].self_attn.named_children()}
    assert kinds["q_proj"] == kinds["v_proj"] == "Linear"
    assert kinds["k_proj"] == kinds["o_proj"] == "NF4Linear"
    with torch.no_grad():
        found = merged(tokens).logits
        assert torch.equal(found, names["model"](tokens).logits)
    # The merged weights are rounded to bfloat16 once more.
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8
