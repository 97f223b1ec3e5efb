"""Attention for training: as exact as PyTorch's, with gradients, and what it leaves to PyTorch."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="its attention interface")

import torch
import torch.nn.functional as F
from helpers import gaussian, same_bits
from torch import Tensor

from minilora.huggingface.attention import (
    MIN_LENGTH,
    attention_forward,
    covers,
    cpu_attention,
    is_supported,
)

pytestmark = pytest.mark.skipif(
    not is_supported(torch.bfloat16), reason="without AVX512-BF16 PyTorch's attention is used"
)

Masks = Callable[[int, int], Tensor | None]


def causal(B: int, L: int) -> Tensor:
    return torch.ones(B, 1, L, L, dtype=torch.bool).tril()


def padded_right(B: int, L: int) -> Tensor:
    mask = causal(B, L)
    mask[-1, :, :, -L // 3 :] = False
    return mask


def padded_left(B: int, L: int) -> Tensor:
    """The first queries of the last row attend to nothing."""
    mask = causal(B, L)
    mask[-1, :, :, : L // 3] = False
    return mask


def packed(B: int, L: int) -> Tensor:
    """Three examples per row: no token attends to another example."""
    segment = torch.arange(L) * 3 // L
    return causal(B, L) & (segment[:, None] == segment)


def window(B: int, L: int) -> Tensor:
    return causal(B, L) & ~causal(B, L).tril(-9)


def one_for_all(B: int, L: int) -> Tensor:
    return packed(1, L)


MASKS: dict[str, Masks] = {
    "causal": lambda B, L: None,
    "bidirectional": lambda B, L: None,
    "padded_right": padded_right,
    "padded_left": padded_left,
    "packed": packed,
    "window": window,
    "one_for_all": one_for_all,
}

# B, H, K, L, D.
SHAPES = {
    "grouped": (2, 6, 2, 70, 16),
    "one key head": (3, 5, 1, 33, 8),
    "a key head each": (2, 3, 3, 130, 24),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, in memory [B, L, H, D] as a layer computes them."""
    B, H, K, L, D = shape
    sizes = [(B, L, H, D), (B, L, K, D), (B, L, K, D), (B, L, H, D)]
    made = [gaussian(*size, seed=i).transpose(1, 2) for i, size in enumerate(sizes)]
    return [t.to(dtype) for t in made]


def pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=q.shape[-1] ** -0.5
    )


def blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return cpu_attention(q, k, v, mask, causal=causal, scale=q.shape[-1] ** -0.5)


def with_gradients(
    attention: Callable[..., Tensor], given: list[Tensor], mask: Tensor | None, causal: bool
) -> list[Tensor]:
    *leaves, dout = (t.detach() for t in given)
    leaves = [t.requires_grad_() for t in leaves]
    out = attention(*leaves, mask, causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_exact_as_those_of_pytorch(
    shape: str, mask: str, dtype: torch.dtype
) -> None:
    """Against float64, by the norm of the error: no larger than PyTorch's, and 10 % for chance.

    In float32 both are a few roundings, which differ with the order of a sum of some 200 terms: an
    error of 8 of them (8 * 2 ** -24 = 5e-7) is none.
    """
    given = inputs(SHAPES[shape], dtype)
    B, _, _, L, *_ = SHAPES[shape]
    allowed = MASKS[mask](B, L)
    is_causal = mask == "causal"

    exact = with_gradients(pytorch, [t.double() for t in given], allowed, is_causal)
    theirs = errors(with_gradients(pytorch, given, allowed, is_causal), exact)
    found = with_gradients(blocks, given, allowed, is_causal)
    ours = errors(found, exact)

    for a, b in zip(ours, theirs, strict=True):
        assert a <= max(1.1 * b, 8 * 2**-24), (ours, theirs)
    assert [t.dtype for t in found] == 4 * [dtype]


def test_a_query_that_attends_to_nothing_gives_zero_and_no_gradient() -> None:
    shape = SHAPES["grouped"]
    given = inputs(shape, torch.float32)
    mask = padded_left(shape[0], shape[3])
    out, dq, dk, _ = with_gradients(blocks, given, mask, False)
    dead = shape[3] // 3
    assert not out[-1, :, :dead].any() and not dq[-1, :, :dead].any()
    assert not dk[-1, :, :dead].any()
    assert out.isfinite().all() and dq[-1, :, dead + 1 :].any()


def test_a_mask_of_nothing_gives_zeros() -> None:
    given = inputs(SHAPES["grouped"], torch.bfloat16)
    mask = torch.zeros(2, 1, 70, 70, dtype=torch.bool)
    assert not any(t.any() for t in with_gradients(blocks, given, mask, False))


def test_inputs_and_output_are_kept_for_the_backward_and_a_number_per_query() -> None:
    shape = SHAPES["grouped"]
    q, k, v, _ = (t.requires_grad_() for t in inputs(shape, torch.bfloat16))
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = blocks(q, k, v, None, True)
    tensors = {t.untyped_storage().data_ptr() for t in (q, k, v, out)}
    (lse,) = (t for t in kept if t.untyped_storage().data_ptr() not in tensors)
    B, H, _, L, _ = shape
    assert lse.shape == (B, H, L) and lse.dtype == torch.float32


def test_the_same_bits_every_time_and_for_any_layout_of_the_inputs() -> None:
    given = inputs(SHAPES["grouped"], torch.bfloat16)
    first = with_gradients(blocks, given, None, True)
    again = with_gradients(blocks, [t.contiguous() for t in given], None, True)
    assert all(map(same_bits, first, again))


def test_examples_of_a_packed_row_do_not_see_each_other() -> None:
    """Each example's output is what it is alone, within a few roundings of float32."""
    q, k, v, _ = inputs((1, 6, 2, 72, 16), torch.float32)
    together = blocks(q, k, v, packed(1, 72), False)
    for start in (0, 24, 48):
        part = slice(start, start + 24)
        alone = blocks(q[:, :, part], k[:, :, part], v[:, :, part], None, True)
        torch.testing.assert_close(together[:, :, part], alone, rtol=0, atol=2e-6)


def test_a_second_derivative_raises() -> None:
    q, k, v, _ = (t.requires_grad_() for t in inputs(SHAPES["grouped"], torch.float32))
    (dq,) = torch.autograd.grad(blocks(q, k, v, None, True).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_a_backward_under_autocast_is_in_the_dtypes_of_the_forward() -> None:
    *given, dout = inputs(SHAPES["grouped"], torch.float32)
    leaves = [t.requires_grad_() for t in given]
    plain = torch.autograd.grad(blocks(*leaves, None, True), leaves, dout)
    out = blocks(*leaves, None, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, leaves, dout)
    assert same_bits(found, plain)


def grouped(length: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return inputs((2, 6, 2, length, 16), dtype)[:3]


ROW = torch.ones(2, 1, 24, 24, dtype=torch.bool)


@pytest.mark.parametrize(
    "given, options",
    [
        (grouped(), {"dropout": 0.1}),
        (grouped(MIN_LENGTH - 1), {}),
        (grouped(dtype=torch.float64), {}),
        (grouped(dtype=torch.float16), {}),
        (grouped(), {"mask": ROW.float()}),
        (grouped(), {"mask": ROW.expand(2, 6, 24, 24), "causal": False}),
        (grouped(), {"mask": ROW[0], "causal": False}),
        ([grouped()[0], *grouped(30)[1:]], {}),
        ([*grouped()[:2], grouped()[2][..., :8]], {}),
    ],
    ids="dropout short float64 float16 float per-head no-batch cached-keys head-sizes".split(),
)
def test_what_is_not_covered(given: list[Tensor], options: dict[str, object]) -> None:
    settings: dict[str, object] = {"causal": True, "dropout": 0.0, "mask": None}
    assert covers(*grouped(), **settings)  # type: ignore[arg-type]
    assert not covers(*given, **settings | options)  # type: ignore[arg-type]


def test_autocast_is_not_covered() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not covers(*grouped(), None, causal=True, dropout=0.0)


LAYER = SimpleNamespace(num_key_value_groups=3, is_causal=True)


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.5}, {"position_bias": gaussian(1, 6, 24, 24)}],
    ids=["dropout", "position bias"],
)
def test_the_rest_goes_to_transformers_as_it_came(options: dict[str, object]) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs = []
    for attention in (attention_forward, sdpa_attention_forward):
        torch.manual_seed(0)
        q, k, v = grouped()
        outputs.append(attention(LAYER, q, k, v, None, scaling=0.25, **options)[0])
    assert same_bits(*outputs)


def test_a_soft_cap_is_refused_by_transformers() -> None:
    with pytest.raises(ValueError, match="softcap"):
        attention_forward(LAYER, *grouped(), None, softcap=30.0)


@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_the_layers_arguments_mean_the_same(is_causal: bool | None, scaling: float | None) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = grouped()
    expected, _ = sdpa_attention_forward(LAYER, q, k, v, None, scaling=scaling, is_causal=is_causal)
    found, weights = attention_forward(LAYER, q, k, v, None, scaling=scaling, is_causal=is_causal)
    assert weights is None and found.is_contiguous() and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_a_dtype_without_instructions_is_refused() -> None:
    q, k, v = grouped(dtype=torch.float16)
    with pytest.raises(TypeError, match=r"q is torch\.float16.*scaled_dot_product_attention"):
        cpu_attention(q, k, v, scale=0.25)


def test_a_processor_without_the_instructions_takes_pytorchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minilora.kernels.cpu.avx512.AVX512_BF16", False)
    given = grouped(dtype=torch.bfloat16)
    assert not is_supported(torch.bfloat16) and is_supported(torch.float32)
    assert not covers(*given, None, causal=True, dropout=0.0)
    found, _ = attention_forward(LAYER, *given, None)
    expected = pytorch(*given, None, True)
    assert same_bits(found, expected.transpose(1, 2))
