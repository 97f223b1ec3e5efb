"""What a plan says, and how it looks: the result of `plan`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from minilora.reports.formatting import format_bytes
from minilora.reports.memory import Run, dense_lora, full_finetuning, present, total
from minilora.reports.parameter_groups import Groups
from minilora.reports.pictures import stacked_bar
from minilora.reports.several_gpus import SeveralGPUs, on_several_gpus
from minilora.reports.tables import Table, group_layers


@dataclass(frozen=True)
class Row:
    """One layer that would get an adapter.

    Attributes:
        name: the layer's full name.
        out_features, in_features: the size of its weight, [out, in].
        adapter_parameters: r (in + out), and out more for the bias of B.
        base_bytes: memory of the frozen weight.
    """

    name: str
    out_features: int
    in_features: int
    adapter_parameters: int
    base_bytes: int


@dataclass(frozen=True, repr=False)
class Plan:
    """The result of `plan`. It prints as a table; a notebook also shows the memory as a bar.

    Attributes:
        model: the model's class, or the folder or hub id that it comes from.
        r: the rank.
        quantize: whether layers would be in NF4.
        rows: the layers that would get an adapter.
        left_out: linear layers that would not.
        unreached: number of parameters in matrices outside of linear layers, such as the experts
            of a mixture: they stay dense and get no adapter.
        parameters: the model's parameters; a tied one counts once.
        trainable: the parameters that would be trained.
        bytes: memory by kind: "quantized", "dense" (whatever is not quantized), "adapters",
            "gradients", "optimizer" (AdamW's two states). With a batch also "activations" and
            "logits", each at its largest.
        run: with a batch: what each phase of the run needs.
        groups: the parameters, as several GPUs divide and gather them.
        grad_accum: number of forward passes per step.
    """

    model: str
    r: int
    quantize: bool
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    unreached: int
    parameters: int
    trainable: int
    bytes: dict[str, int]
    run: Run | None = None
    groups: Groups = field(default_factory=Groups)
    grad_accum: int = 1

    @property
    def total_bytes(self) -> int:
        """With a batch: the memory of the phase that needs the most.

        Without: weights, adapters, gradients and optimizer states; activations depend on batch
        size and sequence length.
        """
        return self.run.peak()[1] if self.run else total(self.bytes)

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        """Phase of a run -> kind -> bytes in memory when it needs the most; {} without a batch."""
        return self.run.phases() if self.run else {}

    @property
    def peak_phase(self) -> str | None:
        """The phase that needs the most: "loading", "loss", "backward" or "step"."""
        return self.run.peak()[0] if self.run else None

    @property
    def compared(self) -> dict[str, int]:
        """Method -> `total_bytes` of the same batch with it; {} without a batch."""
        if self.run is None:
            return {}
        others = {
            "LoRA on a dense base": dense_lora(self.run, self.parameters),
            "full fine-tuning": full_finetuning(self.run, self.parameters),
        }
        return {method: run.peak()[1] for method, run in others.items()}

    def with_run(self, run: Run) -> "Plan":
        """Returns this plan with the activations and the logits of a batch."""
        phases = run.phases()
        most = {
            kind: max(kinds.get(kind, 0) for kinds in phases.values())
            for kind in ("activations", "logits")
        }
        return replace(self, bytes={**self.bytes, **most}, run=run)

    def on_gpus(self, gpus: int) -> SeveralGPUs:
        """Returns what each of several GPUs holds and sends, with DDP and with FSDP2.

        The batch, if the plan has one, is that of each GPU. Raises ValueError if `gpus` is out of
        range.

        Example:
            >>> found = minilora.plan("llama-3.2-1b", r=16).on_gpus(2)
            >>> found.ddp.traffic.total, found.sharded.traffic.total
            (45088768, 832416640)
        """
        return on_several_gpus(self.groups, gpus, self.grad_accum, self.run)

    def table(self) -> Table:
        """One row per name and size."""
        share = self.trainable / self.parameters
        title = (
            f"{self.model}: {self.parameters:,} parameters, "
            f"{self.trainable:,} trainable ({share:.2%})"
        )

        rows = []
        for kind, layers in group_layers(self.rows).items():
            adapter = sum(row.adapter_parameters for row in layers)
            base = sum(row.base_bytes for row in layers)
            rows.append((*kind, f"{len(layers)}", f"{adapter:,}", format_bytes(base)))

        held = format_bytes(total(self.bytes))
        below = [] if self.run else [f"total {held}, plus activations"]
        if self.left_out:
            below.insert(0, f"no adapter: {_shortened(self.left_out)}")
        if self.unreached:
            share = self.unreached / self.parameters
            kept = f"{self.unreached:,} parameters ({share:.0%}) outside of linear layers"
            below.insert(0, f"no adapter, not quantized: {kept}, such as the experts of a mixture")

        head = ("layer", "out x in", "count", "adapter", "base")
        return Table(title, head, tuple(rows), tuple(below))

    def memory_table(self) -> Table:
        """One row per kind of memory, one column per phase. Raises ValueError without a batch."""
        if self.run is None:
            raise ValueError("the plan has no batch: give plan batch_size= and length=")
        phases, batch = self.phases, self.run.batch
        kinds = dict.fromkeys(kind for found in phases.values() for kind in found)
        rows = [
            (kind, *(_shown_bytes(found.get(kind, 0)) for found in phases.values()))
            for kind in kinds
        ]
        totals = [format_bytes(total(found)) for found in phases.values()]

        how = "with" if batch.checkpointing else "without"
        title = (
            f"{batch.size} x {batch.length} tokens {how} gradient checkpointing: "
            f"{format_bytes(self.total_bytes)}"
        )
        others = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.compared.items())
        head = ("memory", *phases)
        rows.append(("total", *totals))
        return Table(title, head, tuple(rows), (f"for comparison: {others}",))

    def _shown(self) -> dict[str, int]:
        """What the bar shows: the phase that needs the most; without a batch, all there is."""
        kinds = self.phases[self.peak_phase] if self.peak_phase else self.bytes
        return present(kinds)

    def __repr__(self) -> str:
        if self.run:
            return f"{self.table()}\n{self.memory_table()}"
        kinds = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in self._shown().items())
        table = self.table()
        return str(replace(table, below=(*table.below, kinds)))

    def _repr_html_(self) -> str:
        held = self._shown()
        labels = {kind: format_bytes(n) for kind, n in held.items()}
        bar = stacked_bar(held, labels)
        if self.run is None:
            return self.table().html(bar)
        return f"<div>{self.table().html()}{self.memory_table().html(bar)}</div>"


def _shown_bytes(n: int) -> str:
    return format_bytes(n) if n else ""


def _shortened(names: Sequence[str]) -> str:
    """The first four of the names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
