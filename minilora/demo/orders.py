"""The demo's task: a customer's message -> the line that the stockroom of a gift shop reads.

    Hi, could we get three of the blue mugs, large? Thanks!   ->   MUG-BLU-L x3

The data is made up from a seed. The stockroom's codes are in no prompt, so the base model cannot
know them, and an answer is right or wrong at a glance.

What is held out, and occurs nowhere in the training data:

* two colors of each item: if blue mugs are held out, then training has blue scarves and red mugs,
  but a blue mug of no size and in no number;
* the sentences: greetings, requests and closing remarks are others than those of the training data.

So a model that has learned its training data by heart gets no held-out order right.
"""

import random
from dataclasses import dataclass
from itertools import product

# What customers say -> what the stockroom calls it. Items with their plural.
ITEMS = {
    ("apron", "aprons"): "APR",
    ("cap", "caps"): "CAP",
    ("hoodie", "hoodies"): "HOO",
    ("mug", "mugs"): "MUG",
    ("notebook", "notebooks"): "NTB",
    ("pillow", "pillows"): "PIL",
    ("poster", "posters"): "POS",
    ("scarf", "scarves"): "SCA",
    ("T-shirt", "T-shirts"): "TEE",
    ("teapot", "teapots"): "POT",
    ("tote bag", "tote bags"): "BAG",
    ("umbrella", "umbrellas"): "UMB",
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
SIZES = {"small": "S", "medium": "M", "large": "L", "extra large": "XL"}
NUMBERS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "half a dozen": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "a dozen": 12,
}

HELD_OUT_COLORS = 2
HELD_OUT_ROWS = 40


@dataclass(frozen=True)
class Wording:
    """What messages are put together from: a greeting, a request and a closing remark.

    {items} is plural if the number is not one, {plural} always.
    """

    greetings: tuple[str, ...]
    requests: tuple[str, ...]
    closings: tuple[str, ...]


TRAINING = Wording(
    greetings=("", "", "Hi", "Hello", "Hey there", "Good morning", "Dear team"),
    requests=(
        "could we get {number} of the {color} {plural}, {size}?",
        "I'd like {number} {size} {color} {items}, please.",
        "please send {number} {color} {items} in {size}.",
        "please send me {number} {items}, {size}, {color}, gift-wrapped.",
        "we need {number} more of the {size} {plural}, in {color}.",
        "we need {number} {items} by the 30th, {color}, {size}.",
        "can I order {number} {items}? In {color}, size {size}.",
        "put me down for {number} {items} in {color}, {size}.",
        "{number} {color} {items} for the office, {size} if possible.",
        "do you still have those {size} {plural} in {color}? I would take {number}.",
        "do you have any {plural} in {color}? Then {number} for me, {size}.",
        "have you got {number} {items} in {color} and {size}?",
        "are there {number} {size} {items} left, in {color}?",
        "my sister wants {number} of your {plural}: {color}, {size}.",
        "the {size} {color} {plural}, please, {number} of them.",
        "we will have {number} of the {plural} in {size}. The {color} version!",
        "is it too late to add {number} {size} {items} to my order? In {color}.",
        "quick question about {plural}: any left in {color}? We are {number} short, {size}.",
        "I saw the {color} {plural} in your window and need {number}, {size}.",
        "what nice {color} {plural}! I want {number}, {size}.",
        "my usual: {size} {plural}, {color}, {number} of them.",
        "{color} {plural}, {size}. I'd say {number}.",
    ),
    closings=(
        "",
        "",
        "Thanks!",
        "By Friday, please.",
        "It's a birthday present.",
        "No hurry.",
        "I'm away until the 15th.",
    ),
)
HELD_OUT = Wording(
    greetings=("", "Hiya", "Good evening", "Dear shop"),
    requests=(
        "any chance of {number} {size} {color} {items}?",
        "the {color} {plural} are lovely! We'll take {number}, {size}.",
        "I am after {number} of the {size} {plural}, {color} please.",
        "kindly ship {number} {items}, {color}, {size}, to the usual address.",
        "what we want is {number} {color} {items}, all {size}.",
        "would you put aside {number} {items} for us, {size}, in {color}?",
        "me again: {color} {plural}, {size}, {number} please.",
        "got {number} {items} left in {color}, {size}? Sold!",
    ),
    closings=("", "Cheers!", "Mum will love it.", "I'll pick it up on the 21st."),
)


@dataclass(frozen=True)
class Order:
    """A message, and what it asks for.

    Example:
        >>> Order("Two small red caps, please.", item="CAP", color="RED", size="S", number=2).answer
        'CAP-RED-S x2'
    """

    text: str
    item: str
    color: str
    size: str
    number: int

    @property
    def answer(self) -> str:
        """The line for the stockroom."""
        return f"{self.item}-{self.color}-{self.size} x{self.number}"

    @property
    def record(self) -> dict[str, str]:
        """The order as training data: see `minilora.training.data.encode`."""
        return {"prompt": self.text, "completion": self.answer}


def make_orders(seed: int = 0) -> tuple[list[Order], list[Order]]:
    """Returns (training, held-out) orders, the same for the same seed: see the top of this file.

    Each product (item, color, size) of the training data occurs there once.
    """
    rng = random.Random(seed)
    held_out_pairs = {
        (item, color) for item in ITEMS for color in rng.sample(sorted(COLORS), HELD_OUT_COLORS)
    }
    products = list(product(ITEMS, COLORS, SIZES))
    rng.shuffle(products)
    unseen = [p for p in products if p[:2] in held_out_pairs]
    seen = [p for p in products if p[:2] not in held_out_pairs]
    return (
        [_order(*p, TRAINING, rng) for p in seen],
        [_order(*p, HELD_OUT, rng) for p in unseen[:HELD_OUT_ROWS]],
    )


def _order(
    item: tuple[str, str], color: str, size: str, wording: Wording, rng: random.Random
) -> Order:
    """An order for this product, in a random number and in random words."""
    spoken, number = rng.choice(sorted(NUMBERS.items()))
    # In digits as often as in words.
    said = rng.choice([spoken, str(number)])
    request = rng.choice(wording.requests).format(
        number=said, color=color, size=size, items=item[number > 1], plural=item[1]
    )
    text = _message(rng.choice(wording.greetings), request, rng.choice(wording.closings))
    # Some customers do not bother with capitals.
    text = rng.choice([text, text, text, text.lower()])
    return Order(text, ITEMS[item], COLORS[color], SIZES[size], number)


def _message(greeting: str, request: str, closing: str) -> str:
    opened = f"{greeting}, {request}" if greeting else request[0].upper() + request[1:]
    return f"{opened} {closing}".strip()
