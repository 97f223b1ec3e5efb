"""The same training step as users of minilora, of peft + bitsandbytes and of PyTorch write it.

Each function builds one side in this process: a model with adapters in training mode, and how its
loss is computed. What is timed of this library is in `minilora_side`, `minilora_loss` and
`minilora_training`.
"""

import contextlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One training step: batch x length tokens, in `dtype`.

    Attributes:
        forward_only: only the logits of all tokens, in eval mode: what a prompt costs.
    """

    dtype: str = "bfloat16"
    batch: int = 4
    length: int = 256
    checkpointing: bool = False
    dropout: float = 0.0
    rank: int = 8
    forward_only: bool = False

    def __str__(self) -> str:
        parts = [f"{self.batch} x {self.length}", self.dtype]
        parts += ["checkpointing"] * self.checkpointing
        parts += [f"dropout {self.dropout:g}"] * (self.dropout > 0)
        parts += ["forward alone"] * self.forward_only
        return ", ".join(parts)

    @property
    def alpha(self) -> int:
        return 2 * self.rank

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def loss_bound(self) -> float:
        """How far the losses of two sides may be apart.

        bfloat16 keeps 8 bits: with the roundings in another order, a loss of 5 moves by some 0.02.
        In float32 what differs are the 0.1 to 0.3 % of blocks whose absmax bitsandbytes' table
        rounds to the second-nearest of the 8-bit codes: some 0.001.
        """
        return 0.05 if self.dtype == "bfloat16" else 0.003

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Side:
    """A model that is ready to train.

    Attributes:
        loss: ids [batch, length] -> the mean loss of predicting every token after the first.
        context: what is on while it trains, entered once around all steps.
    """

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def own_loss(model: Any) -> Callable[[Tensor], Tensor]:
    """The loss that transformers computes from the logits of all tokens."""
    return lambda ids: model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


# -- minilora ------------------------------------------------------------------------------------


def minilora_loss(model: Any) -> Callable[[Tensor], Tensor]:
    """The mean loss of every token, without the logits of all tokens at once."""
    from minilora.huggingface import causal_lm_loss

    return lambda ids: causal_lm_loss(model, {"input_ids": ids}, labels=ids)


@contextlib.contextmanager
def minilora_training(model: Any, checkpointing: bool) -> Iterator[None]:
    """What `finetune` switches on around all steps of a run."""
    from minilora.huggingface import gradient_checkpointing
    from minilora.huggingface.efficient import efficient_training

    with contextlib.ExitStack() as stack:
        stack.enter_context(efficient_training(model))
        if checkpointing:
            stack.enter_context(gradient_checkpointing(model))
        yield


def minilora_side(folder: Path, case: Case, dtype: torch.dtype | None = None) -> Side:
    """minilora as its documentation uses it: quantized while it is read, LoRA on all linears."""
    import minilora

    config = minilora.NF4Config(compute_dtype=case.torch_dtype)
    dtype = dtype or case.torch_dtype
    model: Any = minilora.load(folder, quantization_config=config, dtype=dtype)[0]
    minilora.inject(model, case.rank, alpha=case.alpha, dropout=case.dropout)
    model.train()

    return Side(model, minilora_loss(model), lambda: minilora_training(model, case.checkpointing))


def minilora_float32_side(folder: Path, case: Case) -> Side:
    """The same with the residual stream in float32, as `prepare_model_for_kbit_training` has it."""
    return minilora_side(folder, case, torch.float32)


# -- the others ----------------------------------------------------------------------------------


def peft_side(folder: Path, case: Case, prepare: bool = True) -> Side:
    """peft + bitsandbytes as in their guides to QLoRA.

    `prepare_model_for_kbit_training` casts embeddings and norms to float32, and with them the
    residual stream; the products stay in the compute dtype.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=case.torch_dtype,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=case.torch_dtype, device_map="cpu"
    )
    if prepare:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=case.checkpointing
        )
    elif case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, _peft_config(LoraConfig, case)).train()
    return Side(model, own_loss(model))


def peft_same_dtype_side(folder: Path, case: Case) -> Side:
    """Without `prepare_model_for_kbit_training`: the dtypes are those of minilora's side."""
    return peft_side(folder, case, prepare=False)


def peft_autocast_side(folder: Path, case: Case) -> Side:
    """With `prepare_model_for_kbit_training` and autocast, as Trainer runs it with bf16=True."""
    side = peft_side(folder, case)
    side.context = lambda: torch.autocast("cpu", case.torch_dtype)
    return side


def dense_lora_side(folder: Path, case: Case) -> Side:
    """peft's LoRA on a model that is not quantized."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=case.torch_dtype)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, _peft_config(LoraConfig, case)).train()
    return Side(model, own_loss(model))


def full_side(folder: Path, case: Case) -> Side:
    """Training of every parameter of a model that is not quantized."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=case.torch_dtype).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Side(model, own_loss(model))


def _peft_config(config: Any, case: Case) -> Any:
    return config(
        r=case.rank,
        lora_alpha=case.alpha,
        lora_dropout=case.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


OURS, THEIRS = "minilora", "peft + bitsandbytes"

SAME_DTYPE = "peft + bitsandbytes, not prepared"

SIDES: dict[str, Callable[[Path, Case], Side]] = {
    OURS: minilora_side,
    THEIRS: peft_side,
    SAME_DTYPE: peft_same_dtype_side,
    "peft + bitsandbytes, autocast": peft_autocast_side,
    "minilora, float32 stream": minilora_float32_side,
    "dense LoRA (peft)": dense_lora_side,
    "full fine-tuning": full_side,
}

# The reference lines: another model is trained, so their losses and values are others.
REFERENCE_LINES = ("dense LoRA (peft)", "full fine-tuning")


def child_arguments(text: str) -> dict[str, Any]:
    """What a process of its own is given, from JSON: "folder" as a path, "case" as a `Case`."""
    arguments: dict[str, Any] = json.loads(text)
    arguments["folder"] = Path(arguments["folder"])
    if "case" in arguments:
        arguments["case"] = Case(**arguments["case"])
    return arguments


def import_libraries(side: str, folder: Path) -> None:
    """Imports what `side` needs for a model: what is resident afterwards is not the training's."""
    import importlib

    model_type = json.loads((folder / "config.json").read_text())["model_type"]

    # What a library warns of here is what its users are warned of.
    warnings.simplefilter("ignore")
    for name in ("transformers", f"transformers.models.{model_type}.modeling_{model_type}"):
        importlib.import_module(name)
    if side.startswith(OURS):
        names = ["minilora", "numba"]
    elif side.startswith(THEIRS):
        names = ["peft", "bitsandbytes"]
    else:
        names = ["peft"]
    for name in names:
        importlib.import_module(name)
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# -- what both sides have in common --------------------------------------------------------------


def adapters(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer name, A [r, in], B [out, r]) of minilora's and of peft's layers, under equal names."""
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.")
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield name, module.lora_A["default"].weight, module.lora_B["default"].weight
        elif "default" in getattr(module, "adapters", {}):
            lora = module.adapters["default"]
            yield name, lora.A, lora.B


@torch.no_grad()
def set_adapters(model: nn.Module, std_B: float = 0.0) -> int:
    """Gives every layer an adapter that depends on the layer's name alone; returns their number.

    A has a standard deviation of 1 / r; B is zero, as where training starts, or has `std_B`.
    """
    count = 0
    for name, A, B in adapters(model):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        A.copy_(torch.randn(A.shape, generator=generator) / A.shape[0])
        B.copy_(torch.randn(B.shape, generator=generator) * std_B)
        count += 1
    return count


def text_ids(folder: Path, batch: int, length: int, offset: int = 0) -> Tensor:
    """[batch, length] tokens of this repository's licence, which starts again at its end."""
    from transformers import AutoTokenizer

    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    positions = torch.arange(batch * length) + offset
    return tokens[positions % len(tokens)].view(batch, length)


def smollm2() -> Path:
    """The bundled model's folder, in bfloat16."""
    from minilora.huggingface.bundled import bundled_model_folder

    return bundled_model_folder()
