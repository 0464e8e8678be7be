"""The operators of one forward on meta tensors, as a dispatch mode sees them: the base of every count.

An operator that met the same shapes before is not run again: its output is made from what it gave then. Networks
repeat their blocks, so most of a forward is made this way, in a fraction of the time.
"""

import copy
import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

_PROTOCOL = ("__reduce__", "__reduce_ex__", "__getstate__")  # by which a class tells how it is copied
_FILLING = {"uniform_", "normal_", "fill_", "zero_", "copy_", "mul_", "add_", "sub_", "div_", "clamp_", "erfinv_"}
_FILLING |= {name for name in vars(torch.nn.init) if name.endswith("_") and not name.endswith("__")}
_BIAS_ARGUMENT = {"aten.convolution": 2, "aten.addmm": 0}  # position of the bias in operators that add one


@dataclass(slots=True)
class Tally:
    """What the calls of one operator come to: MACs, and numbers of elements."""

    calls: int = 0
    macs: int = 0  # 0 for operators without a formula
    inputs: int = 0  # of the first argument
    elements: int = 0  # of the first output
    others: int = 0  # of further outputs: the statistics of a norm, for instance
    biases: int = 0  # of the biases that it adds
    biased: int = 0  # of the outputs that it adds a bias to

    def __iadd__(self, other: "Tally") -> "Tally":
        self.calls += other.calls
        self.macs += other.macs
        self.inputs += other.inputs
        self.elements += other.elements
        self.others += other.others
        self.biases += other.biases
        self.biased += other.biased
        return self


_NONE = Tally()


@dataclass(frozen=True)
class Trace:
    """What ran, summed up by the module that ran it; paths are those of `named_modules`, the root's is empty."""

    operators: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))  # (path, operator)
    inputs: dict[str, Counter[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(Counter))
    """By path, how often the module was called with a first argument of which shape."""

    def by_operator(self) -> dict[str, Tally]:
        """The sums over all modules."""
        totals: dict[str, Tally] = defaultdict(Tally)
        for (_, name), tally in self.operators.items():
            totals[name] += tally
        return dict(totals)

    def sum(self, *names: str, under: str = "") -> Tally:
        """The sum of the operators `names` in the module at path `under` (the root by default) and all below it."""
        total = Tally()
        for (path, name), tally in self.operators.items():
            if name in names and (not under or path == under or path.startswith(f"{under}.")):
                total += tally
        return total

    def at(self, path: str, *names: str) -> Tally:
        """The sum of the operators `names` that the module at `path` ran itself."""
        total = Tally()
        for name in names:
            total += self.operators.get((path, name), _NONE)
        return total


class Watch(TorchDispatchMode):
    """Records in `trace` what runs inside, with `root` as the model, and brings everything to meta.

    Third-party models hold tensors that are neither parameters nor buffers, or make some on the CPU; these keep their
    values among themselves, and become meta where they meet a meta tensor.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self._known: dict[tuple, _Known] = {}
        self._log: list[tuple[str, Tally]] = []  # all that ran, in its order
        self._paths = [""]
        for path, module in root.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                self._follow(path, module)

    def _follow(self, path: str, module: nn.Module) -> None:
        paths, inputs = self._paths, self.trace.inputs

        def enter(module: nn.Module, args: tuple) -> None:
            paths.append(path)
            if args and isinstance(args[0], torch.Tensor):
                inputs[path][tuple(args[0].shape)] += 1

        def leave(module: nn.Module, args: tuple, out: Any) -> None:
            paths.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = _describe(func)
        if operator.is_view:
            return func(*args, **kwargs)
        try:
            key = func, _signature(args), _signature(tuple(kwargs.items()))
            known = self._known.get(key)
        except _HasValuesError:
            key = known = None
        if known is not None:
            out = args[0] if known.outputs is None else _make(known.outputs)
            self._record(known.tallies)
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        begin, out = len(self._log), NotImplemented
        if operator.formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            self._record([(operator.name, _tally(operator, out, args, kwargs))])
        if key is not None:
            outputs = _layouts(out) if operator.is_pure else None
            if operator.in_place or outputs is not None:
                self._known[key] = _Known(self._log[begin:], outputs)
        return out

    def _record(self, tallies: list[tuple[str, Tally]]) -> None:
        self._log += tallies
        for name, tally in tallies:
            self.trace.operators[self._paths[-1], name] += tally


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built inside has meta tensors, without the time that their initialisation takes."""
    with uncollected(), torch.device("meta"), _Uninitialised():
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection, which would look at thousands of new modules again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Uninitialised(TorchFunctionMode):
    """Leaves out what fills a meta tensor with values, since there are none: half of the time of building a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLING:
            target = args[0] if args else kwargs.get("tensor")  # as torch.nn.init calls it
            if isinstance(target, torch.Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


class _HasValuesError(Exception):
    """An argument is not a meta tensor: what the operator gives depends on more than shapes."""


class _Operator(NamedTuple):
    name: str  # without the overload: "aten.bmm"
    formula: Any  # of torch.utils.flop_counter, None where it has none
    is_view: bool  # moves nothing, computes nothing
    in_place: bool  # changes its first argument and returns it
    is_pure: bool  # makes new tensors and changes none


class _Known(NamedTuple):
    tallies: list[tuple[str, Tally]]  # of the operators that it is made of: itself alone, or those it decomposes into
    outputs: Any  # see _layouts; None for an operator that returns its first argument


@cache
def _describe(func: Any) -> _Operator:
    schema, tags = func._schema, func.tags
    returns_argument = len(schema.returns) == 1 and schema.returns[0].alias_info is not None
    return _Operator(
        name=str(func._overloadpacket),
        formula=flop_registry.get(func._overloadpacket),
        is_view=func.is_view,
        in_place=returns_argument and schema.name.endswith("_") and torch.Tag.inplace_view not in tags,
        is_pure=all(item.alias_info is None for item in (*schema.arguments, *schema.returns)),
    )


def _tally(operator: _Operator, out: Any, args: Any, kwargs: Any) -> Tally:
    macs = 0 if operator.formula is None else operator.formula(*args, **kwargs, out_val=out) // 2
    elements, *others = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)] or [0]
    inputs = args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0
    position = _BIAS_ARGUMENT.get(operator.name)
    bias = None if position is None else args[position]
    biases, biased = (0, 0) if bias is None else (bias.numel(), elements)
    return Tally(1, macs, inputs, elements, sum(others), biases, biased)


def _signature(value: Any) -> Any:
    """What decides the shapes that an operator gives, in a form that can be looked up.

    Raises:
        _HasValuesError: `value` is, or holds, a tensor that is not meta.
    """
    kind = type(value)
    if kind is int or kind is str or value is None:
        return value
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise _HasValuesError
        return _layout(value)
    if kind is tuple or kind is list:
        return tuple([_signature(item) for item in value])
    return kind, value  # True is not 1.0


def _layouts(out: Any) -> Any:
    """The layout of a meta tensor, a list of these for a tuple or list; None for anything else."""
    if isinstance(out, tuple | list):
        layouts = [_layouts(item) for item in out]
        return None if None in layouts else layouts
    return _layout(out) if isinstance(out, torch.Tensor) and out.is_meta else None


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _make(layout: Any) -> Any:
    if type(layout) is list:
        return tuple([_make(item) for item in layout])
    size, stride, dtype = layout
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def copy_to_meta(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are meta tensors, made without ever copying a weight.

    A copy, and not `functional_call` on the model itself, because some models keep what they compute (masks, position
    tables) between calls: meta tensors must not end up in there.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_make(_layout(parameter)), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _make(_layout(buffer))
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):  # deepcopy refuses those that autograd made
                memo[id(value)] = value.detach().clone()
    return _copy_module(model, memo)


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(module, memo)`, several times as fast: it does not ask what a module's own dictionaries are."""
    if id(module) in memo:
        return memo[id(module)]
    kind = type(module)
    if hasattr(kind, "__deepcopy__") or any(getattr(kind, name) is not getattr(nn.Module, name) for name in _PROTOCOL):
        return copy.deepcopy(module, memo)
    twin = memo[id(module)] = kind.__new__(kind)
    state = {}
    for name, value in module.__getstate__().items():
        if name == "_modules":
            value = {key: None if child is None else _copy_module(child, memo) for key, child in value.items()}
        elif name in ("_parameters", "_buffers"):
            value = {key: None if tensor is None else memo[id(tensor)] for key, tensor in value.items()}
        elif isinstance(value, dict | set | list) and not value:
            value = type(value)()
        elif not _is_constant(value):
            value = copy.deepcopy(value, memo)
        state[name] = value
    twin.__setstate__(state)
    return twin


def _is_constant(value: Any) -> bool:
    """Whether `value` is of the unchangeable kinds that modules hold most, which need no copy."""
    kind = type(value)
    return kind in (int, float, bool, str, type(None)) or (kind is tuple and all(map(_is_constant, value)))
