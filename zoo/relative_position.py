"""Relative position bias: one learned value per head and offset (query minus key), expanded to all pairs of tokens.

A table for grids of h x w tokens has shape ((2h-1) * (2w-1), heads), row-major over (row offset, column offset), as in
Swin (Liu et al., 2021, equation 4). Every family that has such a table expands, resizes and caches it here.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns of tokens


def expand_table(table: Tensor, grid: Grid) -> Tensor:
    """Expand a table ((2h-1) * (2w-1), heads) to the bias (heads, h * w, h * w) of all (query, key) pairs.

    The bias is block-Toeplitz: the columns are expanded by one small gather, and each row of queries is then a
    contiguous slice. That is a copy at memory speed, some thirty times faster than gathering (h * w)^2 entries, and its
    backward pass is a sum of slices instead of a scatter.
    """
    h, w = grid
    columns = torch.arange(w, device=table.device)
    offsets = (columns[:, None] - columns + (w - 1)).flatten()
    by_offset = table.view(2 * h - 1, 2 * w - 1, -1).permute(2, 0, 1).flip(1)  # heads, key row - query row, column
    by_offset = by_offset.index_select(2, offsets).view(-1, 2 * h - 1, w, w)
    by_offset = by_offset.transpose(1, 2).contiguous()  # heads, query column, key row - query row, key column
    rows = [by_offset[:, :, h - 1 - row : 2 * h - 1 - row] for row in range(h)]
    return torch.stack(rows, 1).view(-1, h * w, h * w)


def resize_table(table: Tensor, source: Grid, target: Grid) -> Tensor:
    """Resize a table from the grid `source` to the grid `target` by BEiT's geometric-progression interpolation.

    The source offsets are spread over the target's range in geometric progression (dense near zero), and a bicubic
    interpolating spline is read at every target offset (Bao et al., 2022, the fine-tuning code). Differentiable.
    """
    if source == target:
        return table
    with contextlib.nullcontext() if table.is_meta else torch.autocast(table.device.type, enabled=False):
        dtype = torch.promote_types(table.dtype, torch.float32)
        rows, columns = (_spline_tensor(s, t).to(table.device, dtype) for s, t in zip(source, target, strict=True))
        values = table.to(dtype).view(2 * source[0] - 1, 2 * source[1] - 1, -1)
        return torch.einsum("ai,ijh,bj->abh", rows, values, columns).flatten(0, 1).to(table.dtype)


@torch.compiler.assume_constant_result
def _spline_tensor(source: int, target: int) -> Tensor:
    return torch.tensor(_spline_matrix(source, target))


@functools.lru_cache(maxsize=256)
def _spline_matrix(source: int, target: int) -> np.ndarray:
    """The matrix (2 * target - 1, 2 * source - 1) that resizes one axis: interpolation is linear in the values."""
    from scipy.interpolate import make_interp_spline

    reach, goal = source - 1, target - 1  # the largest offset before and after
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**reach) / (1 - ratio) > goal else (ratio, high)
    positive = np.cumsum(ratio ** np.arange(reach))
    known = np.concatenate([-positive[::-1], [0.0], positive])
    if len(known) == 1:
        return np.ones((2 * target - 1, 1))
    spline = make_interp_spline(known, np.eye(len(known)), k=min(3, len(known) - 1))
    return spline(np.clip(np.arange(-goal, goal + 1.0), known[0], known[-1]))  # constant beyond the known offsets


class _Entry(NamedTuple):
    bias: Tensor
    key: tuple
    table: weakref.ref
    values: Tensor | None  # on the CPU, the values of the table that the bias was built from

    def serves(self, key: tuple, table: Tensor) -> bool:
        return self.key == key and self.table() is table and (self.values is None or torch.equal(self.values, table))


class BiasCache:
    """Keeps the last expanded bias of one table during inference, and never hands out a stale one.

    A bias is kept while the table is the same parameter with the same version, memory, dtype and device, and on the CPU
    the same values. Fused optimizers and edits through ``parameter.data`` (as some averaging hooks make) leave the
    version unchanged; on the CPU the values tell, on a GPU comparing them would stall the queue. There, a forward pass
    that trains the table empties the cache, as ``eval()``, ``train()`` and ``to()`` do; an edit without such a pass
    must be followed by one of these. Copies and pickles of a model start empty. Threads may share a model: what is kept
    is one entry, read once and replaced whole.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._entry: _Entry | None = None

    def clear(self) -> None:
        """Forget the bias and free its memory."""
        self._entry = None

    def get(self, table: Tensor, grid: Grid, dtype: torch.dtype, build: Callable[[], Tensor]) -> Tensor:
        """Return ``build()``, the bias of `table` for `grid` in `dtype`, from memory where that is safe."""
        if not _is_cacheable(table):
            return build()
        if table.requires_grad and torch.is_grad_enabled():  # an optimizer step may follow
            self.clear()
            return build()
        tokens = grid[0] * grid[1]
        if table.shape[-1] * tokens * tokens * dtype.itemsize > self.max_bytes:
            return build()
        # A tensor made in inference mode cannot be saved for a backward pass outside of it.
        mode = torch.is_inference_mode_enabled()
        key = (grid, dtype, mode, table._version, table.data_ptr(), table.dtype, table.device)
        entry = self._entry
        if entry is not None and entry.serves(key, table):
            return entry.bias
        self.clear()  # its memory is free before the new bias needs some
        del entry
        # Before the bias: a bias older than its values would be stale, the other way round it is only built again.
        values = table.detach().clone() if table.device.type == "cpu" else None
        bias = build()
        if type(bias) is Tensor:  # not a fake tensor of a tracer
            self._entry = _Entry(bias, key, weakref.ref(table), values)
        return bias

    def __deepcopy__(self, memo: dict) -> "BiasCache":
        return BiasCache(self.max_bytes)

    def __reduce__(self):
        return BiasCache, (self.max_bytes,)


def _is_cacheable(table: Tensor) -> bool:
    """Whether `table` is a real parameter in an eager run: tracers and transforms must see the bias being built."""
    return (
        not torch.compiler.is_compiling()  # first: what follows would break the graph
        and type(table) is nn.Parameter  # torch.func.functional_call puts plain tensors in its place
        and not table.is_meta
        and not table.is_inference()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        # A captured graph keeps the addresses of its tensors, and owns the memory of those made during the capture.
        and not (table.is_cuda and torch.cuda.is_current_stream_capturing())
    )
