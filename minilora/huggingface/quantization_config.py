"""NF4Config: what `from_pretrained` is given to quantize a model while it is loaded.

The quantizer that acts on it is in quantizer.py, which registers both with transformers: import
`NF4Config` from there, or as `minilora.NF4Config`.
"""

import copy
import re
from collections.abc import Collection
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from minilora.nf4 import DTYPES, check_format
from minilora.targets import Targets

# The name under which transformers finds the quantizer. It is never written to a file: `to_dict`
# leaves it out.
METHOD = "minilora"

# After a reload of this module, the new class takes the old one's place.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Asks `from_pretrained` to quantize a model while it is loaded, as `minilora.quantize` would.

    The model has the same weights, bit for bit, as one that is loaded with the same `dtype` and
    quantized afterwards. `save_pretrained` writes it as a folder in bitsandbytes' layout, which
    `minilora.load` reads, and transformers where bitsandbytes is installed.

    Args:
        targets, exclude: which layers, as for `quantize`.
        quant_type, block_size, double_quant: the format, as for `quantize_nf4`.
        compute_dtype: dtype of the products, or its name. Default: the input's.
        strict: as for `quantize`.

    Raises:
        ValueError, TypeError: there is no such format or dtype, or an option has a type that it
            cannot have. `from_pretrained` raises what
            `quantize` raises, before any weight is read, and a ValueError if the checkpoint does
            not hold all weights of the model or is damaged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=64))
        >>> model.save_pretrained(tmp / "dense")
        >>> config = minilora.NF4Config(compute_dtype=torch.bfloat16)
        >>> model = LlamaForCausalLM.from_pretrained(tmp / "dense", quantization_config=config)
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'NF4Linear'
    """

    def __init__(
        self,
        targets: Targets = "all-linear",
        *,
        exclude: Targets = (),
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        strict: bool = False,
    ) -> None:
        _check_types(quant_type, block_size, double_quant=double_quant, strict=strict)
        check_format(block_size, quant_type)
        _check_targets(targets=targets, exclude=exclude)
        self.quant_method = METHOD
        self.targets = targets
        self.exclude = exclude
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = _dtype(compute_dtype)
        self.strict = strict
        # What the config.json of a saved folder says, once there is a model.
        self._saved: dict[str, Any] | None = None

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A config from its arguments by name; `quant_method` is left out."""
        options = {key: value for key, value in config_dict.items() if key != "quant_method"}
        config = cls(**options)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Of a loaded model: the `quantization_config` that its folder gets, bitsandbytes'.

        Before, the arguments, without a `quant_method`: a config.json that has them is refused by
        transformers and by `minilora.load`, and never taken for that of a model in 4 bits.
        """
        if self._saved is not None:
            return copy.deepcopy(self._saved)
        plain = bool | int | str
        return {n: v if isinstance(v, plain) else str(v) for n, v in self._arguments().items()}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"NF4Config({arguments})"

    def _arguments(self) -> dict[str, Any]:
        hidden = ("quant_method", "_saved")
        return {name: value for name, value in vars(self).items() if name not in hidden}


def _check_types(quant_type: object, block_size: object, **switches: object) -> None:
    if not isinstance(quant_type, str):
        raise TypeError(f"quant_type={quant_type!r}: must be a string")
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size={block_size!r}: must be an integer")
    for option, value in switches.items():
        # Any string that is not empty, "no" too, would mean True.
        if not isinstance(value, bool):
            raise TypeError(f"{option}={value!r}: must be True or False")


def _check_targets(**options: object) -> None:
    for option, value in options.items():
        if isinstance(value, str | re.Pattern) or callable(value):
            continue
        if not isinstance(value, Collection) or isinstance(value, bytes):
            raise TypeError(
                f"{option}={value!r}: must be a name, a list of names, a compiled regular "
                "expression or a callable"
            )
        if odd := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"{option}={value!r}: a list holds names, not {odd[0]!r}")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in (None, *DTYPES):
        raise TypeError(f"compute_dtype={dtype!r}: choose one of {DTYPES}, or None")
    return found
