"""Model folders with one thing wrong, given to `load_dense`, `plan` and `generate`.

A case copies a good folder, whole or in shards, and changes a value, a type, a key or a file of it.
What loads has to be the model itself: its logits are compared, bit for bit, with those of a Llama
that is built without transformers' loading, from the same config and the same tensors.
"""

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_folder
import torch
from fuzzing import REFUSED, SAME, Wrong, attempt

CI, SAMPLE, FULL = 30, 150, 400

Mutation = Callable[[Path, random.Random], None]

IDS = torch.arange(24).reshape(2, 12) * 7 % 250

# Values of the wrong type, at a boundary, or hostile.
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "64",
    "\x1b[2J", "\u202egnp", [], [1], {}, {"a": 1}, [[[]]], "../..", "x" * 5000,
]  # fmt: skip

# The keys of a config that decide how the model computes; every other one may be anything.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "vocab_size")
KEYS = (*SIZES, "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype")
KEYS += ("eos_token_id", "hidden_act", "initializer_range", "max_position_embeddings", "mlp_bias")
KEYS += ("model_type", "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_parameters")
KEYS += ("tie_word_embeddings", "transformers_version", "use_cache", "rope_scaling", "rope_theta")
KEYS += ("torch_dtype", "is_decoder", "is_encoder_decoder", "add_cross_attention", "pruned_heads")
KEYS += ("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict")
KEYS += ("problem_type", "id2label", "num_labels", "tokenizer_class", "auto_map", "name_or_path")
KEYS += ("_name_or_path", "_commit_hash", "transformers_weights", "fusion_config", "torchscript")
KEYS += ("quantization_config", "compression_config", "text_config", "sliding_window", "minilora")
KEYS += ("_attn_implementation", "attn_implementation", "experts_implementation", "layer_types")

QUANTIZATIONS: list[Any] = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dataset": "wikitext2"},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    {"quant_method": "fp8", "activation_scheme": "dynamic"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    {"quant_method": "mxfp4"}, {"quant_method": "hqq"}, {"quant_method": "torchao"},
    {"quant_method": "nobody's\x1b[31m"}, {"quant_method": ["gptq"]}, {}, [], "nf4", 4, False,
]  # fmt: skip

# What a generation config may ask for: other decodings than greedy, code, nonsense.
GENERATION: dict[str, list[Any]] = {
    "do_sample": [True],
    "num_beams": [4, 0, -1, "x"],
    "temperature": [0.0, -1.0, 5.0],
    "repetition_penalty": [3.0, -1.0],
    "max_length": [1, 0, -5],
    "top_k": [1, -1],
    "cache_implementation": ["static", "x"],
    "custom_generate": ["nobody/code", "."],
    "assistant_model": ["x"],
    "prompt_lookup_num_tokens": [3],
    "penalty_alpha": [0.6],
    "dola_layers": ["low"],
    "stop_strings": [["e"]],
    "suppress_tokens": [[68]],
    "forced_eos_token_id": [3],
    "bad_words_ids": [[[68]]],
    "watermarking_config": [{"bias": 9.0}, 3],
    "min_new_tokens": [5],
    "num_return_sequences": [2],
    "return_dict_in_generate": [True],
    "guidance_scale": [3.0],
    "use_cache": [False],
    "eos_token_id": JUNK,
    "bos_token_id": JUNK,
    "pad_token_id": JUNK,
    "unknown": JUNK,
}

OTHER_FILES = {
    "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}',
    "pytorch_model.bin": "not even a pickle",
    "shard-00000-model-00001-of-00002.safetensors": "",
    "preprocessor_config.json": '{"auto_map": {"AutoProcessor": "x.X"}}',
    "processor_config.json": "[",
    "added_tokens.json": '{"<extra>": 400}',
    "special_tokens_map.json": '{"eos_token": "<|im_start|>"}',
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "\x00\x01",
    "spiece.model": "",
    "tekken.json": "{}",
    "model.safetensors.index.json": '{"weight_map": {}}',
    "training_args.bin": "",
    "model.gguf": "GGUF",
    "README.md": "---\nlicense: none\n---\n",
}


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def config_value(folder: Path, rng: random.Random) -> None:
    key, value = rng.choice(KEYS), rng.choice(JUNK)
    edit(folder / "config.json", lambda config: config.update({key: value}))


def config_key_gone(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    key = rng.choice(sorted(json.loads(path.read_text())))
    edit(path, lambda config: config.pop(key))


def config_size(folder: Path, rng: random.Random) -> None:
    """A size that is a little wrong, or right in another type."""
    key = rng.choice(SIZES)

    def change(config: dict[str, Any]) -> None:
        right = config[key]
        config[key] = rng.choice(
            [right + 1, right - 1, 2 * right, right // 2, float(right), str(right), -right, [right]]
        )

    edit(folder / "config.json", change)


def quantized(folder: Path, rng: random.Random) -> None:
    key = rng.choice(["quantization_config", "quantization_config", "compression_config"])
    value = rng.choice(QUANTIZATIONS)
    edit(folder / "config.json", lambda config: config.update({key: value}))


def other_architecture(folder: Path, rng: random.Random) -> None:
    kinds = ["bert", "t5", "vit", "gpt2", "mistral", "qwen2", "gemma", "mamba", "whisper", "llava"]
    kinds += ["nothing", "../llama", "LLAMA", "llama4", "roberta", "encoder-decoder", "clip"]
    kind = rng.choice(kinds)
    edit(folder / "config.json", lambda config: config.update(model_type=kind))


def masked_language_model(folder: Path, rng: random.Random) -> None:
    names = [rng.choice(["BertForMaskedLM", "LlamaForMaskedLM", "RobertaForMaskedLM"])]
    edit(folder / "config.json", lambda config: config.update(architectures=names))


def json_damage(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.glob("*.json")))
    text = path.read_text()
    broken = [
        "", "[]", "null", "{", "{}", text[: rng.randrange(len(text))], "[" * 200_000,
        '{"a":' * 50_000, "\ufeff" + text, text.replace(",", ",,", 1), text + text, "NaN",
    ]  # fmt: skip
    path.write_text(rng.choice(broken))


def json_bytes(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]))
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def file_gone(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(folder.iterdir())).unlink()


def file_more(folder: Path, rng: random.Random) -> None:
    name = rng.choice(sorted(OTHER_FILES))
    (folder / name).write_text(OTHER_FILES[name])


def file_is_folder(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    path.mkdir()


def weights_cut(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 4, 8, 100, len(content) // 2, len(content) - 1])])


def weights_header(folder: Path, rng: random.Random) -> None:
    """Another dtype, shape, name or place of a tensor; the data stay."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = rng.choice(sorted(key for key in header if key != "__metadata__"))
    entry = header[name]
    what = rng.choice(["dtype", "shape", "name", "gone", "offsets", "metadata", "junk"])
    if what == "dtype":
        entry["dtype"] = rng.choice(["F64", "I32", "F16", "BOOL", "F8_E4M3", "X", 3])
    elif what == "shape":
        entry["shape"] = rng.choice(
            [[], [0], entry["shape"][::-1], [-1], [2**40], entry["shape"][:1]]
        )
    elif what == "name":
        header[rng.choice(["", "x", name + ".", "model." + name, name.upper()])] = header.pop(name)
    elif what == "gone":
        del header[name]
    elif what == "offsets":
        entry["data_offsets"] = rng.choice([[0, 4], [4, 0], [0, 2**50], ["a", 1], None])
    elif what == "metadata":
        header["__metadata__"] = rng.choice([{}, {"format": "tf"}, {"format": "x"}, {"a": 1}, 3])
    else:
        header[name] = rng.choice(JUNK)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def tensors(folder: Path, rng: random.Random) -> None:
    """Real files with a tensor too many, too few, or of another dtype or shape."""
    from safetensors.torch import load_file, save_file

    path = rng.choice(sorted(folder.glob("*.safetensors")))
    held = load_file(path)
    name = rng.choice(sorted(held))
    what = rng.choice(["more", "less", "dtype", "shape", "layer"])
    if what == "more":
        held[rng.choice(["x", "lm_head.bias", "model.layers.0.extra.weight"])] = torch.ones(3)
    elif what == "less":
        del held[name]
    elif what == "dtype":
        kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]
        held[name] = held[name].to(rng.choice(kinds))
    elif what == "shape":
        held[name] = held[name].repeat_interleave(2, 0)
    else:
        held["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)
    save_file(held, path, metadata={"format": "pt"})


def index(folder: Path, rng: random.Random) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return tensors(folder, rng)
    names = [
        "../../x.safetensors",
        "/etc/passwd",
        "model.bin",
        "",
        ".",
        "x/../model-00001.safetensors",
    ]
    names += ["config.json", "\x1b[31m.safetensors", "nowhere.safetensors", 3, None, ["a"]]

    def change(content: dict[str, Any]) -> None:
        places = content["weight_map"]
        key = rng.choice(sorted(places))
        what = rng.choice(["name", "name", "swap", "gone", "more", "junk", "metadata"])
        if what == "name":
            places[key] = rng.choice(names)
        elif what == "swap":
            places[key] = rng.choice(sorted(places.values()))
        elif what == "gone":
            del places[key]
        elif what == "more":
            places["x"] = places[key]
        elif what == "junk":
            content["weight_map"] = rng.choice(JUNK)
        else:
            content["metadata"] = rng.choice(JUNK)

    return edit(path, change)


def tokenizer_value(folder: Path, rng: random.Random) -> None:
    keys = ["tokenizer_class", "model_max_length", "eos_token", "pad_token", "bos_token", "backend"]
    keys += [
        "extra_special_tokens",
        "added_tokens_decoder",
        "chat_template",
        "auto_map",
        "vocab_file",
    ]
    keys += ["clean_up_tokenization_spaces", "padding_side", "tokenizer_file", "model_input_names"]
    keys += ["processor_class", "fix_mistral_regex", "unk_token", "truncation_side", "from_slow"]
    value = rng.choice(
        [*JUNK, "BertTokenizer", "LlamaTokenizer", "NoTokenizer", {"AutoTokenizer": 3}]
    )
    key = rng.choice(keys)
    edit(folder / "tokenizer_config.json", lambda config: config.update({key: value}))


def tokenizer_file(folder: Path, rng: random.Random) -> None:
    def change(content: dict[str, Any]) -> None:
        key = rng.choice(sorted(content))
        content[key] = rng.choice(JUNK)

    edit(folder / "tokenizer.json", change)


def generation_value(folder: Path, rng: random.Random) -> None:
    key = rng.choice(sorted(GENERATION))
    value = rng.choice(GENERATION[key])
    edit(folder / "generation_config.json", lambda config: config.update({key: value}))


def template(folder: Path, rng: random.Random) -> None:
    texts = [
        "",
        "{{",
        "{% for",
        "{{ 1 / 0 }}",
        "{{ messages[99].content }}",
        "{{ raise_exception('x') }}",
    ]
    texts += [
        "{{ ''.__class__.__mro__ }}",
        "{{ nothing.at.all }}",
        "{{ messages | tojson }}",
        "constant",
    ]
    texts += [
        "{% include '/etc/passwd' %}",
        "{{ 'a' * 100000 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ]
    (folder / "chat_template.jinja").write_text(rng.choice(texts))


MUTATIONS: list[Mutation] = [
    config_value, config_value, config_value, config_key_gone, config_size, quantized,
    other_architecture, masked_language_model, json_damage, json_bytes, file_gone, file_more,
    file_is_folder, weights_cut, weights_header, tensors, index, index, tokenizer_value,
    tokenizer_file, generation_value, template,
]  # fmt: skip


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    source = tiny_folder.shared() / rng.choice(["model", "shards"])
    model_folder = folder / "model"
    shutil.copytree(source, model_folder)
    rng.choice(MUTATIONS)(model_folder, rng)
    before = contents(model_folder)

    ended = check_plan(model_folder), check_load(model_folder)
    if contents(model_folder) != before:
        raise Wrong("changed", "a file of the folder")
    return REFUSED if REFUSED in ended else SAME


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def check_plan(folder: Path) -> str:
    """`plan` reads the config alone; what it counts has to be what the config describes."""
    import minilora

    found, error = attempt(lambda: minilora.plan(str(folder), r=1), [str(folder), "r=1", "target"])
    if error is not None:
        return REFUSED
    expected = minilora.plan(described(folder), r=1)
    if (found.rows, found.bytes) != (expected.rows, expected.bytes):
        raise Wrong("silent", "the plan is not that of the config")
    return SAME


def check_load(folder: Path) -> str:
    from minilora.huggingface import generate, load_dense

    loaded, error = attempt(lambda: load_dense(folder, dtype=torch.float32), [str(folder)])
    if error is not None:
        return REFUSED
    model, tokenizer = loaded
    if type(model).__name__ != "LlamaForCausalLM":
        raise Wrong("silent", f"loaded as {type(model).__name__}")

    plain = plainly_loaded(folder)
    with torch.no_grad():
        logits, error = attempt(lambda: model(input_ids=IDS).logits, [str(folder)])
        if error is not None or not torch.equal(logits, plain(input_ids=IDS).logits):
            raise Wrong("silent", "the logits are not those of the tensors in the folder")

    names = [str(folder), "tokenizer", "template", "prompt", "context", "eos_token_id"]
    answer, error = attempt(lambda: generate(model, tokenizer, "say yes", limit=4), names)
    if error is not None:
        return REFUSED
    check_answer(plain, tokenizer, model, answer)
    return SAME


def check_answer(plain: Any, tokenizer: Any, model: Any, answer: str) -> None:
    """The answer is the argmax of every step, whatever the generation config asks for."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    text: Any = "say yes"
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "say yes"}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(4):
            token = plain(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            if token.item() in ends:
                break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    if answer != expected:
        raise Wrong("silent", f"{answer!r} instead of {expected!r}")


def described(folder: Path) -> Any:
    """The Llama that the config describes, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
        )


def plainly_loaded(folder: Path) -> Any:
    """The model from its config and all of its tensors, without transformers' loading."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).float().eval()
    state = functools.reduce(dict.__or__, map(load_file, sorted(folder.glob("model*.safetensors"))))
    # transformers reads the keys of a model inside another one, too.
    state = {key.replace("model.model.", "model."): value for key, value in state.items()}
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        raise Wrong("silent", f"loaded, and a strict load says {error}") from error
    return model


def prepare() -> None:
    """What every process pays once is no part of a case."""
    from minilora.huggingface import generate, load_dense

    generate(*load_dense(tiny_folder.shared() / "model"), "x", limit=1)

    # To say which kinds of model there are, transformers imports all of them.
    with tempfile.TemporaryDirectory() as folder:
        other = Path(shutil.copytree(tiny_folder.shared() / "model", folder, dirs_exist_ok=True))
        edit(other / "config.json", lambda config: config.update(model_type="vit"))
        attempt(lambda: load_dense(other), [folder])
