"""AdapterCheckpoints in SFTTrainer, which reads lm_head.weight; checkpoints with accelerate."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import nn
from trainers import adapter_trainer, arguments, checkpointing, interrupted, tiny, trainable

import minilora
from minilora.huggingface.trainer import checkpoint_adapters

pytest.importorskip("transformers", reason="the trainer is transformers' own")

Make = Callable[..., Any]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def sft_trainer(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl", reason="the trainer is TRL's")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer needs a Dataset")
    texts = [{"text": f"{i} plus {i} is {2 * i}."} for i in range(12)]
    return adapter_trainer(trl.SFTTrainer)(
        model=model,
        args=arguments(
            folder, trl.SFTConfig, bf16=False, max_length=32, **checkpointing(), **options
        ),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_sft_saves_adapters_alone_and_resumes_bit_for_bit(
    quantized: bool, folder: Path, byte_tokenizer: Make, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the model is a Llama")

    def trainer(name: str) -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        model = tiny(quantized, lambda: model, dropout=0.2)
        saves = {"save_strategy": "steps", "save_steps": 2}
        return sft_trainer(model, byte_tokenizer(TEMPLATE), tmp_path / name, **saves)

    whole = trainer("whole")
    whole.train()
    found = {p.name for p in (tmp_path / "whole" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in found and "tokenizer.json" in found
    assert not {"config.json", "model.safetensors"} & found

    interrupted(trainer("stopped"), step=4)
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    expected = trainable(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in trainable(resumed.model).items())


def test_an_adapter_on_the_head_that_sft_never_calls_is_named(
    folder: Path, byte_tokenizer: Make, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the model is a Llama")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    minilora.inject(model, r=4, targets=["q_proj", "lm_head"])
    before = trainable(model)
    with pytest.raises(TypeError, match=r"reads the weight of lm_head without calling the layer"):
        sft_trainer(model, byte_tokenizer(TEMPLATE), tmp_path).train()
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


# accelerate


class Loop:
    """A training loop of one's own: two models, of which the second has no adapter."""

    def __init__(self) -> None:
        accelerate = pytest.importorskip("accelerate", reason="the loop is accelerate's")
        torch.manual_seed(0)
        self.accelerator = accelerate.Accelerator(cpu=True)
        checkpoint_adapters(self.accelerator)
        model = minilora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), r=2, dropout=0.3)
        other = nn.Linear(8, 1)
        parameters = [*minilora.adapter_parameters(model), *other.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        prepared = self.accelerator.prepare(other, model, optimizer)
        self.other, self.model, self.optimizer = prepared

    def steps(self, count: int) -> None:
        for _ in range(count):
            loss = self.other(self.model(torch.randn(4, 8))).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {**self.model.state_dict(), **self.other.state_dict(prefix="other.")}


def test_accelerate_saves_adapters_alone_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = Loop()
    randomize(whole.model, size=0.1)
    whole.steps(2)
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.steps(2)

    assert {p.name for p in (tmp_path / "state").iterdir()} == {
        "adapters_1",
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
    }
    files = {p.name for p in (tmp_path / "state" / "adapters_1").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}

    resumed = Loop()
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.steps(2)
    expected = whole.state()
    assert all(torch.equal(t, expected[name]) for name, t in resumed.state().items())


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the loop is accelerate's")
    accelerator = accelerate.Accelerator(cpu=True)
    kind = accelerate.DistributedType.FSDP
    monkeypatch.setattr(type(accelerator), "distributed_type", property(lambda _: kind))
    with pytest.raises(ValueError, match="sharded parameters"):
        checkpoint_adapters(accelerator)


# Two processes

DISTRIBUTED = """
import sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
import transformers
from trainers import adapter_trainer, arguments, rows, tiny, trainable

folder = Path(sys.argv[1])


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=128)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    )


def trainer(name):
    args = arguments(folder / name, save_strategy="steps", save_steps=2, ddp_backend="gloo")
    model = tiny(True, llama, dropout=0.3)
    return adapter_trainer()(model=model, args=args, train_dataset=rows(24))


whole = trainer("whole")
whole.train()
resumed = trainer("resumed")
resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
expected = trainable(whole.model)
assert all(torch.equal(p, expected[name]) for name, p in trainable(resumed.model).items())
if whole.args.process_index == 0:
    print("equal", whole.args.world_size)
torch.distributed.destroy_process_group()
"""


@pytest.mark.soak
def test_two_processes_save_once_and_resume_bit_for_bit(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    paths = ":".join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal 2" in done.stdout
    found = {p.name for p in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= found
    assert "model.safetensors" not in found
