"""What the threads of a warp do together: ldmatrix, stmatrix, mma, shfl, redux; all warps at once.

Arrays are [warps * 32]. Lane l of a warp has the numbers g = l // 4 and t = l % 4, by which the PTX
ISA says who holds which element of a matrix.
"""

import numpy as np
from ptx_values import Array, decode

WARP = 32
LANE = np.arange(WARP)
G, T = LANE // 4, LANE % 4


def gives_row(threads: int, matrix: int) -> Array:
    """Which threads give ldmatrix the address of a row of matrix 0 ... 3: 8 lanes for each."""
    return np.equal(np.arange(threads) % WARP // 8, matrix)


def distribute(rows: Array, matrix: int, transposed: bool) -> Array:
    """ldmatrix: each lane's two elements of an 8 x 8 matrix of 16 bits, in one register.

    rows: uint8 [threads, 16], of the threads that give an address. A lane gets elements 2t and
    2t + 1 of row g; of column g where the matrix is transposed.
    """
    m = rows.view(np.uint16).reshape(-1, WARP, 8)[:, 8 * matrix : 8 * matrix + 8]
    m = m.transpose(0, 2, 1) if transposed else m
    low, high = m[:, G, 2 * T].astype(np.uint32), m[:, G, 2 * T + 1].astype(np.uint32)
    return (low | high << np.uint32(16)).reshape(-1)


def collect(registers: Array, matrix: int, transposed: bool) -> Array:
    """stmatrix, the way back: rows, uint8 [threads, 16], of the threads that give an address."""
    warps = registers.size // WARP
    elements = np.ascontiguousarray(registers).view(np.uint16).reshape(warps, WARP, 2)
    m = np.empty((warps, 8, 8), np.uint16)
    for i in range(2):
        m[:, G, 2 * T + i] = elements[:, :, i]
    m = m.transpose(0, 2, 1) if transposed else m

    rows = np.zeros((warps, WARP, 8), np.uint16)
    rows[:, 8 * matrix : 8 * matrix + 8] = m
    return rows.view(np.uint8).reshape(-1, 16)


Places = tuple[Array, Array]


def _fragment_a(depth: int) -> Places:
    """Row and column of each of a lane's elements of A, [16, depth]."""
    i = np.arange(depth // 2)
    return G[:, None] + 8 * (i // 2 % 2), 2 * T[:, None] + i % 2 + 8 * (i // 4)


def _fragment_b(depth: int) -> Places:
    """Row and column of each of a lane's elements of B, [depth, 8]."""
    i = np.arange(depth // 4)
    row = 2 * T[:, None] + i % 2 + 8 * (i // 2)
    return row, np.repeat(G[:, None], i.size, 1)


def _fragment_c() -> Places:
    """Row and column of each of a lane's elements of C and D, [16, 8]."""
    i = np.arange(4)
    return G[:, None] + 8 * (i // 2), 2 * T[:, None] + i % 2


FRAGMENTS = {depth: (_fragment_a(depth), _fragment_b(depth)) for depth in (8, 16)}
FRAGMENT_C = _fragment_c()


def _matrix(values: Array, places: Places, shape: tuple[int, int]) -> Array:
    """The matrices [warps, *shape] in float64 whose elements the lanes hold, [warps, 32, n]."""
    m = np.zeros((values.shape[0], *shape))
    m[:, places[0], places[1]] = values
    return m


def mma(a: list[Array], b: list[Array], c: list[Array], kind: str) -> list[Array]:
    """D = A B + C of m16n8k16 or m16n8k8, in registers.

    kind: "f16" or "bf16", of A and B; C and D are float32. The sum is exact to float64 and rounded
    once; a tensor core rounds oftener, or truncates.
    """
    depth = 4 * len(a)
    places_a, places_b = FRAGMENTS[depth]
    A = _matrix(_halves(a, kind), places_a, (16, depth))
    B = _matrix(_halves(b, kind), places_b, (depth, 8))
    C = _matrix(np.stack(c, -1).view(np.float32).reshape(-1, WARP, 4), FRAGMENT_C, (16, 8))

    D = (A @ B + C)[:, FRAGMENT_C[0], FRAGMENT_C[1]].astype(np.float32)
    flat = D.reshape(-1, 4)
    return [np.ascontiguousarray(flat[:, i]).view(np.uint32) for i in range(4)]


def _halves(registers: list[Array], kind: str) -> Array:
    """The pairs in registers as numbers, [warps, 32, 2 * registers]."""
    pairs = decode(np.stack(registers, -1), kind + "x2")
    return pairs.reshape(-1, WARP, 2 * len(registers))


def shuffle(values: Array, mode: str, by: Array, clamp: Array) -> Array:
    """shfl.sync: each lane's value from another lane of its warp.

    clamp: as the instruction has it, the size of a segment in bits 8-12 and the last lane in 0-4.
    A lane that would read outside its segment keeps its own.
    """
    lane = np.arange(values.size) % WARP
    segment, limit = clamp >> 8 & 31, clamp & 31
    first, last = lane & segment, lane & segment | limit & ~segment & 31
    by = by.astype(np.int64)
    source = {
        "idx": first | (by & 31 & ~segment.astype(np.int64)),
        "bfly": lane ^ (by & 31),
        "up": lane - (by & 31),
        "down": lane + (by & 31),
    }[mode]
    inside = source >= last if mode == "up" else source <= last
    found: Array = values[np.arange(values.size) - lane + np.where(inside, source, lane)]
    return found


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def reduce(values: Array, operation: str) -> Array:
    """redux.sync over all lanes of each warp."""
    result = REDUCTIONS[operation].reduce(values.reshape(-1, WARP), axis=1, dtype=values.dtype)
    return np.repeat(result, WARP)
