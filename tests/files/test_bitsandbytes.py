"""bitsandbytes' 4-bit tensors: in and out without a bit of difference, and refused when malformed.

bitsandbytes itself is the oracle, in both directions.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minilora
from minilora.files.bitsandbytes import from_tensors, quantized_layers, to_tensors
from minilora.kernels.reference import codebooks
from minilora.nf4 import BLOCK_SIZES, NF4Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGE = (torch.uint8, torch.bfloat16, torch.float32)
QUANT_TYPES = ("nf4", "fp4")


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="the tensors are compared with bitsandbytes'"
    )
    with torch.compiler.set_stance("force_eager"):
        yield functional


# Rows of whole blocks: see tests/core/test_fp4.py.
weights = st.builds(
    lambda rows, blocks, block_size, dtype, seed: (
        gaussian(rows, blocks * block_size, dtype=dtype, seed=seed),
        block_size,
    ),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 3),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
quant_types = st.sampled_from(QUANT_TYPES)


def parts(w: NF4Weight) -> tuple[Tensor, ...]:
    return tuple(t for t in w.tensors if t is not None)


def described(w: NF4Weight) -> tuple[Any, ...]:
    return w.shape, w.dtype, w.block_size, w.quant_type, w.double_quantized


@settings(max_examples=60)
@given(
    weight=weights, quant_type=quant_types, double=st.booleans(), storage=st.sampled_from(STORAGE)
)
def test_what_bitsandbytes_writes_is_read_bit_for_bit(
    weight: tuple[Tensor, int], quant_type: str, double: bool, storage: torch.dtype, bnb: Any
) -> None:
    x, block_size = weight
    packed, state = bnb.quantize_4bit(
        x,
        blocksize=block_size,
        quant_type=quant_type,
        compress_statistics=double,
        quant_storage=storage,
    )
    rest = {f"a.fc.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    w = from_tensors("a.fc", {"a.fc.weight": packed, **rest})

    assert described(w) == (x.shape, x.dtype, block_size, quant_type, double)
    assert torch.equal(w.dequantize(), bnb.dequantize_4bit(packed, state))
    assert same_bits(w.packed, minilora.quantize_nf4(x, block_size, double, quant_type).packed)


@settings(max_examples=60)
@given(weight=weights, quant_type=quant_types, double=st.booleans())
def test_what_is_written_is_read_by_bitsandbytes_and_by_us_bit_for_bit(
    weight: tuple[Tensor, int], quant_type: str, double: bool, bnb: Any
) -> None:
    x, block_size = weight
    w = minilora.quantize_nf4(x, block_size, double, quant_type)
    tensors = to_tensors("a.fc", w)
    assert quantized_layers(tensors) == {"a.fc"}

    again = from_tensors("a.fc", tensors)
    assert same_bits(parts(again), parts(w))
    assert described(again) == described(w)

    packed = tensors.pop("a.fc.weight")
    found = {key.removeprefix("a.fc.weight."): tensor for key, tensor in tensors.items()}
    state = bnb.QuantState.from_dict(found, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(packed, state), w.dequantize())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_keys_dtypes_and_shapes_are_those_of_bitsandbytes(
    quant_type: str, double: bool, bnb: Any
) -> None:
    x = gaussian(48, 192, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(x, quant_type=quant_type, compress_statistics=double)
    expected = {f"fc.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    expected = {"fc.weight": packed, **expected}

    found = to_tensors("fc", minilora.quantize_nf4(x, 64, double, quant_type))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if "quant_state" not in key:
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
    [text], [theirs] = (
        [bytes(t.tolist()) for key, t in both.items() if "quant_state" in key]
        for both in (found, expected)
    )
    assert json.loads(text) == json.loads(theirs)


@pytest.mark.parametrize("shape", [(1,), (7, 33), (2, 3, 65), (128, 96)], ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_any_shape_comes_back_from_the_first_layer_to_the_root(
    shape: tuple[int, ...], double: bool
) -> None:
    w = minilora.quantize_nf4(gaussian(*shape), 32, double)
    for layer in ("", "fc", "model.layers.0.fc"):
        again = from_tensors(layer, to_tensors(layer, w))
        assert same_bits(parts(again), parts(w)) and again.shape == w.shape


def test_layers_are_found_and_read_among_others() -> None:
    a, b = (minilora.quantize_nf4(gaussian(32, 64, seed=seed)) for seed in (1, 2))
    tensors = to_tensors("fc", a) | to_tensors("fc.weight_of.fc", b) | to_tensors("fc2", b)
    tensors |= {"fc.bias": gaussian(32), "norm.weight": gaussian(4), "weight": gaussian(4)}
    tensors |= {"my_weight.absmax": gaussian(4)}
    assert quantized_layers(tensors) == {"fc", "fc.weight_of.fc", "fc2"}
    assert same_bits(parts(from_tensors("fc", tensors)), parts(a))
    assert same_bits(parts(from_tensors("fc2", tensors)), parts(b))


def test_tensors_are_not_copied_and_the_codebook_is_not_shared() -> None:
    w = minilora.quantize_nf4(gaussian(32, 64))
    tensors, others = to_tensors("a", w), to_tensors("b", w)
    assert tensors["a.weight"].data_ptr() == w.packed.data_ptr()
    assert from_tensors("a", tensors).packed.data_ptr() == w.packed.data_ptr()
    for end in ("quant_map", "nested_quant_map"):
        maps = tensors[f"a.weight.{end}"], others[f"b.weight.{end}"]
        # safetensors refuses tensors that share memory.
        assert len({m.data_ptr() for m in (*maps, codebooks.MAP8, codebooks.levels("nf4"))}) == 4


def test_a_map_that_differs_in_the_last_bit_is_the_map() -> None:
    tensors = to_tensors("fc", minilora.quantize_nf4(gaussian(32, 64)))
    tensors["fc.weight.nested_quant_map"] *= 1 + 2**-23
    from_tensors("fc", tensors)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (minilora.quantize_nf4(gaussian(4, 64).double()), "a.fc: .*float64, only of float32"),
        (replace(minilora.quantize_nf4(gaussian(4, 64)), quant_type="af4"), "a.fc: .*'af4'"),
        (minilora.quantize_nf4(gaussian(4, 64)).to("meta"), "a.fc is on the meta device"),
    ],
    ids=["float64", "another codebook", "meta"],
)
def test_what_bitsandbytes_does_not_have_is_refused(weight: NF4Weight, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_tensors("a.fc", weight)


Tensors = dict[str, Tensor]
STATE = "fc.weight.quant_state.bitsandbytes__nf4"
MAP, ABSMAX = "fc.weight.quant_map", "fc.weight.absmax"
ABSMAX2, MAP8 = "fc.weight.nested_absmax", "fc.weight.nested_quant_map"


def without(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(key)


def with_tensor(key: str, change: Callable[[Tensor], Any]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def with_text(text: bytes) -> Callable[[Tensors], Any]:
    return with_tensor(STATE, lambda _: torch.tensor(list(text), dtype=torch.uint8))


def with_state(**changes: Any) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        kept = {key: value for key, value in state.items() if value is not ...}
        with_text(json.dumps(kept).encode())(tensors)

    return change


def renamed(key: str, new: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(key)})


NAN = float("nan")
MALFORMED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no tensors": (lambda tensors: tensors.clear(), "no weight.quant_state"),
    "no state": (without(STATE), "no weight.quant_state"),
    "no packed": (without("fc.weight"), "has no weight"),
    "no absmax": (without(ABSMAX), "has no weight.absmax"),
    "no map": (without(MAP), "has no weight.quant_map"),
    "no nested absmax": (without(ABSMAX2), "has no weight.nested_absmax"),
    "no nested map": (without(MAP8), "has no weight.nested_quant_map"),
    "left over": (renamed("other", "fc.weight.SCB"), "also has weight.SCB"),
    "two states": (
        lambda tensors: tensors.update({STATE[:-3] + "fp4": tensors[STATE]}),
        "nf4.*where one is needed",
    ),
    "another method": (renamed(STATE, STATE[:-3] + "int4"), "int4 is neither NF4 nor FP4"),
    "type of the name": (renamed(STATE, STATE[:-3] + "fp4"), "quant_type is 'nf4', not fp4"),
    "type in the state": (with_state(quant_type="fp4"), "quant_type is 'fp4', not nf4"),
    "no JSON": (with_text(b'{"quant_type"'), "not valid JSON"),
    "no UTF-8": (with_text(b"\xff\xfe"), "not valid JSON"),
    "no object": (with_text(b"[1, 2]"), "weight.quant_state"),
    "empty": (with_text(b""), "not valid JSON"),
    "long": (with_text(b" " * 20_000), "20000 values"),
    "state of floats": (with_tensor(STATE, lambda t: t.float()), "torch.float32"),
    "block size": (with_state(blocksize=48), "blocksize is 48"),
    "block size of 0": (with_state(blocksize=0), "blocksize is 0"),
    "block size of a float": (with_state(blocksize=64.0), "blocksize is 64.0"),
    "block size of text": (with_state(blocksize="64"), "blocksize is '64'"),
    "other block size": (with_state(blocksize=128), "weight.absmax is torch.uint8 of 200 values"),
    "no block size": (with_state(blocksize=...), "blocksize is None"),
    "dtype": (with_state(dtype="int8"), "dtype is 'int8', not float32"),
    "dtype of bitsandbytes": (with_state(dtype="float64"), "dtype is 'float64'"),
    "dtype that is code": (with_state(dtype="__import__"), "dtype is '__import__'"),
    "shape": (with_state(shape=[100, 127]), "6400 bytes.*needs 6350"),
    "shape of nothing": (with_state(shape=[0, 128]), r"shape is \[0, 128\]"),
    "negative shape": (with_state(shape=[-100, -128]), r"shape is \[-100, -128\]"),
    "shape of floats": (with_state(shape=[100.0, 128]), r"shape is \[100.0, 128\]"),
    "shape of bools": (with_state(shape=[True, 12800]), r"shape is \[True, 12800\]"),
    "shape of text": (with_state(shape="100"), "shape is '100'"),
    "huge shape": (with_state(shape=[2**40, 2**40]), "more than any file holds"),
    "nested block size": (with_state(nested_blocksize=64), "nested_blocksize is 64"),
    "nested dtype": (with_state(nested_dtype="bfloat16"), "nested_dtype is 'bfloat16'"),
    "no offset": (with_state(nested_offset=...), "nested_offset is None"),
    "offset of text": (with_state(nested_offset="1"), "nested_offset is '1'"),
    "offset of a bool": (with_state(nested_offset=True), "nested_offset is True"),
    "NaN offset": (with_state(nested_offset=NAN), "nested_offset is nan|not valid JSON"),
    "infinite offset": (with_state(nested_offset=1e39), "nested_offset is 1e"),
    "packed cut off": (with_tensor("fc.weight", lambda t: t[:-1]), "6399 bytes.*needs 6400"),
    "packed of bools": (with_tensor("fc.weight", lambda t: t.bool()), "torch.bool"),
    "dense": (with_tensor("fc.weight", lambda t: gaussian(100, 128)), "51200 bytes"),
    "absmax cut off": (with_tensor(ABSMAX, lambda t: t[:-1]), "of 199 values, not uint8 of 200"),
    "absmax of floats": (with_tensor(ABSMAX, lambda t: t.float()), "torch.float32.*not uint8"),
    "nested absmax of codes": (with_tensor(ABSMAX2, lambda t: t.byte()), "not float32 of 1"),
    "nested absmax too long": (with_tensor(ABSMAX2, lambda t: t.repeat(2)), "of 2 values"),
    "NaN": (with_tensor(ABSMAX2, lambda t: t * NAN), "nested_absmax holds NaN"),
    "infinity": (with_tensor(ABSMAX2, lambda t: t / 0), "nested_absmax holds NaN or infinity"),
    "infinite together": (
        lambda tensors: (
            with_state(nested_offset=3e38)(tensors),
            with_tensor(ABSMAX2, lambda t: t * 0 + 3e38)(tensors),
        ),
        "nested_absmax and nested_offset together are infinity",
    ),
    "no tensor": (with_tensor(ABSMAX, lambda t: t.tolist()), "weight.absmax is a list"),
    "state of text": (with_tensor(STATE, lambda t: "{}"), "is a str, not a tensor"),
    "other levels": (with_tensor(MAP, lambda t: t.flip(0)), "quant_map holds other levels"),
    "other 8-bit levels": (
        with_tensor(MAP8, lambda t: t * 1.001),
        "nested_quant_map.*other levels",
    ),
    "map too short": (with_tensor(MAP, lambda t: t[:15]), "of 15 values"),
    "map of NaN": (with_tensor(MAP, lambda t: t * NAN), "quant_map holds NaN"),
    "meta": (with_tensor("fc.weight", lambda t: t.to("meta")), "meta device"),
    "state on meta": (with_tensor(STATE, lambda t: t.to("meta")), "JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tensors_are_refused_and_the_layer_is_named(name: str) -> None:
    damage, words = MALFORMED[name]
    tensors = to_tensors("fc", minilora.quantize_nf4(gaussian(100, 128))) | {"other": gaussian(3)}
    from_tensors("fc", tensors)
    damage(tensors)
    with pytest.raises(ValueError, match=words) as caught:
        from_tensors("fc", tensors)
    assert re.match("fc: not a 4-bit weight of bitsandbytes: ", str(caught.value))
    assert len(str(caught.value)) < 400


PLAIN: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "offset of no double quantization": (with_state(nested_offset=0.5), "has no weight.nested"),
    "codes": (with_tensor(ABSMAX, lambda t: t.byte()), "torch.uint8.*not float32"),
    "NaN": (with_tensor(ABSMAX, lambda t: t * NAN), "absmax holds NaN"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_malformed_tensors_without_double_quantization_are_refused(name: str) -> None:
    damage, words = PLAIN[name]
    tensors = to_tensors("fc", minilora.quantize_nf4(gaussian(100, 128), double_quant=False))
    damage(tensors)
    with pytest.raises(ValueError, match=words):
        from_tensors("fc", tensors)


def test_text_of_a_file_cannot_control_the_terminal() -> None:
    tensors = to_tensors("fc", minilora.quantize_nf4(gaussian(100, 128)))
    with_state(dtype="\x1b[2J" + "a" * 5000)(tensors)
    with pytest.raises(ValueError, match="fc: ") as caught:
        from_tensors("fc", tensors)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 300
