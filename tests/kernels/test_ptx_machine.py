"""The PTX emulator on kernels written by hand: what it computes, counts and refuses."""

import numpy as np
import pytest
import torch
from ptx_by_hand import HEAD, THREADS, execute, refusal
from ptx_machine import KernelError
from ptx_program import parse, parse_body
from ptx_shared import wavefronts


def test_a_program_is_read() -> None:
    program = parse(HEAD + "$L__BB0_1: add.s32 %r4, %r2, 1; @!%p1 bra $L__BB0_1; ret; }")
    assert program.name == "kernel" and program.threads == 64
    assert list(program.parameters.values()) == ["u64", "u64", "u32"]
    *_, branch, _ = program.body.instructions
    assert branch.name == "bra" and branch.guard == ("%p1", True)
    names = [instruction.name for instruction in program.body.instructions]
    assert program.body.labels["$L__BB0_1"] == names.index("add.s32")


def test_registers_of_blocks_get_names_of_their_own() -> None:
    body = parse_body(".reg .b32 %r<4>; {.reg .b64 a; mov.b64 a, 1;} {.reg .b16 a; mov.b16 a, 2;}")
    first, second = (instruction.operands[0] for instruction in body.instructions)
    assert first != second
    assert (body.width(first), body.width(second), body.width("%r3")) == (8, 2, 4)


def test_a_loop_runs_as_often_as_it_says() -> None:
    loop = """
        mov.b32 %r4, 0; mov.b32 %r5, 0;
    $L__BB0_1:
        add.s32 %r5, %r5, %r2; add.s32 %r4, %r4, 1;
        setp.lt.s32 %p1, %r4, %r1;
        @%p1 bra $L__BB0_1;
        st.global.b32 [%rd4+0], {%r5};
    """
    out, machine = execute(loop, n=5)
    assert out.tolist() == [5 * i for i in range(THREADS)]
    assert machine.counts["setp.lt.s32"] == 10, "five times, two warps"


def test_a_guard_keeps_the_other_threads_as_they_were() -> None:
    out, _ = execute("""
        setp.lt.u32 %p1, %r2, 3; mov.b32 %r4, 7; @%p1 mov.b32 %r4, 9;
        @!%p1 st.global.b32 [%rd4], {%r4};
        @%p1 st.global.b32 [%rd4], {%r2};
    """)
    assert out.tolist() == [0, 1, 2] + [7] * 61


def test_every_cta_has_its_place() -> None:
    out, _ = execute(
        """
        mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y;
        mad.lo.s32 %r6, %r5, 2, %r4; setp.eq.s32 %p1, %r2, %r6;
        mov.u32 %r7, %nctaid.x; shl.b32 %r8, %r6, 8; or.b32 %r8, %r8, %r7;
        @%p1 st.global.b32 [%rd4], {%r8};
        """,
        grid=(2, 3),
    )
    assert out.tolist() == [i << 8 | 2 for i in range(6)] + [-1] * 58


def test_loads_have_every_width() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(torch.int32)
    out, _ = execute(
        """
        mad.wide.u32 %rd5, %r2, 1, %rd1;
        ld.global.nc.L1::evict_first.b8 {%rs1}, [%rd5+64];
        cvt.u32.u16 %r4, %rs1;
        st.global.b32 [%rd4], {%r4};
        """,
        data,
    )
    assert out.tolist() == list(range(64, 128))

    vector = """
        shr.u32 %r4, %r2, 2; mad.wide.u32 %rd5, %r4, 16, %rd1;
        ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd5];
        add.s32 %r14, %r10, %r13; st.global.b32 [%rd4], {%r14};
    """
    out, machine = execute(vector)
    assert out.tolist() == [8 * (i // 4) + 3 for i in range(THREADS)]
    assert machine.counts["global load sectors"] == 8, "256 bytes"
    assert machine.counts["global load requests"] == 2


def test_a_divergent_branch_is_refused() -> None:
    text = "setp.lt.u32 %p1, %r2, 3; @%p1 bra $L__end; mov.b32 %r4, 0; $L__end:"
    assert refusal(text).startswith("divergent branch: @%p1 bra $L__end (CTA (0, 0, 0), kernel)")


def test_a_misaligned_access_is_refused() -> None:
    assert refusal("ld.global.b32 {%r4}, [%rd3+2];").startswith(
        "misaligned global access of 4 bytes: ld.global.b32 {%r4}, [%rd3+2] (CTA (0, 0, 0)"
    )
    assert "misaligned shared access" in refusal("st.shared.v2.b32 [%r3], {%r2, %r2};")


@pytest.mark.parametrize(
    "access", ["ld.global.b32 {%r4}, [%rd3+4]", "st.global.b32 [%rd4+-4], {%r2}"]
)
def test_an_access_out_of_bounds_is_refused_with_its_cta(access: str) -> None:
    guarded = f"mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 2; @%p1 {access};"
    message = refusal(guarded, grid=(3,))
    assert message.startswith("global access out of bounds: 4 bytes at byte")
    assert f"@%p1 {access} (CTA (2, 0, 0)" in message


def test_an_access_that_is_partly_out_of_bounds_is_refused() -> None:
    execute("ld.global.b32 {%r4}, [%rd3];", torch.zeros(256, dtype=torch.uint8))
    with pytest.raises(KernelError, match="4 bytes at byte 252 of uint8 255, thread 63"):
        execute("ld.global.b32 {%r4}, [%rd3];", torch.zeros(255, dtype=torch.uint8))


def test_gaps_between_rows_are_out_of_bounds() -> None:
    rows = torch.zeros(4, 20, dtype=torch.int32)[:, :16]
    execute("setp.lt.u32 %p1, %r2, 16; @%p1 ld.global.b32 {%r4}, [%rd3];", rows)
    with pytest.raises(KernelError, match="out of bounds"):
        execute("setp.lt.u32 %p1, %r2, 17; @%p1 ld.global.b32 {%r4}, [%rd3];", rows)


def test_two_values_at_one_address_are_refused() -> None:
    execute("mov.b32 %r4, 3; st.global.b32 [%rd2], {%r4};")
    assert "two stores of different values" in refusal("st.global.b32 [%rd2], {%r2};")
    later = "mov.u32 %r4, %ctaid.x; setp.eq.s32 %p1, %r2, 0; @%p1 st.global.b32 [%rd2], {%r4};"
    assert "(CTA (1, 0, 0)" in refusal(later, grid=(2,))


def test_what_a_launch_stores_it_may_not_load() -> None:
    message = refusal("st.global.b32 [%rd4], {%r2}; ld.global.b32 {%r4}, [%rd4];")
    assert message.startswith("load of a global address that this launch stores to: ld.global.b32")


def test_a_register_and_shared_memory_that_were_never_written_are_refused() -> None:
    assert "'%r9' is read before it is written: add.s32" in refusal("add.s32 %r4, %r9, 1;")
    message = refusal("st.shared.b32 [%r3], {%r2}; ld.shared.b32 {%r4}, [%r3+4];")
    assert message.startswith("shared memory is read before it is written: ld.shared.b32")
    assert "out of bounds" in refusal("st.shared.b32 [%r3+1000], {%r2};")


# Each thread reads what the thread of the other warp has stored.
EXCHANGE = """
    mov.b32 %r4, global_smem; add.s32 %r5, %r4, %r3; xor.b32 %r6, %r5, 128;
    st.shared.b32 [%r5], {%r2};
    bar.sync 0;
    ld.shared.b32 {%r7}, [%r6];
    bar.sync 0;
    st.shared.b32 [%r5], {%r7};
    st.global.b32 [%rd4], {%r7};
"""


def test_barriers_order_what_warps_do() -> None:
    out, machine = execute(EXCHANGE)
    assert out.tolist() == [i ^ 32 for i in range(THREADS)]
    assert machine.counts["bar.sync"] == 4
    assert machine.counts["shared store wavefronts"] == 4


@pytest.mark.parametrize(("which", "message"), [(0, "read of what"), (1, "write of what")])
def test_a_missing_barrier_is_a_race(which: int, message: str) -> None:
    parts = EXCHANGE.split("bar.sync 0;")
    parts[which : which + 2] = [parts[which] + parts[which + 1]]
    assert f"race in shared memory: {message}" in refusal("bar.sync 0;".join(parts))


def test_two_warps_that_write_the_same_bytes_race() -> None:
    both = "and.b32 %r5, %r3, 127; and.b32 %r6, %r2, 31; setp.lt.u32 %p1, %r2, 32;"
    one_by_one = "@%p1 st.shared.b32 [%r5], {%r6}; @!%p1 st.shared.b32 [%r5], {%r6};"
    message = refusal(both + one_by_one)
    assert message.startswith("race in shared memory: two warps write the same bytes: @!%p1")


def test_warps_may_write_the_same_in_one_instruction() -> None:
    both = "and.b32 %r5, %r3, 127; and.b32 %r6, %r2, 31;"
    load = "bar.sync 0; ld.shared.b32 {%r7}, [%r5]; st.global.b32 [%rd4], {%r7};"
    out, _ = execute(both + "st.shared.b32 [%r5], {%r6};" + load)
    assert out.tolist() == 2 * list(range(32))

    different = both + "st.shared.b32 [%r5], {%r2};"
    assert "two threads write different values to the same shared bytes" in refusal(different)
    assert "race in shared memory: read of what" in refusal(
        both + "st.shared.b32 [%r5], {%r6}; ld.shared.b32 {%r7}, [%r5];"
    )


COPY = """
    cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, %r8;
    cp.async.commit_group ;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r6, %r3, 128; ld.shared.b32 {%r7}, [%r6];
    st.global.b32 [%rd4], {%r7};
"""
ALL_BYTES = "mov.b32 %r8, 4;"


def test_an_asynchronous_copy_lands_at_its_wait() -> None:
    out, machine = execute(ALL_BYTES + COPY)
    assert out.tolist() == [i ^ 32 for i in range(THREADS)]
    assert machine.counts["shared cp.async wavefronts"] == 2
    odd = "and.b32 %r8, %r2, 1; shl.b32 %r8, %r8, 2;"
    out, _ = execute(odd + COPY)
    assert out.tolist() == [i ^ 32 if i % 2 else 0 for i in range(THREADS)]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("cp.async.wait_group 0;", "before it is written"),
        ("cp.async.commit_group ;", "before it is written"),
        ("bar.sync 0;", "race in shared memory: read of what"),
    ],
)
def test_what_an_asynchronous_copy_needs(removed: str, message: str) -> None:
    assert message in refusal(ALL_BYTES + COPY.replace(removed, ""))


def test_other_warps_need_a_barrier_after_the_wait() -> None:
    barrier, wait = "bar.sync 0;", "cp.async.wait_group 0;"
    early = COPY.replace(barrier, "").replace(wait, barrier + wait)
    assert "race in shared memory: read of what" in refusal(ALL_BYTES + early)


def test_bytes_in_flight_are_not_to_be_touched() -> None:
    # The bytes were written before, so that reading them is not what is wrong.
    before = "st.shared.b32 [%r3], {%r2}; bar.sync 0;"
    early = COPY.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;")
    message = "a cp.async may still be writing: ld.shared.b32"
    assert message in refusal(before + ALL_BYTES + early)
    second = COPY.splitlines()[1]
    assert "may still be writing: cp.async" in refusal(ALL_BYTES + second + second)


def test_banks_are_counted() -> None:
    lanes, everyone = np.arange(32, dtype=np.uint64), np.ones(32, np.bool_)
    assert wavefronts(4 * lanes, 4, everyone) == 1
    assert wavefronts(128 * lanes, 4, everyone) == 32
    assert wavefronts(8 * lanes, 4, everyone) == 2
    assert wavefronts(0 * lanes, 4, everyone) == 1, "one word for all"
    assert wavefronts(2 * lanes, 2, everyone) == 1
    assert wavefronts(8 * lanes, 8, everyone) == 2
    assert wavefronts(16 * lanes, 16, everyone) == 4
    assert wavefronts(128 * lanes, 16, everyone) == 32
    assert wavefronts(0 * lanes, 16, everyone) == 4, "a quarter of a warp at a time"
    assert wavefronts(128 * lanes, 4, lanes < 5) == 5


def test_an_endless_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx_machine.MOST_STEPS", 100)
    assert "endless loop: bra.uni $L__a" in refusal("$L__a: bra.uni $L__a;")


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"atom\.global\.add\.u32"):
        execute("atom.global.add.u32 %r4, [%rd3], 1;")
    with pytest.raises(NotImplementedError, match="some of the warps"):
        execute("bar.sync 1, 32;")
