"""A byte-level BPE tokenizer in the form that a GGUF file holds it.

llama.cpp implements the tokenizers that it knows, and a file only names which: the rule by which
text is split before the merges is one of a list. So the rule of the folder's tokenizer has to be
recognized, and one that is not on the list is refused: with a rule that is nearly the same, numbers
or spaces would become other tokens than in training.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.huggingface.messages import one_line

# The types of tokens, from llama.cpp's llama.h.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# The regular expressions of tokenizer.json -> what llama.cpp calls the rule (llama-vocab.cpp).
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}|{_REST}": "qwen2",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        pre_tokenizer: llama.cpp's name of the rule by which text is split before the merges.
        tokens, types: the tokens in the order of their ids, and the type of each.
        merges: pairs of tokens, separated by a space, in the order in which they are merged.
        special: ids of the special tokens: "bos", "eos", "unk", "pad".
        adds_bos: whether every text starts with "bos".
        chat_template: Jinja, or None.
    """

    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    chat_template: str | None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Returns the vocabulary of a folder's tokenizer, filled up to the `size` of the embedding.

    Raises:
        ValueError: the tokenizer is not a byte-level BPE, or splits text by a rule that llama.cpp
            does not name.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json, from which a GGUF file is made")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    pre_tokenizer = _pre_tokenizer(folder, described)
    tokens, types = _tokens(folder, described, size)

    kinds = ("bos", "eos", "unk", "pad")
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds}
    start = tokenizer("a")["input_ids"][:1]
    return Vocabulary(
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
        special={kind: i for kind, i in ids.items() if i is not None},
        adds_bos=ids["bos"] is not None and start == [ids["bos"]],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _pre_tokenizer(folder: Path, described: dict[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's splitting rule. Raises ValueError if it has none."""
    model, before = described["model"], described["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]

    name = None
    if model["type"] == "BPE" and kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            name = "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last["use_regex"]:
            name = "smollm"
        if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated":
            name = _SPLITS.get(steps[0]["pattern"].get("Regex"))

    # llama.cpp takes a whole word that is a token without merging it for this rule, and no other.
    whole_words = bool(model.get("ignore_merges")) == (name == "llama-bpe")
    normalizer = (described["normalizer"] or {}).get("type")
    if name is None or not whole_words or normalizer not in (None, "NFC"):
        raise ValueError(
            f"{folder} has a tokenizer that a GGUF file cannot name ({model['type']}, split by "
            f"{one_line(before, 200)}): use llama.cpp's convert_hf_to_gguf.py"
        )
    return name


def _tokens(folder: Path, described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The tokens in the order of their ids, and their types; ids without a token are unused."""
    found = {i: (token, NORMAL) for token, i in described["model"]["vocab"].items()}
    for added in described["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found) >= size:
        token = one_line(found[max(found)][0], 40)
        raise ValueError(f"{folder}: the token {token!r} has no row among the {size} embeddings")

    rows = [found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    return [token for token, _ in rows], [kind for _, kind in rows]
