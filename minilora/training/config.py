"""The settings of a fine-tuning run.

The texts under `Attributes` below are the only description of each setting. The help of
`minilora finetune --help` and the table in the documentation are read from them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run. Each one is also an option of `minilora finetune`.

    Attributes:
        model: Folder or hub id of a causal language model; 'smollm2' is the bundled demo model.
        data: Training data: JSONL with prompt/completion, messages or text in each line; or a
            text file.
        out: Output folder for the adapter, the metrics and the checkpoints.
        r: Rank of the adapters.
        alpha: The update is scaled by alpha / r (default: 2*r).
        targets: Layers that get an adapter: 'all-linear' or names of layers; on the command line
            separated by commas (q_proj,v_proj).
        dropout: Dropout probability on the adapters' input.
        lr: Peak learning rate: linear warm-up over 3 % of the steps, then cosine decay to zero.
        steps: Number of optimizer steps (default: as many as epochs takes).
        epochs: Number of passes over the training examples; ignored if steps is given.
        batch_size: Number of sequences per forward pass.
        grad_accum: Number of forward passes per optimizer step (gradient accumulation). The loss
            is averaged over all completion tokens of the step.
        max_length: Maximum number of tokens per sequence.
        weight_decay: AdamW's weight decay.
        clip: Maximum norm of the gradients; larger ones are scaled down to it.
        quantize: Quantize the base model to 4-bit NormalFloat (QLoRA); otherwise plain LoRA.
        learn_prompt: Train on the prompt too, not only on the completion.
        eval_fraction: Fraction of the examples held out for evaluation; 0 holds out none.
        seed: Seed for the hold-out split, data order and adapter initialization.
        device: Device to train on: cpu or cuda (default: GPU if available).
        checkpointing: Gradient checkpointing: less memory, more time, the same results (default:
            on for a quantized model that supports it).
        save_every: Number of steps between two checkpoints of the run; 0 saves one only if the run
            is interrupted.
        keep: Number of most recent checkpoints to keep.
        resume: Resume from the newest intact checkpoint in the output folder.

    Raises:
        ValueError: a number is out of range; the message names it.

    Example:
        >>> config = FinetuneConfig("smollm2", "my.jsonl", "my-adapter", batch_size=4)
        >>> config.steps_for(examples=100)
        25
    """

    model: str
    data: str
    out: str
    r: int = 16
    alpha: float | None = None
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    lr: float = 2e-4
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    grad_accum: int = 1
    max_length: int = 512
    weight_decay: float = 0.0
    clip: float = 1.0
    quantize: bool = True
    learn_prompt: bool = False
    eval_fraction: float = 0.05
    seed: int = 0
    device: str | None = None
    checkpointing: bool | None = None
    save_every: int = 100
    keep: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "max_length", "steps", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.save_every < 0:
            raise ValueError(f"save_every={self.save_every}: must be at least 0")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction}: must be at least 0 and below 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr}: must be positive and finite")
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs}: must be positive")

    def steps_for(self, examples: int) -> int:
        """Returns the number of optimizer steps for this many training examples."""
        if self.steps is not None:
            return self.steps
        per_step = self.batch_size * self.grad_accum
        return max(1, round(self.epochs * examples / per_step))
