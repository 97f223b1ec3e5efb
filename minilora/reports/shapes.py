"""The sizes of well-known models, to plan a run before anything is downloaded.

    minilora.plan("llama-65b", r=16)

Each row is what the model's public config.json says; the comments above the rows give its name on
the Hugging Face hub. A test builds every shape and compares its number of parameters with the
published one.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Heads: of the queries, and of keys and values. Size of a head: "-" for hidden / heads. Tied: the
# output head has the embedding's weight.
_TABLE = """
# name        type     hidden  width layers  heads   keys   head   vocab  tied
# huggyllama/llama-7b, -13b, -30b (33B in the paper), -65b
llama-7b      llama      4096  11008     32     32     32      -   32000    no
llama-13b     llama      5120  13824     40     40     40      -   32000    no
llama-33b     llama      6656  17920     60     52     52      -   32000    no
llama-65b     llama      8192  22016     80     64     64      -   32000    no
# meta-llama/Llama-2-7b-hf, -13b-hf, -70b-hf
llama-2-7b    llama      4096  11008     32     32     32      -   32000    no
llama-2-13b   llama      5120  13824     40     40     40      -   32000    no
llama-2-70b   llama      8192  28672     80     64      8      -   32000    no
# meta-llama/Meta-Llama-3-8B, -70B
llama-3-8b    llama      4096  14336     32     32      8      -  128256    no
llama-3-70b   llama      8192  28672     80     64      8      -  128256    no
# meta-llama/Llama-3.1-405B
llama-3.1-405b llama    16384  53248    126    128      8      -  128256    no
# meta-llama/Llama-3.2-1B, -3B
llama-3.2-1b  llama      2048   8192     16     32      8     64  128256   yes
llama-3.2-3b  llama      3072   8192     28     24      8    128  128256   yes
# HuggingFaceTB/SmolLM2-135M-Instruct, ...
smollm2-135m  llama       576   1536     30      9      3      -   49152   yes
smollm2-360m  llama       960   2560     32     15      5      -   49152   yes
smollm2-1.7b  llama      2048   8192     24     32     32      -   49152   yes
# TinyLlama/TinyLlama-1.1B-Chat-v1.0
tinyllama     llama      2048   5632     22     32      4      -   32000    no
# mistralai/Mistral-7B-v0.1
mistral-7b    mistral    4096  14336     32     32      8    128   32000    no
# Qwen/Qwen2.5-0.5B, ...
qwen2.5-0.5b  qwen2       896   4864     24     14      2      -  151936   yes
qwen2.5-1.5b  qwen2      1536   8960     28     12      2      -  151936   yes
qwen2.5-3b    qwen2      2048  11008     36     16      2      -  151936   yes
qwen2.5-7b    qwen2      3584  18944     28     28      4      -  152064    no
qwen2.5-14b   qwen2      5120  13824     48     40      8      -  152064    no
qwen2.5-32b   qwen2      5120  27648     64     40      8      -  152064    no
qwen2.5-72b   qwen2      8192  29568     80     64      8      -  152064    no
# Qwen/Qwen3-0.6B, ...
qwen3-0.6b    qwen3      1024   3072     28     16      8    128  151936   yes
qwen3-1.7b    qwen3      2048   6144     28     16      8    128  151936   yes
qwen3-4b      qwen3      2560   9728     36     32      8    128  151936   yes
qwen3-8b      qwen3      4096  12288     36     32      8    128  151936    no
qwen3-14b     qwen3      5120  17408     40     40      8    128  151936    no
qwen3-32b     qwen3      5120  25600     64     64      8    128  151936    no
"""


def _config(row: str) -> dict[str, Any]:
    """A row of the table as a config.json, by transformers' names."""
    _, kind, hidden, width, layers, heads, keys, head, vocabulary, tied = row.split()
    config = {
        "model_type": kind,
        "hidden_size": int(hidden),
        "intermediate_size": int(width),
        "num_hidden_layers": int(layers),
        "num_attention_heads": int(heads),
        "num_key_value_heads": int(keys),
        "vocab_size": int(vocabulary),
        "tie_word_embeddings": tied == "yes",
        "dtype": "bfloat16",
    }
    return config if head == "-" else {**config, "head_dim": int(head)}


# Name -> config.json.
SHAPES: dict[str, dict[str, Any]] = {}
for _row in _TABLE.splitlines():
    if _row and not _row.startswith("#"):
        SHAPES[_row.split()[0]] = _config(_row)


def is_shape(name: object) -> bool:
    """Whether this is the name of a shape, in capitals or not."""
    return isinstance(name, str) and name.lower() in SHAPES


def similar_shapes(name: str) -> list[str]:
    """Returns the shapes that someone may have meant by a name or a hub id, the closest first.

    Example:
        >>> similar_shapes("meta-llama/Meta-Llama-3-8B")
        ['llama-3-8b']
    """
    name = name.lower().rpartition("/")[2]
    return difflib.get_close_matches(name, SHAPES, n=3, cutoff=0.7)


@contextmanager
def suggesting_shapes(source: object) -> Iterator[None]:
    """An error inside the block also names the shapes that the source may have meant."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not isinstance(source, str) or Path(source).exists():
            raise
        if similar := similar_shapes(source):
            meant = " or ".join(similar)
            unknown = f"{source} is not a known shape (did you mean {meant}?)"
            raise ValueError(f"{unknown}, and {error}") from error
        raise


def shape_config(name: str) -> Any:
    """Returns the transformers config of a named shape.

    Raises:
        ValueError: there is no shape of this name; the message suggests similar ones.

    Example:
        >>> shape_config("llama-65b").num_hidden_layers
        80
    """
    from transformers import AutoConfig

    if not is_shape(name):
        known = ", ".join(similar_shapes(name) or SHAPES)
        raise ValueError(f"there is no shape {name!r}: choose from {known}")
    sizes = dict(SHAPES[name.lower()])
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
