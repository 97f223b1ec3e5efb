"""Kernels written by hand for the tests of the PTX emulator: a head, and statements behind it."""

import pytest
import torch
from ptx_machine import KernelError, Machine
from ptx_program import parse
from torch import Tensor

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 16 kernel_param_1,
    .param .u32 kernel_param_2
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<60>;
    .reg .b64 %rd<9>;
    .loc 1 2 3
$L__func_begin0:
    ld.param.b64 %rd1, [kernel_param_0];   // input
    ld.param.b64 %rd2, [kernel_param_1];   // output
    ld.param.b32 %r1, [kernel_param_2];
    mov.u32 %r2, %tid.x;
    mad.wide.u32 %rd3, %r2, 4, %rd1;
    mad.wide.u32 %rd4, %r2, 4, %rd2;
    shl.b32 %r3, %r2, 2;
"""
THREADS = 64


def execute(
    text: str,
    source: Tensor | None = None,
    n: int = 0,
    grid: tuple[int, ...] = (1,),
    size: int = 64,
) -> tuple[Tensor, Machine]:
    """Runs statements behind HEAD; returns the output, int32 [size], and the machine.

    %rd1 and %rd2 point to input and output, %rd3 and %rd4 to the thread's element of them; %r1 is
    n, %r2 the thread, %r3 four times it.
    """
    source = torch.arange(THREADS, dtype=torch.int32) if source is None else source
    out = torch.full((size,), -1, dtype=torch.int32)
    program = parse(HEAD + text + "\n    ret;\n}\n.section .debug_str { .b8 0 }\n")
    arguments: list[int | float] = [source.data_ptr(), out.data_ptr(), n]
    machine = Machine(program, arguments, [source, out], shared=1024)
    machine.run(grid)
    return out, machine


def refusal(text: str, grid: tuple[int, ...] = (1,)) -> str:
    """The message of the error that statements end in."""
    with pytest.raises(KernelError) as error:
        execute(text, grid=grid)
    return str(error.value)
