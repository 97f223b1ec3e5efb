"""What fits a GPU: the largest batch size for each rank and length."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minilora.reports.formatting import format_bytes
from minilora.reports.memory import Run
from minilora.reports.plan_result import Plan
from minilora.reports.tables import Table

# What a plan does not count: a GPU's context, the workspaces of libraries, and memory that an
# allocator cannot use because of fragmentation.
RESERVED = 1_000_000_000

LENGTHS = (512, 1024, 2048, 4096, 8192)
RANKS = (8, 16, 64)

# The table does not tell larger batches apart.
LARGEST_BATCH = 1024

_UNITS = {
    "GB": 10**9,
    "MB": 10**6,
    "GIB": 2**30,
    "MIB": 2**20,
}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?([GM]i?B)?", re.ASCII | re.IGNORECASE)


def parse_memory(text: str, name: str = "gpu") -> int:
    """Returns the bytes of an amount of memory: "24GB", "24 GiB", "80" (GB).

    Args:
        text: the amount.
        name: what error messages call it.

    Raises:
        ValueError: it is not an amount of memory.

    Example:
        >>> parse_memory("24GB"), parse_memory("1.5 GiB")
        (24000000000, 1610612736)
    """
    found = _AMOUNT.fullmatch(text.strip())
    unit = (found[2] or "GB").upper() if found else "GB"
    size = float(found[1]) * _UNITS[unit] if found else 0.0
    if not 0 < size < 1e15:
        raise ValueError(f"{name}={text!r} is not an amount of memory: write 24GB or 24GiB")
    return round(size)


def largest_batch(run: Run, memory: int) -> int:
    """Returns the largest batch size for which no phase of the run needs more than `memory`.

    At most `LARGEST_BATCH`; 0 if not even one sequence fits.
    """

    def fits(size: int) -> bool:
        batch = replace(run.batch, size=size)
        _, needed = replace(run, batch=batch).peak()
        return needed <= memory

    # Memory grows with the batch size, so the sizes that fit come first.
    low, high = 0, LARGEST_BATCH + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Fit:
    """What fits a GPU; it prints as a table.

    Attributes:
        memory: bytes of the GPU.
        smallest: bytes that the smallest of the runs needs with a single sequence.
        batches: (rank, length) -> the largest batch size; 0 where not even one sequence fits.
        checkpointing: whether this is with gradient checkpointing.
        where: what the title begins with.
    """

    memory: int
    smallest: int
    batches: dict[tuple[int, int], int]
    checkpointing: bool
    where: str = ""

    def table(self) -> Table:
        """One row per rank, one column per length."""
        ranks = sorted({r for r, _ in self.batches})
        lengths = sorted({length for _, length in self.batches})
        rows = []
        for r in ranks:
            batches = [self.batches[r, length] for length in lengths]
            rows.append((f"r={r}", *map(_shown, batches)))

        how = "with" if self.checkpointing else "without"
        size = f"largest batch size in {format_bytes(self.memory)}"
        title = f"{self.where}{size}, {how} gradient checkpointing"
        below = [f"{format_bytes(RESERVED)} of it is kept for the GPU's context and fragmentation"]
        if not any(self.batches.values()):
            needed = format_bytes(self.smallest + RESERVED)
            below.append(f"nothing fits: the smallest of these runs needs a GPU of {needed}")
        elif not all(self.batches.values()):
            below.append("-: not even one sequence fits")
        head = ("tokens", *map(str, lengths))
        return Table(title, head, tuple(rows), tuple(below))

    def __str__(self) -> str:
        return str(self.table())


def _shown(batch: int) -> str:
    if batch >= LARGEST_BATCH:
        return f">= {LARGEST_BATCH}"
    return str(batch) if batch else "-"


def fit(
    plans: Sequence[Plan], memory: int, lengths: Sequence[int] = LENGTHS, where: str = ""
) -> Fit:
    """Returns the largest batch for each rank and length.

    Args:
        plans: one for each rank, with any batch.
        memory: bytes of the GPU, of which `RESERVED` are left free.
        lengths: tokens per sequence.
        where: what the title begins with.

    Raises:
        ValueError: a plan has no batch.
    """
    batches, smallest = {}, []
    for plan in plans:
        if plan.run is None:
            raise ValueError("the plan has no batch: give plan batch_size= and length=")
        for length in lengths:
            batch = replace(plan.run.batch, size=1, length=length)
            single = replace(plan.run, batch=batch)
            batches[plan.r, length] = largest_batch(single, memory - RESERVED)
            smallest.append(single.peak()[1])
    checkpointing = all(plan.run and plan.run.batch.checkpointing for plan in plans)
    return Fit(memory, min(smallest), batches, checkpointing, where)
