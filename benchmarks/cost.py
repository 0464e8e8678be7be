"""What a model costs, whatever the machine: parameters, multiply-accumulates (MACs) and activations.

A copy of the model runs on meta tensors (shapes only: no weights, no memory, so any resolution takes a fraction of a
second) and `benchmarks.trace` watches its operators. MACs are half of what PyTorch's own formulas, those of
`torch.utils.flop_counter`, give. The trace serves the papers' own conventions, too: `benchmarks.conventions`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from benchmarks.errors import InputError, unsupported_size
from benchmarks.trace import Trace, Watch, copy_to_meta, uncollected

CONVENTION = (
    "Multiply-accumulates (MACs) of every convolution, linear layer and matrix product, both products of attention "
    "included (fused or not), at batch 1 in evaluation mode; biases, norms, activation functions, softmax, additions "
    "and resizing not counted. Activations: the output elements of the counted operators (Radosavovic et al. 2020, "
    "Designing Network Design Spaces, extended from convolutions to all of these). Parameters: all of them, shared "
    "ones once, without an auxiliary head, which is given apart."
)

# Operators that only make or move data: no arithmetic was left uncounted there.
_NO_ARITHMETIC = {
    "aten._to_copy", "aten._unsafe_view", "aten.alias_copy", "aten.arange", "aten.as_strided_", "aten.cat",
    "aten.clone", "aten.constant_pad_nd", "aten.copy", "aten.copy_", "aten.empty", "aten.empty_like",
    "aten.empty_strided", "aten.fill_", "aten.full", "aten.full_like", "aten.gather", "aten.index",
    "aten.index_select", "aten.lift_fresh_copy", "aten.new_empty", "aten.new_full", "aten.new_ones",
    "aten.new_zeros", "aten.ones", "aten.ones_like", "aten.repeat", "aten.resize_", "aten.roll",
    "aten.scalar_tensor", "aten.stack", "aten.zero_", "aten.zeros", "aten.zeros_like",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of one image. `convention` says what each number means."""

    input_size: tuple[int, ...]  # channels, height, width
    params: int  # without the auxiliary head
    params_auxiliary: int  # of the auxiliary head, which only training runs; 0 where there is none
    macs: int
    activations: int  # elements
    by_operator: dict[str, int]  # operator -> MACs, largest first
    by_module: dict[str, int]  # module path of one or two names -> MACs
    uncounted: dict[str, int]  # operator that does arithmetic but was not counted -> elements of its outputs
    convention: str = field(default=CONVENTION, repr=False)
    trace: Trace = field(default_factory=Trace, repr=False)  # what ran, for other conventions


def count(
    model: nn.Module,
    input_size: Sequence[int] = (3, 512, 512),
    *,
    forward: Callable[[nn.Module, torch.Tensor], Any] | None = None,
) -> Cost:
    """Counts one forward of `model` over one image of `input_size` (channels, height, width).

    A segmentor of mmsegmentation is counted in its default 'tensor' mode: backbone, neck and decode head up to the
    logits, without resizing them. `forward(model, image)` replaces the plain call `model(image)`. The model may lie on
    any device, meta included, and is left as it is: what runs is a copy without weights.

    Raises:
        InputError: the model cannot take this size; the message has the first line of the model's own.
    """
    input_size = tuple(input_size)
    name = type(model).__name__
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    # Not inference mode, in which torch takes linear layers apart in another way.
    with (
        uncollected(),
        _neutral_switches(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        ghost = copy_to_meta(model).eval()
        image = torch.empty((1, *input_size), dtype=dtype, device="meta")
        try:
            with Watch(ghost) as watch:
                forward(ghost, image) if forward else ghost(image)
        except NotImplementedError as error:
            raise InputError(f"{name} cannot be counted on meta tensors: {str(error).splitlines()[0]}") from error
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise unsupported_size(name, input_size, error) from error

    counted = {str(operator) for operator in flop_registry}
    totals = watch.trace.by_operator()
    by_operator = Counter({name: tally.macs for name, tally in totals.items() if name in counted})
    elements = Counter({name: tally.elements + tally.others for name, tally in totals.items()})
    uncounted = Counter({name: n for name, n in elements.items() if n and name not in counted | _NO_ARITHMETIC})
    auxiliary = _auxiliary_parameters(model)
    total = sum(p.numel() for p in model.parameters())
    return Cost(
        input_size=input_size,
        params=total - auxiliary,
        params_auxiliary=auxiliary,
        macs=by_operator.total(),
        activations=sum(elements[name] for name in by_operator),
        by_operator=dict(by_operator.most_common()),
        by_module=_by_module(watch.trace),
        uncounted=dict(uncounted.most_common()),
        trace=watch.trace,
    )


@contextmanager
def _neutral_switches() -> Iterator[None]:
    """Attention in countable pieces: no fused kernel of nn.MultiheadAttention, no fused scaled_dot_product_attention.

    Otherwise a model's MACs and activations would depend on which kernels this machine offers.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _auxiliary_parameters(model: nn.Module) -> int:
    """Parameters that mmsegmentation's auxiliary head (or heads) has for itself."""
    head = getattr(model, "auxiliary_head", None)
    if not isinstance(head, nn.Module):
        return 0
    kept = {p for path, p in model.named_parameters() if not path.startswith("auxiliary_head.")}
    return sum(p.numel() for p in head.parameters() if p not in kept)


def _by_module(trace: Trace) -> dict[str, int]:
    """MACs of the modules on the two upper levels."""
    modules: Counter[str] = Counter()
    for (path, _), tally in trace.operators.items():
        names = path.split(".") if path and tally.macs else []
        for level in range(1, min(len(names), 2) + 1):
            modules[".".join(names[:level])] += tally.macs
    return dict(modules)
