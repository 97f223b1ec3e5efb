"""What `minilora plan` prints: the plan of a model, and what fits a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora.huggingface.base_model import check_not_4bit
from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder
from minilora.huggingface.model_folder import is_4bit, read_config
from minilora.huggingface.provenance import decide_quantize
from minilora.reports.largest_batch import LENGTHS, RANKS, Fit, fit, parse_memory
from minilora.reports.planning import Plan, named_model, plan
from minilora.reports.several_gpus import check_gpus
from minilora.reports.shapes import is_shape, suggesting_shapes


@dataclass(frozen=True)
class DryRun:
    """The plan of a run of `finetune`; as text it is what `minilora plan` prints.

    Attributes:
        model: Folder or hub id (also one stored in 4 bits), 'smollm2' for the bundled demo model,
            or the name of a well-known shape, such as llama-65b.
        r: Rank of the adapters.
        targets: Layers that get an adapter: 'all-linear' or names of layers; on the command line
            separated by commas (q_proj,v_proj).
        quantize: Quantize the base model to 4-bit NormalFloat (QLoRA); otherwise plain LoRA
            (default: quantize; for a merged model, choose explicitly).
        batch_size: Number of sequences per forward pass; with --length, activations and logits
            are counted too.
        length: Number of tokens per sequence.
        checkpointing: Gradient checkpointing: less memory, more time, the same results (default:
            on for a quantized model).
        dropout: Dropout probability on the adapters' input.
        grad_accum: Number of forward passes per optimizer step (gradient accumulation).
        gpu: Memory of a GPU, such as 24GB: show the largest batch size that fits, for several
            ranks, and for several lengths or the given one.
        gpus: Number of GPUs: show what each of them holds and sends per step, with DDP and with
            FSDP2; --batch-size is that of each GPU.
        bandwidth: Bytes per second that each GPU sends, such as 25GB: with --gpus, show how long
            sending takes and, with a batch, what computation hides of it.
        trust_remote_code: Allow code in the model's folder to be executed.

    Example:
        >>> print(DryRun("smollm2-135m", gpu="2GB", length=1024))  # doctest: +ELLIPSIS
        smollm2-135m: 134,515,008 parameters, 4,884,480 trainable (3.63%)
        ...
        largest batch size in 2.00 GB, with gradient checkpointing
        ...
    """

    model: str
    r: int = 16
    targets: str | Sequence[str] = "all-linear"
    quantize: bool | None = None
    batch_size: int | None = None
    length: int | None = None
    checkpointing: bool | None = None
    dropout: float = 0.0
    grad_accum: int = 1
    gpu: str | None = None
    gpus: int | None = None
    bandwidth: str | None = None
    trust_remote_code: bool = False

    def __str__(self) -> str:
        """Raises ValueError for what `plan` does, and for GPUs that cannot be."""
        memory = None if self.gpu is None else parse_memory(self.gpu)
        bandwidth = None
        if self.bandwidth is not None:
            bandwidth = parse_memory(self.bandwidth, "bandwidth")
        if self.gpus is not None:
            check_gpus(self.gpus)
        elif bandwidth is not None:
            raise ValueError("a bandwidth without a number of GPUs: give gpus (--gpus) as well")
        source = bundled_model_folder() if self.model == DEMO_MODEL else self.model
        contents = self._config(source)
        stored = is_4bit(contents)
        quantized = decide_quantize(self.quantize, contents, self.model)
        if not quantized:
            check_not_4bit(self.model, stored)
        name, empty = named_model(source, self.trust_remote_code)
        options: dict[str, Any] = {
            "targets": self.targets,
            # What is stored in 4 bits is trained as it is.
            "quantize": "all-linear" if quantized and not stored else False,
            "checkpointing": self.checkpointing,
            "dropout": self.dropout,
            "grad_accum": self.grad_accum,
        }

        # With a GPU, a length alone asks what fits.
        alone = memory is not None and self.batch_size is None
        length = None if alone else self.length
        planned = plan(empty, self.r, batch_size=self.batch_size, length=length, **options)
        shown = [str(replace(planned, model=name))]
        if self.gpus is not None:
            shown.append(str(planned.on_gpus(self.gpus).table(bandwidth)))
        if memory is not None:
            lengths = LENGTHS if self.length is None else [self.length]
            ranks = sorted({self.r, *RANKS})
            options |= {"batch_size": 1, "length": lengths[0]}
            plans = [plan(empty, rank, **options) for rank in ranks]
            shown += map(str, self._fits(plans, memory, lengths))
        return "\n".join(shown)

    def _fits(self, plans: Sequence[Plan], memory: int, lengths: Sequence[int]) -> list[Fit]:
        """What fits one GPU; or each of several, for each way to use them."""
        if self.gpus is None:
            return [fit(plans, memory, lengths)]
        ways: dict[str, list[Plan]] = {"DDP": [], "FSDP2": []}
        for one in plans:
            found = one.on_gpus(self.gpus)
            ways["DDP"].append(replace(one, run=found.ddp.run))
            ways["FSDP2"].append(replace(one, run=found.sharded.run))
        each = f"on each of {self.gpus} GPUs"
        return [fit(runs, memory, lengths, f"{way}, {each}: ") for way, runs in ways.items()]

    def _config(self, source: Any) -> dict[str, Any]:
        """The contents of the model's config.json; {} for a shape."""
        if is_shape(source) and not Path(source).is_dir():
            return {}
        with suggesting_shapes(source):
            return read_config(source, self.trust_remote_code, allow_4bit=True)
