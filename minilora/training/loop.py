"""One explicit training loop. Read `train` for QLoRA's recipe, `finetune` for what a run does around it."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.files.adapters import save_adapter
from minilora.files.atomic import write_text
from minilora.huggingface.loading import (
    gradient_checkpointing,
    load_dense,
    own_memory,
    pad_id,
    pick_device,
)
from minilora.optim.adamw import PagedAdamW
from minilora.optim.retry import retry_on_oom
from minilora.reports.planning import amount
from minilora.reports.runs import Result, Step
from minilora.surgery import adapter_parameters, audit, inject, quantize_steps
from minilora.training.checkpoints import Keeper, clear
from minilora.training.data import IGNORE, Example, batch_order, collate, load_examples

PAD_TO = 16  # tokens: sequences are padded to a multiple


@dataclass(frozen=True)
class FinetuneConfig:
    """What a run is made of. All but weight_decay and clip are flags of `minilora finetune` too.

    Attributes:
        model: folder or hub id of a causal language model, or "smollm2", the embedded one.
        data: JSONL or a text file: see `minilora.data`.
        out: folder for the adapter and the metrics.
        r, alpha, targets, dropout: as for `inject`.
        lr: peak of the learning rate; it warms up over 3 % of the steps and falls to zero on a cosine.
        steps: optimizer steps; None: `epochs` decides.
        epochs: passes over the training examples.
        batch_size: sequences in a forward pass.
        grad_accum: forward passes in a step. The loss is averaged over the learned tokens of the whole step.
        max_length: tokens in a sequence.
        weight_decay, clip: AdamW's decay; the norm that gradients are clipped to.
        quantize: the base in NF4; False: as it is (plain LoRA).
        learn_prompt: learn the prompt too, not the answer alone.
        eval_fraction: share of the examples held out; 0: none.
        seed: decides the adapter's start, the hold-out and the order.
        device: "cpu", "cuda"; None: the GPU if there is one.
        checkpointing: gradient checkpointing: less memory for more time, the same bits. None: where the base is quantized and
            the model has it.
        save_every: steps between two checkpoints of the run; 0: none but at Ctrl-C or SIGTERM.
        keep: so many checkpoints are kept, the last ones.
        resume: go on from the newest whole checkpoint in `out`.

    Raises:
        ValueError: a number out of range, by name.

    Example:
        >>> FinetuneConfig("smollm2", "my.jsonl", "my-adapter", batch_size=4).steps_for(examples=100)
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
        if self.save_every < 0:
            raise ValueError(f"save_every={self.save_every}: at least 0")
        for name in ("batch_size", "grad_accum", "max_length", "steps", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction}: at least 0 and less than 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr}: above 0 and finite")
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs}: above 0")

    def steps_for(self, examples: int) -> int:
        """Optimizer steps of a run over so many training examples."""
        return self.steps or max(
            1, round(self.epochs * examples / (self.batch_size * self.grad_accum))
        )


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate at step 0, 1, ... : linear warm-up over 3 %, then half a cosine down to zero."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum over learned tokens of -log p(token | what stands before it), in float32."""
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE
    with _only(learned, model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if logits.dim() == 3:  # a model without a head that could be told
        logits = logits[:, :-1][learned]
    return F.cross_entropy(logits.float(), labels[learned], reduction="sum")


@contextmanager
def _only(learned: Tensor, model: nn.Module) -> Iterator[None]:
    """Inside the block the output head sees the hidden states of the learned tokens alone, [learned, width].

    With a vocabulary of 49,152 the logits are the largest tensor of a small model's step, and most tokens are not learned.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][learned], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> PagedAdamW:
    return PagedAdamW(adapter_parameters(model), lr=config.lr, weight_decay=config.weight_decay)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: FinetuneConfig,
    *,
    pad: int,
    optimizer: PagedAdamW | None = None,
    done: int = 0,
) -> Iterator[Step]:
    """Trains an injected model and yields a `Step` after each optimizer step. Only the adapter's parameters change.

    Where forward or backward run out of device memory they are run again with the optimizer's states on the host. With `done`
    steps behind it, and the model, the optimizer and the random states as they were then, `train` goes on to the bit.

    Raises:
        ValueError: an adapter got no gradient in the first step.
        FloatingPointError: a loss or a gradient is NaN or infinite; the batch is named, the parameters are as before the step.
    """
    parameters = adapter_parameters(model)
    optimizer = optimizer or make_optimizer(model, config)
    steps, in_a_step = config.steps_for(len(examples)), config.batch_size * config.grad_accum
    model.train()
    for step in range(done, steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule(step, steps)
        picked = [
            (i, examples[i]) for i in batch_order(len(examples), in_a_step, config.seed, step)
        ]
        picked.sort(
            key=lambda pair: len(pair[1].ids)
        )  # micro-batches of like lengths: less padding, the same sum
        loss = retry_on_oom(
            partial(forward_backward, model, picked, config, step, pad=pad), optimizer
        )
        if step == done:
            check_gradients(model)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
        check_finite(norm, "the gradient's norm", step, picked)
        optimizer.step()
        optimizer.zero_grad()
        learned, tokens = sum(e.learned for _, e in picked), sum(len(e.ids) for _, e in picked)
        lr = optimizer.param_groups[0]["lr"]
        yield Step(step + 1, loss, lr, norm, learned, tokens, time.perf_counter() - start)


def forward_backward(
    model: nn.Module,
    picked: Sequence[tuple[int, Example]],
    config: FinetuneConfig,
    step: int,
    *,
    pad: int,
) -> float:
    """Adds the gradients of a step's examples, in micro-batches, and returns its loss."""
    device = adapter_parameters(model)[0].device
    learned = sum(
        e.learned for _, e in picked
    )  # over the whole step: a token weighs the same in any micro-batch
    loss = 0.0
    for i in range(0, len(picked), config.batch_size):
        micro = picked[i : i + config.batch_size]
        batch = to_device(collate([e for _, e in micro], pad, PAD_TO), device)
        part = token_losses(model, batch) / learned
        if not part.requires_grad:
            check_gradients(model)  # none of them: torch would say so without a name
        part.backward()  # type: ignore[no-untyped-call]
        check_finite(part.item(), "the loss", step, micro)
        loss += part.item()
    return loss


def check_finite(value: float, what: str, step: int, picked: Sequence[tuple[int, Example]]) -> None:
    if not math.isfinite(value):
        batch = "; ".join(
            f"example {i} ({e.where or 'ids'}: {str(e.ids[:8])[1:-1]}, ...)" for i, e in picked
        )
        raise FloatingPointError(
            f"step {step + 1}: {what} is {value}. The parameters are those of step {step}; lower the learning rate, or look at "
            f"what is in the batch (token ids): {batch}."
        )


def check_gradients(model: nn.Module) -> None:
    """Raises ValueError, with names, if a part of the adapters took no part in the first backward."""
    if without := audit(model):
        shown = ", ".join(without[:8]) + (
            f" and {len(without) - 8} more" if len(without) > 8 else ""
        )
        raise ValueError(
            f"adapters got no gradient in the first step and would never learn ({len(without)} of them): {shown}. Likely reasons: "
            "gradient checkpointing that is reentrant (the input of a frozen base needs no gradient); a fused loss that reads "
            "lm_head.weight and goes round the layer; a part of the model that this data does not reach, or whose output is "
            "detached. Leave those layers out with targets, or mend the path"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 8, pad: int = 0
) -> float:
    """Returns the mean loss in nats a learned token, over all examples. Leaves the model in the mode that it was in."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda e: len(e.ids))  # like lengths together: less padding
    total = 0.0
    for i in range(0, len(ordered), batch_size):
        total += token_losses(
            model, to_device(collate(ordered[i : i + batch_size], pad, PAD_TO), device)
        ).item()
    model.train(was_training)
    return total / sum(e.learned for e in examples)


def bar(what: str, total: int | None = None, done: int = 0) -> Any:
    """A progress bar; silent where the output is no terminal."""
    from tqdm import tqdm

    return tqdm(desc=what, total=total, initial=done, disable=None, dynamic_ncols=True)


def quantize_with_bar(model: nn.Module) -> None:
    with bar("quantize") as progress:
        for done, total in quantize_steps(model):
            progress.total = total
            progress.update(done - progress.n)
    own_memory(model)


def train_with_bar(
    model: nn.Module,
    examples: Sequence[Example],
    config: FinetuneConfig,
    *,
    pad: int,
    keeper: Keeper | None = None,
) -> list[Step]:
    """Runs `train` to its end, shows its progress, and writes a line a step to `metrics.jsonl`.

    With a keeper it starts where that one stands and saves checkpoints; without, Ctrl-C ends it at once and nothing is saved.
    """
    optimizer = make_optimizer(model, config)
    lines = keeper.start(model, optimizer) if keeper else []
    history = [Step(**json.loads(line)) for line in lines]
    write_text(
        path := Path(config.out) / "metrics.jsonl", "".join(lines)
    )  # those of steps that will be done again are cut off
    with (
        bar("train", config.steps_for(len(examples)), done=len(history)) as progress,
        path.open("a") as metrics,
        keeper.watch() if keeper else nullcontext(),
    ):
        for step in train(model, examples, config, pad=pad, optimizer=optimizer, done=len(history)):
            history.append(step)
            progress.set_postfix_str(
                f"loss {step.loss:.3f}, {step.tokens / step.seconds:.0f} tokens/s, {amount(peak_memory())}"
            )
            progress.update()
            line = json.dumps(asdict(step)) + "\n"
            metrics.write(line)
            metrics.flush()
            if keeper:
                keeper.after(line, model, optimizer)
        if optimizer.paging.since is not None:
            progress.write(f"the device ran out of memory: {optimizer.paging}")
    return history


def peak_memory() -> int:
    """The most bytes that this process has held: on the GPU if it has used one, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def hold_out(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Splits into (to train on, held out), at random."""
    count = round(len(examples) * fraction)
    if count >= len(examples):
        raise ValueError(
            f"eval_fraction={fraction} leaves none of {len(examples)} examples to train on"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


def recompute(model: nn.Module, config: FinetuneConfig) -> AbstractContextManager[None]:
    """Gradient checkpointing inside the block, if the config wants it."""
    can = bool(getattr(model, "supports_gradient_checkpointing", False))
    wanted = config.quantize and can if config.checkpointing is None else config.checkpointing
    return gradient_checkpointing(model) if wanted else nullcontext()


def finetune(config: FinetuneConfig) -> Result:
    r"""Loads, quantizes, injects, trains and saves: see `FinetuneConfig`.

    Writes to `config.out`: the adapter (`save_adapter`), `config.json`, `metrics.jsonl` with a line a step; and `checkpoints/`
    until the run is finished. A run that was stopped and resumed, on the same machine and versions, gives the same bits as one
    that was not.

    Returns:
        A `Result` with the trained model, its tokenizer, the loss on the hold-out before and after, and every `Step`.

    Raises:
        ValueError, FileNotFoundError: from the config, the data or the model, or from what there is to resume, before anything
            is written. ValueError too if an adapter gets no gradient.
        FloatingPointError: a loss or a gradient became NaN or infinite.
        OSError: a checkpoint could not be written.
        minilora.resume.Interrupted: Ctrl-C or SIGTERM, after the checkpoint was written. A KeyboardInterrupt.

    Example:
        >>> data = tmp / "my.jsonl"
        >>> _ = data.write_text(8 * '{"prompt": "Where is it?", "completion": "Under the stone"}\n')
        >>> config = FinetuneConfig("smollm2", str(data), str(tmp / "a"), lr=2e-3, steps=2, batch_size=2, eval_fraction=0.1)
        >>> result = finetune(config)
        >>> result.eval_after < result.eval_before
        True
    """
    device = pick_device(config.device)
    out, facts = Path(config.out), json.loads(json.dumps(asdict(config)))
    keeper = Keeper(out, facts, every=config.save_every, keep=config.keep, resume=config.resume)
    torch.manual_seed(config.seed)  # dropout
    model, tokenizer = load_dense(config.model, device=device)
    examples = load_examples(
        config.data, tokenizer, config.max_length, learn_prompt=config.learn_prompt
    )
    keeper.check_examples(config.data, examples)
    training, held_out = hold_out(examples, config.eval_fraction, config.seed)
    if config.quantize:
        quantize_with_bar(model)
    inject(
        model,
        config.r,
        alpha=config.alpha,
        targets=config.targets,
        dropout=config.dropout,
        seed=config.seed,
    )
    pad = pad_id(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", json.dumps(facts, indent=2) + "\n")
    if held_out and not keeper.resumed:
        keeper.run.eval_before = evaluate(model, held_out, batch_size=config.batch_size, pad=pad)
    with recompute(model, config):
        history = train_with_bar(model, training, config, pad=pad, keeper=keeper)
    save_adapter(model, out)
    after = evaluate(model, held_out, batch_size=config.batch_size, pad=pad) if held_out else None
    clear(out)
    return Result(model, tokenizer, out, keeper.run.eval_before, after, history)
