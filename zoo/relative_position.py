"""Relative position bias: one learned value per head and offset (query minus key), expanded to all pairs of tokens.

A table for grids of h x w tokens has shape ((2h-1) * (2w-1), heads), row-major over (row offset, column offset), as in
Swin (Liu et al., 2021, equation 4). Every family that has such a table expands, resizes and caches it here.
"""

import functools
import weakref
from collections.abc import Callable

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
    with torch.autocast(table.device.type, enabled=False):
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


class BiasCache:
    """Keeps the last expanded bias of one table during inference, and never hands out a stale one.

    A hit needs the same parameter object with the same version, memory, dtype and device, and on the CPU the same
    values: an edit through ``parameter.data`` (as some averaging hooks do) leaves the version unchanged. On a GPU that
    comparison would stall the queue; there such an edit must be followed by ``eval()``, ``train()`` or ``to()``, each
    of which empties the cache. Copies and pickles of a model start empty.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forget the bias and free its memory."""
        self._bias: Tensor | None = None
        self._values: Tensor | None = None
        self._table: Callable[[], Tensor | None] = lambda: None
        self._key: tuple = ()

    def get(self, table: Tensor, grid: Grid, dtype: torch.dtype, build: Callable[[], Tensor]) -> Tensor:
        """Return ``build()``, the bias of `table` for `grid` in `dtype`, from memory where that is safe."""
        tokens = grid[0] * grid[1]
        if not _is_cacheable(table) or table.shape[-1] * tokens * tokens * dtype.itemsize > self.max_bytes:
            return build()
        # A tensor made in inference mode cannot be saved for a backward pass outside of it.
        mode = torch.is_inference_mode_enabled()
        key = (grid, dtype, mode, table._version, table.data_ptr(), table.dtype, table.device)
        if self._key == key and self._table() is table and (self._values is None or torch.equal(self._values, table)):
            return self._bias
        self.clear()
        bias = build()
        if type(bias) is Tensor:  # not a fake tensor of a tracer
            self._bias, self._key, self._table = bias, key, weakref.ref(table)
            self._values = table.detach().clone() if table.device.type == "cpu" else None
        return bias

    def __deepcopy__(self, memo: dict) -> "BiasCache":
        return BiasCache(self.max_bytes)

    def __reduce__(self):
        return BiasCache, (self.max_bytes,)


def _is_cacheable(table: Tensor) -> bool:
    return (
        type(table) is nn.Parameter  # torch.func.functional_call puts plain tensors in its place
        and not (table.requires_grad and torch.is_grad_enabled())
        and not table.is_meta
        and not table.is_inference()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )
