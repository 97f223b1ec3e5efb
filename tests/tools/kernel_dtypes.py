"""The dtypes of the CPU kernels that need AVX-512, and how coarsely each rounds a result."""

import pytest
import torch

from minilora.kernels.cpu.avx512 import AVX512, AVX512_BF16

BF16, F32 = torch.bfloat16, torch.float32

# Of the result, at most; float32 is rounded as part of its sum.
ROUNDING = {F32: 0.0, BF16: 2**-8}

every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(F32, marks=pytest.mark.skipif(not AVX512, reason="no AVX-512")),
        pytest.param(BF16, marks=pytest.mark.skipif(not AVX512_BF16, reason="no AVX512-BF16")),
    ],
    ids=str,
)
