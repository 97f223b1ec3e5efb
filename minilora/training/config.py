"""The settings of a fine-tuning run.

The texts under `Attributes` below are the only description of each setting. The help of
`minilora finetune --help` and the table in the documentation are read from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minilora.training.config_checks import check_settings


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run. Each one is also an option of `minilora finetune`.

    Attributes:
        model: Folder or hub id of a causal language model; 'smollm2' is the bundled demo model.
        data: Training data, records with prompt and completion, messages or text: a file that ends
            in .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz) or .parquet; or a text file,
            .txt or .md.
        out: Output folder for the adapter, the metrics and the checkpoints.
        r: Rank of the adapters.
        alpha: The update is scaled by alpha / r (default: 2*r).
        targets: Layers that get an adapter: 'all-linear' or names of layers; on the command line
            separated by commas (q_proj,v_proj).
        dropout: Dropout probability on the adapters' input.
        lr: Peak learning rate: linear warm-up over 3 % of the steps, then cosine decay to zero.
        steps: Number of optimizer steps (default: from epochs).
        epochs: Number of passes over the training examples; ignored with steps.
        batch_size: Number of sequences per forward pass.
        grad_accum: Number of forward passes per optimizer step (gradient accumulation). The loss
            is averaged over all completion tokens of the step.
        max_length: Maximum number of tokens per sequence.
        packing: Put several short sequences into one row of up to max_length tokens, and up to
            batch_size rows into a forward pass: less padding, the same steps, losses and gradients.
            No sequence sees another one. Refused for models that cannot do this.
        group_by_length: Train on sequences of similar length in each step: less padding, in another
            order. Every epoch still shows every example once.
        weight_decay: AdamW's weight decay.
        clip: Maximum norm of the gradients; larger ones are scaled down to it.
        quantize: Quantize the base model to 4-bit NormalFloat (QLoRA); otherwise plain LoRA
            (default: quantize; for a merged model, choose explicitly).
        learn_prompt: Train on the prompt too, not only on the completion.
        eval_fraction: Fraction of the examples held out for evaluation; 0 holds out none.
        eval_data: Evaluation data in a file of its own, in the same formats (default: a part
            of the data, see eval_fraction).
        eval_every: Evaluate the hold-out every N steps and keep the adapter with the lowest loss;
            0 evaluates only before and after training and keeps the last one.
        samples: Number of hold-out prompts that the model answers before and after training, for
            the report; 0 disables them.
        seed: Seed for the hold-out split, data order and adapter initialization.
        device: Device to train on: cpu, cuda or mps (default: cuda if available,
            else cpu).
        checkpointing: Gradient checkpointing: less memory, more time, the same results (default:
            on for a quantized model that supports it).
        log_every: Print a line of progress at least every N steps (default: about 20 lines per
            run); none if standard output and standard error are both a terminal, where a progress
            bar is shown instead.
        save_every: Save a checkpoint of the run every N steps; 0 saves one only if the run is
            interrupted.
        keep: Number of most recent checkpoints to keep.
        resume: Resume from the newest intact checkpoint in the output folder.
        overwrite: Replace the run in the output folder, finished or not. Other files there stay.
        trust_remote_code: Allow code in the model's folder to be executed.
        shard: With several processes (torchrun), each loads and holds only a part of the model:
            less memory per process, more communication. A dense model is quantized into
            OUT/base-4bit first. Otherwise each process holds the whole model.
        timeout: With several processes (torchrun), how many seconds they wait for one that gives no
            sign of life, or for each other within a step.

    Raises:
        ValueError: a setting has another type or is out of range; the message names it.

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
    packing: bool = False
    group_by_length: bool = False
    weight_decay: float = 0.0
    clip: float = 1.0
    quantize: bool | None = None
    learn_prompt: bool = False
    eval_fraction: float = 0.05
    eval_data: str | None = None
    eval_every: int = 0
    samples: int = 3
    seed: int = 0
    device: str | None = None
    checkpointing: bool | None = None
    log_every: int | None = None
    save_every: int = 100
    keep: int = 2
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    shard: bool = False
    timeout: float = 20.0

    def __post_init__(self) -> None:
        check_settings(self)

    def steps_for(self, examples: int) -> int:
        """Returns the number of optimizer steps for this many training examples."""
        if self.steps is not None:
            return self.steps
        per_step = self.batch_size * self.grad_accum
        return max(1, round(self.epochs * examples / per_step))
