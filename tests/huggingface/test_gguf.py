"""A GGUF file that is written here is read by transformers as the model that it was made from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_level import CHATML
from helpers import same_bits
from torch import Tensor

from minilora.huggingface.bundled import bundled_model_folder
from minilora.huggingface.gguf import _encoded, export_gguf
from minilora.huggingface.gguf_tokenizer import read_vocabulary

gguf = pytest.importorskip("gguf", reason="GGUF files are written with it: pip install -e .[hf]")
transformers = pytest.importorskip("transformers", reason="transformers is the reader")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
# A reader knows the size of a head from the file, but for Qwen3's, which it takes for 128.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}
TEXT = "It's 1 of 23 tests, in naïve prose!  And   spaces.\n\n\tprint('x')"


def bpe(split: Any = None, size: int = 280, **model: Any) -> Any:
    """A trained byte-level BPE; `split` decides where a token may end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(**model))
    whole = not isinstance(split, pre_tokenizers.Split)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT] * 20, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    fast.chat_template = CHATML
    return fast


def make_folder(path: Path, family: str = "llama", tokenizer: Any = None, **options: Any) -> Path:
    kind = family.split(",")[0]
    options = SIZES | FAMILIES[family] | options
    config = transformers.AutoConfig.for_model(kind, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            # Norms are ones, and biases zeros: nothing would show a mix-up.
            p.data += 0.1 * torch.randn(p.shape)
    model.save_pretrained(path)
    (tokenizer or bpe()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("merged"))


def read(file: Path) -> tuple[Any, Any]:
    """The model and the tokenizer that transformers makes of a file."""
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **options
    )
    return model.eval(), tokenizer


def load(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def rounded(weight: Tensor, quant_type: str) -> Tensor:
    """The weight as the format holds it, from its definition."""
    if weight.dim() < 2:
        return weight
    if quant_type == "f16" or weight.shape[-1] % 32:
        return weight.half().float()
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = blocks / scale
    # Half away from zero, as C's roundf.
    codes = codes.sign() * (codes.abs() + 0.5).floor()
    return (codes * scale.half().float()).reshape(weight.shape)


def bound(weight: Tensor, quant_type: str) -> Tensor:
    """The largest error that docs/how-to/merging-and-serving.md admits, per weight."""
    if weight.dim() < 2:
        return torch.zeros_like(weight)
    weight = weight.abs()
    if quant_type == "f16" or weight.shape[-1] % 32:
        return (weight * 2**-11).clamp(min=2**-25)
    largest = weight.reshape(-1, 32).amax(1, keepdim=True)
    errors = largest / 254 + (largest * 2**-11).clamp(min=127 * 2**-25)
    # Scale, code and product are themselves rounded to float32.
    return (errors * (1 + 2**-20)).expand(-1, 32).reshape(weight.shape)


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    found: Tensor = model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits
    return found


@torch.no_grad()
def greedy(model: Any, tokenizer: Any) -> list[int]:
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    return out[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("quant_type", ["f16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_weights_as_the_format_rounds_them(
    family: str, quant_type: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "merged", family)
    export_gguf(folder, tmp_path / "model.gguf", quant_type=quant_type)
    found, found_tokenizer = read(tmp_path / "model.gguf")
    expected, tokenizer = load(folder)

    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    for name, weight in found.state_dict().items():
        off = (weight - rounded(weights[name], quant_type)).abs().max()
        # A tie between two codes may go either way: 1 / scale is rounded too.
        assert off <= weights[name].abs().max() / 127 if quant_type == "q8_0" else off == 0, name
        assert ((weight - weights[name]).abs() <= bound(weights[name], quant_type)).all(), name

    assert found_tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    # With the weights that were read, the rest of the model computes the same, bit for bit.
    expected.load_state_dict(found.state_dict())
    assert same_bits(logits(found, tokenizer), logits(expected, tokenizer))
    assert greedy(found, tokenizer) == greedy(expected, tokenizer)


@pytest.mark.parametrize("quant_type", ["f16", "q8_0"])
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8])
def test_the_errors_of_small_weights_too_are_within_the_documented_bounds(
    size: float, quant_type: str
) -> None:
    kind = gguf.GGMLQuantizationType[quant_type.upper()]
    weight = size * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    stored = gguf.quants.dequantize(_encoded(weight, kind), kind)
    errors = (torch.from_numpy(stored) - weight).abs()
    bounds = bound(weight, quant_type)
    assert (errors <= bounds).all()
    # They are no larger than they need be, down to where all weights become zeros.
    assert (errors / bounds).max() > (0.8 if size > 1e-7 else 0)


@pytest.mark.parametrize("quant_type", ["f16", "q8_0"])
def test_the_bounds_in_the_documentation_have_their_absolute_terms(quant_type: str) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "merging-and-serving.md"
    (row,) = [x for x in page.read_text().splitlines() if x.startswith(f'| `"{quant_type}"` |')]
    terms = {"f16": ("2^-11", "2^-25"), "q8_0": ("1/254", "2^-11", "127 * 2^-25")}
    assert all(term in row for term in terms[quant_type])


def test_a_missing_folder_to_write_to_is_named(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone is not a folder: create it"):
        export_gguf(merged, tmp_path / "gone" / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_a_sharded_folder_gives_the_same_file(merged: Path, tmp_path: Path) -> None:
    model, tokenizer = load(merged)
    # The file says the folder's name.
    sharded = tmp_path / merged.name
    model.save_pretrained(sharded, max_shard_size="60KB")
    tokenizer.save_pretrained(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1

    export_gguf(merged, tmp_path / "a.gguf")
    export_gguf(sharded, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_float16_model_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "merged")
    model, tokenizer = load(folder)
    model.half().save_pretrained(folder)
    export_gguf(folder, tmp_path / "model.gguf")
    found, _ = read(tmp_path / "model.gguf")
    expected, _ = load(folder)
    assert same_bits(logits(found, tokenizer), logits(expected, tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary positions",
        ),
    ],
)
def test_a_config_that_the_file_cannot_express_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "merged", **options)
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_window_of_attention_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "merged", "mistral", sliding_window=16)
    with pytest.raises(ValueError, match="sliding_window=16"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_another_architecture_is_refused_and_the_way_out_named(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"gpt2 model, and only llama.*convert_hf_to_gguf"):
        export_gguf(tmp_path / "gpt2", tmp_path / "model.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
def test_a_weight_that_float16_cannot_hold_is_named_and_the_old_file_stays(
    value: float, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "merged")
    model, _ = load(folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    model.save_pretrained(folder)
    (tmp_path / "model.gguf").write_text("the old file")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "the old file"
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "model.gguf"}


def test_a_tensor_without_a_name_in_the_format_is_named(merged: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, tokenizer = load(merged)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    weights = tmp_path / "merged" / "model.safetensors"
    save_file(
        {**load_file(weights), "model.extra.weight": torch.ones(2)}, weights, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"model\.extra\.weight"):
        export_gguf(tmp_path / "merged", tmp_path / "model.gguf")


def damage(folder: Path, change: str) -> None:
    """Makes a merged folder one that contradicts its config, or is incomplete."""
    from safetensors.torch import load_file, save_file

    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, described = load_file(weights), json.loads(config.read_text())
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif change == "shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(5, 64)
    elif change == "int8":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int8)
    elif change == "more layers":
        described["num_hidden_layers"] = 3
    elif change == "heads":
        described["num_key_value_heads"] = 4
    save_file(tensors, weights, {"format": "pt"})
    config.write_text(json.dumps(described))
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "no tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"has no model\.layers\.1\.mlp\.up_proj\.weight"),
        ("shape", r"up_proj\.weight has the shape \[5, 64\], its config needs \[96, 64\]"),
        ("int8", r"up_proj\.weight is stored as I8"),
        ("more layers", r"has no model\.layers\.2\."),
        ("heads", r"k_proj\.weight has the shape"),
        ("truncated", r"model\.safetensors cannot be read"),
        ("no tokenizer", r"has no tokenizer\.json"),
    ],
)
def test_a_damaged_folder_is_refused_and_the_old_file_stays(
    change: str, message: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "merged")
    damage(folder, change)
    (tmp_path / "model.gguf").write_text("the old file")
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "the old file"


def test_a_head_of_its_own_is_written_whatever_the_config_says(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path / "merged", "llama, tied")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for scale in (1.0, 2.0):
        head = tensors["model.embed_tokens.weight"].clone() * scale
        save_file({**tensors, "lm_head.weight": head}, weights, {"format": "pt"})
        export_gguf(folder, tmp_path / "model.gguf")
        found, _ = read(tmp_path / "model.gguf")
        assert found.config.tie_word_embeddings == (scale == 1.0)
        assert same_bits(found.lm_head.weight.data, head.half().float())


@pytest.mark.parametrize("quant_type", ["q4_0", "F16", None])
def test_another_format_is_refused(quant_type: Any, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be 'f16' or 'q8_0'"):
        export_gguf(merged, tmp_path / "model.gguf", quant_type=quant_type)


def test_a_missing_folder_and_a_quantized_one_are_refused(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        export_gguf(tmp_path / "nowhere", tmp_path / "model.gguf")
    model, tokenizer = load(merged)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    config = tmp_path / "merged" / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"quantization_config": quantized})
    )
    with pytest.raises(ValueError, match="quantized"):
        export_gguf(tmp_path / "merged", tmp_path / "model.gguf")


def splits() -> dict[str, tuple[Any, dict[str, Any]]]:
    """What llama.cpp calls a rule -> how a tokenizer.json has it."""
    from tokenizers import Regex, pre_tokenizers

    word = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return {
        "gpt-2": (None, {}),
        "smollm": (pre_tokenizers.Digits(individual_digits=True), {}),
        "qwen2": (pre_tokenizers.Split(Regex(word + r"\p{N}" + rest), "isolated"), {}),
        "llama-bpe": (
            pre_tokenizers.Split(Regex(word + r"\p{N}{1,3}" + rest), "isolated"),
            {"ignore_merges": True},
        ),
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_rule_that_splits_text_is_recognized(name: str, tmp_path: Path) -> None:
    split, model = splits()[name]
    tokenizer = bpe(split, **model)
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 300)
    assert found.pre_tokenizer == name
    assert found.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found.types == [3, 3] + [1] * (len(tokenizer) - 2) + [5] * (300 - len(tokenizer))
    assert found.special == {"bos": 0, "eos": 1, "pad": 1}
    assert found.chat_template == CHATML and not found.adds_bos

    # The merges, applied in their order to the bytes of a word, give its tokens.
    word = list("prose")
    for merge in found.merges:
        pair = merge.split(" ")
        while (at := pairs(word).index(pair) if pair in pairs(word) else None) is not None:
            word[at : at + 2] = ["".join(pair)]
    assert [found.tokens.index(part) for part in word] == tokenizer("prose")["input_ids"]


def pairs(word: list[str]) -> list[list[str]]:
    return [word[i : i + 2] for i in range(len(word) - 1)]


def test_a_rule_that_llama_cpp_does_not_name_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    bpe(pre_tokenizers.Punctuation()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot name.*Punctuation"):
        read_vocabulary(tmp_path, 300)
    bpe(splits()["llama-bpe"][0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot name"):
        read_vocabulary(tmp_path, 300)


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    bpe().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no row among the 270 embeddings"):
        read_vocabulary(tmp_path, 270)


def test_a_tokenizer_that_does_not_split_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot name.*ByteLevel"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.soak
@pytest.mark.parametrize("quant_type", ["f16", "q8_0"])
def test_smollm2_answers_the_same_from_a_gguf_file(quant_type: str, tmp_path: Path) -> None:
    """A model with outliers among its weights, as trained ones have."""
    folder = bundled_model_folder()
    export_gguf(folder, tmp_path / "model.gguf", quant_type=quant_type)
    found, found_tokenizer = read(tmp_path / "model.gguf")
    expected, tokenizer = load(folder)
    assert found_tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    if quant_type == "f16":
        assert same_bits(logits(found, tokenizer), logits(expected, tokenizer))
    expected.load_state_dict(found.state_dict())
    assert same_bits(logits(found, tokenizer), logits(expected, tokenizer))
    assert greedy(found, tokenizer) == greedy(expected, tokenizer)
