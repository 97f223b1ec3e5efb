"""What the PTX emulator does with the threads of a warp together, against plain PyTorch."""

import pytest
import torch
from ptx_by_hand import THREADS, execute


def test_shuffles() -> None:
    text = "shfl.sync.{} %r4, %r2, {}, {}, -1; st.global.b32 [%rd4], {{%r4}};"
    threads = range(THREADS)

    def shuffled(mode: str, by: int, clamp: int) -> list[int]:
        return execute(text.format(mode, by, clamp))[0].tolist()

    assert shuffled("bfly.b32", 5, 31) == [i ^ 5 for i in threads]
    assert shuffled("idx.b32", 3, 31) == [i // 32 * 32 + 3 for i in threads]
    assert shuffled("down.b32", 30, 31) == [i + 30 if i % 32 < 2 else i for i in threads]
    assert shuffled("up.b32", 30, 0) == [i - 30 if i % 32 >= 30 else i for i in threads]
    # In segments of 8 lanes; who would read beyond its own keeps what it has.
    assert shuffled("bfly.b32", 8, 0x181F) == [i ^ 8 if i & 8 else i for i in threads]


def test_redux() -> None:
    out, _ = execute("redux.sync.add.s32 %r4, %r2, 0xffffffff; st.global.b32 [%rd4], {%r4};")
    assert out.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_elements(transposed: bool) -> None:
    matrices = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    name = "ldmatrix.sync.aligned.m8n8.x4" + (".trans" if transposed else "") + ".shared.b16"
    text = f"""
        ld.global.b32 {{%r4}}, [%rd3]; st.shared.b32 [%r3], {{%r4}};
        ld.global.b32 {{%r4}}, [%rd3+256]; st.shared.b32 [%r3+256], {{%r4}}; bar.sync 0;
        and.b32 %r5, %r2, 31; shl.b32 %r5, %r5, 4;
        {name} {{%r10, %r11, %r12, %r13}}, [%r5];
        mad.wide.u32 %rd5, %r2, 16, %rd2;
        st.global.v4.b32 [%rd5], {{%r10, %r11, %r12, %r13}};
    """
    out, machine = execute(text, matrices.view(torch.int32).flatten(), size=256)
    found = out.view(torch.int16).view(THREADS, 4, 2)
    given = matrices.transpose(1, 2) if transposed else matrices
    for lane in range(THREADS):
        for i in range(4):
            row, column = lane % 32 // 4, 2 * (lane % 4)
            assert found[lane, i].tolist() == given[i, row, column : column + 2].tolist()
    assert machine.counts["shared load wavefronts"] == 8, "four matrices, two warps"


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_way_back(transposed: bool) -> None:
    end = ".trans.shared.b16" if transposed else ".shared.b16"
    text = f"""
        mad.wide.u32 %rd5, %r2, 16, %rd1; ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd5];
        and.b32 %r5, %r2, 32; shl.b32 %r5, %r5, 4; and.b32 %r6, %r2, 31; shl.b32 %r6, %r6, 4;
        add.s32 %r5, %r5, %r6;
        stmatrix.sync.aligned.m8n8.x4{end} [%r5], {{%r10, %r11, %r12, %r13}};
        ldmatrix.sync.aligned.m8n8.x4{end} {{%r20, %r21, %r22, %r23}}, [%r5];
        mad.wide.u32 %rd5, %r2, 16, %rd2; st.global.v4.b32 [%rd5], {{%r20, %r21, %r22, %r23}};
    """
    registers = torch.randint(0, 2**31 - 1, (256,), dtype=torch.int32)
    out, _ = execute(text, registers, size=256)
    assert torch.equal(out, registers)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_is_a_product(dtype: torch.dtype, depth: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    A = torch.randn(16, depth, generator=generator).to(dtype)
    B = torch.randn(depth, 8, generator=generator).to(dtype)
    C = torch.randn(16, 8, generator=generator)

    # As the PTX ISA lays the matrices out: lane 4g + t has rows g and g + 8 of A and C.
    a, b, c = (torch.zeros(32, n, dtype=torch.int32) for n in (depth // 4, depth // 8, 4))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(depth // 4):
            pair = A[g + 8 * (i % 2), 2 * t + 8 * (i // 2) :][:2]
            a[lane, i] = pair.contiguous().view(torch.int32)
        for i in range(depth // 8):
            b[lane, i] = B[2 * t + 8 * i :][:2, g].contiguous().view(torch.int32)
        for i in range(4):
            c[lane, i] = C[g + 8 * (i // 2), 2 * t + i % 2].view(torch.int32)

    registers = torch.cat([a, b, c], 1)
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    count = registers.shape[1]
    names = [f"%r{10 + i}" for i in range(count)]
    loads = "\n".join(f"ld.global.b32 {{{name}}}, [%rd5+{4 * i}];" for i, name in enumerate(names))
    operands = [names[: depth // 4], names[depth // 4 : -4], names[-4:]]
    vectors = ", ".join("{" + ", ".join(part) + "}" for part in operands)
    text = f"""
        and.b32 %r5, %r2, 31; mad.wide.u32 %rd5, %r5, {4 * count}, %rd1; {loads}
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32
            {{%r40, %r41, %r42, %r43}}, {vectors};
        mad.wide.u32 %rd5, %r2, 16, %rd2;
        st.global.v4.b32 [%rd5], {{%r40, %r41, %r42, %r43}};
    """
    out, _ = execute(text, registers, size=256)
    found = out.view(torch.float32).view(2, 32, 4)

    D = (A.double() @ B.double() + C.double()).float()
    for lane in range(32):
        g, t = divmod(lane, 4)
        expected = [D[g + 8 * (i // 2), 2 * t + i % 2].item() for i in range(4)]
        assert found[0, lane].tolist() == expected == found[1, lane].tolist()
