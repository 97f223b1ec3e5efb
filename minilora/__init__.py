"""LoRA and QLoRA, small enough to read in an afternoon and exact enough to train with.

import minilora

minilora.quantize(model)          # 4-bit NormalFloat, double-quantized
minilora.inject(model, r=8)       # frozen W, trainable B A
...                               # train minilora.adapter_parameters(model)
minilora.save_adapter(model, "my-adapter")
minilora.merge(model)
"""

from minilora.checkpoint import load_adapter as load_adapter
from minilora.checkpoint import save_adapter as save_adapter
from minilora.functional import lora_linear as lora_linear
from minilora.functional import nf4_linear as nf4_linear
from minilora.merging import merge as merge
from minilora.merging import merge_report as merge_report
from minilora.modules import LoRALinear as LoRALinear
from minilora.modules import NF4Linear as NF4Linear
from minilora.optim import PagedAdamW as PagedAdamW
from minilora.plan import plan as plan
from minilora.recipe import FinetuneConfig as FinetuneConfig
from minilora.recipe import finetune as finetune
from minilora.retry import retry_on_oom as retry_on_oom
from minilora.surgery import adapter_parameters as adapter_parameters
from minilora.surgery import audit as audit
from minilora.surgery import disabled as disabled
from minilora.surgery import eject as eject
from minilora.surgery import inject as inject
from minilora.surgery import quantize as quantize
from minilora.weight import NF4Weight as NF4Weight
from minilora.weight import dequantize_nf4 as dequantize_nf4
from minilora.weight import quantize_nf4 as quantize_nf4

__version__ = "0.1.0"

__all__ = [
    "FinetuneConfig",
    "LoRALinear",
    "NF4Linear",
    "NF4Weight",
    "PagedAdamW",
    "adapter_parameters",
    "audit",
    "dequantize_nf4",
    "disabled",
    "eject",
    "finetune",
    "inject",
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
]
