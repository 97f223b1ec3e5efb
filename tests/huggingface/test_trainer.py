"""AdapterCheckpoints in transformers' Trainer: small files, exact resume, no adapter left idle."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapters_of, randomize
from torch import nn
from trainers import (
    adapter_trainer,
    arguments,
    checkpointing,
    interrupted,
    losses,
    rows,
    tiny,
    trainable,
)

import minilora

transformers = pytest.importorskip("transformers", reason="the trainer is transformers' own")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

Make = Callable[..., Any]
DATA = rows()

SAVED = {"adapter_config.json", "adapter_model.safetensors"}
STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}

every_base = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])


def trainer_of(model: Any, folder: Path, **options: Any) -> Any:
    return adapter_trainer()(
        model=model, args=arguments(folder, **options), train_dataset=DATA, eval_dataset=DATA[:4]
    )


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_script_of_the_documentation_has_25_lines() -> None:
    """tests/project/test_docs.py runs it."""
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "trainers.md"
    script = page.read_text().split("```python\n")[1].split("```")[0]
    assert "AdapterCheckpoints" in script and "resume_from_checkpoint" in script
    assert len([line for line in script.splitlines() if line]) <= 25


@every_base
def test_a_checkpoint_holds_the_adapter_and_no_base(
    quantized: bool, tiny_llama: Make, tmp_path: Path
) -> None:
    model = tiny(quantized, tiny_llama)
    trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert {p.name for p in (tmp_path / "checkpoint-2").iterdir()} == SAVED | STATES

    trainer.save_model(str(tmp_path / "final"))
    assert {p.name for p in (tmp_path / "final").iterdir()} == SAVED
    other = tiny_llama()
    if quantized:
        minilora.quantize(other)
    minilora.load_adapter(other, tmp_path / "final")
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)


def test_a_checkpoint_can_be_read_by_peft(tiny_llama: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT reads what was saved")
    model = tiny(False, tiny_llama)
    trainer_of(model, tmp_path, save_strategy="steps", save_steps=4).train()
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4").eval()
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=0)


def test_the_folder_is_not_taken_for_a_whole_model(tiny_llama: Make, tmp_path: Path) -> None:
    trainer_of(tiny(False, tiny_llama), tmp_path).save_model()
    with pytest.raises((OSError, ValueError)):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


RESUMED = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": checkpointing(),
    "second-epoch": {"per_device_train_batch_size": 4},
    "bf16": {"bf16": True},
}


# `make test` runs each once, and `make soak` the others.
SAMPLE = {
    ("plain", False),
    ("accumulated", True),
    ("checkpointed", True),
    ("second-epoch", False),
    ("bf16", True),
}
PAIRS = [
    pytest.param(
        RESUMED[name],
        quantized,
        id=f"{name}-{'nf4' if quantized else 'dense'}",
        marks=[] if (name, quantized) in SAMPLE else pytest.mark.soak,
    )
    for name in RESUMED
    for quantized in (False, True)
]


@pytest.mark.parametrize(("options", "quantized"), PAIRS)
def test_a_resumed_run_is_bit_identical(
    options: dict[str, Any], quantized: bool, tiny_llama: Make, tmp_path: Path
) -> None:
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "weight_decay": 0.1,
        "logging_strategy": "steps",
        "logging_steps": 1,
    } | options

    def trainer(folder: str) -> Any:
        return trainer_of(tiny(quantized, tiny_llama, dropout=0.3), tmp_path / folder, **options)

    whole = trainer("whole")
    whole.train()

    interrupted(trainer("stopped"), step=6)
    torch.manual_seed(99)
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)

    assert_same(trainable(resumed.model), trainable(whole.model))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    first = trainable(tiny(quantized, tiny_llama))
    assert all(not torch.equal(p, first[n]) for n, p in trainable(whole.model).items())


@pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning")
@every_base
def test_parameters_trained_whole_are_saved_and_resumed_too(
    quantized: bool, tiny_llama: Make, tmp_path: Path
) -> None:
    def trainer(folder: str) -> Any:
        model = tiny_llama(tie_word_embeddings=True)
        model = tiny(quantized, lambda: model, train_also=["norm", "embed_tokens"])
        return trainer_of(model, tmp_path / folder, save_strategy="steps", save_steps=2)

    before = tiny_llama(tie_word_embeddings=True).state_dict()
    whole = trainer("whole")
    whole.train()
    interrupted(trainer("stopped"), step=4)
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    for model in (whole.model, resumed.model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])

    # The base of either is what it was.
    for model in (whole.model, resumed.model):
        ejected = minilora.eject(model).state_dict()
        assert torch.equal(ejected["lm_head.weight"], before["lm_head.weight"])
        assert torch.equal(ejected["model.norm.weight"], before["model.norm.weight"])


def test_several_adapters_are_saved_and_resumed_each(tiny_llama: Make, tmp_path: Path) -> None:
    def trainer(folder: str) -> Any:
        model = tiny(False, tiny_llama, name="frozen")
        randomize(model, "frozen", size=0.01)
        minilora.inject(model, r=2, name="b", targets="q_proj")
        minilora.inject(model, r=3, name="a", targets=["q_proj", "o_proj"])
        minilora.use(model, "a", "b")
        return trainer_of(model, tmp_path / folder, save_strategy="steps", save_steps=2)

    whole = trainer("whole")
    whole.train()
    interrupted(trainer("stopped"), step=4)
    resumed = trainer("stopped")

    # What is not trained is saved all the same: the run may have started from other values.
    with torch.no_grad():
        for adapter in adapters_of(resumed.model, "frozen").values():
            adapter.B.zero_()
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    folders = {p.name for p in (tmp_path / "whole" / "checkpoint-2").iterdir() if p.is_dir()}
    assert folders == {"a", "b", "frozen"}


@every_base
def test_the_best_adapter_is_loaded_at_the_end(
    quantized: bool, tiny_llama: Make, tmp_path: Path
) -> None:
    model = tiny(quantized, tiny_llama)
    trainer = trainer_of(
        model,
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=2,
    )
    scores = [0.0, 1.0, 3.0, 2.0, 0.5, 2.5, 1.0]
    trainer.evaluate = lambda **_: {"eval_score": scores[trainer.state.global_step]}
    seen = []
    saved = trainer.save_model
    trainer.save_model = lambda *args, **options: (
        seen.append(trainable(model)),
        saved(*args, **options),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_same(trainable(model), seen[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.parametrize("name", sorted(STATES))
def test_a_checkpoint_that_lacks_a_state_is_refused(
    name: str, tiny_llama: Make, tmp_path: Path
) -> None:
    trainer_of(tiny(False, tiny_llama), tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-4" / name).unlink()
    model = tiny(False, tiny_llama)
    before = trainable(model)
    with pytest.raises(ValueError, match=f"checkpoint-4 cannot be resumed: it has no {name}"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=True)
    assert_same(trainable(model), before)


@pytest.mark.parametrize("name", sorted(STATES - {"trainer_state.json"}))
@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_checkpoint_with_a_truncated_state_is_refused(
    left: int, name: str, tiny_llama: Make, tmp_path: Path
) -> None:
    trainer_of(tiny(False, tiny_llama), tmp_path, save_strategy="steps", save_steps=4).train()
    file = tmp_path / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:left])
    model = tiny(False, tiny_llama)
    before = trainable(model)
    with pytest.raises(ValueError, match=f"checkpoint-4/{name} is damaged or incomplete"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=True)
    assert_same(trainable(model), before)


def test_a_checkpoint_of_another_adapter_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tiny(False, tiny_llama, targets="q_proj"), tmp_path, **options).train()
    model = tiny(False, tiny_llama)
    before = trainable(model)
    with pytest.raises(ValueError, match="does not fit"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=True)
    assert_same(trainable(model), before)


def test_a_checkpoint_without_an_adapter_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    trainer_of(tiny(False, tiny_llama), tmp_path, save_strategy="steps", save_steps=4).train()
    for name in SAVED:
        (tmp_path / "checkpoint-4" / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        trainer_of(tiny(False, tiny_llama), tmp_path).train(resume_from_checkpoint=True)


def test_a_model_without_adapters_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter: minilora\.inject"):
        trainer_of(tiny_llama(), tmp_path)


class HeadRead(nn.Module):
    """A Llama whose loss reads lm_head.weight, as fused losses do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.llama = model

    def forward(self, input_ids: Any, labels: Any, **_: Any) -> Any:
        hidden = self.llama.model(input_ids).last_hidden_state
        logits = hidden @ self.llama.lm_head.weight.T
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss}


def test_a_weight_that_is_read_without_a_call_is_named_before_anything_changes(
    tiny_llama: Make, tmp_path: Path
) -> None:
    model = HeadRead(tiny(False, tiny_llama, targets=["q_proj", "lm_head"]))
    before = trainable(model)
    with pytest.raises(TypeError, match=r"reads the weight of llama\.lm_head without calling"):
        trainer_of(model, tmp_path).train()
    assert_same(trainable(model), before)


def test_an_adapter_without_a_gradient_is_named_before_anything_changes(
    tiny_llama: Make, tmp_path: Path
) -> None:
    model = tiny(False, tiny_llama)
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, x, y: y.detach())
    before = trainable(model)
    message = r"got no gradient .* \(1 of them\): model\.layers\.1\.self_attn\.q_proj\. L"
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path).train()
    assert_same(trainable(model), before)


def test_the_check_of_the_first_step_can_be_switched_off(tiny_llama: Make, tmp_path: Path) -> None:
    trainer = trainer_of(HeadRead(tiny(False, tiny_llama, targets=["q_proj", "lm_head"])), tmp_path)
    type(trainer).check_first_step = False
    trainer.train()


def test_no_gradient_at_all_names_the_layers_too(tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny(False, tiny_llama)
    model.model.norm.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match=r"\(14 of them\): model\.layers\.0\.self_attn\.q_proj"):
        trainer_of(model, tmp_path).train()


class Alternating(nn.Module):
    """Two layers, of which each micro-batch reaches another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.calls = 0

    def forward(self, x: Any, **_: Any) -> Any:
        layer = self.layers[self.calls % 2]
        self.calls += 1
        return {"loss": layer(x).square().mean()}


def test_the_check_waits_for_all_micro_batches_of_the_step(tmp_path: Path) -> None:
    def trainer(steps: int) -> Any:
        model = minilora.inject(Alternating(), r=2)
        data = [{"x": torch.ones(4) * i, "label": 0} for i in range(1, 9)]
        options = arguments(
            tmp_path, gradient_accumulation_steps=steps, remove_unused_columns=False
        )
        return adapter_trainer()(model=model, args=options, train_dataset=data)

    trainer(2).train()
    with pytest.raises(ValueError, match=r"\(1 of them\): layers\.1"):
        trainer(1).train()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_is_trained_and_resumed(tiny_llama: Make, tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    trainer = trainer_of(
        tiny(True, tiny_llama), tmp_path, **options, save_strategy="steps", save_steps=1
    )
    trainer.train()
    expected = trainable(trainer.accelerator.unwrap_model(trainer.model))
    resumed = trainer_of(tiny(True, tiny_llama), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(trainable(resumed.accelerator.unwrap_model(resumed.model)), expected)


def test_a_model_that_was_loaded_in_4_bits_is_trained_and_resumed(
    folder: Path, tmp_path: Path
) -> None:
    def trainer(name: str) -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, quantization_config=minilora.NF4Config(), dtype=torch.float32
        )
        minilora.inject(model, r=4)
        return trainer_of(model, tmp_path / name, save_strategy="steps", save_steps=2)

    whole = trainer("whole")
    whole.train()
    interrupted(trainer("stopped"), step=4)
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same(trainable(resumed.model), trainable(whole.model))
    assert {p.name for p in (tmp_path / "whole" / "checkpoint-4").iterdir()} == SAVED | STATES


@pytest.mark.parametrize("options", [{"r": 2}, {"alpha": 3}, {"dropout": 0.1}], ids=str)
def test_a_checkpoint_of_other_settings_is_refused(
    options: dict[str, Any], tiny_llama: Make, tmp_path: Path
) -> None:
    trainer_of(tiny(False, tiny_llama), tmp_path, save_strategy="steps", save_steps=4).train()
    model = minilora.inject(tiny_llama(), **{"r": 4, **options})
    before = trainable(model)
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=rf"checkpoint-4 .* {name}=.*the model has {name}={value}"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=True)
    assert_same(trainable(model), before)


def test_evaluation_before_training_is_not_checked(tiny_llama: Make, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(False, tiny_llama), tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_tokenizer_is_saved_with_the_adapter(
    tiny_llama: Make, byte_tokenizer: Make, tmp_path: Path
) -> None:
    model = tiny(False, tiny_llama)
    tokenizer = byte_tokenizer("{{ messages }}")
    trainer = adapter_trainer()(
        model=model, args=arguments(tmp_path), train_dataset=DATA, processing_class=tokenizer
    )
    trainer.save_model()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).vocab_size == tokenizer.vocab_size


def test_a_full_disk_leaves_the_checkpoint_before_it(
    tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny(False, tiny_llama), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    before = (tmp_path / "checkpoint-4" / "adapter_model.safetensors").read_bytes()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("minilora.files.adapter_folder.write_tensors", fails)
    with pytest.raises(OSError, match="no space"):
        trainer.save_model(str(tmp_path / "checkpoint-4"))
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").read_bytes() == before
    shutil.rmtree(tmp_path / "checkpoint-4")
