"""The operators `torch.ops.minilora.*`: opcheck of each, the fakes, the dispatcher's choice.

And what autocast does to them.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import gaussian
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import minilora
from minilora import ops

NAMES = (
    "quantize",
    "double_quantize",
    "double_dequantize",
    "dequantize",
    "dropout",
    "project",
    "contract",
    "nf4_linear",
    "nf4_linear_backward",
    "nf4_lora_linear",
    "nf4_inference",
    "nf4_lora_linear_backward",
)
operator = torch.ops.minilora


def parts(w: minilora.NF4Weight) -> tuple[Any, ...]:
    """The weight as the operators' schemas take it."""
    return (*w.tensors, list(w.shape), w.block_size, w.quant_type)


def case(name: str, args: tuple[Any, ...], label: str = "") -> Any:
    """One operator with arguments, as a pytest parameter."""
    op = getattr(operator, name).default
    return pytest.param(op, args, id=f"{name}-{label}" if label else name)


def calls() -> list[Any]:
    """Every operator with arguments of every kind."""
    absmax = gaussian(300).abs()
    found = [
        case("double_quantize", (absmax,)),
        case("double_dequantize", tuple(ops.double_quantize(absmax))),
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found.append(case("quantize", (gaussian(3, 43, dtype=dtype), 64, "nf4"), str(dtype)))
        dropped = gaussian(43, 3, dtype=dtype).T, 0.3, torch.tensor(1)
        found.append(case("dropout", dropped, str(dtype)))
        x, u = gaussian(6, 64, dtype=dtype), gaussian(6, 8, dtype=dtype)
        found.append(case("project", (x, gaussian(64, 8, dtype=dtype).T), str(dtype)))
        found.append(case("contract", (u, x, 1.5), str(dtype)))

    # The blocks of the second cross its rows.
    for shape, block in (((33, 128), 64), ((5, 70), 32)):
        for double in (False, True):
            w = minilora.quantize_nf4(gaussian(*shape), block, double)
            found += calls_with_weight(w, f"{shape}-{'double' if double else 'plain'}")
    return found


def calls_with_weight(w: minilora.NF4Weight, label: str) -> list[Any]:
    O, I = w.shape
    found = [
        case("dequantize", (*parts(w), dtype), f"{label}-{dtype}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    for rows in ((1,), (2, 3), (0,), ()):
        x, dy = gaussian(*rows, I), gaussian(*rows, O)
        z, B = gaussian(*rows, 3), gaussian(O, 3)
        u, A = gaussian(*rows, 3), gaussian(3, I)
        for bias in (None, gaussian(O)):
            tail = f"{label}-{rows}{'' if bias is None else '-bias'}"
            found.append(case("nf4_linear", (x, *parts(w), bias), tail))
            found.append(case("nf4_lora_linear", (x, *parts(w), bias, z, B, 1.5), tail))
            found.append(case("nf4_inference", (x, *parts(w), bias, A, B, 1.5), tail))

        tail = f"{label}-{rows}"
        found.append(case("nf4_linear_backward", (dy, *parts(w)), tail))
        found.append(case("nf4_lora_linear_backward", (dy, *parts(w), u, A, 1.5), tail))
    return found


def test_these_are_all_the_operators() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name for name in registered if name.startswith("minilora::")}
    # Subpackages have operators of their own.
    others = {"minilora::linear_cross_entropy"}
    assert ours - others == {f"minilora::{name}" for name in NAMES}


@pytest.mark.parametrize(("op", "args"), calls())
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("kind", ["transposed", "expanded", "strided"])
def test_fakes_of_the_products_promise_what_the_kernels_return_for_any_strides(
    dtype: torch.dtype, kind: str
) -> None:
    def rows(width: int) -> Tensor:
        x = gaussian(4, 6, width, dtype=dtype)
        layouts = {
            "transposed": x.transpose(0, 1),
            "expanded": x[:1, :1].expand(4, 6, width),
            "strided": x[:, ::2, :],
        }
        return layouts[kind]

    for shape in ((33, 128), (10, 70)):
        w = minilora.quantize_nf4(gaussian(*shape, dtype=dtype))
        forward = (ops.nf4_linear, rows(shape[1]), (None,))
        backward = (ops.nf4_linear_backward, rows(shape[0]), ())
        for op, x, bias in (forward, backward):
            real = op(x, w, *bias)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = op(mode.from_tensor(x), w, *bias)
            assert (fake.dtype, fake.shape) == (real.dtype, real.shape)
            assert fake.stride() == real.stride()


def test_fakes_work_on_the_meta_device() -> None:
    w = minilora.quantize_nf4(gaussian(33, 128)).to("meta")
    x = torch.empty(2, 128, device="meta", dtype=torch.bfloat16)
    y = ops.nf4_linear(x, w, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 33), torch.bfloat16, "meta")
    dense = w.dequantize(torch.float16)
    assert (dense.shape, dense.device.type) == ((33, 128), "meta")

    packed, absmax = ops.quantize(torch.empty(5, 13, device="meta"), 32)
    assert (packed.shape, packed.dtype) == ((33,), torch.uint8)
    assert (absmax.shape, absmax.dtype) == ((3,), torch.float32)

    codes, absmax2, offset = ops.double_quantize(torch.empty(257, device="meta"))
    assert (codes.shape, codes.dtype) == ((257,), torch.uint8)
    assert (absmax2.shape, offset.shape) == ((2,), ())
    assert ops.double_dequantize(codes, absmax2, offset).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_has_a_kernel_of_its_own_and_other_devices_the_reference(name: str) -> None:
    has: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"minilora::{name}", "CPU")
    assert has(f"minilora::{name}", "CompositeExplicitAutograd")
    for key in ("XPU", "MPS", "AutogradCPU", "CompositeImplicitAutograd"):
        assert not has(f"minilora::{name}", key)


# The next three run in a process of their own: what counts is what they import first.


def dispatch() -> None:
    import sys

    import torch

    import minilora
    from minilora import ops

    def backends() -> set[str]:
        """The fast backends that are loaded. (Merging imports the reference, which is light.)"""
        kernels = [name for name in sys.modules if name.startswith("minilora.kernels.")]
        return {name.split(".")[2] for name in kernels} - {"reference"}

    heavy = {"numba", "triton"} & sys.modules.keys()
    assert not backends() and not heavy, "a kernel was imported before its first call"
    x = torch.arange(-64.0, 64.0)

    # A device without a backend of its own, its tensors on the CPU.
    other = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    packed, absmax = ops.quantize.redispatch(other, x, 64)
    parts = packed, absmax, None, None, [2, 64], 64, "nf4"
    product = torch.ops.minilora.nf4_linear.default
    dequantize = torch.ops.minilora.dequantize.default
    y = product.redispatch(other, x.view(2, 64), *parts, None)
    dense = dequantize.redispatch(other, *parts, torch.float32)
    assert torch.equal(y, x.view(2, 64) @ dense.T)
    assert not backends(), backends()

    w = minilora.quantize_nf4(x, double_quant=False)
    assert backends() == {"cpu"}
    assert torch.equal(w.packed, packed)

    # CPU tensors, handed to the GPU's backend: it refuses them by name.
    gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        ops.quantize.redispatch(gpu, x, 64)
    except ValueError as error:
        assert "x is on cpu: a Triton kernel runs on a GPU" in str(error)
    else:
        raise AssertionError("a CPU tensor was launched")
    assert backends() == {"cpu", "gpu"}


def odd_defaults() -> None:
    import torch

    x = torch.linspace(-1, 1, 4096)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        import minilora
        from minilora.kernels.gpu import nf4
        from minilora.kernels.reference import codebooks
        from minilora.kernels.reference import nf4 as reference

        w = minilora.quantize_nf4(x)
    torch.set_default_dtype(torch.float32)
    assert nf4._TINY_BITS.value == torch.tensor(reference.TINY).view(torch.int32).item()
    assert torch.equal(codebooks.levels("nf4"), torch.tensor(codebooks.NF4))
    assert torch.equal(codebooks.MAP8, codebooks.derive_map8())
    again = minilora.quantize_nf4(x)
    assert all(torch.equal(a, b) for a, b in zip(w.tensors, again.tensors, strict=True))

    # Half of the widest step between levels.
    assert (w.dequantize() - x).abs().max() < 0.16


def without_triton() -> None:
    import sys

    import torch

    from minilora import ops

    sys.modules["triton"] = None
    gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    message = "NF4 on a GPU runs through Triton, which is not installed: pip install triton"

    # Not only the first time.
    for _ in range(2):
        try:
            ops.quantize.redispatch(gpu, torch.ones(64), 64)
        except ImportError as error:
            assert str(error) == message
        else:
            raise AssertionError("something else ran in Triton's place")


def test_a_kernel_is_imported_at_its_first_call_and_from_the_devices_backend() -> None:
    in_a_process_of_its_own(dispatch)


def test_tables_do_not_depend_on_the_default_dtype_and_device_at_import() -> None:
    in_a_process_of_its_own(odd_defaults)


def test_a_gpu_tensor_without_triton_gets_one_clear_error_and_nothing_else() -> None:
    in_a_process_of_its_own(without_triton)


def in_a_process_of_its_own(body: Callable[[], None]) -> None:
    source = f"{inspect.getsource(body)}\n{body.__name__}()"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(33, 128), (10, 70)], ids=str)
def test_under_autocast_an_operator_returns_its_inputs_dtype_and_bits(
    rows: int, shape: tuple[int, int]
) -> None:
    w = minilora.quantize_nf4(gaussian(*shape))
    x, dy, bias = gaussian(rows, shape[1]), gaussian(rows, shape[0]), gaussian(shape[0])

    def results() -> list[Tensor]:
        products = [ops.nf4_linear(x, w, bias), ops.nf4_linear_backward(dy, w)]
        return [*products, w.dequantize(torch.float32), *ops.quantize(x, 64)]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
