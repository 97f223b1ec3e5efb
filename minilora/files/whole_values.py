"""The values that an adapter's files hold for parameters of the model itself."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files.adapter_folder import SavedAdapter
from minilora.files.peft_values import ConfigReader, saves
from minilora.files.text import shown
from minilora.lora import LoRALayer
from minilora.sharded import full
from minilora.whole import places, whole_parameters


class WholeValues:
    """The parameters that files train whole, checked against a model that is not changed.

    Args:
        model: the model.
        names: `canonical_names(model)`.
        saved: what the files hold.
        config: what the config says.
        swapped: whether the adapter is in the model already, and gets other values.

    Attributes:
        values: name of the parameter in the model -> value, in its dtype, on its device.
        changed: whether a value is not that of the base.
        problems: what does not fit, with names.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        saved: SavedAdapter,
        config: ConfigReader,
        swapped: bool,
    ) -> None:
        self.values: dict[str, Tensor] = {}
        self.changed = False
        self.problems: list[str] = []
        self._model, self._saved, self._config = model, saved, config
        # A wrapper's named_parameters may leave its own part out.
        held = places(model)
        self._paths = {names[path]: path for path in held}
        self._parameters = {names[p]: getattr(module, n) for p, (module, n) in held.items()}
        self._buffers = {
            names[f"{path}.{name}" if path else name]: buffer
            for path, module in model.named_modules(remove_duplicate=False)
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
        self._ours = {id(p) for layer in layers for p in layer.adapters.parameters()}
        self._embeddings = _embeddings(model)

        for name, tensor in saved.whole.items():
            if problem := self._add(name, tensor):
                self.problems.append(problem)
        self._check_nested(names[path] for path, _ in model.named_modules(remove_duplicate=False))
        self._check_shared(swapped)
        self._check_missing({names[path] for path in whole_parameters(model)} if swapped else ())

    def _add(self, name: str, tensor: Tensor) -> str | None:
        """Takes a value; or returns why it does not fit."""
        if name in self._buffers:
            return self._buffer_mismatch(name, tensor)
        if problem := self._mismatch(name, tensor):
            return problem

        p = self._parameters[name]
        value = tensor.to(device=p.device, dtype=p.dtype, copy=True)
        if not bool(value.isfinite().all()):
            return f"{name}: the file has NaN, or what is infinite in {p.dtype}"
        # A file in fewer bits is that of the same base in fewer bits.
        base = full(p).detach()
        same = torch.equal(value, base) or torch.equal(base.to(tensor), tensor)
        if self._is_trained(name, changed=not same):
            self.changed = self.changed or not same
            self.values[self._paths[name]] = value
            for other in self._tied_with(name):
                self.values.setdefault(self._paths[other], value)
        elif not same and self._saved.trained is not None and self._config.saves(name):
            return f"{name} is not that of the base that the adapter was trained on"
        elif not same:
            return f"the file has {name}, which modules_to_save does not name"
        return None

    def _is_trained(self, name: str, changed: bool) -> bool:
        if self._saved.trained is not None:
            return name in self._saved.trained
        if self._config.saves(name):
            return True
        owner, _, end = name.rpartition(".")
        if end == "bias" and self._config.bias != "none":
            return self._config.bias == "all" or owner in self._saved.layers
        # PEFT saves embeddings with an adapter, and those that have got more rows.
        if changed and id(self._parameters[name]) in self._embeddings:
            return True
        return self._config.ties_weights and any(map(self._config.saves, self._same(name)))

    def _tied_with(self, name: str) -> list[str]:
        """Other names of a parameter that PEFT changes with it: none of one that it copied.

        Where `ensure_weight_tying` ties the copies, as it not always does, the file holds them all.
        """
        if self._saved.trained is not None or self._config.saves(name):
            return []
        return [other for other in self._same(name) if other != name]

    def _same(self, name: str) -> list[str]:
        """All names of a parameter."""
        p = self._parameters[name]
        return [other for other, found in self._parameters.items() if found is p]

    def _mismatch(self, name: str, tensor: Tensor) -> str | None:
        if name not in self._parameters:
            return f"the model has no parameter {shown(name)}"
        p = self._parameters[name]
        if id(p) in self._ours:
            return f"{name} is a parameter of an adapter, not of the model"
        if not p.is_floating_point():
            return f"{name} is a part of a quantized weight, and cannot be trained whole"
        if p.shape != tensor.shape:
            return f"{name}: the file has {list(tensor.shape)}, the model {list(p.shape)}"
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            return f"{name}: the file has {tensor.dtype}"
        if p.is_meta:
            return f"{name} is on the meta device and has no values: load the model first"
        return None

    def _buffer_mismatch(self, name: str, tensor: Tensor) -> str | None:
        """PEFT saves the buffers of a module too."""
        buffer = self._buffers[name]
        same = buffer.shape == tensor.shape and not buffer.is_meta
        if same and torch.equal(tensor.to(buffer.device, buffer.dtype), buffer):
            return None
        return f"the file has other values for {name}, a buffer and no parameter: it was not frozen"

    def _check_nested(self, modules: Iterable[str]) -> None:
        """PEFT saves a module inside of one that it saves whole, and cannot read it again."""
        entries = tuple(self._config.modules_to_save)
        copied = sorted({m for m in modules if m.endswith(entries)}) if entries else []
        for outer, inner in itertools.combinations(copied, 2):
            # In minilora's files they are one copy.
            if inner.startswith(f"{outer}.") and self._saved.base is None:
                pair = f"{shown(outer)} and {shown(inner)} inside of it"
                self.problems.append(f"modules_to_save means {pair}: which to use is not clear")

    def _check_shared(self, swapped: bool) -> None:
        """One parameter cannot have two values where it has one place."""
        places: dict[Any, tuple[str, Tensor]] = {}
        names = {path: name for name, path in self._paths.items()}
        for path, value in self.values.items():
            owner, _, end = path.rpartition(".")
            p = self._parameters[names[path]]
            place: Any = id(p) if swapped else (id(self._model.get_submodule(owner)), end)
            first, expected = places.setdefault(place, (names[path], value))
            if not torch.equal(expected, value):
                self.problems.append(f"{first} is shared, and the file has two values for it")

    def _check_missing(self, trained: Iterable[str]) -> None:
        """What the config, the files or the model train whole, and the files do not have."""
        whole = self._saved.whole
        for module in self._config.modules_to_save:
            # PEFT names the usual heads, whether the model has them or not.
            here = any(saves(module, name) for name in self._parameters)
            if here and not any(saves(module, name) for name in whole):
                missing = f"{shown(module)}, which modules_to_save names"
                self.problems.append(f"the file has nothing for {missing}")
        for name in sorted(set(self._saved.trained or ()) - whole.keys()):
            self.problems.append(
                f"the file has nothing for {shown(name)}, which it says was trained"
            )
        given = {name for name, path in self._paths.items() if path in self.values}
        for name in sorted(set(trained) - given - whole.keys()):
            missing = f"{name}, which the model trains as a whole"
            self.problems.append(f"the file has nothing for {missing}")


def _embeddings(model: Any) -> set[int]:
    """The ids of the weights of a transformers model's input and output embeddings."""
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter, lambda: None)()
        except (NotImplementedError, AttributeError):
            continue
        weight = getattr(module, "weight", None)
        found |= {id(weight)} if isinstance(weight, nn.Parameter) else set()
    return found
