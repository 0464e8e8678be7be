"""HRFormer: High-Resolution Transformer for Dense Prediction (Yuan et al., NeurIPS 2021).

Paper: https://arxiv.org/abs/2110.09408 (section 3, Figures 1 and 2, Tables 1 and 2). Where the paper and the published
implementation differ, the numbers follow the implementation, and a comment says so.

Branches at strides 4, 8, 16 and 32 run in parallel, each a row of transformer blocks with attention inside small
windows and a depth-wise convolution in the feed-forward network; after every module all branches are added into all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbone import build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.lean import activated_linear, can_fold, depthwise, fold, is_affine
from zoo.multi_resolution import STRIDES, Fusion, HRNetTrunk, conv_norm
from zoo.recompute import recompute
from zoo.relative_position import resize_table
from zoo.windows import ShiftedWindowAttention, WindowAttention

RELATIVE_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class HRFormerConfig:
    """What an HRFormer is made of; the names of Tables 1 and 2 spelled out. Raises ZooError for impossible values.

    The ablations are fields: of `hrformer_tiny`, row 1 of Table 7 is ``depthwise_ffn=False``, row 2 of Table 9 that and
    ``shifted_windows=True`` (the other row of each is the default); of `hrformer_base`, the rows of Table 12 are
    ``window_size`` 7 (the default), 9, 11, 13, 15, ``(15, 13, 11, 9)``, ``(21, 17, 13, 9)`` and ``(17, 15, 13, 11)``.
    The networks of Table 8 are in baselines/swin.py, HRNet-T, S and B of Table 11 in baselines/hrnet.py.
    """

    channels: tuple[int, int, int, int] = (32, 64, 128, 256)  # of the branches, strides 4 to 32 (C)
    num_modules: tuple[int, int, int, int] = (1, 1, 4, 2)  # per stage (M); a stage has one branch more than the last
    num_blocks: tuple[int, int, int, int] = (2, 2, 2, 2)  # per branch of a module, by stage (B)
    num_heads: tuple[int, int, int, int] = (1, 2, 4, 8)  # attention heads per branch (H)
    window_size: int | tuple[int, int, int, int] = (7, 7, 7, 7)  # tokens, a window's side: one, or one per branch (W)
    mlp_ratio: float = 4.0  # hidden width over width of the feed-forward networks (R)
    drop_path_rate: float = 0.0  # stochastic depth of the last block; grows linearly from 0
    depthwise_ffn: bool = True  # the 3x3 depth-wise convolution of the feed-forward networks (Table 7)
    shifted_windows: bool = False  # of every second block, by half a window, as in Swin (Table 9)
    bilinear_fusion: bool = False  # enlarge bilinearly, as the published pose estimation does, not by nearest neighbour
    head_widths: tuple[int, int, int, int] = (32, 64, 128, 256)  # of the classifier's bottlenecks, which give 4 times
    head_features: int = 2048  # channels before the classifier's pooling
    img_size: int | tuple[int, int] | None = None  # accepted for uniformity: no parameter depends on it

    def __post_init__(self):
        if isinstance(self.window_size, int) and not isinstance(self.window_size, bool):
            object.__setattr__(self, "window_size", (self.window_size,) * len(STRIDES))
        if not isinstance(self.window_size, list | tuple):
            raise ZooError(f"window_size={self.window_size!r} must be an int, or 4 ints, one per branch")
        check_fields(self)
        if self.img_size is not None:
            check_size(self.img_size)
        for name in ("channels", "num_modules", "num_blocks", "num_heads", "window_size", "head_widths"):
            if min(getattr(self, name)) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive")
        for channels, heads in zip(self.channels, self.num_heads, strict=True):
            if channels % heads:
                raise ZooError(f"num_heads={self.num_heads} must divide channels={self.channels}, branch by branch")
        if not (self.mlp_ratio > 0 and int(min(self.channels) * self.mlp_ratio) > 0):
            raise ZooError(f"mlp_ratio={self.mlp_ratio} must be positive and leave hidden channels")
        if not 0 <= self.drop_path_rate < 1:
            raise ZooError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")
        if self.head_features < 1:
            raise ZooError(f"head_features={self.head_features} must be positive")
        if self.shifted_windows and (max(self.num_blocks[1:]) < 2 or max(self.window_size) < 2):
            raise ZooError(
                f"shifted_windows=True moves nothing with num_blocks={self.num_blocks} after the first stage and "
                f"window_size={self.window_size}: it needs 2 blocks, and windows of 2"
            )


class ConvFeedForward(nn.Module):
    """Point-wise, depth-wise 3x3 and point-wise convolution (Figure 1).

    The paper shows these alone; the published code has a BatchNorm and a GELU after each, the last included. Autograd
    keeps the convolutions' outputs; norms and GELUs are computed again in the backward pass. In evaluation mode the
    norms are folded into the convolutions.
    """

    def __init__(self, dim: int, hidden: int, depthwise: bool = True):
        super().__init__()
        self.fc1, self.norm1 = conv_norm(dim, hidden, bias=True)
        if depthwise:
            self.dw3x3, self.norm2 = conv_norm(hidden, hidden, 3, groups=hidden, bias=True)
        self.depthwise = depthwise
        self.fc2, self.norm3 = conv_norm(hidden, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, H, W) -> the same."""
        later = (self.norm2, self.norm3) if self.depthwise else (self.norm3,)
        if can_fold(self.fc1, self.norm1, x) and all(map(is_affine, later)):
            return self._folded(x)
        x, norm = self.fc1(x), self.norm1
        if self.depthwise:
            x, norm = recompute(self._middle, x, norms=[norm]), self.norm2
        x = recompute(lambda x: self.fc2(F.gelu(norm(x))), x, norms=[norm])
        return recompute(lambda x: F.gelu(self.norm3(x)), x, norms=[self.norm3])

    def _middle(self, x: Tensor) -> Tensor:
        return self.dw3x3(F.gelu(self.norm1(x)))

    def _folded(self, x: Tensor) -> Tensor:
        weight, bias = fold(self.fc1, self.norm1)
        x = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias)
        if self.depthwise:
            x = depthwise(x.permute(0, 3, 1, 2), *fold(self.dw3x3, self.norm2), "gelu").permute(0, 2, 3, 1)
        weight, bias = fold(self.fc2, self.norm3)
        return F.gelu(activated_linear("gelu", weight.flatten(1), bias, x)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """HRFormer block (Figure 1): attention inside windows, then the feed-forward network across them."""

    def __init__(
        self, dim: int, num_heads: int, window: int, cfg: HRFormerConfig, drop_path: float, shifted: bool = False
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        attention = ShiftedWindowAttention if shifted else WindowAttention
        self.attn = attention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvFeedForward(dim, int(dim * cfg.mlp_ratio), cfg.depthwise_ffn)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        mixed = self.mlp(self.norm2(x).permute(0, 3, 1, 2))
        return x + self.drop_path(mixed).permute(0, 2, 3, 1)


class HRFormer(HRNetTrunk):
    """HRFormer image classifier with four maps at strides 4, 8, 16 and 32 (section 3, Figure 2).

    Any image size from 32 pixels works: the branches have ceil(side / stride) rows and columns, windows are padded
    (see `WindowAttention`), and fusion resamples to the exact size. The features before pooling are the map
    (B, head_features, ceil(H / 32), ceil(W / 32)) of the HRNetV2 head.
    """

    family = "HRFormer"
    depthwise = True

    def _blocks(self, branch: int, rates: Sequence[float]) -> list[nn.Module]:
        cfg = self.config
        return [
            Block(
                cfg.channels[branch],
                cfg.num_heads[branch],
                cfg.window_size[branch],
                cfg,
                rate,
                shifted=cfg.shifted_windows and index % 2 == 1,
            )
            for index, rate in enumerate(rates)
        ]

    def _fusion(self, branches: int, bilinear: bool = False) -> Fusion:
        return super()._fusion(branches, self.config.bilinear_fusion)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(RELATIVE_TABLE)}

    def published_key(self, key: str) -> str:
        return self.published_parts(key)[0]

    def published_parts(self, key: str) -> tuple[str, ...]:
        key = super().published_key(key)
        if ".attn.attn.qkv." in key:
            return tuple(key.replace("qkv", f"{part}_proj") for part in "qkv")
        return (key.replace(".attn.attn.proj.", ".attn.attn.out_proj."),)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict (classifier, segmentation or pose backbone) under our names.

        The three projections of an attention become one, the index buffers are left out (they follow from the window),
        and relative tables of other windows are resized.
        """
        own = self.state_dict()
        fitted = {}
        for key, value in super().from_published(state).items():
            if key.endswith("relative_position_index"):
                continue
            key = key.replace(".attn.attn.out_proj.", ".attn.attn.proj.")
            if key.endswith(RELATIVE_TABLE) and key in own and value.ndim == 2 and len(value) != len(own[key]):
                value = resize_square_table(value, len(own[key]))
            fitted[key] = value
        for key in own:
            parts = self.published_parts(key)
            if len(parts) > 1 and all(part in fitted for part in parts) and len({fitted[p].shape for p in parts}) == 1:
                fitted[key] = torch.cat([fitted.pop(part) for part in parts])
        return fitted


def resize_square_table(table: Tensor, rows: int) -> Tensor:
    """Resize the relative table of one square window to that with `rows` rows; what is no such table is returned."""
    sides = [round(count**0.5) for count in (len(table), rows)]  # 2 * window - 1
    if sides[0] ** 2 != len(table) or not sides[0] % 2:
        return table
    old, new = ((side + 1) // 2 for side in sides)
    return resize_table(table, (old, old), (new, new))


VARIANTS = {
    "hrformer_tiny": HRFormerConfig(channels=(18, 36, 72, 144), num_modules=(1, 1, 3, 2)),
    "hrformer_small": HRFormerConfig(),
    "hrformer_base": HRFormerConfig(channels=(78, 156, 312, 624), num_heads=(2, 4, 8, 16), drop_path_rate=0.2),
    "test_hrformer": HRFormerConfig(
        channels=(8, 16, 16, 32),
        num_modules=(1, 1, 1, 1),
        num_blocks=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.1,
        head_widths=(4, 4, 8, 8),
        head_features=64,
    ),
}

default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(first_conv="stem.conv1", classifier="head") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build(HRFormer, variant, VARIANTS[variant], pretrained, **kwargs)


@register_model
def hrformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HRFormer-T: 8.0 M parameters, 1.7 GMACs at 224 (Table 2)."""
    return _create("hrformer_tiny", pretrained, **kwargs)


@register_model
def hrformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HRFormer-S: 13.5 M parameters, 3.4 GMACs at 224 (Table 2)."""
    return _create("hrformer_small", pretrained, **kwargs)


@register_model
def hrformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HRFormer-B: 50.3 M parameters, 13.3 GMACs at 224 (Table 2)."""
    return _create("hrformer_base", pretrained, **kwargs)


@register_model
def test_hrformer(**kwargs: Any) -> nn.Module:
    """An HRFormer for tests: one block everywhere, windows of four."""
    return _create("test_hrformer", **kwargs)
