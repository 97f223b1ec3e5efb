"""What every test runs under, and small models.

No network, Triton interpreted, one thread per worker, hypothesis without deadlines.
"""

import gc
import os
import signal

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# Before anything imports triton. With a GPU: TRITON_INTERPRET=0, `make test-gpu`.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# A background job of a shell ignores Ctrl-C from the start, and a run respects that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers that compete for the cores are ten times slower.
if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_not_searched_for_garbage(frozen: None) -> None:
    """A garbage collection goes through the objects of the file's own tests, not through all.

    Every model that is loaded and every step that is retried starts one. With all libraries and
    test files imported it would go through more than a million objects each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def frozen() -> Iterator[None]:
    yield
    # Libraries complain at exit of objects that are not freed.
    gc.unfreeze()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[str], Any]:
    """Returns a function that makes a byte-level tokenizer with a chat template.

    It pads with its end of turn, as SmolLM2 does.
    """
    for library in ("tokenizers", "transformers"):
        pytest.importorskip(library, reason="the tokenizer in these tests is made with it")
    from byte_level import byte_tokenizer

    return byte_tokenizer


# The sizes of a Llama for tests.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Returns a function that makes a small random Llama, the same for the same seed."""
    transformers = pytest.importorskip(
        "transformers", reason="the language model in these tests is a transformers Llama"
    )

    def make(tie_word_embeddings: bool = False, seed: int = 0) -> Any:
        tied = tie_word_embeddings
        config = transformers.LlamaConfig(
            **SMALL, vocab_size=128, max_position_embeddings=64, tie_word_embeddings=tied
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return transformers.LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[[str], Any]) -> Path:
    """A model folder as transformers writes it: a tiny Llama and its byte-level tokenizer."""
    from byte_level import CHATML
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    byte_tokenizer(CHATML).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        vocab_size=258,
        tie_word_embeddings=True,
        # With the default of 0.02 a frozen head is too small to be made to say anything.
        initializer_range=0.2,
        bos_token_id=257,
        eos_token_id=256,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
