"""Self-attention inside the windows of a map: HRFormer's, and Swin's shifted ones in its place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention import Attention

BIAS_CACHE_BYTES = 64 * 2**20  # per block: an expanded bias kept for inference, 3.2 MB for 16 heads and windows of 15
UNSEEN = -100.0  # added to the logits of tokens that a shift brought into one window, as in Swin


class WindowAttention(nn.Module):
    """Local-window self-attention with a relative position bias (HRFormer, section 3), no shift.

    Sides that the window does not divide are zero-padded after the norm. The padding is not masked, as published:
    padded tokens are keys that hold the projection's bias.
    """

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.window = window
        # The paper names T5's position scheme; the published code has Swin's tables.
        self.attn = Attention(dim, num_heads, (window, window), BIAS_CACHE_BYTES)
        nn.init.normal_(self.attn.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        window, (h, w) = self.window, x.shape[1:3]
        rows, columns = -h % window, -w % window  # of padding, half before (rounded down) and half after
        top, left = rows // 2, columns // 2
        if rows or columns:
            x = F.pad(x, (0, 0, left, columns - left, top, rows - top))
        return self._attend(x)[:, top : top + h, left : left + w]

    def _attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """A map of whole windows (B, H, W, C), what to add to the logits (windows, 1, N, N) -> the map."""
        window, heads = self.window, self.attn.num_heads
        b, *padded, c = x.shape
        grid = padded[0] // window, padded[1] // window  # of windows
        # Projected as a map and cut into heads and windows at once: one copy in, one out.
        qkv = self.attn.qkv(x).view(b, grid[0], window, grid[1], window, 3, heads, c // heads)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, window * window, c // heads)
        mask = None if mask is None else mask.repeat(b, 1, 1, 1)
        x = self.attn.attend(qkv, (window, window), mask).view(b, *grid, heads, window, window, c // heads)
        return self.attn.proj(x.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, *padded, c))


class ShiftedWindowAttention(WindowAttention):
    """The same with windows moved by half of their side, as in every second block of Swin (Liu et al., 2021).

    The (padded) map is rolled, and tokens that were no neighbours before do not see each other. Along a side that is
    one window nothing is moved.
    """

    def _attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        sides = x.shape[1:3]
        shifts = [self.window // 2 if side > self.window else 0 for side in sides]
        if not any(shifts):
            return super()._attend(x)
        # Along each side the windows before the last are whole; the last has what lay at the end and at the beginning.
        rows, columns = (
            torch.arange(side, device=x.device) >= side - shift for side, shift in zip(sides, shifts, strict=True)
        )
        part = (2 * rows[:, None] + columns).view(sides[0] // self.window, self.window, -1, self.window)
        part = part.transpose(1, 2).reshape(-1, 1, 1, self.window**2)  # of the map that a token comes from
        mask = (part != part.transpose(-1, -2)) * UNSEEN
        x = super()._attend(x.roll([-shift for shift in shifts], (1, 2)), mask)
        return x.roll(shifts, (1, 2))
