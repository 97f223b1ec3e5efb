"""LoRA and QLoRA, small enough to read in an afternoon and exact enough to train with.

import minilora

minilora.quantize(model)          # 4-bit NormalFloat, double-quantized
minilora.inject(model, r=8)       # frozen W, trainable B A
...                               # train minilora.adapter_parameters(model)
minilora.save_adapter(model, "my-adapter")
minilora.merge(model)

The core (the files directly in this folder) is imported here. A name of a subpackage is imported
when it is first used, so the core works without any of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from minilora.functional import lora_linear as lora_linear
from minilora.functional import nf4_linear as nf4_linear
from minilora.layers import NF4Linear as NF4Linear
from minilora.layers import QLoRALinear as QLoRALinear
from minilora.lora import LoRA as LoRA
from minilora.lora import LoRALinear as LoRALinear
from minilora.merging import merge as merge
from minilora.nf4 import NF4Weight as NF4Weight
from minilora.nf4 import dequantize_nf4 as dequantize_nf4
from minilora.nf4 import quantize_nf4 as quantize_nf4
from minilora.surgery import adapter_parameters as adapter_parameters
from minilora.surgery import audit as audit
from minilora.surgery import disabled as disabled
from minilora.surgery import eject as eject
from minilora.surgery import inject as inject
from minilora.surgery import quantize as quantize
from minilora.surgery import use as use

if TYPE_CHECKING:
    from minilora.files import load_adapter as load_adapter
    from minilora.files import save_adapter as save_adapter
    from minilora.huggingface import load as load
    from minilora.huggingface.quantized_folder import save_quantized as save_quantized
    from minilora.huggingface.quantizer import NF4Config as NF4Config
    from minilora.losses import linear_cross_entropy as linear_cross_entropy
    from minilora.optim import PagedAdamW as PagedAdamW
    from minilora.optim import retry_on_oom as retry_on_oom
    from minilora.reports import merge_report as merge_report
    from minilora.reports import plan as plan
    from minilora.training import FinetuneConfig as FinetuneConfig
    from minilora.training import finetune as finetune

# The package takes it from here; CITATION.cff repeats it.
__version__ = "0.1.0"

# Name -> the subpackage, or the module in it, that it is imported from when it is first used.
_SUBPACKAGE = {
    "load_adapter": "files",
    "save_adapter": "files",
    "load": "huggingface",
    "save_quantized": "huggingface.quantized_folder",
    "NF4Config": "huggingface.quantizer",
    "linear_cross_entropy": "losses",
    "PagedAdamW": "optim",
    "retry_on_oom": "optim",
    "merge_report": "reports",
    "plan": "reports",
    "FinetuneConfig": "training",
    "finetune": "training",
}

__all__ = [
    "FinetuneConfig",
    "LoRA",
    "LoRALinear",
    "NF4Config",
    "NF4Linear",
    "NF4Weight",
    "PagedAdamW",
    "QLoRALinear",
    "adapter_parameters",
    "audit",
    "dequantize_nf4",
    "disabled",
    "eject",
    "finetune",
    "inject",
    "linear_cross_entropy",
    "load",
    "load_adapter",
    "lora_linear",
    "merge",
    "merge_report",
    "nf4_linear",
    "plan",
    "quantize",
    "quantize_nf4",
    "retry_on_oom",
    "save_adapter",
    "save_quantized",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _SUBPACKAGE:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"minilora.{_SUBPACKAGE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
