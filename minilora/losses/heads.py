"""An output head that is applied to a chunk of tokens at a time, and its gradients."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minilora.losses.kernels import kernels_for
from minilora.losses.softmax import softmax_cross_entropy_

# Rows of the weight's gradient that are summed at once.
_ROWS = 4096


class Options(NamedTuple):
    """How the loss follows from the logits; the arguments of `linear_cross_entropy`."""

    ignore_index: int
    scale: float
    softcap: float | None
    chunk: int


class Head(Protocol):
    """What `losses_in_chunks` needs of an output head.

    Attributes:
        gradient: whether gradients are asked for, and the logits have one.
    """

    gradient: bool

    def logits(self, h: Tensor) -> Tensor:
        """Returns the logits [n, V] of a chunk [n, H], which the caller may overwrite."""

    def backward(self, g: Tensor) -> Tensor:
        """Returns the gradient of the last chunk from that of its logits; adds up the head's."""


def losses_in_chunks(
    head: Head, hidden: Tensor, labels: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each token [N], and the gradient of their sum with respect to `hidden`.

    Tokens that are ignored have zeros, and never reach the head.

    Args:
        head: the output head; it holds its own gradients afterwards.
        hidden: [N, H].
        labels: [N].

    Without gradients (`Head.gradient`) that of `hidden` is empty, or zeros.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_zeros(len(labels), dtype=wide)
    dhidden = torch.zeros_like(hidden) if head.gradient else hidden.new_empty(0)

    kept = (labels != options.ignore_index).nonzero()[:, 0]
    # Chunks of equal size: a short last one would read the whole weight too.
    chunks = -(-len(kept) // options.chunk)
    for rows in kept.tensor_split(chunks) if chunks else ():
        z = head.logits(hidden[rows])
        found = softmax_cross_entropy_(z, labels[rows], options.scale, options.softcap)
        losses[rows] = found.to(losses.dtype)
        if head.gradient:
            dhidden[rows] = head.backward(z).to(hidden.dtype)
        del z
    return losses, dhidden


class WeightHead:
    """z = h W^T + b with a dense weight.

    Args:
        weight: W [V, H].
        bias: b [V] or None.
        rows: most rows of h.
        gradient: whether `backward` will be called.
        needs_dW, needs_db: which gradients it adds up.

    Attributes:
        dW, db: these gradients, in float32 or wider; empty if they are not needed.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        gradient: bool,
        needs_dW: bool,
        needs_db: bool,
    ) -> None:
        self.weight, self.bias, self.gradient = weight, bias, gradient
        wide = torch.promote_types(weight.dtype, torch.float32)
        V = len(weight)
        self.dW = torch.zeros_like(weight, dtype=wide) if needs_dW else weight.new_empty(0)
        self.db = weight.new_zeros(V if needs_db else 0, dtype=wide)
        # One buffer for all chunks: new memory would be mapped page by page.
        self._z = weight.new_empty(rows, V)
        self._kernels = kernels_for("dense", weight)

    def logits(self, h: Tensor) -> Tensor:
        self._h, z = h, self._z[: len(h)]
        if self.bias is None:
            return self._kernels.product(h, self.weight, z)  # type: ignore[no-any-return]
        return torch.addmm(self.bias, h, self.weight.T, out=z)

    def backward(self, g: Tensor) -> Tensor:
        if len(self.db):
            self.db += g.sum(0, dtype=self.db.dtype)
        if len(self.dW):
            self._add_product(g)
        return self._kernels.product_backward(g, self.weight)  # type: ignore[no-any-return]

    def _add_product(self, g: Tensor) -> None:
        """dW += g^T h. With g in 16 bits, a few rows at a time, since the product is then new."""
        if self.dW.dtype == g.dtype:
            self.dW.addmm_(g.T, self._h)
            return
        for start in range(0, len(self.dW), _ROWS):
            some = slice(start, start + _ROWS)
            self.dW[some] += g[:, some].T @ self._h


class LayerHead:
    """A head that is called as a layer, so that whatever it computes takes part.

    Args:
        layer: [n, H] -> [n, V].
        parameters: those that require a gradient.
        gradient: whether `backward` will be called.

    Attributes:
        sums: the gradients of the parameters, in float32 or wider.
    """

    def __init__(
        self,
        layer: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        gradient: bool,
    ) -> None:
        self.layer, self.parameters, self.gradient = layer, parameters, gradient
        wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        pairs = zip(parameters, wide, strict=True)
        self.sums = [torch.zeros_like(p, dtype=dtype) for p, dtype in pairs] if gradient else []

    def logits(self, h: Tensor) -> Tensor:
        self._h = h.detach().requires_grad_(self.gradient)
        with torch.set_grad_enabled(self.gradient):
            z = self.layer(self._h)
        self._check(z)
        # A layer may detach what it returns.
        self.gradient = z.requires_grad
        if not self.gradient:
            return z
        # The caller overwrites a copy, since the layer may need its output in the backward.
        self._z = z
        return z.detach().clone()

    def _check(self, z: object) -> None:
        rows, name = len(self._h), type(self.layer).__name__
        if not isinstance(z, Tensor) or not z.is_floating_point():
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"the head {name} returned {kind}: it must return logits [n, V]")
        if z.dim() != 2 or len(z) != rows:
            raise ValueError(
                f"the head {name} returned {tuple(z.shape)} for {tuple(self._h.shape)}: it must "
                f"return logits [n, V] = [{rows}, V]"
            )

    def backward(self, g: Tensor) -> Tensor:
        inputs = (self._h, *self.parameters)
        dh, *gradients = torch.autograd.grad(self._z, inputs, g, materialize_grads=True)
        # Before the next chunk is computed.
        del self._z
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += gradient
        return dh
