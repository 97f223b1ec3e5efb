"""The operators `torch.ops.minilora.*`: opcheck of each, fakes that tell the truth, the dispatcher's choice, and autocast."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import minilora
from minilora import ops

NAMES = (
    "quantize",
    "double_quantize",
    "double_dequantize",
    "dequantize",
    "nf4_linear",
    "nf4_linear_backward",
    "nf4_lora_linear",
    "nf4_lora_linear_backward",
)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calls() -> list[Any]:
    """Every operator with arguments of every kind, as pytest parameters (operator, arguments)."""
    absmax = gaussian(300).abs()
    found = [
        pytest.param(ops.double_quantize, (absmax,), id="double_quantize"),
        pytest.param(
            ops.double_dequantize, tuple(ops.double_quantize(absmax)), id="double_dequantize"
        ),
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found.append(
            pytest.param(ops.quantize, (gaussian(3, 43, dtype=dtype), 64), id=f"quantize-{dtype}")
        )
    for double in (False, True):
        for shape, block in (
            ((33, 128), 64),
            ((5, 70), 32),
        ):  # the blocks of the second cross its rows
            w = minilora.quantize_nf4(gaussian(*shape), block, double)
            name = f"{shape}-{'double' if double else 'plain'}"
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                args = (*w.tensors, list(shape), dtype, block)
                found.append(pytest.param(ops.dequantize, args, id=f"dequantize-{name}-{dtype}"))
            for rows in ((1,), (2, 3), (0,), ()):
                x, dy = gaussian(*rows, shape[1]), gaussian(*rows, shape[0])
                for bias in (None, gaussian(shape[0])):
                    args = (x, *w.tensors, bias, list(shape), block)
                    tail = f"{name}-{rows}{'' if bias is None else '-bias'}"
                    found.append(pytest.param(ops.nf4_linear, args, id=f"nf4_linear-{tail}"))
                    z, B = gaussian(*rows, 3), gaussian(shape[0], 3)
                    args = (x, *w.tensors, bias, z, B, 1.5, list(shape), block)
                    found.append(
                        pytest.param(ops.nf4_lora_linear, args, id=f"nf4_lora_linear-{tail}")
                    )
                args = (dy, *w.tensors, list(shape), block)
                found.append(
                    pytest.param(
                        ops.nf4_linear_backward, args, id=f"nf4_linear_backward-{name}-{rows}"
                    )
                )
                args = (
                    dy,
                    *w.tensors,
                    gaussian(*rows, 3),
                    gaussian(3, shape[1]),
                    1.5,
                    list(shape),
                    block,
                )
                found.append(
                    pytest.param(
                        ops.nf4_lora_linear_backward,
                        args,
                        id=f"nf4_lora_linear_backward-{name}-{rows}",
                    )
                )
    return found


def test_these_are_all_the_operators() -> None:
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("minilora::")
    }
    assert registered == {f"minilora::{name}" for name in NAMES}


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
        for op, x, bias in (
            (ops.nf4_linear, rows(shape[1]), (None,)),
            (ops.nf4_linear_backward, rows(shape[0]), ()),
        ):
            real = op(x, *w.tensors, *bias, shape, 64)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = op(mode.from_tensor(x), *w.tensors, *bias, shape, 64)
            assert (fake.dtype, fake.shape, fake.stride()) == (
                real.dtype,
                real.shape,
                real.stride(),
            )


def test_fakes_work_on_the_meta_device() -> None:
    w = minilora.quantize_nf4(gaussian(33, 128)).to("meta")
    y = ops.nf4_linear(
        torch.empty(2, 128, device="meta", dtype=torch.bfloat16), *w.tensors, None, w.shape, 64
    )
    assert (y.shape, y.dtype, y.device.type) == ((2, 33), torch.bfloat16, "meta")
    assert w.dequantize(torch.float16).shape == (33, 128) and w.dequantize(torch.float16).is_meta
    packed, absmax = ops.quantize(torch.empty(5, 13, device="meta"), 32)
    assert (packed.shape, packed.dtype, absmax.shape, absmax.dtype) == (
        (33,),
        torch.uint8,
        (3,),
        torch.float32,
    )
    codes, absmax2, offset = ops.double_quantize(torch.empty(257, device="meta"))
    assert (codes.shape, codes.dtype, absmax2.shape, offset.shape) == (
        (257,),
        torch.uint8,
        (2,),
        (),
    )
    assert ops.double_dequantize(codes, absmax2, offset).dtype == torch.float32


# ---- dispatch


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_has_a_kernel_of_its_own_and_other_devices_the_reference(name: str) -> None:
    has: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"minilora::{name}", "CPU")
    assert has(f"minilora::{name}", "CompositeExplicitAutograd")
    assert not any(
        has(f"minilora::{name}", key)
        for key in ("XPU", "MPS", "AutogradCPU", "CompositeImplicitAutograd")
    )


def dispatch() -> None:
    import sys

    import torch

    import minilora
    from minilora import ops

    def rooms() -> set[str]:
        """The fast twins that are loaded; the reference is what merging computes with, and light."""
        return {
            name.split(".")[2] for name in sys.modules if name.startswith("minilora.kernels.")
        } - {"reference"}

    heavy = {"numba", "triton"} & sys.modules.keys()
    assert not rooms() and not heavy, "a kernel was imported before its first call"
    x = torch.arange(-64.0, 64.0)
    other = torch._C.DispatchKeySet(
        torch._C.DispatchKey.XPU
    )  # a device without a room of its own, its tensors on the CPU
    packed, absmax = ops.quantize.redispatch(other, x, 64)
    shape = [2, 64]
    y = ops.nf4_linear.redispatch(other, x.view(2, 64), packed, absmax, None, None, None, shape, 64)
    dense = ops.dequantize.redispatch(other, packed, absmax, None, None, shape, torch.float32, 64)
    assert torch.equal(y, x.view(2, 64) @ dense.T)
    assert not rooms(), rooms()
    w = minilora.quantize_nf4(x, double_quant=False)
    assert rooms() == {"cpu"} and torch.equal(w.packed, packed)
    gpu = torch._C.DispatchKeySet(
        torch._C.DispatchKey.CUDA
    )  # CPU tensors, handed to the GPU's room: it refuses them by name
    try:
        ops.quantize.redispatch(gpu, x, 64)
    except ValueError as error:
        assert "x is on cpu: a Triton kernel runs on a GPU" in str(error)
    else:
        raise AssertionError("a CPU tensor was launched")
    assert rooms() == {"cpu", "gpu"}


def odd_defaults() -> None:
    import torch

    x = torch.linspace(-1, 1, 4096)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        import minilora
        from minilora.kernels.gpu import nf4
        from minilora.kernels.reference import nf4 as reference

        w = minilora.quantize_nf4(x)
    torch.set_default_dtype(torch.float32)
    assert nf4._TINY_BITS.value == torch.tensor(reference.TINY).view(torch.int32).item()
    published = torch.tensor(reference.NF4)
    assert torch.equal(reference.CODE, published) and torch.equal(
        reference.MAP8, reference.derive_map8()
    )
    again = minilora.quantize_nf4(x)
    assert all(torch.equal(a, b) for a, b in zip(w.tensors, again.tensors, strict=True))
    assert (w.dequantize() - x).abs().max() < 0.16  # half of the widest step between levels


def without_triton() -> None:
    import sys

    import torch

    from minilora import ops

    sys.modules["triton"] = None
    gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for _ in range(2):  # not only the first time
        try:
            ops.quantize.redispatch(gpu, torch.ones(64), 64)
        except ImportError as error:
            assert (
                str(error)
                == "NF4 on a GPU runs through Triton, which is not installed: pip install triton"
            )
        else:
            raise AssertionError("something else ran in Triton's place")


def test_a_kernel_is_imported_at_its_first_call_and_from_the_devices_room() -> None:
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


# ---- autocast


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(33, 128), (10, 70)], ids=str)
def test_under_autocast_an_operator_returns_its_inputs_dtype_and_bits(
    rows: int, shape: tuple[int, int]
) -> None:
    w = minilora.quantize_nf4(gaussian(*shape))
    x, dy, bias = gaussian(rows, shape[1]), gaussian(rows, shape[0]), gaussian(shape[0])

    def results() -> list[Tensor]:
        y = ops.nf4_linear(x, *w.tensors, bias, shape, 64)
        return [
            y,
            ops.nf4_linear_backward(dy, *w.tensors, shape, 64),
            w.dequantize(torch.float32),
            *ops.quantize(x, 64),
        ]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
