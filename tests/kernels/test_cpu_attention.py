"""Attention on the CPU against its mathematics in float64, and the small products it is made of."""

import math

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels.cpu import attention as cpu
from minilora.kernels.cpu.avx512 import AVX512_BF16

needs_bfloat16 = pytest.mark.skipif(
    not AVX512_BF16, reason="vdpbf16ps: without it PyTorch's attention is used"
)
pytestmark = needs_bfloat16

# B, H, K, L, J, D
SHAPE = (2, 6, 2, 70, 70, 24)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and dout, in memory [B, positions, heads, D] as a layer computes them."""
    B, H, K, L, J, D = shape
    sizes = [(B, L, H, D), (B, J, K, D), (B, J, K, D), (B, L, H, D)]
    made = [gaussian(*size, seed=i).transpose(1, 2) for i, size in enumerate(sizes)]
    return [t.to(dtype) for t in made]


def random_mask(shape: tuple[int, ...], density: float) -> Tensor:
    B, _, _, L, J, _ = shape
    return gaussian(B, 1, L, J, seed=9) < math.sqrt(2) * torch.erfinv(torch.tensor(2 * density - 1))


def causal_mask(length: int) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


def kernel(given: list[Tensor], mask: Tensor | None, causal: bool) -> list[Tensor]:
    """out, dq, dk, dv and lse."""
    q, k, v, dout = given
    options = (mask, causal, q.shape[-1] ** -0.5)
    out, lse = cpu.attention(q, k, v, *options)
    return [out, *cpu.attention_backward(dout, q, k, v, *options, out, lse), lse]


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """P and lse by their definition; where a query attends to nothing, 0 and infinity."""
    S = q.shape[-1] ** -0.5 * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if mask is None:
        return S.softmax(-1), S.logsumexp(-1)
    S, is_empty = S.masked_fill(~mask, -math.inf), ~mask.any(-1)
    lse = S.logsumexp(-1).masked_fill(is_empty, math.inf)
    return (S - lse[..., None]).exp(), lse


def exact(given: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The same by autograd, in float64."""
    q, k, v, dout = (t.double().requires_grad_() for t in given)
    P, lse = probabilities(q, k, mask)
    out = P @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout), lse.detach()]


def sizes(given: list[Tensor], out: Tensor, mask: Tensor | None) -> list[Tensor]:
    """out, dq, dk and dv with every term of their sums replaced by its absolute value."""
    q, k, v, dout = (t.double() for t in given)
    P, _ = probabilities(q, k, mask)
    K, scale = k.shape[1], q.shape[-1] ** -0.5
    q, k, v, dout, out = (t.abs() for t in (q, k, v, dout, out))
    k, v = (t.repeat_interleave(q.shape[1] // K, 1) for t in (k, v))

    dS = scale * P * (dout @ v.mT + (dout * out).sum(-1, keepdim=True))
    dk, dv = (t.unflatten(1, (K, -1)).sum(2) for t in (dS.mT @ q, P.mT @ dout))
    return [P @ v, dS @ k, dk, dv]


def bound(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Of the norm of an error, over that of the sizes of the terms.

    In bfloat16 the results are rounded, and P or dS, to 2^-9 at most each. A float32 sum of n terms
    is off by sqrt(n) random roundings, and P by those of S.
    """
    _, H, K, L, J, D = shape
    if dtype == torch.bfloat16:
        return 2 * 2**-9
    return 2 * math.sqrt(H // K * L + J + D) * 2**-24


@given(
    B=st.integers(1, 2),
    K=st.integers(1, 3),
    group=st.integers(1, 3),
    L=st.integers(1, 150),
    J=st.integers(1, 150),
    D=st.integers(1, 100),
    kind=st.sampled_from(["all", "causal", "half", "few", "none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_kernel_is_the_mathematics(
    B: int, K: int, group: int, L: int, J: int, D: int, kind: str, dtype: torch.dtype
) -> None:
    causal = kind == "causal"
    shape = (B, K * group, K, L, L if causal else J, D)
    density = {"half": 0.5, "few": 0.02, "none": 0.0}.get(kind)
    mask = None if density is None else random_mask(shape, density)
    arguments = inputs(shape, dtype)

    found = kernel(arguments, mask, causal)
    seen = causal_mask(L) if causal else mask
    *expected, lse = exact(arguments, seen)
    terms = sizes(arguments, expected[0], seen)
    for f, e, size in zip(found, expected, terms, strict=False):
        assert f.dtype == dtype and f.shape == e.shape
        assert (f - e).norm() <= bound(shape, dtype) * size.norm()
    torch.testing.assert_close(found[-1].double(), lse, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_strides_change_nothing(dtype: torch.dtype) -> None:
    arguments = inputs(SHAPE, dtype)
    expected = kernel(arguments, None, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(same_bits, kernel(arguments, None, True), expected))
    finally:
        torch.set_num_threads(before)
    for strided in ([t.contiguous() for t in arguments], [t.mT.clone().mT for t in arguments]):
        assert all(map(same_bits, kernel(strided, None, True), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_sums_the_heads_of_a_key_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The thread that computes them all, or PyTorch from a tensor with all heads."""
    arguments, found = inputs(SHAPE, dtype), []
    for groups_per_thread in (0, 1000):
        monkeypatch.setattr(cpu, "_GROUPS_PER_THREAD", groups_per_thread)
        found.append(tuple(kernel(arguments, None, True)))
    assert same_bits(*found)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["query", "key"])
def test_what_is_not_finite_reaches_those_it_belongs_to_and_nobody_else(
    which: str, dtype: torch.dtype, bad: float
) -> None:
    """A query its own output, a key those that attend to it. (A value is multiplied by P = 0.)

    Query 67 is computed where query 3 has been.
    """
    clean = kernel(inputs(SHAPE, dtype), None, True)[0]
    arguments = inputs(SHAPE, dtype)
    arguments[which == "key"][1, 0, 3, :] = bad
    out = kernel(arguments, None, True)[0]

    reached = torch.zeros(70, dtype=torch.bool)
    reached[3 : 4 if which == "query" else 70] = True
    if bad == math.inf:
        # S = -inf is a score as well: of a key that is not attended to.
        reached &= ~out[1, 0].isfinite().all(-1)
        assert reached.any()
    assert out[1, 0, reached].isnan().all()
    assert same_bits(out[1, 0, ~reached], clean[1, 0, ~reached]) or bad == math.inf
    assert same_bits(out[1, 0, :3], clean[1, 0, :3]) and same_bits(out[0], clean[0])
