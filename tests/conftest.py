"""What every test runs under: no network, Triton interpreted, one thread a worker, hypothesis without deadlines; small models."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before anything imports triton; with a GPU: TRITON_INTERPRET=0, `make test-gpu`

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job is born deaf to Ctrl-C, and a run respects that
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # workers that spin against each other are ten times slower


class Allocator(TorchDispatchMode):
    """Inside `with Allocator(fails) as a:` allocation k = 0, 1, ... runs out of memory where fails(k); a.count counts them.

    An operator allocates, however it is spelled, if it returns a storage that it was not given, or makes a given one larger.
    """

    def __init__(self, fails: Callable[[int], bool] = lambda k: False) -> None:
        super().__init__()
        self.fails, self.count, self.failed = fails, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {s._cdata: s.nbytes() for s in _storages((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        if any(s.nbytes() > given.get(s._cdata, 0) for s in _storages((args, kwargs or {}, out))):
            self.count += 1
            if self.fails(self.count - 1):
                self.failed += 1
                raise torch.OutOfMemoryError(f"injected at allocation {self.count - 1}: {func}")
        return out


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.fixture(scope="session")
def allocator() -> type[Allocator]:
    return Allocator


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[str], Any]:
    """Returns a function that makes a byte-level tokenizer with a chat template; it pads with its end of turn, as SmolLM2 does."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the tokenizer in these tests is made with tokenizers"
    )
    transformers = pytest.importorskip(
        "transformers", reason="the tokenizer in these tests is a transformers one"
    )

    def make(chat_template: str) -> Any:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        core = tokenizers.Tokenizer(
            tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
        )
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        core.decoder = tokenizers.decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        fast.chat_template = chat_template
        return fast

    return make


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # a Llama for tests


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Returns a function that makes a small random Llama, the same for the same seed: 2 layers, hidden 64, two kv heads."""
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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[[str], Any]) -> Path:
    """A model folder as transformers writes it: a tiny Llama and its byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    byte_tokenizer(CHATML).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        vocab_size=258,
        tie_word_embeddings=True,
        initializer_range=0.2,  # a frozen head as small as 0.02 cannot be made to say anything
        bos_token_id=257,
        eos_token_id=256,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
