"""The tables of levels: derived from the papers, compared with the published digits and bytes."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from minilora.kernels.reference import codebooks

NF4 = codebooks.levels("nf4")


def test_derived_codebook_is_within_an_ulp_of_the_published_one() -> None:
    # The levels are scaled so that the largest is 1: an ulp of float32 there is 2^-23.
    published = torch.tensor(codebooks.NF4, dtype=torch.float64)
    assert (codebooks.derive_nf4() - published).abs().max() < 2**-23
    assert torch.equal(NF4.double(), published), "the digits are float32 numbers"


def test_published_digits_follow_bit_for_bit_from_probabilities_in_float32() -> None:
    def half(levels: int) -> Tensor:
        # In float32, as in the code that made the digits.
        p = torch.linspace(0.9677083, 0.5, levels + 1)[:-1]
        return torch.special.ndtri(p.double()).float()

    levels = torch.cat([-half(7), torch.zeros(1), half(8)]).sort().values
    assert same_bits(levels / levels.max(), NF4)


def test_map8_is_the_dynamic_map_of_bitsandbytes_in_256_ascending_values() -> None:
    bnb: Any = pytest.importorskip(
        "bitsandbytes.functional", reason="the 8-bit map is compared with bitsandbytes'"
    )
    assert same_bits(codebooks.MAP8, bnb.create_dynamic_map(signed=True).float())
    assert (codebooks.MAP8.diff() > 0).all()
    assert codebooks.MAP8.shape == (256,)


def test_the_8_bit_map_has_the_same_bits_on_a_processor_without_vector_instructions() -> None:
    """Or bytes quantized on one machine would be dequantized to other weights on another."""
    code = (
        "from minilora.kernels.reference import codebooks; import torch; "
        "print(codebooks.MAP8.view(torch.int32).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(codebooks.MAP8.view(torch.int32).tolist())


@pytest.mark.parametrize("quant_type", codebooks.CODEBOOKS)
def test_levels_are_those_of_bitsandbytes_code_for_code(quant_type: str) -> None:
    bnb: Any = pytest.importorskip(
        "bitsandbytes.functional", reason="the levels are compared with bitsandbytes'"
    )
    expected = bnb.get_4bit_type(quant_type, device="cpu")
    assert same_bits(codebooks.levels(quant_type), expected)


def test_the_codes_of_fp4_are_a_sign_and_a_magnitude_in_no_order() -> None:
    levels = codebooks.levels("fp4")
    assert torch.equal(levels[8:], -levels[:8])
    assert (levels == 0).nonzero().flatten().tolist() == [0, 8]
    assert not levels.signbit()[8], "the second zero is 0, not -0"

    codes = codebooks.ascending_codes("fp4")
    assert codes.tolist() == [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]
    assert (levels[codes.int()].diff() >= 0).all()
    assert codebooks.ascending_codes("nf4").tolist() == list(range(16))


SORTED = {"nf4": NF4, "fp4": codebooks.levels("fp4").sort().values, "map8": codebooks.MAP8}


@pytest.mark.parametrize("levels", SORTED.values(), ids=SORTED)
def test_thresholds_are_midpoints_rounded_to_float32(levels: Tensor) -> None:
    # The sum of two neighbours is exact in float64, so this is the midpoint rounded once.
    exact = (levels[:-1].double() + levels[1:].double()) / 2
    assert same_bits(codebooks.midpoints(levels), exact.float())


def test_an_unknown_quantization_type_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="quant_type='nf3': there is a codebook for 'nf4', 'fp4'"):
        codebooks.levels("nf3")
