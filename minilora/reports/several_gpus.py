r"""A run on several GPUs: the memory of each, and the bytes that it sends in a step.

With DDP every GPU has the whole model, and the gradients are summed. With FSDP2 a GPU has a part of
each parameter, and gathers those of a block for as long as it computes with them. What is outside
of the blocks is one more group, gathered once per forward pass.

    DDP    gradients      all-reduce      2 (n-1)/n bytes    in the last backward pass of a step
    FSDP2  parameters     all-gather      (n-1) shards       before a block's forward pass, and
                                                             again before its backward pass
           gradients      reduce-scatter  (n-1) shards       in the last backward pass of a step

n GPUs; the bytes are those that each GPU sends, and it receives as many. Ring algorithms send that
much, and no algorithm that only passes messages sends less. gloo sums with an all-reduce where
FSDP2 asks for a reduce-scatter, and sends twice as much for it.

A block is gathered while another one computes, which hides the gather if computing takes longer. A
GPU computes 2 operations per weight and token in a forward pass, as many in a backward pass past a
frozen weight, and as many again where checkpointing repeats the forward pass. Only the products
with the linear layers of the blocks are counted.
"""

from dataclasses import dataclass, replace

from minilora.distributed.sharding import blocks_together
from minilora.reports.formatting import format_bytes, format_seconds, three_digits
from minilora.reports.memory import Decoder, Run, total
from minilora.reports.parameter_groups import Group, Groups
from minilora.reports.tables import Table

# DDP sums gradients in buckets of this size, the last of which is complete when the pass is over.
BUCKET = 25 << 20

MOST_GPUS = 65_536


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU sends in a step, by collective operation; it receives as many."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    @property
    def total(self) -> int:
        """All bytes that a GPU sends."""
        return self.all_reduce + self.all_gather + self.reduce_scatter


@dataclass(frozen=True)
class Share:
    """What each of several GPUs holds and sends.

    Attributes:
        held: kind -> bytes, without activations.
        run: what a run needs on each GPU; None without a batch.
        traffic: what it sends.
        exposed: the bytes of it that nothing hides: those of the first groups that are gathered in
            a step, and of the last gradients.
        hidden: (bytes, operations) of what is sent while so many floating-point operations are
            computed; () without a batch.
    """

    held: dict[str, int]
    run: Run | None
    traffic: Traffic
    exposed: int
    hidden: tuple[tuple[int, int], ...]

    @property
    def memory(self) -> dict[str, int]:
        """Kind -> bytes when the run needs the most; without a batch, what is held."""
        return self.run.phases()[self.run.peak()[0]] if self.run else self.held

    def hidden_up_to(self, bandwidth: float) -> float:
        """Returns the operations per second up to which computing takes longer than sending.

        Args:
            bandwidth: bytes per second that a GPU sends.
        """
        speeds = [bandwidth * operations / n for n, operations in self.hidden if n]
        return min(speeds, default=float("inf"))


@dataclass(frozen=True, repr=False)
class SeveralGPUs:
    """A plan for several GPUs, with DDP and with FSDP2. It prints as a table, also in a notebook.

    Attributes:
        gpus: number of GPUs.
        ddp: what each of them holds and sends with DDP.
        sharded: likewise with FSDP2.
    """

    gpus: int
    ddp: Share
    sharded: Share

    def table(self, bandwidth: float | None = None) -> Table:
        """Memory when a run needs the most, and bytes sent; one column for each way.

        Args:
            bandwidth: bytes per second that a GPU sends: the table also shows how long it takes
                and, with a batch, what computation hides of it.
        """
        ways = (self.ddp, self.sharded)
        kinds = dict.fromkeys(kind for way in ways for kind, n in way.memory.items() if n)
        rows = [(kind, *(_shown(way.memory.get(kind, 0)) for way in ways)) for kind in kinds]
        rows.append(("total", *(format_bytes(total(way.memory)) for way in ways)))
        rows.append(("sent per step", *(format_bytes(way.traffic.total) for way in ways)))

        run = self.ddp.run
        if bandwidth is not None:
            sent = [format_seconds(way.traffic.total / bandwidth) for way in ways]
            rows.append((f"at {format_bytes(bandwidth)} per second", *sent))
        if bandwidth is not None and run is not None:
            exposed = [format_seconds(way.exposed / bandwidth) for way in ways]
            limits = [f"{three_digits(way.hidden_up_to(bandwidth) / 1e12)} TFLOP/s" for way in ways]
            rows += [("of which nothing hides", *exposed), ("the rest is hidden up to", *limits)]

        title = f"{self.gpus} GPUs"
        if run is not None:
            title += f", {run.batch.size} x {run.batch.length} tokens per forward pass on each"
        below = () if run else ("total: plus activations",)
        return Table(title, ("each GPU", "DDP", "FSDP2"), tuple(rows), below)

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()


def check_gpus(gpus: int) -> None:
    """Raises ValueError unless there can be so many GPUs."""
    if not isinstance(gpus, int) or isinstance(gpus, bool) or not 1 <= gpus <= MOST_GPUS:
        raise ValueError(f"gpus={gpus!r}: must be a whole number of GPUs, 1 ... {MOST_GPUS:,}")


def on_several_gpus(groups: Groups, gpus: int, grad_accum: int, run: Run | None) -> SeveralGPUs:
    """Returns what each of several GPUs holds and sends.

    Args:
        groups: the parameters of the model.
        gpus: number of GPUs.
        grad_accum: number of forward passes per step.
        run: what a run on one GPU needs, with the batch of each GPU.

    Raises:
        ValueError: `gpus` is out of range.
    """
    check_gpus(gpus)
    return SeveralGPUs(gpus, _ddp(groups, gpus, run), _sharded(groups, gpus, grad_accum, run))


def _ddp(groups: Groups, gpus: int, run: Run | None) -> Share:
    held = groups.shard_bytes(1)
    # DDP copies the gradients into buckets.
    buckets = held["gradients"]

    def sent(n: int) -> int:
        return 2 * n * (gpus - 1) // gpus

    traffic = Traffic(all_reduce=sent(held["gradients"]))
    hidden: tuple[tuple[int, int], ...] = ()
    if run is not None:
        _, backward = _operations(run)
        hidden = ((traffic.total, run.decoder.layers * backward),)
        run = replace(run, held={**run.held, "buckets": buckets})
    exposed = sent(min(BUCKET, held["gradients"]))
    return Share({**held, "buckets": buckets}, run, traffic, exposed, hidden)


def _sharded(groups: Groups, gpus: int, grad_accum: int, run: Run | None) -> Share:
    held, others = groups.shard_bytes(gpus), gpus - 1
    blocks = sum(block.count * block.shard_bytes(gpus) for block in groups.blocks)
    root = groups.root.shard_bytes(gpus)
    traffic = Traffic(
        all_gather=others * grad_accum * (root + 2 * blocks),
        reduce_scatter=others * held["gradients"],
    )

    largest = max(groups.blocks, key=lambda block: block.shard_bytes(gpus), default=Group(()))
    together = min(blocks_together(largest.shard_bytes(1)), max(largest.count, 1))
    shards, gradients = (
        together * n for n in (largest.shard_bytes(gpus), largest.gradient_bytes(gpus))
    )
    gather, scatter = others * shards, others * gradients
    gathered = gpus * (root + 2 * (shards + gradients))
    if grad_accum > 1:
        # They are only divided in the last backward pass of a step.
        gathered += gpus * held["gradients"]

    hidden: tuple[tuple[int, int], ...] = ()
    if run is not None:
        forward, backward = (together * n for n in _operations(run))
        hidden = ((gather, forward), (gather + scatter, backward))
        run = replace(
            run,
            held={kind: held[kind] for kind, n in run.held.items() if n},
            loading={kind: held.get(kind, n) for kind, n in run.loading.items()},
            gradients=held["gradients"],
            accumulate=False,
            gathered=gathered,
        )
    exposed = others * root + gather + scatter
    return Share({**held, "gathered": gathered}, run, traffic, exposed, hidden)


def _operations(run: Run) -> tuple[int, int]:
    """Floating-point operations of one block in a forward pass, and in a backward pass."""
    forward = 2 * block_weights(run.decoder) * run.batch.tokens
    return forward, (2 if run.batch.checkpointing else 1) * forward


def block_weights(d: Decoder) -> int:
    """Returns the number of weights in the linear layers of a block.

    Example:
        >>> block_weights(Decoder(4096, 32, 32, 4096, 4096, 11008, 32000, True, 8192, 2, True))
        202375168
    """
    projections = 2 * d.attention + 2 * d.keys
    return d.hidden * (projections + (3 if d.gated else 2) * d.width)


def _shown(n: int) -> str:
    return format_bytes(n) if n else ""
