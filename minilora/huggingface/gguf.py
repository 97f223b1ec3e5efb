"""A merged model as one GGUF file, the format of llama.cpp, Ollama and LM Studio.

A GGUF file holds the weights under llama.cpp's names, the sizes from the config, and the tokenizer.
What the file cannot say as the folder says it, such as scaled rotary positions, is refused: a file
that is nearly right loads without a word and answers nonsense.

The format stores norms and biases in float32, and matrices in one of

    f16     float16, with 11 bits of mantissa: an error of at most 2^-11 of each weight, or 2^-25
            where that is more
    q8_0    8 bits, and a float16 scale per block of 32 weights: an error of at most 1/254 of the
            block's largest weight; and for the scale 2^-11 of that weight, or 127 * 2^-25 where
            that is more

The absolute terms are those of float16's subnormal numbers, which are 2^-24 apart: they count for
weights below 2^-14 in f16, and for blocks whose largest weight is below 127 * 2^-14 in q8_0.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.files.atomic import atomic_files
from minilora.files.json_file import read_json
from minilora.huggingface.checkpoint_files import check_dense
from minilora.huggingface.gguf_tokenizer import Vocabulary, read_vocabulary
from minilora.huggingface.loading import empty_model, load_config
from minilora.huggingface.messages import one_line
from minilora.huggingface.model_folder import check_weights

# transformers' model type -> llama.cpp's. Mistral's layers are Llama's.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# What a config may say beside its sizes: the only value that the file stands for.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
}

_LARGEST_FLOAT16 = 65504.0

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Weights in a block of Q8_0.
_BLOCK = 32

# Of the index of a very large model, which has some megabytes.
_MOST_BYTES = 64 << 20


def export_gguf(source: str | Path, path: str | Path, *, quant_type: str = "f16") -> None:
    """Writes a merged model's folder as a GGUF file.

    One tensor is in memory at a time. A file that exists is replaced when the new one is complete.

    Args:
        source: a folder with dense safetensors weights and a tokenizer, such as `minilora merge`
            writes: Llama, Mistral, Qwen2 or Qwen3 with a byte-level BPE tokenizer.
        path: the file to write, in a folder that exists.
        quant_type: "f16" or "q8_0", the format of the matrices.

    Raises:
        ValueError: the folder is no such model, or the file could not say what its config or its
            tokenizer says; a weight is not finite, or too large for float16; the folder to write
            to does not exist. The message names it, and nothing is written.
        ModuleNotFoundError: the `gguf` package is not installed.

    Example:
        >>> try:
        ...     export_gguf("merged", "model.gguf", quant_type="q8_0")
        ... except ValueError as error:
        ...     print(error)
        merged is not a folder: merge and save the model first
    """
    import gguf

    if quant_type not in ("f16", "q8_0"):
        raise ValueError(f"quant_type={one_line(quant_type, 40)!r}: must be 'f16' or 'q8_0'")
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"{one_line(source)} is not a folder: merge and save the model first")
    target = Path(path).parent
    if not target.is_dir():
        raise ValueError(f"{one_line(target)} is not a folder: create it to write {path} there")
    config = load_config(folder)
    check_weights(folder)
    _check_config(folder, config)

    vocabulary = read_vocabulary(folder, config.vocab_size)
    files = _files_of_tensors(folder)
    names = _names_in_file(files, folder, config)
    with (
        atomic_files(Path(path)) as [temporary],
        closing(gguf.GGUFWriter(temporary, _ARCHITECTURES[config.model_type])) as writer,
    ):
        _add_sizes(writer, folder, config, quant_type)
        _add_vocabulary(writer, vocabulary)
        _write_tensors(writer, files, names, config, quant_type)


def _check_config(folder: Path, config: Any) -> None:
    """Raises ValueError if llama.cpp would compute something else than the config describes."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized: merge it into dense weights first")
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(
            f"{folder} is a {one_line(config.model_type, 40)} model, and only {known} can be "
            "exported: llama.cpp's convert_hf_to_gguf.py reads more"
        )
    for key, value in _FIXED.items():
        # Qwen2's layers have no window unless the config switches it on.
        windowed = key != "sliding_window" or config.model_type == "mistral"
        if windowed and getattr(config, key, value) != value:
            found = one_line(getattr(config, key), 80)
            raise ValueError(f"{folder} cannot be exported with {key}={found} in its config.json")

    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{folder} scales its rotary positions (rope_parameters={one_line(rope, 120)}), which "
            "cannot be exported: use llama.cpp's convert_hf_to_gguf.py"
        )
    if config.model_type == "qwen2" and _head_size(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        raise ValueError(f"{folder} cannot be exported with head_dim={config.head_dim}")


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _add_sizes(writer: Any, folder: Path, config: Any, quant_type: str) -> None:
    """What a reader builds the model from."""
    import gguf

    file_type = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[quant_type]
    writer.add_type("model")
    writer.add_name(folder.absolute().name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(False)
    for kind, token in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(token)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _names_in_file(files: Mapping[str, Path], folder: Path, config: Any) -> dict[str, str]:
    """Each tensor of the folder and its name in the file.

    Raises ValueError unless they are exactly those that the config describes: a reader would fill
    what is missing with random numbers.
    """
    import gguf

    kind = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type].upper()]
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    model = empty_model(folder)
    check_dense(sorted(set(files.values())), model)
    expected = {n: t.shape for n, t in model.state_dict().items()}
    if _is_tied(files, config):
        del expected[_HEAD]
        files = {name: path for name, path in files.items() if name != _HEAD}

    names = {}
    for name in sorted({*files, *expected}):
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if name not in expected or found is None:
            raise ValueError(
                f"{folder} has a tensor {one_line(name, 120)}, for which a GGUF file of its "
                f"{config.model_type} model has no place"
            )
        if name not in files:
            raise ValueError(f"{folder} has no {name}, which its config.json needs")
        with _opened(files[name]) as file:
            shape = file.get_slice(name).get_shape()
        if shape != [*expected[name]]:
            needed = [*expected[name]]
            raise ValueError(f"{folder}: {name} has the shape {shape}, its config needs {needed}")
        names[name] = found
    return names


def _is_tied(files: Mapping[str, Path], config: Any) -> bool:
    """Whether the head is the embedding, which a reader takes where there is no output.weight.

    A folder may hold another head although its config says that they are tied.
    """
    if not config.tie_word_embeddings or _HEAD not in files:
        return bool(config.tie_word_embeddings)
    if _EMBEDDING not in files:
        return False
    with _opened(files[_HEAD]) as one, _opened(files[_EMBEDDING]) as other:
        return bool(one.get_tensor(_HEAD).equal(other.get_tensor(_EMBEDDING)))


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """The names of a folder's tensors, and the file that holds each."""
    single = folder / "model.safetensors"
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(sorted(file.keys()), single)
    shards = read_json(folder / "model.safetensors.index.json", _MOST_BYTES)["weight_map"]
    return {name: folder / shards[name] for name in sorted(shards)}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ValueError, with the file's name, if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error, 200)}") from error


def _write_tensors(
    writer: Any,
    files: Mapping[str, Path],
    names: Mapping[str, str],
    config: Any,
    quant_type: str,
) -> None:
    """Announces all tensors with their sizes, and then writes one after the other."""
    kinds = {}
    for name, new_name in names.items():
        with _opened(files[name]) as file:
            shape = file.get_slice(name).get_shape()
        kinds[name] = _format(shape, quant_type)
        stored, dtype, size = _layout(shape, kinds[name])
        writer.add_tensor_info(new_name, stored, dtype, size, kinds[name])

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        with _opened(files[name]) as file:
            weight = file.get_tensor(name).float()
        _check_float16(name, weight)
        writer.write_tensor_data(_encoded(_permuted(name, weight, config), kinds[name]))


def _format(shape: Sequence[int], quant_type: str) -> Any:
    """The format of a tensor: matrices in `quant_type`, where a row is whole blocks of it."""
    from gguf import GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if quant_type == "q8_0" and shape[-1] % _BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _layout(shape: Sequence[int], kind: Any) -> tuple[Sequence[int], Any, int]:
    """The shape, dtype and bytes of a tensor as it is stored."""
    import gguf
    import numpy as np

    if kind == gguf.GGMLQuantizationType.Q8_0:
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        return stored, np.dtype(np.uint8), math.prod(stored)
    dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
    return shape, dtype, math.prod(shape) * dtype.itemsize


def _encoded(weight: Tensor, kind: Any) -> Any:
    import gguf

    return gguf.quants.quantize(weight.numpy(), kind)


def _check_float16(name: str, weight: Tensor) -> None:
    """Raises ValueError for NaN, infinity, and what float16 cannot hold."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not largest <= _LARGEST_FLOAT16:
        raise ValueError(f"{name} holds {largest}, and float16 ends at {_LARGEST_FLOAT16:.0f}")


def _permuted(name: str, weight: Tensor, config: Any) -> Tensor:
    """Llama's q and k in llama.cpp's order: rotated pairs side by side, not half a head apart.

    [heads, 2, size / 2, ...] becomes [heads, size / 2, 2, ...]. Qwen's stay as they are.
    """
    projections = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    heads = projections.get(name.split(".")[-2])
    if heads is None or _ARCHITECTURES[config.model_type] != "llama":
        return weight
    halves = weight.reshape(getattr(config, heads), 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
