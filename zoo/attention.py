"""Global multi-head self-attention with a relative position bias, and when its attention maps are kept."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from zoo.recompute import recompute
from zoo.relative_position import BiasCache, Grid, expand_table, resize_table

FUSED_MIN_TOKENS = 256  # below, torch's fused attention kernel is no faster on a CPU (measured)
RECOMPUTE_MIN_TOKENS = 128  # from here on, the attention maps are a large part of what training would keep


class Attention(nn.Module):
    """Global multi-head self-attention with a relative position bias (or, without `table_grid`, none)."""

    def __init__(self, dim: int, num_heads: int, table_grid: Grid | None = None, cache_bytes: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.table_grid = table_grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table: nn.Parameter | None = None
        if table_grid is not None:
            h, w = table_grid
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * h - 1) * (2 * w - 1), num_heads))
            self._bias_cache = BiasCache(cache_bytes)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Tokens (B, N, C), rows of the `grid` that the bias refers to, -> (B, N, C)."""
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(qkv, grid).transpose(1, 2).reshape(b, n, c))

    def attend(self, qkv: Tensor, grid: Grid | None = None, mask: Tensor | None = None) -> Tensor:
        """Queries, keys and values (3, B, heads, N, head width) -> (B, heads, N, head width).

        A `mask` (B, 1, N, N) is added to the logits.
        """
        if self._fuse(qkv):
            q, k, v = qkv.unbind(0)
            table = self.relative_position_bias_table
            bias = None if table is None else self._bias(table, grid, q.dtype)[None]
            if mask is not None:
                bias = mask.to(q.dtype) if bias is None else bias + mask.to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if qkv.shape[3] >= RECOMPUTE_MIN_TOKENS:  # autograd would keep the attention maps
            return recompute(lambda qkv: self._explicit(qkv, grid, mask), qkv)
        return self._explicit(qkv, grid, mask)

    def _fuse(self, qkv: Tensor) -> bool:
        """Whether torch's fused kernel wins; on a CPU it has no backward pass for the bias and needs many tokens."""
        table = self.relative_position_bias_table
        trains_bias = table is not None and table.requires_grad and torch.is_grad_enabled()
        return use_fused_attn() and (not qkv.is_cpu or (qkv.shape[3] >= FUSED_MIN_TOKENS and not trains_bias))

    def _explicit(self, qkv: Tensor, grid: Grid | None, mask: Tensor | None = None) -> Tensor:
        q, k, v = qkv.unbind(0)
        logits = (q * self.scale) @ k.transpose(-2, -1)  # (B, heads, N, N)
        if self.relative_position_bias_table is not None:
            bias = self._bias(self.relative_position_bias_table, grid, logits.dtype)
            # In its own memory, which is much; a batch of biases (`torch.func.vmap`) would not fit in there.
            logits = logits + bias if torch._C._are_functorch_transforms_active() else logits.add_(bias)
        if mask is not None:
            logits = logits + mask.to(logits.dtype)
        return logits.softmax(-1).to(v.dtype) @ v

    def _bias(self, table: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        def expand() -> Tensor:
            return expand_table(resize_table(table, self.table_grid, grid).to(dtype), grid)

        return expand() if self.training else self._bias_cache.get(table, grid, dtype, expand)

    def train(self, mode: bool = True) -> "Attention":
        self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "Attention":
        self._forget()
        return super()._apply(*args, **kwargs)

    def _forget(self) -> None:
        if self.table_grid is not None:
            self._bias_cache.clear()
