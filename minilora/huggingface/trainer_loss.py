"""A Trainer whose loss never holds the logits of a whole batch."""

import warnings
from typing import Any

from torch import Tensor

from minilora.huggingface.causal_loss import causal_lm_loss, unwrapped
from minilora.huggingface.output_head import UnknownHeadError


class ChunkedLoss:
    """Mixed in before `transformers.Trainer`: the loss of a causal language model, in chunks.

    The loss and the gradients are those of the model's own loss, but for rounding. Logits are
    computed for the tokens alone that have a label, a chunk of them at a time: see
    `minilora.huggingface.causal_lm_loss`. It works with and without adapters, on the head too.

    The model's own loss is used, with all logits, where a model's head is not recognised (a warning
    says why), where a batch has no labels, and where an evaluation returns logits: for
    `compute_metrics` and `predict`.

    Raises:
        TypeError: the trainer computes a loss of its own, as `trl.SFTTrainer` does.
        ValueError: `compute_loss_func` or label smoothing, which need all logits, is set.

    Example:
        >>> import transformers
        >>> class Trainer(ChunkedLoss, transformers.Trainer):
        ...     pass
    """

    # transformers' own, of which nothing is imported here.
    args: Any
    accelerator: Any
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    label_smoother: Any

    _only_loss = False
    _warned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_order(type(self))
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError(
                "compute_loss_func and label_smoothing_factor need all logits: leave them out, or "
                "train without ChunkedLoss"
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch; with its outputs, unless the loss is all that is asked for."""
        if "labels" in inputs and (self._only_loss or not return_outputs):
            try:
                loss = self._chunked(model, inputs, num_items_in_batch)
            except UnknownHeadError as reason:
                self._warn(model, reason)
            else:
                return (loss, {}) if return_outputs else loss
        inherited: Any = super()
        return inherited.compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Trainer's step of an evaluation, which asks `compute_loss` for outputs in any case."""
        self._only_loss = prediction_loss_only
        try:
            inherited: Any = super()
            return inherited.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._only_loss = False

    def _chunked(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        # Trainer counts the tokens of all micro-batches of a step, on all processes.
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return causal_lm_loss(model, rest, inputs["labels"])
        total = causal_lm_loss(model, rest, inputs["labels"], reduction="sum")
        loss: Tensor = total / max(num_items_in_batch, 1)
        if self.args.average_tokens_across_devices:
            loss = loss * max(self.accelerator.num_processes, self.args.n_gpu)
        return loss

    def _warn(self, model: Any, reason: UnknownHeadError) -> None:
        if not self._warned:
            kind = type(unwrapped(model)).__name__
            warnings.warn(
                f"{kind} computes its own loss, with the logits of all tokens at once: {reason}",
                stacklevel=2,
            )
        self._warned = True


def _check_order(trainer: type[Any]) -> None:
    """Raises TypeError if a class of trainers has a loss that this one would replace."""
    order = trainer.__mro__
    after = order[order.index(ChunkedLoss) + 1 :]
    own = next((cls for cls in after if "compute_loss" in vars(cls)), None)
    if own is not None and own.__module__ != "transformers.trainer":
        raise TypeError(
            f"ChunkedLoss would replace {own.__name__}.compute_loss: leave ChunkedLoss out, or mix "
            f"it in behind {own.__name__} if that calls super().compute_loss"
        )
