r"""The output head of a causal language model, and what the model does with its result.

A model computes logits = f(head(hidden)), where f is the identity, a factor (Cohere, Granite) or a
soft cap (Gemma 2). No list of architectures would be complete, so the model is asked: it runs on a
few tokens with a stand-in for its head, which returns a ramp of known numbers for each word. What
the model makes of the ramp shows f.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Any four words will do, where none is out of range.
_TOKENS = (0, 1, 2, 3)


class UnknownHeadError(ValueError):
    """The loss of this model cannot be computed behind its output head. The message says why."""


@dataclass(frozen=True)
class OutputHead:
    r"""How a causal language model computes its logits, c tanh(a head(hidden) / c).

    Attributes:
        layer: the output head, [..., H] -> [..., V].
        scale: a.
        softcap: c; None: there is no cap, and the logits are a head(hidden).
    """

    layer: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, z: Tensor) -> Tensor:
        """Returns what the model makes of z, the result of `layer`."""
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


# What was found out about a model: the layer that was its head, and the result.
_FOUND: WeakKeyDictionary[nn.Module, tuple[nn.Module | None, OutputHead | UnknownHeadError]]
_FOUND = WeakKeyDictionary()


def find_output_head(model: nn.Module) -> OutputHead:
    """Returns the output head of a causal language model.

    The first call for a model runs it on four tokens, twice, without gradients. Nothing of the
    model is changed, and no random number is drawn.

    Raises:
        UnknownHeadError: the model has no output head or does not call it, changes its logits in
            another way than by a factor and a soft cap, or its own loss has another term, such as
            that of a mixture's router.

    Example:
        >>> from transformers import CohereConfig, CohereForCausalLM
        >>> config = CohereConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     vocab_size=32, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ... )
        >>> find_output_head(CohereForCausalLM(config)).scale
        0.25
    """
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    known = _FOUND.get(model)
    if known is None or known[0] is not layer:
        known = _FOUND[model] = (layer, _find(model, layer))
    found = known[1]
    if isinstance(found, UnknownHeadError):
        raise UnknownHeadError(*found.args)
    return found


def hidden_states(model: nn.Module, head: OutputHead, inputs: Mapping[str, Any]) -> Tensor:
    """Returns what the output head would get, [batch, length, H], without calling it.

    Args:
        model: a causal language model, or what wraps one (DDP, torch.compile).
        head: see `find_output_head`.
        inputs: the arguments of a forward, without labels.
    """
    stand_in = _StandIn(head.layer, torch.zeros(1))
    with _in_place_of(head.layer, stand_in, model):
        model(**inputs)
    return stand_in.taken()


class _StandIn(nn.Module):
    """Keeps what the head would get, and returns the same number for each word instead.

    A model that looks at the head's weight, for its dtype, finds that of the head.
    """

    def __init__(self, head: nn.Module, output: Tensor) -> None:
        super().__init__()
        # Not as a child: a parameter of the model would appear twice.
        self.__dict__["_head"] = head
        self.__dict__["_output"] = output
        self.__dict__["_calls"] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_head"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        self._calls.append(hidden)
        output: Tensor = self._output.to(hidden.device)
        return output.expand(*hidden.shape[:-1], -1)

    def taken(self) -> Tensor:
        """What the head would have got; raises UnknownHeadError unless it was called once."""
        calls = self.__dict__["_calls"]
        if len(calls) != 1:
            raise UnknownHeadError(f"its output head was called {len(calls)} times in a forward")
        hidden: Tensor = calls[0]
        return hidden


@contextmanager
def _in_place_of(layer: nn.Module, stand_in: nn.Module, model: nn.Module) -> Iterator[None]:
    """Inside the block, `stand_in` is where the model has `layer`."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is layer
    ]
    for parent, name in places:
        parent._modules[name] = stand_in
    try:
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = layer


def _find(model: nn.Module, layer: nn.Module | None) -> OutputHead | UnknownHeadError:
    if layer is None:
        return UnknownHeadError("it has no output head that get_output_embeddings returns")
    try:
        with _evaluating(model), torch.no_grad():
            return _recognise(model, layer)
    except UnknownHeadError as unknown:
        return unknown
    except Exception as error:
        # Whatever a foreign model raises for four tokens of text.
        return UnknownHeadError(
            f"it cannot be run on a few tokens ({type(error).__name__}: {error})"
        )


def _recognise(model: nn.Module, layer: nn.Module) -> OutputHead:
    device = next(model.parameters()).device
    ids = torch.tensor([_TOKENS], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with _recording(layer) as calls:
        outputs = model(**inputs, labels=ids)
    if len(calls) != 1:
        raise UnknownHeadError(f"its output head was called {len(calls)} times in a forward")
    z, logits = calls[0], outputs.logits
    if z.shape != logits.shape or z.shape[:2] != ids.shape:
        raise UnknownHeadError(f"its head returns {tuple(z.shape)}, its logits are {logits.shape}")

    # Of both signs, and from a millionth to a million. In float64, for exact factors.
    half = torch.logspace(-6, 6, (z.shape[-1] + 1) // 2, dtype=torch.float64)
    ramp = torch.cat([half, -half])[: z.shape[-1]]
    stand_in = _StandIn(layer, ramp)
    with _in_place_of(layer, stand_in, model):
        made = model(**inputs).logits[0, 0].double().cpu()
    head = _fit(layer, ramp, made)

    if not torch.allclose(head.logits(z.float()), logits.float(), rtol=0.02, atol=0.02):
        raise UnknownHeadError("its logits are not those of its output head")
    if not _is_cross_entropy(outputs.loss, logits, ids):
        raise UnknownHeadError(
            "its loss is not the cross-entropy of the next token alone (a mixture of experts may "
            "add a term of its router)"
        )
    return head


def _is_cross_entropy(loss: Tensor, logits: Tensor, ids: Tensor) -> bool:
    """Whether a loss is the cross-entropy of the next token, computed in either dtype."""
    computed = (F.cross_entropy(z[0, :-1], ids[0, 1:]) for z in (logits.float(), logits))
    # A router's term is some 1e-4 of the loss, float32 rounds to 1e-7.
    return any(math.isclose(loss.item(), own.item(), rel_tol=1e-5) for own in computed)


def _fit(layer: nn.Module, ramp: Tensor, made: Tensor) -> OutputHead:
    """Returns the head whose scale and soft cap turn `ramp` into `made`."""
    smallest, largest = ramp.abs().argmin(), ramp.argmax()
    factors = made / ramp
    limit = _round(made[largest].item())
    line = OutputHead(layer, _round(factors[largest].item()))
    candidates = [line]
    if limit > 0:
        candidates.append(OutputHead(layer, _round(factors[smallest].item()), limit))
    for head in candidates:
        if torch.allclose(head.logits(ramp), made, rtol=1e-5, atol=0):
            return head
    raise UnknownHeadError("it changes its logits in another way than by a factor and a soft cap")


def _round(x: float) -> float:
    """The number of few digits that x is in float32, in which a model may have computed; or x."""
    short = float(f"{x:.4g}")
    return short if math.isclose(short, x, rel_tol=2e-7) else x


@contextmanager
def _recording(layer: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block every part of the model is in eval mode, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
