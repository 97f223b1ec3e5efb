r"""AdamW whose states can leave the device.

AdamW keeps two numbers per parameter, which are needed once per step. QLoRA (Dettmers et al. 2023,
arXiv:2305.14314, section 3) moves them to host memory when a long sequence makes the GPU run out,
and copies them back one page at a time for the update: "paged optimizers".

A step that runs out of memory loses nothing and repeats nothing, because it **first allocates
everything and then updates everything**. Until the last allocation nothing has changed, so a
failure is followed by another attempt with less memory. After it, only in-place operators run.

How it differs from other libraries. bitsandbytes builds on CUDA's unified memory, where the driver
pages on its own, and only tensors of at least 1e5 elements. torchao's CPU offload always pays for
the copies. This is plain PyTorch: paging starts when memory runs out, works for tensors of any
size, and changes no bit of the result.

Which bits: on the CPU those of `torch.optim.AdamW(foreach=False)`; `foreach=True` differs from it
in 16-bit dtypes. On a GPU the operators and their order are those of the default there,
`foreach=True`. `fused=True` rounds differently everywhere. `reference.py` has the
mathematics alone.

What it costs: without paging, nothing. With paging, each step copies every state to the device and
back. When it pays: LoRA's own states are small (r = 16 on a 7B model: about 320 MB in float32)
next to the activations. They matter for high ranks, trained embeddings, full fine-tuning of small
models, and for the peak of a long sequence.

Parameters that FSDP2 has sharded: each process updates the part that it has, and pages its states,
with the bits of one process that has it all. Nothing communicates.

The rest of the folder: `allocation` (what a step allocates), `buffers` (that memory, and the loop
over pages), `pages` (cutting parameters), `transfer` (copies), `placement` (where states live),
`shards`, `state_dict`, `checks`, and `retry` (a forward and backward that ran out of memory).
"""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from minilora.optim.allocation import allocate
from minilora.optim.buffers import Operands
from minilora.optim.checks import TORCH_OPTIONS, check_options, checked_group, trained_groups
from minilora.optim.pages import Group
from minilora.optim.paging import Paging
from minilora.optim.placement import PageMode, Placement
from minilora.optim.state_dict import copied_states


def update_page(group: Group, page: Operands) -> None:
    r"""One step of AdamW for all chunks of a page, in place, allocating nothing.

    `sqrt` and `+ eps` run over the whole scratch memory at once: both are correctly rounded, so the
    bits do not depend on how the elements are grouped.
    """
    lr = group["lr"]
    beta1, beta2 = group["betas"]

    # p <- p - lr wd p
    if group["weight_decay"] != 0:
        _multiply(page.params, 1 - lr * group["weight_decay"])

    # m <- b1 m + (1 - b1) g
    torch._foreach_lerp_(page.exp_avgs, page.grads, 1 - beta1)

    # v <- b2 v + (1 - b2) g^2
    _multiply(page.exp_avg_sqs, beta2)
    torch._foreach_addcmul_(page.exp_avg_sqs, page.grads, page.grads, 1 - beta2)

    # root = sqrt(v) / sqrt(1 - b2^t) + eps
    torch._foreach_copy_(page.scratch, page.exp_avg_sqs)
    page.flat_scratch.sqrt_()
    torch._foreach_div_(page.scratch, [(1 - beta2**t) ** 0.5 for t in page.steps])
    page.flat_scratch.add_(group["eps"])

    # p <- p - lr / (1 - b1^t) m / root
    step_sizes = [lr / (1 - beta1**t) for t in page.steps]
    torch._foreach_addcdiv_(page.params, page.exp_avgs, page.scratch, [-s for s in step_sizes])


def _multiply(tensors: list[Tensor], factor: float) -> None:
    # On the CPU foreach rounds the factor to bfloat16 or float16 first, which gives other bits.
    if tensors[0].is_cpu:
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


class PagedAdamW(torch.optim.Optimizer):
    r"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with states that can move to the host.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Parameters, states and `state_dict` are those of `torch.optim.AdamW`, bit for bit (tested on the
    CPU), wherever the states live; either optimizer loads the other's state dict. With float32
    states for 16-bit parameters, `torch.optim.AdamW` would round them when it loads them. Parameter
    groups, schedulers, clipping, hooks and closures work as in any `torch.optim.Optimizer`.

    Args:
        params: parameters or groups of them: floating point, dense, any shape. Sharded ones
            (DTensor, from `fully_shard`) have states that are sharded as they are; their state
            dict can also be loaded from whole tensors, of which each process takes its part.
        lr, betas, eps, weight_decay: Python numbers, as for `torch.optim.AdamW`.
        page: "on_oom": states live on the device until a step runs out of memory there, from then
            on in (pinned) host memory. "always": in host memory from the start. "never": on the
            device, and running out of memory is an error.
        state_dtype: None: states and arithmetic in the dtype of their parameter, as in
            `torch.optim.AdamW`. `torch.float32`: those of 16-bit parameters in float32, with twice
            the memory for states: p <- round(AdamW(float32(p), float32(g), m, v)), one rounding per
            step. float16 needs it: there eps=1e-8 is zero and g^2 vanishes for |g| < 5e-3.

    Attributes:
        paging: a `Paging`: since which step, pages, bytes moved, milliseconds.

    Raises:
        ValueError, TypeError: an option that is out of range or not supported (a tensor as lr,
            amsgrad, maximize), an eps that is zero in float16, a complex parameter or a sparse
            gradient, states that no longer fit their parameter, by name. Nothing has changed.
        torch.OutOfMemoryError: from `step`: not even the smallest pages fit. Nothing has changed;
            free memory and call `step` again.
        MemoryError: from `step` and `page_out`: not enough host memory for the states. No parameter
            has changed.

    Only `torch.OutOfMemoryError` starts paging. A CPU that runs out of memory raises a plain
    RuntimeError, and moving states within its own memory would not help.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = minilora.PagedAdamW(layer.parameters(), lr=1e-3, page="always")
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.paging.since, optimizer.paging.pages, optimizer.paging.bytes_in
        (1, 1, 64)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        page: PageMode = "on_oom",
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if page not in get_args(PageMode):
            raise ValueError(f'page={page!r}: must be one of "on_oom", "always", "never"')
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype={state_dtype}: must be None or torch.float32")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_options(options)
        self._placement = Placement(page, state_dtype)
        super().__init__(params, {**options, **TORCH_OPTIONS})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as `torch.optim.AdamW` does, or raises and adds nothing."""
        super().add_param_group(checked_group(param_group, self.defaults, self._placement))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient, or none; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        trained = trained_groups(self.param_groups, self.state, self._placement)

        # First everything is allocated. From then on nothing is, and nothing can fail.
        placement = self._placement
        buffers, new_states = allocate(trained, self.state, placement, self.page_out)

        if placement.prefers_host:
            placement.mark_start(self.state)
        placement.install(new_states, self.state, placement.prefers_host)

        steps = [self.state[p]["step"] for _, params in trained for p in params]
        if steps:
            torch._foreach_add_(steps, 1.0)

        with self.paging.timed(enabled=bool(placement.on_host)):
            for device_buffers in buffers:
                device_buffers.run(update_page, self.paging)
        return loss

    @property
    def page(self) -> PageMode:
        return self._placement.mode

    @property
    def state_dtype(self) -> torch.dtype | None:
        return self._placement.state_dtype

    @property
    def paging(self) -> Paging:
        return self._placement.paging

    def page_out(self) -> int:
        """Moves all states to host memory, where they stay until `page_in`; returns bytes freed.

        A state is dropped only after it was copied. If the host runs out of memory, what has moved
        stays there, the rest stays on the device, and `step` still works.

        Raises:
            MemoryError: not enough host memory.
            ValueError: the optimizer was created with page="never".
        """
        freed = self._placement.move_to_host(self.state)
        self.release()
        return freed

    def page_in(self) -> int:
        """Moves all states back to the device, or none; returns the number of bytes moved.

        The next time a step runs out of memory, they move to the host again.

        Raises:
            torch.OutOfMemoryError: not enough device memory; the states stay on the host.
            ValueError: the optimizer was created with page="always".
        """
        return self._placement.move_to_device(self.state)

    def release(self) -> None:
        """Returns memory cached by PyTorch's allocators to the parameters' devices."""
        for device in self._devices():
            self._placement.transfer(device).release()

    def in_use(self) -> str:
        """How much memory the parameters' devices have in use, for an error message."""
        return "; ".join(self._placement.transfer(device).in_use() for device in self._devices())

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(p.device for group in self.param_groups for p in group["params"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of `torch.optim.AdamW`, from any device.

        The states are copied to where `page` wants them. After an error the optimizer is unchanged.

        Raises:
            ValueError, TypeError: it belongs to other parameters or to an unsupported optimizer, or
                its states would be rounded.
            torch.OutOfMemoryError, MemoryError: not enough memory.
        """
        with copied_states(self, self._placement):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_placement": self._placement}
