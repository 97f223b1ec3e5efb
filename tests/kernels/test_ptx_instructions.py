"""The arithmetic instructions of the PTX emulator, against numpy, PyTorch and plain integers."""

import operator
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ptx import run_ptx
from ptx_arithmetic import signature
from ptx_values import DTYPES, decode, encode, immediate, is_float, narrow, size_of, widen

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
EDGES = [0, 1, 2, 7, 31, 32, 63, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31]
NUMBERS = [*EDGES, 2**32 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


def bits_of(kind: str) -> list[int]:
    """Random and edge values of a kind, as bits."""
    size = 8 * size_of(kind)
    chance = random.Random(kind)
    return [n % 2**size for n in NUMBERS] + [chance.getrandbits(size) for _ in range(80)]


def signed(kind: str, bits: int) -> int:
    """The integer that some bits are."""
    size = 8 * size_of(kind)
    return bits - 2**size if kind[0] == "s" and bits >> (size - 1) else bits


def execute(name: str, *sources: list[int]) -> list[int]:
    """Runs an instruction on bits; returns the bits of its results."""
    found = signature(name)
    kinds = found.sources
    arrays = [
        decode(np.array(bits, f"u{max(size_of(kind), 1)}"), kind)
        if kind != "pred"
        else np.array(bits, np.bool_)
        for bits, kind in zip(sources, kinds, strict=True)
    ]
    with np.errstate(all="ignore"):
        result = np.asarray(found.compute(*arrays))
        return [int(n) for n in encode(result, found.result, size_of(found.result))]


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("operation", BINARY)
def test_integers_are_computed_modulo_their_size(operation: str, kind: str) -> None:
    a = bits_of(kind)
    b = a[1:] + a[:1]
    expected = [
        BINARY[operation](signed(kind, p), signed(kind, q)) % 2 ** (8 * size_of(kind))
        for p, q in zip(a, b, strict=True)
    ]
    assert execute(f"{operation}.{kind}", a, b) == expected


@pytest.mark.parametrize("kind", ("u16", "s16", "u32", "s32"))
def test_wide_and_upper_products(kind: str) -> None:
    a = bits_of(kind)
    b, bits = a[3:] + a[:3], 8 * size_of(kind)
    c = [n * 2**bits % 2 ** (2 * bits) for n in a]
    products = [signed(kind, p) * signed(kind, q) for p, q in zip(a, b, strict=True)]

    wide = [product % 2 ** (2 * bits) for product in products]
    assert execute(f"mul.wide.{kind}", a, b) == wide
    added = [(product + n) % 2 ** (2 * bits) for product, n in zip(wide, c, strict=True)]
    assert execute(f"mad.wide.{kind}", a, b, c) == added
    assert execute(f"mul.hi.{kind}", a, b) == [(p >> bits) % 2**bits for p in products]


@pytest.mark.parametrize("kind", ("u32", "s32"))
def test_division_rounds_towards_zero(kind: str) -> None:
    a = [n for n in bits_of(kind) if signed(kind, n) != -(2**31)]
    b = [n or 3 for n in a[5:] + a[:5]]

    def towards_zero(p: int, q: int) -> int:
        quotient = abs(p) // abs(q)
        return quotient if (p < 0) == (q < 0) else -quotient

    numbers = [(signed(kind, p), signed(kind, q)) for p, q in zip(a, b, strict=True)]
    assert execute(f"div.{kind}", a, b) == [towards_zero(p, q) % 2**32 for p, q in numbers]
    rest = [(p - q * towards_zero(p, q)) % 2**32 for p, q in numbers]
    assert execute(f"rem.{kind}", a, b) == rest


@pytest.mark.parametrize("kind", ("b16", "b32", "b64"))
def test_shifts_beyond_the_size_give_zero_or_the_sign(kind: str) -> None:
    bits = 8 * size_of(kind)
    a = bits_of(kind)
    by = [n % (bits + 9) for n in range(len(a))]
    left = [(n << k) % 2**bits for n, k in zip(a, by, strict=True)]
    assert execute(f"shl.{kind}", a, by) == left
    right = [n >> k for n, k in zip(a, by, strict=True)]
    assert execute(f"shr.u{bits}", a, by) == right
    kept = [(signed(f"s{bits}", n) >> k) % 2**bits for n, k in zip(a, by, strict=True)]
    assert execute(f"shr.s{bits}", a, by) == kept


def field(bits: int, position: int, length: int) -> int:
    return bits >> position & (1 << length) - 1


def test_bit_fields() -> None:
    a = bits_of("b32")
    position = [n % 40 for n in range(len(a))]
    length = [n * 7 % 36 for n in range(len(a))]
    fields = list(zip(a, position, length, strict=True))
    plain = [field(n, p, k) if p < 32 else 0 for n, p, k in fields]
    assert execute("bfe.u32", a, position, length) == plain

    def extended(n: int, p: int, k: int) -> int:
        k = min(k, 32 - p)
        return 0 if k <= 0 else (field(n, p, k) - (field(n, p + k - 1, 1) << k)) % 2**32

    assert execute("bfe.s32", a, position, length) == [extended(*f) for f in fields]

    into = a[9:] + a[:9]
    expected = []
    for (n, p, k), old in zip(fields, into, strict=True):
        mask = ((1 << k) - 1) << p
        expected.append((old & ~mask | n << p & mask) % 2**32)
    assert execute("bfi.b32", a, into, position, length) == expected


def test_three_inputs_give_every_function() -> None:
    a = bits_of("b32")
    b, c = a[7:] + a[:7], a[20:] + a[:20]
    # The table of a function is its value on these three, the PTX ISA says.
    x, y, z = 0xF0, 0xCC, 0xAA
    functions: list[Callable[[int, int, int], int]] = [
        lambda x, y, z: x & y | z,
        lambda x, y, z: x & ~y ^ z,
        lambda x, y, z: (x | y) & ~z,
    ]
    for function in functions:
        table = [function(x, y, z) & 255] * len(a)
        expected = [function(*row) % 2**32 for row in zip(a, b, c, strict=True)]
        assert execute("lop3.b32", a, b, c, table) == expected


def test_funnel_shifts_and_counts() -> None:
    a = bits_of("b32")
    high, by = a[4:] + a[:4], [n % 40 for n in range(len(a))]
    rows = list(zip(a, high, by, strict=True))
    right = [((h << 32 | low) >> (k & 31)) % 2**32 for low, h, k in rows]
    assert execute("shf.r.wrap.b32", a, high, by) == right
    left = [((h << 32 | low) << min(k, 32) >> 32) % 2**32 for low, h, k in rows]
    assert execute("shf.l.clamp.b32", a, high, by) == left

    assert execute("popc.b32", a) == [n.bit_count() for n in a]
    assert execute("clz.b32", a) == [32 - n.bit_length() for n in a]
    assert execute("brev.b32", a) == [int(f"{n:032b}"[::-1], 2) for n in a]


def test_prmt_picks_bytes_and_signs() -> None:
    a, chance = bits_of("b32"), random.Random(1)
    b = a[11:] + a[:11]
    selectors = [chance.getrandbits(16) for _ in a]

    def picked(p: int, q: int, selector: int) -> int:
        both = (q << 32 | p).to_bytes(8, "little")
        found = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = both[nibble & 7]
            found.append(255 * (byte >> 7) if nibble & 8 else byte)
        return int.from_bytes(bytes(found), "little")

    expected = [picked(*row) for row in zip(a, b, selectors, strict=True)]
    assert execute("prmt.b32", a, b, selectors) == expected


FLOATS = [0.0, -0.0, 1.0, -1.5, 3.4e38, 1e-40, float("inf"), float("-inf"), float("nan"), 65504.0]


def float_bits(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.cat([torch.tensor(FLOATS), torch.randn(200, generator=generator)])
    return [n % 2**32 for n in numbers.view(torch.int32).tolist()]


def as_torch(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32).copy())


def same(bits: list[int], expected: torch.Tensor) -> bool:
    """Equal bits, except that any NaN equals any NaN."""
    size = expected.element_size()
    dtype = {2: torch.int16, 4: torch.int32}[size]
    found = torch.tensor([n - 2 ** (8 * size) * (n >> (8 * size - 1)) for n in bits]).to(dtype)
    agree = found == expected.view(dtype)
    return bool((agree | (found.view(expected.dtype).isnan() & expected.isnan())).all())


FLOAT_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add.f32": torch.add,
    "add.rn.f32": torch.add,
    "sub.rn.f32": torch.sub,
    "mul.f32": torch.mul,
    "div.rn.f32": torch.div,
    "max.f32": torch.fmax,
    "min.f32": torch.fmin,
    "max.NaN.f32": torch.maximum,
}


@pytest.mark.parametrize("name", FLOAT_BINARY)
def test_float32_arithmetic_is_pytorchs(name: str) -> None:
    a, b = float_bits(0), float_bits(1)[3:] + float_bits(1)[:3]
    found, expected = execute(name, a, b), FLOAT_BINARY[name](as_torch(a), as_torch(b))
    if name.startswith("m"):
        # Of two zeros either may be the larger.
        found = [n if n << 1 & 0xFFFFFFFF else 0 for n in found]
        expected = torch.where(expected == 0, 0.0, expected)
    assert same(found, expected)


def test_fused_multiply_add_rounds_once() -> None:
    a = np.float32(1 + 2**-12)
    bits = int(a.view(np.uint32))
    (found,) = execute("fma.rn.f32", [bits], [bits], [int(np.float32(-1).view(np.uint32))])
    assert np.uint32(found).view(np.float32) == 2**-11 + 2**-24


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("test", COMPARE)
def test_comparisons_of_nan(test: str) -> None:
    a, b = float_bits(2), float_bits(3)
    p, q = as_torch(a), as_torch(b)
    ordered = COMPARE[test](p, q)
    unordered = p.isnan() | q.isnan()
    assert execute(f"setp.{test}.f32", a, b) == ordered.int().tolist()
    assert execute(f"setp.{test}u.f32", a, b) == (ordered | unordered).int().tolist()
    assert execute("setp.ne.f32", a, b) == ((p != q) & ~unordered).int().tolist()
    assert execute("setp.neu.f32", a, b) == (p != q).int().tolist()
    joined = [i % 2 for i in range(len(a))]
    both = [int(x and y) for x, y in zip(ordered.tolist(), joined, strict=True)]
    assert execute(f"setp.{test}.and.f32", a, b, joined) == both


def test_signed_and_unsigned_comparisons() -> None:
    assert execute("setp.lt.s32", [0xFFFFFFFF], [1]) == [1]
    assert execute("setp.lt.u32", [0xFFFFFFFF], [1]) == [0]
    assert execute("selp.b32", [5, 5], [6, 6], [1, 0]) == [5, 6]


def test_conversions_of_integers_extend_and_cut() -> None:
    assert execute("cvt.s64.s32", [0xFFFFFFFE]) == [2**64 - 2]
    assert execute("cvt.u64.u32", [0xFFFFFFFE]) == [2**32 - 2]
    assert execute("cvt.u16.u32", [0x12345678]) == [0x5678]
    assert execute("cvt.rn.f32.s32", [0xFFFFFFFF]) == [0xBF800000]
    large = [int(np.float32(x).view(np.uint32)) for x in (3e9, -3e9, 2.5, -2.5, np.nan)]
    expected = [2**31 - 1, 2**31, 2, 2**32 - 2, 0]
    assert execute("cvt.rzi.s32.f32", large) == expected


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_to_16_bits_round_as_pytorch_does(kind: str, dtype: torch.dtype) -> None:
    a, b = float_bits(4), float_bits(5)
    assert same(execute(f"cvt.rn.{kind}.f32", a), as_torch(a).to(dtype))
    pairs = execute(f"cvt.rn.{kind}x2.f32", a, b)
    assert same([n >> 16 for n in pairs], as_torch(a).to(dtype))
    assert same([n & 0xFFFF for n in pairs], as_torch(b).to(dtype))

    halves = [n & 0xFFFF for n in pairs]
    assert same(execute(f"cvt.f32.{kind}", halves), as_torch(b).to(dtype).float())


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_arithmetic_on_pairs_rounds_each_half_once(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    a, b, c = (torch.randn(4000, generator=generator).to(dtype) for _ in range(3))

    def pairs(t: torch.Tensor) -> list[int]:
        return [n % 2**32 for n in t.view(torch.int32).tolist()]

    def check(found: list[int], expected: torch.Tensor) -> bool:
        return [n % 2**32 for n in found] == pairs(expected)

    assert check(execute(f"mul.{kind}x2", pairs(a), pairs(b)), a * b)
    # PyTorch's own conversion from float64 rounds twice.
    exact = a.double() * b.double() + c.double()
    candidates = exact.to(dtype)
    found = torch.tensor(execute(f"fma.rn.{kind}x2", pairs(a), pairs(b), pairs(c)))
    found = found.to(torch.uint32).view(torch.int32).view(dtype)
    assert bool(((found.double() - exact).abs() <= (candidates.double() - exact).abs()).all())


def test_pairs_of_float32() -> None:
    a, b = float_bits(7), float_bits(8)
    low, high = a[:100], a[100:200]
    pairs = [q << 32 | p for p, q in zip(low, high, strict=True)]
    others = [q << 32 | p for p, q in zip(b[:100], b[100:200], strict=True)]
    found = execute("mul.rn.f32x2", pairs, others)
    assert same([n % 2**32 for n in found], as_torch(low) * as_torch(b[:100]))
    assert same([n >> 32 for n in found], as_torch(high) * as_torch(b[100:200]))


def test_a_sum_of_bfloat16_and_float32() -> None:
    a, b = float_bits(9), float_bits(10)
    halves = [n >> 16 for n in a]
    wide = as_torch([n << 16 for n in halves])
    assert same(execute("add.rn.f32.bf16", halves, b), wide + as_torch(b))
    product = torch.addcmul(as_torch(b).double(), wide.double(), wide.double()).float()
    assert same(execute("fma.rn.f32.bf16", halves, halves, b), product)


def test_bfloat16_is_rounded_from_float64_in_one_step() -> None:
    # Just above a tie: rounded to float32 first, it would lie on the tie and go to the even side.
    tie = 1 + 2**-8
    assert widen(narrow(np.float64(tie + 2**-40))) == np.float32(1 + 2**-7)
    assert widen(narrow(np.float64(tie))) == 1.0
    assert widen(narrow(np.float64(tie - 2**-40))) == 1.0


@pytest.mark.parametrize(
    ("text", "kind", "bits"),
    [
        ("12", "u32", 12),
        ("-1", "s32", 2**32 - 1),
        ("0x7F", "b16", 0x7F),
        ("0f3F800000", "f32", 0x3F800000),
        ("4294967295U", "u32", 2**32 - 1),
        ("0d3FF0000000000000", "f64", 0x3FF0000000000000),
    ],
)
def test_constants(text: str, kind: str, bits: int) -> None:
    assert int(immediate(text, kind)[0]) == bits


@pytest.mark.parametrize("kind", [kind for kind in DTYPES if kind != "pred" and not is_float(kind)])
def test_signed_results_are_extended_into_wider_registers(kind: str) -> None:
    minus_one = encode(np.array([-1]).astype(DTYPES[kind]), kind, 8)
    expected = 2**64 - 1 if kind[0] == "s" else 2 ** (8 * size_of(kind)) - 1
    assert int(minus_one[0]) == expected


@pytest.mark.parametrize(
    "name",
    [
        "div.full.f32",
        "add.ftz.f32",
        "ex2.approx.f32",
        "prmt.b32.f4e",
        "tex.2d.v4.f32",
        "mul.hi.u64",
    ],
)
def test_an_unknown_instruction_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name.replace(".", r"\.")):
        signature(name)


def test_inline_assembly_has_registers_of_its_own() -> None:
    text = "{ .reg .b32 x, y; and.b32 x, $1, 15; { .reg .b32 x; mov.b32 x, 3; add.u32 y, x, 0; } "
    text += "add.u32 $0, x, y; }"
    (found,) = run_ptx(text, 1, [np.array([[0x12, 0x3F]], np.uint32)])
    assert found.tolist() == [[5, 18]]
    (scalar,) = run_ptx("shl.b32 $0, $1, 4;", 1, [np.uint32(3)])
    assert scalar.shape == () and int(scalar) == 48


def test_the_largest_of_three() -> None:
    inputs = [np.array([n], np.uint32) for n in (3, 9, 5)]
    assert int(run_ptx("max.u32 $0, $1, $2, $3;", 1, inputs)[0][0]) == 9
    with pytest.raises(NotImplementedError, match="3 sources"):
        run_ptx("add.u32 $0, $1, $2, $3;", 1, inputs)


def test_registers_are_packed_and_unpacked() -> None:
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {b, a}; }"
    (found,) = run_ptx(text, 1, [np.array([0x12345678], np.uint32)])
    assert hex(int(found[0])) == "0x56781234"
