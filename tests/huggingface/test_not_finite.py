"""Loading a model finds NaN and infinity among its weights, wherever they are, and names them."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("accelerate", reason="transformers places layers with it")

import transformers
from safetensors.torch import load_file, save_file
from transformers_folders import make_folder

from minilora.huggingface.pretrained import load
from minilora.huggingface.quantizer import NF4Config


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "model"
    load(dense, quantization_config=NF4Config())[0].save_pretrained(path)
    return path


def spoil(folder: Path, name: str, value: float, *, whole: bool = False) -> None:
    """Writes a value into the last place of a stored tensor, or into all of them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0 if whole else -1 :] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_dense_weight_that_is_not_finite_is_named_in_the_error(
    name: str, value: float, dense: Path, in_4_bits: Path, tmp_path: Path
) -> None:
    """Of one value: the token on which a model is tried out does not see all."""

    for path, config in ((dense, None), (dense, NF4Config()), (in_4_bits, None)):
        folder = Path(shutil.copytree(path, tmp_path / "model", dirs_exist_ok=True))
        spoil(folder, name, value)
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
            load(folder, quantization_config=config)
        if config:
            with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
                transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_nan_in_a_dense_layer_is_found_where_attention_hides_it(
    layer: str, dense: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    spoil(folder, f"model.layers.0.{layer}.weight", float("nan"), whole=True)
    with pytest.raises(ValueError, match=rf"layers\.0\.{layer}\.weight holds NaN"):
        load(folder)
