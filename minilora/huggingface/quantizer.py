"""NF4Config: `from_pretrained` reads a model's weights and quantizes them as they arrive.

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=minilora.NF4Config())

transformers asks a *quantizer* what to do with each tensor of a checkpoint. This one takes the
linear layers that `minilora.quantize` would take and makes each an `NF4Linear` as soon as its
weight has been read. There is never more than one dense weight in memory, beside those that stay
dense.

The same quantizer reads folders whose layers are in 4 bits already, in bitsandbytes' layout
(`minilora.load` asks for it), and that is what `save_pretrained` writes. A folder under a method
name of our own would be loaded as random weights wherever minilora has not been imported.

Importing this file registers the quantizer and `NF4Config` with transformers, whose base classes
they need. The two files are the only ones that import transformers at their top, and are themselves
imported on first use.
"""

import contextlib
import copy
import os
import re
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer

from minilora.checks import check_can_be_quantized, warn_of_unreached
from minilora.files.bitsandbytes import from_tensors, quantized_layers
from minilora.guards import guard
from minilora.huggingface.checkpoint_files import (
    DENSE,
    check_finite,
    drop_pages,
    own_memory,
    stored_dtypes,
)
from minilora.huggingface.quantization_config import METHOD as METHOD
from minilora.huggingface.quantization_config import NF4Config as NF4Config
from minilora.huggingface.quantized_folder import quantization_config_of, state_dict_of
from minilora.huggingface.unplaced import is_new_head, unplaced_tensors
from minilora.layers import NF4Linear, become, check_quantizable
from minilora.lora import LoRALayer
from minilora.nf4 import NF4Weight, quantize_nf4
from minilora.targets import kept_in_float32, select_layers

# Of a weight in 4 bits, by bitsandbytes' names: the weight first, and then its constants.
_STORED = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)

# Bytes of weights after which the pages that they were read from are let go.
_DROP_EVERY = 64 << 20

# Some models initialize their layers' weights from outside. transformers leaves those alone that
# say that they have been loaded, which every 4-bit weight has been.
NF4Weight._is_hf_initialized = True  # type: ignore[attr-defined]

# After a reload of this module, the new class takes the old one's place.
AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


class _Operation(ConversionOps):  # type: ignore[misc]
    """What happens to the tensors of one layer when they have been read."""

    def __init__(self, quantizer: "NF4Quantizer") -> None:
        # By this name transformers knows that it must not cast what it hands over.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> "_Operation":
        # transformers copies the operation for every tensor, and all have to report to one place.
        return self


class _Quantize(_Operation):
    """Dense weights, by their full names, become 4-bit layers; what else comes along stays."""

    def convert(self, input_dict: dict[str, Any], model: Any, **kwargs: Any) -> dict[str, Any]:
        return self.hf_quantizer.quantize_tensors(model, input_dict, kwargs["missing_keys"])


class _Deserialize(_Operation):
    """The tensors that bitsandbytes stores of one weight, by the names of _STORED."""

    def convert(
        self, input_dict: dict[str, Any], model: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        missing = kwargs["missing_keys"]
        return self.hf_quantizer.read_tensors(model, full_layer_name, input_dict, missing)


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads, trains and saves a model with an `NF4Config`.

    Errors inside transformers' conversion of a tensor end in its log. They are collected here and
    raised when all tensors have been read, instead of a model.
    """

    is_trainable = True

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        # A copy: one config may load several models.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._chosen: set[str] = set()
        self._as_stored: set[str] = set()
        self._faults: dict[str, str] = {}
        self._missing: set[str] = set()
        self._files: set[str] = set()
        self._stored: set[str] = set()
        self._unplaced: list[str] = []
        self._held = 0
        self._float32: tuple[str, ...] = ()
        self._model: Any = None

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer may train the model: it has adapters.

        Without any, embeddings and norms would be trained silently.
        """
        model = self._model and self._model()
        return model is not None and any(isinstance(m, LoRALayer) for m in model.modules())

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be copied. Its model can, and the copy of a model holds this one.
        return {**vars(self), "_model": self._model and self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember(state["_model"])

    def _remember(self, model: Any) -> None:
        # Not the model itself: a cycle would keep its memory until a collection.
        self._model = None if model is None else weakref.ref(model)

    # Before anything is read

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a device map that offloads to the disk."""
        places = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" in places:
            raise ValueError("device_map places layers on the disk, where 4-bit layers cannot be")

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, from which `device_map="auto"` estimates what fits where."""
        config = self.quantization_config
        bits_per_block = 8 + 32 / 256 if config.double_quant else 32
        return float((4 + bits_per_block / config.block_size) / 8)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Decides which layers are quantized, and raises unless all of them can be."""
        files = kwargs.get("checkpoint_files") or ()
        dtypes = stored_dtypes(files)
        # The hub's cache has links.
        self._stored = set(dtypes)
        self._files = {os.path.realpath(file) for file in files}
        if self.pre_quantized:
            self._chosen = quantized_layers(dtypes)
            if not self._chosen:
                raise ValueError("the model's config says that it is in 4 bits, but no layer is")
            # As transformers casts it: what a model keeps in float32 whatever its dtype.
            plan = model._get_dtype_plan(model.dtype)
            self._float32 = tuple(name for name, kept in plan.items() if kept == torch.float32)
            return model

        # transformers would cast the codes of another method's weights to floats.
        codes = [n for n, dtype in dtypes.items() if n.endswith(".weight") and dtype not in DENSE]
        if codes:
            stored = f"{codes[0]} is stored as {dtypes[codes[0]]}"
            raise ValueError(
                f"{stored}: the checkpoint is quantized already, in a way unknown here"
            )

        config = self.quantization_config
        shared, embeddings = tied_layers(model)
        kept = embeddings | kept_in_float32(model)
        chosen = select_layers(model, config.targets, config.exclude, kept)
        check_can_be_quantized(model, chosen)
        if tied := [name for name in chosen if name in shared]:
            reason = f"{tied[0]} shares its weight with another layer and would be untied"
            raise ValueError(f"{reason}: leave it out with exclude=")
        warn_of_unreached(model, config.targets, config.strict, "quantized", stacklevel=2)
        self._chosen = set(chosen)
        self._read_as_stored(model, {n for n in chosen if dtypes.get(f"{n}.weight") == "BF16"})
        return model

    def _read_as_stored(self, model: Any, layers: set[str]) -> None:
        """Lets transformers hand over these bfloat16 weights without a copy of each in float32."""
        if model.dtype == torch.float32:
            self._as_stored = layers
            plan = {rf"^{re.escape(name)}\.weight$": torch.bfloat16 for name in layers}
            usual = model._get_dtype_plan
            model._get_dtype_plan = lambda dtype: {**plan, **usual(dtype)}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Finds the stored tensors that the model has no place for, by transformers' renaming."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        # `load` reads what is in 4 bits, and accepts no such tensor at all.
        if not self.pre_quantized:
            self._unplaced = unplaced_tensors(model, conversions, self._stored)
        return conversions

    # While tensors are read

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is a weight that is, or becomes, a 4-bit one."""
        layer, _, name = param_name.rpartition(".")
        return name == "weight" and layer in self._chosen

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(list(_STORED), "weight", [_Deserialize(self)])]

    def quantize_tensors(
        self, model: Any, tensors: dict[str, Any], missing: set[str]
    ) -> dict[str, Any]:
        """Quantizes the weights of chosen layers; returns the other tensors."""
        self._missing = missing
        rest: dict[str, Any] = {}
        config = self.quantization_config
        form = config.block_size, config.double_quant, config.quant_type
        for name, found in tensors.items():
            weight = found[0] if isinstance(found, list) else found
            if not self.param_needs_quantization(model, name):
                rest[name] = found
                continue
            try:
                quantized = quantize_nf4(weight, *form)
                if name.removesuffix(".weight") in self._as_stored:
                    quantized = replace(quantized, dtype=torch.float32)
                self._place(model, name, quantized)
            except (TypeError, ValueError) as error:
                self._faults[name] = f"{name}: {error}"
            missing.discard(name)
            self._held += weight.nbytes
        if self._held >= _DROP_EVERY:
            drop_pages(self._files)
            self._held = 0
        return rest

    def read_tensors(
        self, model: Any, name: str, tensors: dict[str, Any], missing: set[str]
    ) -> dict[str, Any]:
        """Makes a 4-bit layer of what bitsandbytes stored; returns a dense tensor as it is."""
        self._missing = missing
        found = {key: t[0] if isinstance(t, list) else t for key, t in tensors.items()}
        parameter = model.get_parameter_or_buffer(name)
        if found.keys() == {"weight"}:
            dense = found["weight"]
            if dense.shape == parameter.shape and dense.is_floating_point():
                return {"weight": dense.to(self._dense_dtype(name, parameter))}
            stored = f"{dense.dtype} of shape {tuple(dense.shape)}"
            fault = f"{name} is {stored}, the model needs floats of {tuple(parameter.shape)}"
            self._faults[name] = fault
        else:
            try:
                self._place(model, name, from_tensors("", found))
            except (TypeError, ValueError) as error:
                self._faults[name] = f"{name}: {error}"
        missing.discard(name)
        return {}

    def _dense_dtype(self, name: str, parameter: Tensor) -> torch.dtype:
        kept = any(re.search(pattern, name) for pattern in self._float32)
        return torch.float32 if kept else parameter.dtype

    def _place(self, model: Any, name: str, weight: NF4Weight) -> None:
        """Makes the layer on the meta device that a weight belongs to an NF4Linear."""
        layer_name = name.rpartition(".")[0]
        layer = model.get_submodule(layer_name)
        check_quantizable(layer, layer_name)
        empty = layer.weight
        if type(empty) is not nn.Parameter:
            raise ValueError(f"it is sharded ({type(empty).__name__}): quantize, and shard then")
        if weight.shape != empty.shape:
            sizes = f"{tuple(weight.shape)}, the model needs {tuple(empty.shape)}"
            raise ValueError(f"it has the shape {sizes}")

        new = NF4Linear(weight, None, self.quantization_config.compute_dtype).to(weight.device)
        become(layer, new)
        # Or transformers would initialize it.
        layer.__dict__["_is_hf_initialized"] = True

    # When all have been read

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Raises ValueError unless every weight has been read; then the model is complete."""
        self._check_complete(model)
        vars(model).pop("_get_dtype_plan", None)
        own = [c for c in model._weight_conversions if not self._is_own(c)]
        model._weight_conversions = own
        own_memory(model)
        check_finite(model)
        guard(model)
        self._remember(model)
        config = self.quantization_config
        # Not every model can be saved, and this is no place to say so.
        with contextlib.suppress(ValueError):
            config._saved = quantization_config_of(model)
        if self.pre_quantized:
            weight = next(m.weight for m in model.modules() if isinstance(m, NF4Linear))
            config.quant_type, config.block_size = weight.quant_type, weight.block_size
            config.double_quant = weight.double_quantized
        return model

    @staticmethod
    def _is_own(conversion: Any) -> bool:
        return any(isinstance(op, _Deserialize) for op in getattr(conversion, "operations", ()))

    def _check_complete(self, model: Any) -> None:
        """transformers fills what is missing with random numbers, and says so in its log."""
        if self._faults:
            fault = next(iter(self._faults.values()))
            raise ValueError(f"{fault}{_and_more(self._faults)}")

        # Of a folder in 4 bits they are names in its files, and not always the model's.
        chosen = set() if self.pre_quantized else self._chosen
        dense = {n for n in chosen if type(model.get_submodule(n)) is not NF4Linear}
        missing = {f"{name}.weight" for name in dense} | self._missing
        patterns = model._keys_to_ignore_on_load_missing or ()
        missing = {n for n in missing if not any(re.search(p, n) for p in patterns)}
        missing = {n for n in missing if not is_new_head(model, n)}
        # A weight that is tied to one that was read has been read.
        named = model.named_parameters(remove_duplicate=False)
        present = {id(p) for name, p in named if name not in missing}
        missing = {n for n in missing if id(model.get_parameter_or_buffer(n)) not in present}
        if missing:
            first = min(missing)
            raise ValueError(
                f"the checkpoint has no {first}{_and_more(missing)}, which the model "
                f"({type(model).__name__}) needs: it is incomplete, or another model's"
            )
        if self._unplaced:
            raise ValueError(
                f"the model ({type(model).__name__}) has no place for {self._unplaced[0]}"
                f"{_and_more(self._unplaced)} of the checkpoint: its config is another model's, or "
                "has too few layers. To do without these tensors, load the model dense and call "
                "minilora.quantize"
            )

    # Saving, and merging

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the tensors in bitsandbytes' layout."""
        self.quantization_config._saved = quantization_config_of(model)
        return state_dict_of(model), {}


def tied_layers(model: Any) -> tuple[set[str], set[str]]:
    """The layers whose weight has several names, and those of them that have an embedding's.

    transformers ties weights when they have been read; before, there are only these names.
    """
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)

    tied = [{key.rpartition(".")[0] for key in keys} for keys in groups.values()]
    names = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    embeddings = [layers for layers in tied if layers & names]
    return set().union(*tied), set().union(*embeddings)


def _and_more(found: Any) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
