"""Dropout whose mask is drawn from a seed: the generator, the mask, the CPU's kernel."""

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minilora
from minilora.kernels.cpu import dropout as cpu
from minilora.kernels.reference import dropout as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_the_words_are_those_of_philox4x32_10() -> None:
    """Known answers of Random123 (Salmon et al. 2011): counter and key 0."""
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.words(4, seed=0).tolist() == expected


@given(
    n=st.integers(0, 5000),
    p=st.floats(0.0, 0.99),
    seed=st.integers(0, 2**62 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_the_cpu_kernel_is_the_reference(n: int, p: float, seed: int, dtype: torch.dtype) -> None:
    x = gaussian(n, dtype=dtype)
    assert same_bits(
        cpu.dropout(x, p, torch.tensor(seed)), reference.dropout(x, p, torch.tensor(seed))
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_strides_do_not_change_the_mask(threads: int) -> None:
    x = gaussian(300, 700)
    expected = reference.dropout(x, 0.3, torch.tensor(5))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(cpu.dropout(x, 0.3, torch.tensor(5)), expected)
        assert torch.equal(cpu.dropout(x.T.contiguous().T, 0.3, torch.tensor(5)), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_fraction_of_zeros_and_the_mean(p: float) -> None:
    n = 1 << 20
    y = cpu.dropout(torch.ones(n), p, torch.tensor(3))
    # Five standard deviations of a binomial distribution.
    spread = 5 * (p * (1 - p) / n) ** 0.5
    assert abs((y == 0).double().mean() - p) < spread
    assert abs(y.double().mean() - 1) < spread / (1 - p)


def test_masks_of_different_seeds_and_neighbouring_elements_are_independent() -> None:
    n, p = 1 << 18, 0.5
    zeros = [
        (cpu.dropout(torch.ones(n), p, torch.tensor(seed)) == 0).double()
        for seed in (1, 2, 1 << 32)
    ]
    pairs = [(zeros[0], zeros[1]), (zeros[0], zeros[2]), (zeros[0][1:], zeros[0][:-1])]
    pairs.append((zeros[0][: n // 4], zeros[0][n // 4 : n // 2]))
    for a, b in pairs:
        assert abs((a * b).mean() - p * p) < 5 * 0.44 / len(a) ** 0.5


def losses(weight: Tensor, dropout: float) -> tuple[Tensor, ...]:
    """A layer's output and all its gradients, with the mask that seed 0 draws."""
    w = minilora.quantize_nf4(weight)
    x, bias = gaussian(6, 128, dtype=weight.dtype), gaussian(40, dtype=weight.dtype)
    A, B = gaussian(4, 128, seed=1), gaussian(40, 4, seed=2)
    leaves = [t.requires_grad_() for t in (x, A, B, bias)]
    torch.manual_seed(0)
    y = minilora.lora_linear(x, w, A, B, 1.5, bias, dropout)
    gradients = torch.autograd.grad(y, leaves, gaussian(6, 40, seed=3, dtype=weight.dtype))
    return y.detach(), *gradients


def test_a_layers_gradients_are_those_of_the_mask_that_its_forward_drew() -> None:
    """Oracle: autograd through the same mask in float64."""
    weight = gaussian(40, 128, dtype=torch.float64)
    found = losses(weight, 0.25)

    torch.manual_seed(0)
    seed = torch.randint(1 << 62, ())
    W = minilora.quantize_nf4(weight).dequantize(torch.float64)
    x, bias = gaussian(6, 128, dtype=torch.float64), gaussian(40, dtype=torch.float64)
    A, B = gaussian(4, 128, seed=1).double(), gaussian(40, 4, seed=2).double()
    leaves = [t.requires_grad_() for t in (x, A, B, bias)]
    mask = reference.dropout(torch.ones_like(x), 0.25, seed)
    y = x @ W.T + bias + 1.5 * ((x * mask) @ A.T) @ B.T
    gradients = torch.autograd.grad(y, leaves, gaussian(6, 40, seed=3, dtype=torch.float64))
    for ours, expected in zip(found, (y, *gradients), strict=True):
        # A and B are float32, and so are their gradients.
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_forward_that_checkpointing_repeats_draws_the_same_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    w = minilora.quantize_nf4(gaussian(64, 64))
    A, B = gaussian(4, 64), gaussian(64, 4)

    def layer(x: Tensor) -> Tensor:
        return minilora.lora_linear(x, w, A, B, 2.0, dropout=0.5)

    gradients = []
    for repeated in (False, True):
        torch.manual_seed(1)
        x = gaussian(3, 64).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if repeated else layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_the_mask_is_not_kept() -> None:
    w = minilora.quantize_nf4(gaussian(64, 256))
    x = gaussian(100, 256).requires_grad_()
    A, B = gaussian(4, 256).requires_grad_(), gaussian(64, 4).requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        minilora.lora_linear(x, w, A, B, 2.0, dropout=0.5)
    z, seed = 100 * 4 * 4, 8
    assert sum(saved.values()) == x.nbytes + A.nbytes + B.nbytes + z + seed
