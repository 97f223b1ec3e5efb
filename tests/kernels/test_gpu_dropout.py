"""kernels/gpu/dropout.py against the reference, bit for bit, with guard bytes around x."""

import pytest
import torch
from gpu import guarded
from helpers import gaussian, same_bits

from minilora.kernels.gpu import dropout
from minilora.kernels.reference import dropout as reference


@pytest.mark.parametrize("n", [1, 2, 5, 4095, 4096, 4097, 9001])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_it_draws_the_mask_of_the_reference(n: int, dtype: torch.dtype) -> None:
    x = gaussian(n, dtype=dtype)
    for p, seed in ((0.05, torch.tensor(1)), (0.5, torch.tensor(2**62 - 12345))):
        with guarded() as buffers:
            found = dropout.dropout(buffers.hold(x), p, seed)
            assert same_bits(found, reference.dropout(x, p, seed))
