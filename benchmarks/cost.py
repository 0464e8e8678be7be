"""What a model costs, whatever the machine: parameters, multiply-accumulates (MACs) and activations.

Counted with `torch.utils.flop_counter.FlopCounterMode` while a copy of the model runs on meta tensors: shapes only, no
weights, no memory, so any resolution takes seconds.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.errors import InputError, unsupported_size

CONVENTION = (
    "Multiply-accumulates (MACs) of every convolution, linear layer and matrix product, both products of attention "
    "included (fused or not), at batch 1 in evaluation mode; biases, norms, activation functions, softmax, additions "
    "and resizing not counted. Activations: the output elements of the counted operators (Radosavovic et al. 2020, "
    "Designing Network Design Spaces, extended from convolutions to all of these). Parameters: all of them, shared "
    "ones once, without an auxiliary head, which is given apart."
)

# Operators that only make or move data: no arithmetic was left uncounted there.
_NO_ARITHMETIC = {
    "aten::_to_copy", "aten::_unsafe_view", "aten::alias_copy", "aten::arange", "aten::as_strided_", "aten::cat",
    "aten::clone", "aten::constant_pad_nd", "aten::copy", "aten::copy_", "aten::empty", "aten::empty_like",
    "aten::empty_strided", "aten::fill_", "aten::full", "aten::full_like", "aten::gather", "aten::index",
    "aten::index_select", "aten::lift_fresh_copy", "aten::new_empty", "aten::new_full", "aten::new_ones",
    "aten::new_zeros", "aten::ones", "aten::ones_like", "aten::repeat", "aten::resize_", "aten::roll",
    "aten::scalar_tensor", "aten::stack", "aten::zero_", "aten::zeros", "aten::zeros_like",
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
    ghost = _copy_to_meta(model).eval()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    image = torch.empty((1, *input_size), dtype=dtype, device="meta")
    flops = FlopCounterMode(display=False)
    watch = _Watch(flops.flop_registry)
    # Not inference mode, in which torch takes linear layers apart in another way.
    with _neutral_switches(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        try:
            with watch, flops:  # the later one acts first and hands on what it has decomposed
                _Call(ghost, forward)(image)
        except NotImplementedError as error:
            raise InputError(f"{name} cannot be counted on meta tensors: {str(error).splitlines()[0]}") from error
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise unsupported_size(name, input_size, error) from error

    counts = flops.get_flop_counts()
    by_operator = Counter({str(op): value // 2 for op, value in counts.get("Global", {}).items()})
    auxiliary = _auxiliary_parameters(model)
    total = sum(p.numel() for p in model.parameters())
    return Cost(
        input_size=input_size,
        params=total - auxiliary,
        params_auxiliary=auxiliary,
        macs=by_operator.total(),
        activations=watch.activations,
        by_operator=dict(by_operator.most_common()),
        by_module=_by_module({path: sum(operators.values()) // 2 for path, operators in counts.items()}),
        uncounted=dict(watch.uncounted.most_common()),
    )


class _Call(nn.Module):
    """The forward as a module, so that every module below has its full path whatever `forward` calls."""

    PREFIX = "_Call.model."

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, torch.Tensor], Any] | None) -> None:
        super().__init__()
        self.model = model
        self.call = forward or (lambda model, image: model(image))

    def forward(self, image: torch.Tensor) -> Any:
        return self.call(self.model, image)


class _Watch(TorchDispatchMode):
    """Sees what `FlopCounterMode` executes: counts outputs, and brings everything to meta.

    Third-party models hold tensors that are neither parameters nor buffers, or make some on the CPU; these keep their
    values among themselves, and become meta where they meet a meta tensor.
    """

    def __init__(self, counted: dict[Any, Any]) -> None:
        super().__init__()
        self.counted = counted
        self.activations = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        out = func(*args, **kwargs)
        elements = sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        if func._overloadpacket in self.counted:
            self.activations += elements
        elif elements and not func.is_view and func._schema.name not in _NO_ARITHMETIC:
            self.uncounted[str(func._overloadpacket)] += elements
        return out


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


def _copy_to_meta(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are meta tensors, made without ever copying a weight.

    A copy, and not `functional_call` on the model itself, because some models keep what they compute (masks, position
    tables) between calls: meta tensors must not end up in there.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):  # deepcopy refuses those that autograd made
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _auxiliary_parameters(model: nn.Module) -> int:
    """Parameters that mmsegmentation's auxiliary head (or heads) has for itself."""
    head = getattr(model, "auxiliary_head", None)
    if not isinstance(head, nn.Module):
        return 0
    kept = {p for path, p in model.named_parameters() if not path.startswith("auxiliary_head.")}
    return sum(p.numel() for p in head.parameters() if p not in kept)


def _by_module(macs: dict[str, int]) -> dict[str, int]:
    """MACs of the modules on the two upper levels, from those of every module that was called.

    Containers such as a ModuleList are never called: each called module's own MACs are added to all that it lies in.
    """
    paths = {path.removeprefix(_Call.PREFIX): value for path, value in macs.items() if path.startswith(_Call.PREFIX)}
    own = Counter(paths)
    for path, value in paths.items():
        above = path
        while above := above.rpartition(".")[0]:
            if above in paths:
                own[above] -= value
                break
    modules: Counter[str] = Counter()
    for path, value in own.items():
        names = path.split(".")
        for level in range(1, min(len(names), 2) + 1):
            modules[".".join(names[:level])] += value
    return dict(modules)
