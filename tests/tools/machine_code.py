"""Describes what the compiler made of a kernel: loops, copies, registers, memory.

Three stages of a compiled kernel are read: Triton's own TTGIR (what is copied ahead, and how many
copies a loop waits for), PTX, and the machine code, which is SASS on NVIDIA.
"""

import math
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# A product on tensor cores, up to sm_89 and on sm_120, on sm_90, and on sm_100.
_PRODUCT = re.compile(r"tt\.dot |ttng\.warp_group_dot |ttng\.tc_gen5_mma")

# Shared memory of [buffers, rows, words of a row].
_WORDS = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+xi32,")


# An asynchronous copy of words or floats: the sizes of the tile.
_COPY = re.compile(r"ttg\.async_copy_global_to_local .* : tensor<([0-9x]+)x!tt\.ptr<[if]32>")


class Pipeline(NamedTuple):
    """What the main loop of a product copies ahead.

    in_flight: the copies that are still under way after a wait, at least; None without a wait
    buffers: how many steps of packed words have room in shared memory; 0 where none have
    narrow: words and floats that are copied one by one in an iteration, 4 bytes each
    """

    in_flight: int | None
    buffers: int
    narrow: int


def pipeline(ttgir: str) -> Pipeline:
    """Reads the pipeline of the longest loop that has a product."""
    body = max(filter(_PRODUCT.search, _loops_of_ttgir(ttgir)), key=len, default="")
    waits = re.findall(r"ttg\.async_wait.*\{num = (\d+) : i32\}", body)
    buffers = _WORDS.findall(ttgir)
    return Pipeline(
        in_flight=min(map(int, waits), default=None),
        buffers=min(map(int, buffers), default=0),
        narrow=sum(map(_copied_one_by_one, body.split("\n"))),
    )


def _copied_one_by_one(line: str) -> int:
    copy = _COPY.search(line)
    if not copy or re.search(r"contiguity = (?!1 )\d", line):
        return 0
    return math.prod(map(int, copy[1].split("x")))


def _loops_of_ttgir(ttgir: str) -> list[str]:
    """The text of every scf.for, up to the brace that is indented as it is."""
    return [m[0] for m in re.finditer(r"^( *)[^\n]*scf\.for .*?^\1\}", ttgir, re.M | re.S)]


class Sass(NamedTuple):
    """A kernel's instructions (address, name, operands) without padding, and what it occupies."""

    lines: list[tuple[int, str, str]]
    stack: int
    registers: int


def sass(cubin: bytes) -> Sass:
    """Disassembles one kernel."""
    with _file(cubin) as path:
        return _with_usage(cubin, _instructions(_run("cuobjdump", "-sass", path)))


def sass_of_all(cubins: list[bytes], architecture: str) -> list[Sass]:
    """Disassembles kernels for the same architecture, as "sm_90a".

    The disassembler takes a third of a second to start, so it gets the instructions of all of them
    one after the other.
    """
    codes = [_code(cubin) for cubin in cubins]
    with _file(b"".join(codes)) as path:
        kind = architecture.upper().replace("_", "").replace("A", "a")
        lines = iter(_instructions(_run("nvdisasm", "--binary", kind, path)))

    found, start = [], 0
    for cubin, code in zip(cubins, codes, strict=True):
        own = [next(lines) for _ in range(len(code) // _INSTRUCTION)]
        found.append(_with_usage(cubin, [_moved(line, start) for line in own]))
        start += len(code)
    return found


# Bytes.
_INSTRUCTION = 16


def _code(cubin: bytes) -> bytes:
    """The section with instructions of an ELF file of 64 bits that holds one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    (count,) = struct.unpack_from("<H", cubin, 0x3C)
    sections = [struct.unpack_from("<2I4Q2I2Q", cubin, table + 64 * i) for i in range(count)]
    (code,) = (s for s in sections if s[2] & 0x4)
    offset, size = code[4:6]
    return cubin[offset : offset + size]


def _moved(line: tuple[int, str, str], start: int) -> tuple[int, str, str]:
    """An instruction as it is where its kernel starts at address 0."""
    address, name, rest = line
    if name.startswith("BRA"):
        rest = re.sub(r"0x([0-9a-f]+)", lambda to: hex(int(to[1], 16) - start), rest)
    return address - start, name, rest


def _run(tool: str, *arguments: str) -> str:
    command = [str(BIN / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def _file(content: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        yield file.name


def _instructions(text: str) -> list[tuple[int, str, str]]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", text)
    return [(int(address, 16), name, rest) for address, name, rest in found]


def _with_usage(cubin: bytes, lines: list[tuple[int, str, str]]) -> Sass:
    while lines and lines[-1][1] in ("NOP", "BRA"):
        lines.pop()

    with _file(cubin) as path:
        usage = _run("cuobjdump", "--dump-resource-usage", path)
    occupied = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert lines and occupied, "cuobjdump printed something else than expected"
    return Sass(lines, stack=int(occupied[2]), registers=int(occupied[1]))


def loops(lines: list[tuple[int, str, str]]) -> list[list[str]]:
    """The instructions from the target of each backward branch to the branch, longest first."""
    found = []
    for address, name, rest in lines:
        to = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if to and int(to[1], 16) < address:
            first = int(to[1], 16)
            found.append([name for at, name, _ in lines if first <= at <= address])
    return sorted(found, key=len, reverse=True)


def architecture(k: Any) -> str:
    """What a kernel is assembled for, as "sm_90a"."""
    found = re.search(r"\.target (sm_\w+)", k.asm["ptx"])
    assert found, "the PTX names no target"
    return found[1]


def measure_nvidia(k: Any, code: Sass, weights: float, threads: int) -> dict[str, Any]:
    """Describes a kernel that decodes so many weights per thread, in its loop if it has one."""
    ptx, ttgir = k.asm["ptx"], k.asm["ttgir"]
    found = loops(code.lines)
    body = found[0] if found else [name for _, name, _ in code.lines]
    wide = [name for _, name, _ in code.lines if ".128" in name]
    ahead = pipeline(ttgir)

    return {
        "in_flight": ahead.in_flight,
        "buffers": ahead.buffers,
        "narrow per weight": ahead.narrow / (weights * threads) if weights else 0,
        "stack": code.stack,
        "registers": code.registers,
        "spills": sum(name.startswith(("LDL", "STL")) for loop in found for name in loop),
        "instructions": len(body),
        "weights": weights,
        "per weight": round(len(body) / weights, 2) if weights else None,
        "copies": sum(name.startswith("LDGSTS") for name in body),
        "loads of 2 bytes": sum(name.startswith("LDG") and "U16" in name for name in body),
        "barriers": sum(name.startswith("BAR") for name in body),
        "shuffles": sum(name.startswith("SHFL") for name in body),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": sum("MMA" in name for name in body),
        "wide": sum(name.startswith(("LDG", "STG", "LDGSTS")) for name in wide),
        "f64": ".f64" in ptx,
        "div.full": "div.full" in ptx,
    }


def measure_amd(text: str) -> dict[str, Any]:
    def directive(key: str) -> int:
        value = re.search(rf"{re.escape(key)}:\s+(\d+)", text)
        assert value, f"{key} is not in the assembly"
        return int(value[1])

    return {
        "spills": directive(".vgpr_spill_count"),
        "stack": directive(".private_segment_fixed_size"),
        "registers": directive(".vgpr_count"),
        "mfma": text.count("v_mfma"),
        "wide": len(re.findall(r"_(?:load|store)_dwordx4", text)),
    }
