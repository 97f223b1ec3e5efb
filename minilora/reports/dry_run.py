"""What `minilora plan` prints: the plan of a model, and what fits a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora.huggingface.base_model import check_not_4bit
from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder
from minilora.huggingface.model_folder import is_4bit, read_config
from minilora.huggingface.provenance import decide_quantize
from minilora.reports.largest_batch import LENGTHS, RANKS, fit, parse_memory
from minilora.reports.planning import named_model, plan
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
        gpu: Memory of a GPU, such as 24GB: show the largest batch size that fits, for several
            ranks, and for several lengths or the given one.
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
    gpu: str | None = None
    trust_remote_code: bool = False

    def __str__(self) -> str:
        """Raises ValueError for what `plan` does, and if `gpu` is not an amount of memory."""
        memory = None if self.gpu is None else parse_memory(self.gpu)
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
        }

        # With a GPU, a length alone asks what fits.
        alone = memory is not None and self.batch_size is None
        length = None if alone else self.length
        planned = plan(empty, self.r, batch_size=self.batch_size, length=length, **options)
        shown = str(replace(planned, model=name))
        if memory is None:
            return shown

        lengths = LENGTHS if self.length is None else [self.length]
        ranks = sorted({self.r, *RANKS})
        plans = [plan(empty, rank, batch_size=1, length=lengths[0], **options) for rank in ranks]
        return f"{shown}\n{fit(plans, memory, lengths)}"

    def _config(self, source: Any) -> dict[str, Any]:
        """The contents of the model's config.json; {} for a shape."""
        if is_shape(source) and not Path(source).is_dir():
            return {}
        with suggesting_shapes(source):
            return read_config(source, self.trust_remote_code, allow_4bit=True)
