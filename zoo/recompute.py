"""Trade a little arithmetic in the backward pass for the tensors that autograd would otherwise keep."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
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


def checkpoint_block(block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """Return ``block(*args)``; autograd keeps `args` only and runs the block again in the backward pass.

    The second run draws the same random numbers and leaves the running statistics of batch norms alone, so that
    training with and without it is the same.
    """
    if torch.compiler.is_compiling():
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _fixed_statistics(block)))


@contextmanager
def _fixed_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):  # the second run updates copies that nobody reads
        norm._buffers |= {name: value.clone() for name, value in buffers.items() if value is not None}
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers |= buffers
