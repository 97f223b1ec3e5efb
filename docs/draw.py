"""Draws docs/pictures/*.svg:  python docs/draw.py [folder]

What is drawn is computed, or read from the sources.
"""

import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from structure import CORE, KERNELS, SUBPACKAGES, arrows, outer_arrows  # noqa: E402
from svg import Picture  # noqa: E402

from minilora.kernels.reference.codebooks import NF4  # noqa: E402

WIDE = 720
GAUSS = NormalDist()


def code_of(y: float) -> int:
    """The number of thresholds, half way between neighbouring levels, below y."""
    return sum(y > (a + b) / 2 for a, b in pairwise(NF4))


def layout() -> Picture:
    """Weights, codes, bytes, blocks, groups; and what each costs."""
    p = Picture(
        WIDE,
        560,
        "How an NF4 weight is stored: codes, bytes, blocks of 64, groups of 256 blocks",
    )
    drawn = random.Random(29)
    block = [NormalDist(0, 0.02).inv_cdf(drawn.random()) for _ in range(64)]
    absmax = max(map(abs, block))
    shown = [0, 1, 2, 3, None, 62, 63]
    left, step = 150, 66
    p.text(16, 30, "one block: 64 consecutive weights", "head")
    for y, label in (
        (62, "weight w"),
        (92, "w / absmax"),
        (122, "code, 0 to 15"),
        (158, "four bits"),
        (206, "byte"),
    ):
        p.text(16, y, label, "soft")
    for place, i in enumerate(shown):
        x = left + step * place
        if i is None:
            for y in (62, 92, 122, 158, 206):
                p.text(x + step / 2, y, "...", "soft", "middle")
            continue
        code = code_of(block[i] / absmax)
        p.box(x + 2, 45, step - 4, 24, "w", f"{block[i]:.4f}", "mono small")
        p.text(x + step / 2, 92, f"{block[i] / absmax:.3f}", "mono small", "middle")
        p.text(x + step / 2, 122, str(code), "mono", "middle")
        p.box(x + 2, 140, step - 4, 26, "code", f"{code:04b}", "mono")
        if i % 2 == 0:
            byte = code << 4 | code_of(block[i + 1] / absmax)
            p.line([(x + 8, 172), (x + 8, 180), (x + 2 * step - 8, 180), (x + 2 * step - 8, 172)])
            p.box(x + 2, 188, 2 * step - 4, 28, "code", f"0x{byte:02x}", "mono")
    p.text(left, 236, "the first of two weights is in the high nibble", "small soft")
    p.text(left + 7 * step + 8, 54, "absmax", "small soft")
    p.text(left + 7 * step + 8, 70, f"{absmax:.4f}", "mono small")
    p.text(left + 7 * step + 8, 206, "32 bytes", "small")

    p.text(16, 282, "one group: 256 blocks, 16,384 weights", "head")
    cells = [0, 1, 2, None, 254, 255]
    for place, b in enumerate(cells):
        x = left + 77 * place
        if b is None:
            for y in (315, 368):
                p.text(x + 38, y, "...", "soft", "middle")
            continue
        p.box(x + 2, 296, 73, 30, "code", f"block {b}", "small")
        p.arrow((x + 38, 326), (x + 38, 348))
        p.box(x + 2, 350, 73, 28, "lora", f"d{b}", "mono")
    p.text(16, 315, "32 bytes each", "soft")
    p.text(16, 368, "absmax, as 8 bits", "soft")
    p.brace(left + 2, left + 6 * 77 - 2, 384)
    p.text(16, 424, "for the group", "soft")
    p.box(left + 2, 404, 226, 28, "grad", "absmax2: s0, one float32", "small")
    p.text(left + 240, 415, "absmax = map8[d] * s0 + offset", "mono small")
    p.text(left + 240, 432, "offset: one float32 for the whole weight", "small soft")

    p.text(16, 470, "bytes of a group", "head")
    width = 520.0
    for y, label, parts in (
        (482, "bfloat16", [(32768, "w", "32,768")]),
        (514, "NF4", [(8192, "code", "8,192"), (256, "lora", ""), (4, "grad", "")]),
    ):
        p.text(16, y + 17, label, "soft")
        x = float(left)
        for size, kind, text in parts:
            p.box(x, y, size / 32768 * width, 24, kind, text, "small", r=0)
            x += size / 32768 * width
        if label == "NF4":
            p.text(x + 8, y + 17, "+ 256 + 4 = 8,452 bytes: 4.127 bits per weight", "small")
    return p


def density() -> Picture:
    """The levels, and the density whose quantiles they are."""
    p = Picture(WIDE, 330, "The 16 NF4 levels on the density of the normal distribution")
    # In standard deviations: what the level 1 stands for.
    outermost = GAUSS.inv_cdf(0.9677083)
    middle, unit, foot, high = 382.0, 286.0, 250.0, 190.0

    def at(y: float) -> tuple[float, float]:
        return middle + unit * y, foot - high * GAUSS.pdf(outermost * y) / GAUSS.pdf(0)

    edges = [-1.12, *((a + b) / 2 for a, b in pairwise(NF4)), 1.12]
    for code, (a, b) in enumerate(pairwise(edges)):
        curve = [at(a + (b - a) * i / 24) for i in range(25)]
        p.area([(curve[0][0], foot), *curve, (curve[-1][0], foot)], "x" if code % 2 else "code")
    for code, y in enumerate(NF4):
        x, top = at(y)
        p.line([(x, foot), (x, top)], "ink", 1.6)
        p.text(x, foot + 18, str(code), "mono small", "middle")
    p.line([(12, foot), (WIDE - 12, foot)])
    p.text(14, foot + 18, "code", "small soft")
    for code in (0, 3, 7, 11, 15):
        p.text(at(NF4[code])[0], foot + 38, f"{NF4[code]:.3f}", "mono small soft", "middle")
    p.text(14, foot + 38, "level", "small soft")
    p.text(16, 30, "each line is a level, each band the values that round to it", "head")
    p.text(16, 54, "7 steps of equal probability", "small soft")
    p.text(16, 70, "below zero", "small soft")
    p.text(WIDE - 16, 54, "8 steps of equal probability", "small soft", "end")
    p.text(WIDE - 16, 70, "above zero", "small soft", "end")
    p.text(
        middle,
        foot + 64,
        f"w / absmax: 1 is {outermost:.2f} standard deviations of the normal distribution",
        "small soft",
        "middle",
    )
    return p


def grid(
    p: Picture,
    x: float,
    y: float,
    rows: int,
    columns: int,
    cell: tuple[float, float],
    kind: str,
    lit: set[tuple[int, int]],
) -> None:
    """A matrix of tiles, of which some are lit."""
    for r in range(rows):
        for c in range(columns):
            where = x + c * cell[0], y + r * cell[1]
            p.box(*where, *cell, kind if (r, c) in lit else "", r=0)


def fused() -> Picture:
    """One product, with a dense copy of the weight and without."""
    p = Picture(
        WIDE,
        470,
        "A product with a packed weight: through a dense copy, and tile by tile in registers",
    )

    def levels(y: float, title: str) -> None:
        p.text(16, y, title, "head")
        p.text(16, y + 30, "memory", "soft")
        p.text(16, y + 136, "registers", "soft")
        p.line([(16, y + 100), (WIDE - 16, y + 100)], "ink dash")

    levels(30, "with a dense copy: 0.52 + 2 + 2 bytes per weight cross the bus")
    p.box(110, 52, 60, 60, "code", "packed", "small")
    p.text(178, 72, "0.52 bytes", "small soft")
    p.text(178, 88, "per weight, read", "small soft")
    p.box(300, 42, 80, 80, "w", "dense W", "small")
    p.text(393, 72, "2 bytes written,", "small soft")
    p.text(393, 88, "2 bytes read", "small soft")
    p.box(530, 52, 70, 40, "x", "x", "small")
    p.box(640, 52, 60, 40, "grad", "y", "small")
    p.box(200, 146, 80, 34, "", "decode", "small")
    p.box(560, 146, 90, 34, "", "multiply", "small")
    p.arrow((140, 112), (140, 163), (200, 163))
    p.arrow((280, 163), (320, 163), (320, 122))
    p.arrow((360, 122), (360, 163), (560, 163))
    p.arrow((580, 92), (580, 146))
    p.arrow((650, 163), (670, 163), (670, 92))

    y = 250
    levels(y, "fused: 0.52 bytes per weight, decoded tile by tile in registers")
    grid(p, 110, y + 18, 4, 4, (19, 18), "code", {(1, 2)})
    p.text(196, y + 36, "packed W", "small")
    p.text(196, y + 54, "0.52 bytes", "small soft")
    p.text(196, y + 72, "per weight, read", "small soft")
    grid(p, 452, y + 18, 3, 4, (19, 18), "x", {(1, 2)})
    p.text(490, y + 88, "x", "small", "middle")
    grid(p, 612, y + 18, 3, 4, (19, 18), "grad", {(1, 1)})
    p.text(650, y + 88, "y", "small", "middle")
    base = y + 130
    p.box(136, base, 60, 60, "code", "[BO, BI]", "small")
    p.text(166, base + 78, "4-bit codes", "small soft", "middle")
    p.box(276, base, 60, 60, "w", "[BO, BI]", "small")
    p.text(306, base + 78, "16-bit weights", "small soft", "middle")
    p.box(416, base, 60, 60, "x", "[BM, BI]", "small")
    p.text(446, base + 78, "a tile of x", "small soft", "middle")
    p.box(590, base, 70, 60, "grad", "[BM, BO]", "small")
    p.text(625, base + 78, "float32 sums", "small soft", "middle")
    p.arrow((157.5, y + 54), (157.5, base))
    p.arrow((499.5, y + 54), (499.5, y + 112), (446, y + 112), (446, base))
    p.arrow((196, base + 30), (276, base + 30))
    p.text(236, base + 22, "decode", "small", "middle")
    p.text(376, base + 35, "times", "small", "middle")
    p.arrow((476, base + 30), (590, base + 30))
    p.text(533, base + 22, "add, for each", "small", "middle")
    p.text(533, base + 47, "tile along I", "small", "middle")
    p.arrow((640.5, base), (640.5, y + 54))
    return p


def update() -> Picture:
    """One layer as its weights: W is frozen, and B A beside it is trained. For the README."""
    p = Picture(420, 178, "LoRA: a frozen weight W, and the product of two thin matrices beside it")
    side, thin, top = 104.0, 16.0, 34.0
    middle = top + side / 2

    p.text(16 + side / 2, 22, "frozen, in 4 bits", "small soft", "middle")
    p.box(16, top, side, side, "w", "W", "mono")
    p.text(16 + side / 2, top + side + 18, "[out, in]", "mono small", "middle")
    p.text(178, middle + 5, "+ alpha/r", "mono", "middle")

    size, r = 4096, 8
    share = 2 * size * r / size**2
    text = f"trained: {share:.1%} of {size} x {size} at r = {r}"
    p.text(404, 22, text, "small soft", "end")
    p.box(256, top, thin, side, "lora")
    p.text(246, middle + 5, "B", "mono", "end")
    p.text(256 + thin / 2, top + side + 18, "[out, r]", "mono small", "middle")
    p.box(292, middle - thin / 2, side, thin, "lora")
    p.text(292 + side / 2, middle - thin / 2 - 8, "A", "mono", "middle")
    p.text(292 + side / 2, middle + thin / 2 + 18, "[r, in]", "mono small", "middle")
    return p


def lora() -> Picture:
    """The forward and the gradients as blocks whose sides are M, I, O and r."""
    p = Picture(WIDE, 620, "LoRA's forward and its gradients as products of blocks")
    side = {"M": 56.0, "I": 92.0, "O": 68.0, "r": 18.0}

    def row(y: float, terms: list[str]) -> None:
        """Terms, each "x:M,I:x" (label, rows and columns, kind) or a sign, around height y."""
        x = 20.0
        for term in terms:
            if ":" not in term:
                p.text(x + 6 * len(term), y + 5, term, "mono", "middle")
                x += 12 * len(term)
                continue
            label, size, kind = term.split(":")
            tall, wide = (side[s] for s in size.split(","))
            space = max(wide, 40)
            p.box(
                x + (space - wide) / 2,
                y - tall / 2,
                wide,
                tall,
                kind,
                label if wide > 30 else "",
                "mono",
            )
            if wide <= 30:
                p.text(x + space / 2, y - 6 - tall / 2, label, "mono", "middle")
            p.text(
                x + space / 2,
                y + 17 + tall / 2,
                f"[{size.replace(',', ', ')}]",
                "small soft",
                "middle",
            )
            x += space + 6

    p.text(20, 30, "forward", "head")
    row(
        108,
        [
            "y:M,O:",
            "= ",
            "x:M,I:x",
            "Wᵀ:I,O:w",
            "+ s",
            "x:M,I:x",
            "Aᵀ:I,r:lora",
            "Bᵀ:r,O:lora",
        ],
    )
    p.text(20, 206, "backward", "head")
    row(
        272,
        [
            "dx:M,I:",
            "= ",
            "dy:M,O:grad",
            "W:O,I:w",
            "+ s",
            "dy:M,O:grad",
            "B:O,r:lora",
            "A:r,I:lora",
        ],
    )
    row(404, ["dA:r,I:", "= s", "(", "dy:M,O:grad", "B:O,r:lora", ")ᵀ", "x:M,I:x"])
    row(536, ["dB:O,r:", "= s", "dyᵀ:O,M:grad", "(", "x:M,I:x", "Aᵀ:I,r:lora", ")"])
    x = 470
    for i, (kind, text) in enumerate(
        [
            ("w", "W: frozen, packed in 4 bits"),
            ("lora", "A, B: trained"),
            ("x", "x: saved for the backward pass"),
            ("grad", "dy: gradient of the output"),
        ]
    ):
        p.box(x, 400 + 30 * i, 22, 16, kind)
        p.text(x + 32, 413 + 30 * i, text, "small")
    p.text(x, 545, "computed once, used twice, [M, r]:", "small soft")
    p.text(x, 565, "z = x Aᵀ    u = dy B", "mono small")
    return p


def pages() -> Picture:
    """Optimizer states on the host, visiting the device two pages at a time."""
    p = Picture(
        WIDE, 380, "Paged optimizer states: two pages on the device, copies beside the update"
    )
    p.text(16, 30, "after the device has run out of memory", "head")
    p.text(16, 66, "host, pinned", "soft")
    left, w = 130.0, 78.0
    for i in range(7):
        p.box(left + i * w, 48, w - 4, 28, "lora" if i in (2, 3) else "w", f"page {i}", "small")
    p.text(
        left,
        94,
        "both states of all parameters, in pages of up to 64 MiB; small parameters share one",
        "small soft",
    )
    p.text(16, 146, "device", "soft")
    p.box(left, 124, 236, 34, "x", "parameters, gradients, activations", "small")
    p.box(left + 256, 124, 90, 34, "lora", "page slot", "small")
    p.box(left + 352, 124, 90, 34, "lora", "page slot", "small")
    p.text(left + 456, 146, "plus half a page", "small soft")

    p.text(16, 204, "one step over time", "head")
    p.text(16, 240, "side stream", "soft")
    p.text(16, 288, "main stream", "soft")
    unit = 66.0
    copies = [
        ("in 0", 0),
        ("in 1", 1),
        ("out 0", 2),
        ("in 2", 3),
        ("out 1", 4),
        ("in 3", 5),
        ("out 2", 6),
        ("out 3", 7),
    ]
    for label, at in copies:
        p.box(
            left + at * unit,
            222,
            unit - 4,
            28,
            "code" if label.startswith("in") else "grad",
            label,
            "small",
        )
    for i, at in enumerate((1, 2, 4, 6)):
        p.box(left + at * unit, 270, unit - 4, 28, "lora", f"update {i}", "small")
    p.arrow((left, 318), (left + 8.4 * unit, 318))
    p.text(left + 8.4 * unit, 334, "time", "small soft", "end")
    p.text(
        16,
        362,
        "A step first allocates everything and then updates: one that fails has changed nothing.",
        "small soft",
    )
    return p


CENTRE = WIDE / 2
SIDE_WIDTH = 156
LEFT_SIDE = ("reports", "huggingface", "distributed", "losses", "files")
RIGHT_SIDE = ("optim",)
ROW, ROW_HEIGHT, ROW_WIDTH = 52, 38, 204


DRAWABLE = {
    ("cli", "demo"),
    ("demo", "training"),
    ("training", "core"),
    *(("training", name) for name in (*LEFT_SIDE, *RIGHT_SIDE)),
    *((name, "core") for name in (*LEFT_SIDE, *RIGHT_SIDE)),
    *pairwise(LEFT_SIDE),
    *pairwise(RIGHT_SIDE),
    *zip(LEFT_SIDE, LEFT_SIDE[2:], strict=False),
    *zip(LEFT_SIDE, LEFT_SIDE[3:], strict=False),
}


def structure() -> Picture:
    """The core in reading order, the subpackages around it, the kernels below."""
    for unit, others in outer_arrows().items():
        lost = [other for other in others if (unit, other) not in DRAWABLE]
        assert not lost, f"the picture has no way to draw {unit} -> {lost}"

    p = Picture(
        WIDE,
        378 + ROW * len(CORE) + 52,
        "The structure of minilora: the core, the subpackages and the kernels",
    )
    panel = Panel(212, 200, 296, 36 + ROW * len(CORE))
    draw_front(p, panel)
    draw_core(p, panel)
    draw_sides(p, panel)
    draw_kernels(p, panel)
    return p


class Panel(NamedTuple):
    """A rectangle that holds others."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height


def unit_box(p: Picture, box: Panel, kind: str, name: str, caption: tuple[str, ...]) -> None:
    """A box with a name and up to two lines below it."""
    p.box(*box, "paper", r=5)
    p.box(*box, kind, r=5)
    lines = [line for line in caption if line]
    y = box.y + box.height / 2 + 5 - 8 * len(lines)
    p.text(box.x + box.width / 2, y, name, "mono", "middle")
    for i, line in enumerate(lines, start=1):
        p.text(box.x + box.width / 2, y + 1 + 16 * i, line, "small soft", "middle")


def draw_front(p: Picture, panel: Panel) -> None:
    """cli above demo above training, and the arrows between them."""
    boxes = {
        "cli": Panel(CENTRE - 84, 16, 168, 42),
        "demo": Panel(CENTRE - 84, 76, 168, 42),
        "training": Panel(panel.x, 136, panel.width, 44),
    }
    arrows = outer_arrows()
    for above, below in pairwise(boxes):
        if below in arrows[above]:
            p.arrow((CENTRE, boxes[above].bottom), (CENTRE, boxes[below].y))
    if "core" in arrows["training"]:
        p.arrow((CENTRE, boxes["training"].bottom), (CENTRE, panel.y))
    for name, box in boxes.items():
        title = "cli.py" if name == "cli" else f"{name}/"
        unit_box(p, box, "w" if name == "cli" else "x", title, SUBPACKAGES[name])


def draw_core(p: Picture, panel: Panel) -> None:
    """The files of the core, numbered; at their right the imports, all but one to what was read."""
    p.box(*panel, "paper", r=8)
    p.text(panel.x + 16, panel.y + 22, "the core, in reading order", "head")
    rows = {
        name: Panel(panel.x + 16, panel.y + 34 + ROW * i, ROW_WIDTH, ROW_HEIGHT)
        for i, name in enumerate(CORE)
    }
    number = {name: i for i, name in enumerate(CORE)}
    past: list[tuple[int, str, str]] = []
    imports = arrows()
    for name, row in rows.items():
        for other in sorted(imports[name] & rows.keys()):
            span = number[name] - number[other]
            if span == 1:
                p.arrow((row.x + 24, row.y), (row.x + 24, rows[other].bottom))
            else:
                past.append((abs(span), name, other))
    for track, (_, name, other) in enumerate(sorted(past)):
        import_past(p, rows[name], rows[other], track)
    for name, row in rows.items():
        p.box(*row, "paper", r=5)
        p.box(*row, "lora", r=5)
        p.text(row.x + 24, row.y + 24, str(number[name] + 1), "head", "middle")
        p.text(row.x + 46, row.y + 16, f"{name}.py", "mono")
        p.text(row.x + 46, row.y + 31, CORE[name], "small soft")


def import_past(p: Picture, start: Panel, end: Panel, track: int) -> None:
    """An arrow from one row to another, at the right of the rows between them."""
    turn = start.right + 16 + 14 * track
    down = start.y < end.y
    y0 = start.y + start.height * (0.7 if down else 0.3)
    y1 = end.y + end.height * (0.3 if down else 0.7)
    p.arrow((start.right, y0), (turn, y0), (turn, y1), (end.right, y1))


def draw_sides(p: Picture, panel: Panel) -> None:
    """The subpackages at both sides of the core."""
    columns = ((LEFT_SIDE, 28.0, -1), (RIGHT_SIDE, WIDE - 28.0 - SIDE_WIDTH, 1))
    for names, x, side in columns:
        boxes = {
            name: Panel(x, panel.y + 74 + 108 * i, SIDE_WIDTH, 74) for i, name in enumerate(names)
        }
        draw_side_arrows(p, panel, boxes, side)
        for name, box in boxes.items():
            unit_box(p, box, "x", f"{name}/", SUBPACKAGES[name])


def draw_side_arrows(p: Picture, panel: Panel, boxes: dict[str, Panel], side: int) -> None:
    """From training into the boxes of one side, from box to box, and from a box into the core."""
    arrows = outer_arrows()
    from_training = panel.right if side > 0 else panel.x
    for i, (name, box) in enumerate(boxes.items()):
        if name not in arrows["training"]:
            continue
        middle = box.x + SIDE_WIDTH / 2
        if i == 0:
            p.arrow((from_training, 166), (middle, 166), (middle, box.y))
        else:
            outside = WIDE - 12 if side > 0 else 12
            edge = box.right if side > 0 else box.x
            y = box.y + box.height / 2
            p.arrow((from_training, 150), (outside, 150), (outside, y), (edge, y))
    for (upper, first), (lower, second) in pairwise(boxes.items()):
        if lower in arrows[upper]:
            middle = first.x + SIDE_WIDTH / 2
            p.arrow((middle, first.bottom), (middle, second.y))
    items = [*boxes.items()]
    apart = [(n, *pair) for n in (2, 3) for pair in zip(items, items[n:], strict=False)]
    for n, (upper, first), (lower, second) in apart:
        if lower in arrows[upper]:
            beside = first.x - 8 * (n - 1)
            start, end = first.y + 0.75 * first.height, second.y + 0.25 * second.height
            p.arrow((first.x, start), (beside, start), (beside, end), (second.x, end))
    for name, box in boxes.items():
        if "core" in arrows[name]:
            start, end = (box.x, panel.right) if side > 0 else (box.right, panel.x)
            p.arrow((start, box.y + box.height / 2), (end, box.y + box.height / 2))


def draw_kernels(p: Picture, panel: Panel) -> None:
    """The three folders of kernels; ops loads them when it needs them."""
    box = Panel(16, panel.bottom + 36, WIDE - 32, 142)
    p.box(*box, "paper", r=8)
    p.text(CENTRE, box.y + 23, "the kernels", "head", "middle")
    text = "each function three times, under one name and signature"
    p.text(CENTRE, box.y + 41, text, "small soft", "middle")
    boxes = {
        name: Panel(CENTRE - 84 + 236 * (i - 1), box.y + 54, 168, 74)
        for i, name in enumerate(KERNELS)
    }
    ops = panel.y + 34 + ROW * (len(CORE) - 1) + ROW_HEIGHT
    imports = arrows()
    for i, (name, kernel) in enumerate(boxes.items()):
        x = kernel.x + kernel.width / 2
        if name in imports["ops"]:
            y, start = ops + 22, panel.x + 60 + 20 * i
            p.arrow((start, ops), (start, y), (x, y), (x, kernel.y), style="ink dash")
        if "kernels.reference" in imports[name]:
            reference = boxes["kernels.reference"]
            left = name == "kernels.cpu"
            start, end = (kernel.right, reference.x) if left else (kernel.x, reference.right)
            p.arrow((start, kernel.y + 37), (end, kernel.y + 37))
    for name, kernel in boxes.items():
        title = f"{name.replace('.', '/')}/"
        unit_box(p, kernel, "code", title, KERNELS[name])


PICTURES: dict[str, Callable[[], Picture]] = {
    "nf4-layout": layout,
    "nf4-levels": density,
    "fused-product": fused,
    "lora-shapes": lora,
    "lora-update": update,
    "pages": pages,
    "structure": structure,
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().save(folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pictures")
