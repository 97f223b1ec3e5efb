"""The table of levels by byte permutes, against the levels, on every 16-bit half of a word."""

import pytest
import torch
from gpu import DEVICE

from minilora.kernels.gpu import permute, runtime
from minilora.kernels.gpu.runtime import tl, triton
from minilora.kernels.reference.codebooks import levels

NO_PTX = pytest.mark.skipif(runtime.PORTABLE, reason="AMD has no PTX")


@triton.jit
def look_up(words, levels_ptr, out, SIZE: tl.constexpr, PTX: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    levels = permute.load_planes(levels_ptr, i) if PTX else levels_ptr
    p0, p1, p2, p3 = permute.level_pairs(tl.load(words + i), levels, PTX)
    tl.store(out + 4 * i, p0)
    tl.store(out + 4 * i + 1, p1)
    tl.store(out + 4 * i + 2, p2)
    tl.store(out + 4 * i + 3, p3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("by_ptx", [False, pytest.param(True, marks=NO_PTX)])
def test_every_half_of_a_word_gives_its_levels(
    dtype: torch.dtype, quant_type: str, by_ptx: bool
) -> None:
    rounded = levels(quant_type).to(dtype)
    table = permute.byte_planes(DEVICE, quant_type, dtype) if by_ptx else rounded.to(DEVICE)
    half = torch.arange(2**16, dtype=torch.int64)

    for words in (half | 0x5A3C0000, half << 16 | 0x5A3C):
        words = words.to(torch.int32)
        out = torch.empty(2**16, 4, dtype=torch.int32, device=DEVICE)
        look_up[(16,)](words.to(DEVICE), table, out, SIZE=4096, PTX=by_ptx)

        pairs = words.view(torch.uint8).view(-1, 4)
        codes = torch.stack([pairs >> 4, pairs & 15], dim=2).view(-1, 8)
        assert torch.equal(out.cpu().view(dtype).view(-1, 8), rounded[codes.int()])


def test_every_copy_of_the_planes_has_the_bytes_of_the_levels() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        planes = permute.byte_planes(DEVICE, "nf4", dtype).cpu()
        bits = levels("nf4").to(dtype).view(torch.int16).int()
        expected = torch.stack([bits & 0xFF, bits >> 8 & 0xFF])
        assert planes.shape == (8, 2, 16) and planes.is_contiguous()
        assert torch.equal(planes.int(), expected.expand(8, 2, 16))
