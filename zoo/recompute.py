"""Trade a little arithmetic in the backward pass for the tensors that autograd would otherwise keep."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(
    function: Callable[..., torch.Tensor], *args: torch.Tensor, norms: Sequence[nn.Module] = ()
) -> torch.Tensor:
    """Return ``function(*args)``; autograd keeps `args` only and calls `function` again in the backward pass.

    The second call stops as soon as the last saved tensor is back, so that a closing matrix product is not repeated.
    `function` must not draw random numbers, and `norms` names the batch norms that it calls: their running statistics
    move once, not twice. Without autograd, under `torch.compile` (whose partitioner decides this itself) and under
    `torch.func` transforms (which allow no saved-tensor hooks) it is a plain call.
    """
    if is_plain():
        return function(*args)
    context = {"context_fn": lambda: (contextlib.nullcontext(), _Still(norms))} if norms else {}
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **context
    )


def is_plain() -> bool:
    """Whether the plain operators must run: autograd is off, or a compiler, tracer or transform watches instead."""
    return (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def checkpoint_block(block: nn.Module, *args: Any) -> Any:
    """Call a block, which is called again in the backward pass; its batch norms' running statistics move once."""
    if is_plain():
        return block(*args)
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    context = {"context_fn": lambda: (contextlib.nullcontext(), _Still(norms))} if norms else {}
    return checkpoint(block, *args, use_reentrant=False, **context)


class _Still:
    """Batch norms that leave their running statistics as they are, in training mode too; may be entered again."""

    def __init__(self, norms: Sequence[nn.Module]):
        self.norms = [norm for norm in norms if isinstance(norm, _BatchNorm)]  # others have no such statistics
        self.before: list[list[tuple]] = []

    def __enter__(self) -> None:
        self.before.append([(norm.momentum, norm.num_batches_tracked) for norm in self.norms])
        for norm in self.norms:
            batches = norm.num_batches_tracked
            norm.momentum, norm.num_batches_tracked = 0.0, None if batches is None else batches.clone()

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, batches) in zip(self.norms, self.before.pop(), strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
