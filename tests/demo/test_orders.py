"""The demo's orders: every answer can be read off its text, and none of the held-out ones is given.

The parser below is an oracle: it knows the shop's codes from a table of its own, and finds them in
a text by looking for words.
"""

import re
from collections import Counter

import pytest

from minilora.demo.orders import HELD_OUT, TRAINING, Order, make_orders

SEEDS = pytest.mark.parametrize("seed", range(4))

ITEMS = {
    "aprons?": "APR",
    "caps?": "CAP",
    "hoodies?": "HOO",
    "mugs?": "MUG",
    "notebooks?": "NTB",
    "pillows?": "PIL",
    "posters?": "POS",
    "scar(?:f|ves)": "SCA",
    "t-shirts?": "TEE",
    "teapots?": "POT",
    "tote bags?": "BAG",
    "umbrellas?": "UMB",
}
COLORS = {
    "black": "BLK",
    "blue": "BLU",
    "gray": "GRY",
    "green": "GRN",
    "pink": "PNK",
    "red": "RED",
    "white": "WHT",
    "yellow": "YEL",
}
SIZES = {"small": "S", "medium": "M", "(?<!extra )large": "L", "extra large": "XL"}
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
NUMBERS = {f"{word}|{n}": str(n) for n, word in enumerate(WORDS, start=1)}
NUMBERS["six|6|half a dozen"] = NUMBERS.pop("six|6")
NUMBERS["twelve|12|(?<!half )a dozen"] = NUMBERS.pop("twelve|12")


def find(table: dict[str, str], text: str) -> str:
    """The only word of the table that the text contains."""
    found = [(m[0], code) for words, code in table.items() for m in matches(words, text)]
    assert len(found) == 1, f"{text!r} contains {found}"
    return found[0][1]


def matches(words: str, text: str) -> list[re.Match[str]]:
    return list(re.finditer(rf"\b(?:{words})\b", text, re.IGNORECASE))


def everything(seed: int) -> list[Order]:
    training, held_out = make_orders(seed)
    return [*training, *held_out]


def product(order: Order) -> tuple[str, str, str]:
    return (order.item, order.color, order.size)


@SEEDS
def test_the_answer_is_what_an_independent_parser_finds_in_the_text(seed: int) -> None:
    for order in everything(seed):
        item, color = find(ITEMS, order.text), find(COLORS, order.text)
        size, number = find(SIZES, order.text), find(NUMBERS, order.text)
        assert order.answer == f"{item}-{color}-{size} x{number}", order.text


@SEEDS
def test_an_answer_is_of_one_form_and_says_its_fields(seed: int) -> None:
    for order in everything(seed):
        found = re.fullmatch(r"([A-Z]{3})-([A-Z]{3})-(S|M|L|XL) x([1-9]|1[0-2])", order.answer)
        assert found is not None, order.answer
        assert found.groups() == (order.item, order.color, order.size, str(order.number))


@SEEDS
def test_what_is_held_out_is_nowhere_in_the_training_data(seed: int) -> None:
    training, held_out = make_orders(seed)
    assert not {o.answer for o in held_out} & {o.answer for o in training}
    pairs = {(o.item, o.color) for o in held_out}
    assert not pairs & {(o.item, o.color) for o in training}
    assert not {o.text for o in held_out} & {o.text for o in training}


def test_the_held_out_sentences_are_others() -> None:
    for part in ("greetings", "requests", "closings"):
        both = set(getattr(TRAINING, part)) & set(getattr(HELD_OUT, part))
        # A greeting and a closing remark may be left out in both.
        assert both <= {""}


@SEEDS
def test_every_code_is_taught(seed: int) -> None:
    training, held_out = make_orders(seed)
    for part in ("item", "color", "size", "number"):
        taught = {getattr(o, part) for o in training}
        assert {getattr(o, part) for o in held_out} <= taught


@SEEDS
def test_each_product_is_ordered_once(seed: int) -> None:
    training, held_out = make_orders(seed)
    assert len(training) == 12 * 6 * 4 and len(held_out) == 40
    for orders in (training, held_out):
        assert set(Counter(map(product, orders)).values()) == {1}


def test_the_seed_alone_decides() -> None:
    assert make_orders(0) == make_orders(0)
    assert not {o.text for o in make_orders(0)[1]} & {o.text for o in make_orders(1)[1]}


@SEEDS
def test_messages_read_like_messages(seed: int) -> None:
    adjectives = "|".join([*COLORS, "small", "medium", "extra large", "large"])
    for order in everything(seed):
        assert order.text == order.text.strip() and "  " not in order.text
        assert "{" not in order.text and len(order.text) < 130
        # One mug, two mugs.
        nouns = "|".join(ITEMS)
        said = "|".join(NUMBERS)
        for found in matches(rf"(?:{said}) (?:(?:{adjectives}) )*({nouns})", order.text):
            assert found[1].endswith("s") == (order.number > 1), order.text


def test_a_record_is_what_finetune_reads() -> None:
    order = make_orders(0)[0][0]
    assert order.record == {"prompt": order.text, "completion": order.answer}
