"""Trade a little arithmetic in the backward pass for the tensors that autograd would otherwise keep."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    """Return ``function(*args)``; autograd keeps `args` only and calls `function` again in the backward pass.

    The second call stops as soon as the last saved tensor is back, so that a closing matrix product is not repeated.
    `function` must not draw random numbers. Without autograd, under `torch.compile` (whose partitioner decides this
    itself) and under `torch.func` transforms (which allow no saved-tensor hooks) it is a plain call.
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    ):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
