"""A run on a base that is stored in 4 bits, by minilora or by bitsandbytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_folders import store_in_4bit

import minilora
from minilora.cli import app
from minilora.huggingface import load_dense
from minilora.huggingface.provenance import merged_from
from minilora.training import FinetuneConfig, finetune

Configure = Callable[..., FinetuneConfig]


@pytest.fixture
def stored(folder: Path, tmp_path: Path) -> Path:
    """The tiny model in 4 bits."""
    return store_in_4bit(folder, tmp_path / "stored")


def test_a_dense_base_is_refused_before_anything_is_written(
    stored: Path, configure: Configure
) -> None:
    config = configure(model=str(stored), quantize=False)
    with pytest.raises(ValueError, match=r"stored in 4 bits.*--no-quantize"):
        finetune(config)
    assert not Path(config.out).exists()
    arguments = ["generate", "--model", str(stored), "--no-quantize", "--prompt", "x"]
    with pytest.raises(ValueError, match=r"stored in 4 bits.*--no-quantize"):
        app(arguments, standalone_mode=False)


def test_a_run_on_a_stored_base_is_the_run_on_the_dense_one_quantized(
    stored: Path, tmp_path: Path, configure: Callable[..., FinetuneConfig], capsys: Any
) -> None:
    """The same bytes, the same steps; its adapter is used with either base, and merged."""

    def run(name: str, **changes: Any) -> Any:
        options = {"steps": 2, "batch_size": 2, "samples": 0, "out": str(tmp_path / name)}
        return finetune(configure(**options, **changes))

    usual = run("usual")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("loading ") and said[1] == "quantizing it to 4 bits"
    found = run("found", model=str(stored))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("loading ") and said[1] == "it is in 4 bits already"
    assert [s.loss for s in found.history] == [s.loss for s in usual.history]

    adapter = str(tmp_path / "found")
    app(["merge", "--adapter", adapter, "--out", str(tmp_path / "dense")], standalone_mode=False)
    merged, _ = load_dense(tmp_path / "dense")
    expected = minilora.merge(usual.model).state_dict()
    assert all(torch.equal(v, expected[key]) for key, v in merged.state_dict().items())
    record = merged_from(merged.config)
    assert record is not None and record.quantized and record.base == str(stored.absolute())


def test_a_folder_that_bitsandbytes_wrote_is_trained_on(
    folder: Path, tmp_path: Path, configure: Callable[..., FinetuneConfig]
) -> None:
    pytest.importorskip("bitsandbytes", reason="the writer")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    path = tmp_path / "theirs"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)

    result = finetune(configure(model=str(path), steps=20, batch_size=4, samples=0))
    assert result.eval_before is not None and result.eval_after is not None
    assert result.eval_after < 0.7 * result.eval_before
    layer = result.model.model.layers[0].mlp.up_proj
    theirs = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(layer.weight.packed, theirs.data.reshape(-1))
    assert not layer.weight.double_quantized
