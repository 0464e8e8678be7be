"""HRFormer: High-Resolution Transformer for Dense Prediction (Yuan et al., NeurIPS 2021).

Paper: https://arxiv.org/abs/2110.09408 (section 3, Figures 1 and 2, Tables 1 and 2). Where the paper and the published
implementation differ, the numbers follow the implementation, and a comment says so.

Branches at strides 4, 8, 16 and 32 run in parallel, each a row of transformer blocks with attention inside small
windows and a depth-wise convolution in the feed-forward network; after every module all branches are added into all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import Attention
from zoo.backbone import build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.lean import activated_linear, can_fold, depthwise, fold, is_affine
from zoo.multi_resolution import (
    STRIDES,
    Bottleneck,
    ClassificationHead,
    Fusion,
    MultiResolution,
    Normed,
    Stem,
    conv_norm,
    upsample_bilinear,
    upsample_nearest,
)
from zoo.recompute import checkpoint_block, recompute
from zoo.relative_position import resize_table

STEM_WIDTH = 64  # channels of the stem and width of the first stage's bottlenecks (Table 1)
RELATIVE_TABLE = "relative_position_bias_table"
BIAS_CACHE_BYTES = 64 * 2**20  # per block: an expanded bias kept for inference, 3.2 MB for 16 heads and windows of 15


@dataclass(frozen=True)
class HRFormerConfig:
    """What an HRFormer is made of; the names of Tables 1 and 2 spelled out. Raises ZooError for impossible values."""

    channels: tuple[int, int, int, int] = (32, 64, 128, 256)  # of the branches, strides 4 to 32 (C)
    num_modules: tuple[int, int, int, int] = (1, 1, 4, 2)  # per stage (M); a stage has one branch more than the last
    num_blocks: tuple[int, int, int, int] = (2, 2, 2, 2)  # per branch of a module, by stage (B)
    num_heads: tuple[int, int, int, int] = (1, 2, 4, 8)  # attention heads per branch (H)
    window_size: int | tuple[int, int, int, int] = (7, 7, 7, 7)  # tokens, a window's side: one, or one per branch (W)
    mlp_ratio: float = 4.0  # hidden width over width of the feed-forward networks (R)
    drop_path_rate: float = 0.0  # stochastic depth of the last block; grows linearly from 0
    depthwise_ffn: bool = True  # the 3x3 depth-wise convolution of the feed-forward networks (Table 7)
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


class WindowAttention(nn.Module):
    """Local-window self-attention with a relative position bias (section 3), no shift.

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
        window, heads = self.window, self.attn.num_heads
        b, h, w, c = x.shape
        rows, columns = -h % window, -w % window  # of padding, half before (rounded down) and half after
        top, left = rows // 2, columns // 2
        if rows or columns:
            x = F.pad(x, (0, 0, left, columns - left, top, rows - top))
        padded = x.shape[1:3]
        grid = padded[0] // window, padded[1] // window  # of windows
        # Projected as a map and cut into heads and windows at once: one copy in, one out.
        qkv = self.attn.qkv(x).view(b, grid[0], window, grid[1], window, 3, heads, c // heads)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, window * window, c // heads)
        x = self.attn.attend(qkv, (window, window)).view(b, *grid, heads, window, window, c // heads)
        x = self.attn.proj(x.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, *padded, c))
        return x[:, top : top + h, left : left + w]


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

    def __init__(self, dim: int, num_heads: int, window: int, cfg: HRFormerConfig, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvFeedForward(dim, int(dim * cfg.mlp_ratio), cfg.depthwise_ffn)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        mixed = self.mlp(self.norm2(x).permute(0, 3, 1, 2))
        return x + self.drop_path(mixed).permute(0, 2, 3, 1)


class Module(nn.Module):
    """Parallel branches of blocks, and the fusion that ends them (Figure 2)."""

    def __init__(self, cfg: HRFormerConfig, drop_paths: Sequence[float], branches: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(Block(dim, heads, window, cfg, rate) for rate in drop_paths)
            for dim, heads, window in zip(
                cfg.channels[:branches], cfg.num_heads[:branches], cfg.window_size[:branches], strict=True
            )
        )
        paths = [[fusion_path(cfg.channels, j, i) for j in range(branches)] for i in range(branches)]
        self.fuse_layers = Fusion(paths, F.relu, upsample_bilinear if cfg.bilinear_fusion else upsample_nearest)

    def forward(
        self, maps: list[Tensor], outputs: Sequence[int] | None = None, checkpointing: bool = False
    ) -> list[Tensor]:
        """Maps (B, C, H, W) of the branches -> the fused maps, all or those of `outputs`."""
        mixed = []
        for x, blocks in zip(maps, self.branches, strict=True):
            x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C), a view of channels-last memory
            for block in blocks:
                x = checkpoint_block(block, x) if checkpointing else block(x)
            mixed.append(x.permute(0, 3, 1, 2))
        return self.fuse_layers(mixed, outputs)


def fusion_path(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """The path from branch `source` to branch `target`; what comes from below is enlarged after it."""
    if source == target:
        return nn.Identity()
    dim, out = channels[source], channels[target]
    if source > target:
        return Normed(*conv_norm(dim, out))
    steps = []
    for step in range(source + 1, target + 1):
        last = step == target
        layers = conv_norm(dim, dim, 3, stride=2, groups=dim) + conv_norm(dim, out if last else dim)
        steps.append(Normed(*layers, *([] if last else [nn.ReLU()])))
    return nn.Sequential(*steps)


def transition(dim: int, out: int, stride: int) -> nn.Sequential:
    return Normed(*conv_norm(dim, out, 3, stride=stride), nn.ReLU())


class HRFormer(MultiResolution):
    """HRFormer image classifier with four maps at strides 4, 8, 16 and 32 (section 3, Figure 2).

    Any image size from 32 pixels works: the branches have ceil(side / stride) rows and columns, windows are padded
    (see `WindowAttention`), and fusion resamples to the exact size. The features before pooling are the map
    (B, head_features, ceil(H / 32), ceil(W / 32)) of the HRNetV2 head.
    """

    family = "HRFormer"
    maps_are_normed = False

    def __init__(
        self,
        cfg: HRFormerConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        self.config = cfg
        self.num_features = self.head_hidden_size = cfg.head_features
        self.stem = Stem(in_chans, STEM_WIDTH, STEM_WIDTH)
        wide = STEM_WIDTH * Bottleneck.expansion
        bottlenecks = cfg.num_modules[0] * cfg.num_blocks[0]
        self.layer1 = nn.Sequential(
            *[Bottleneck(wide if i else STEM_WIDTH, STEM_WIDTH, project=not i) for i in range(bottlenecks)]
        )
        # Nested as in the published checkpoints. A branch is born from the lowest resolution alone.
        c = cfg.channels
        self.transition1 = nn.ModuleList([transition(wide, c[0], 1), nn.Sequential(transition(wide, c[1], 2))])
        self.transition2 = nn.ModuleDict({"2": nn.Sequential(transition(c[1], c[2], 2))})
        self.transition3 = nn.ModuleDict({"3": nn.Sequential(transition(c[2], c[3], 2))})
        rates = iter(drop_path_rates(cfg))
        self.stage2, self.stage3, self.stage4 = (
            nn.ModuleList(
                Module(cfg, [next(rates) for _ in range(cfg.num_blocks[stage])], branches=stage + 1)
                for _ in range(cfg.num_modules[stage])
            )
            for stage in (1, 2, 3)
        )
        last = f"stage4.{cfg.num_modules[3] - 1}.fuse_layers"
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"{last}.{i}"}
            for i, (channels, stride) in enumerate(zip(c, STRIDES, strict=True))
        ]
        self.neck = ClassificationHead(c, cfg.head_widths, cfg.head_features, depthwise=True)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def _make(self, x: Tensor, outputs: Sequence[int]) -> list[Tensor]:
        x = self.layer1(self.stem(x))
        maps = [branch(x) for branch in self.transition1]
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        for module in self.stage2:
            maps = module(maps, checkpointing=checkpointing)
        maps = [*maps, self.transition2["2"](maps[-1])]
        for module in self.stage3:
            maps = module(maps, checkpointing=checkpointing)
        maps = [*maps, self.transition3["3"](maps[-1])]
        for module in self.stage4[:-1]:
            maps = module(maps, checkpointing=checkpointing)
        return self.stage4[-1](maps, outputs, checkpointing)

    def _keep(self, take: Sequence[int]) -> bool:
        self.stage4[-1].fuse_layers.keep(take)
        return super()._keep(take)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(RELATIVE_TABLE)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return {"stem": r"^stem", "blocks": r"^(?:layer|transition|stage)(\d+)", "neck": r"^neck"}
        # A transition lies between the stage of its number and the next.
        blocks = [(r"^(?:layer|stage)(\d+)\.(\d+)", None), (r"^transition(\d+)", (9999,))]
        return {"stem": r"^stem", "blocks": blocks, "neck": r"^neck"}

    def published_key(self, key: str) -> str:
        return self.published_parts(key)[0]

    def published_parts(self, key: str) -> tuple[str, ...]:
        key = re.sub(r"^(?:stem|neck)\.", "", re.sub(r"^head\.", "classifier.", key))
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
        for key, value in state.items():
            if key.endswith("relative_position_index"):
                continue
            key = re.sub(r"^(?=(?:conv|bn)[12]\.)", "stem.", key)
            key = re.sub(r"^(?=(?:incre_modules|downsamp_modules|final_layer)\.)", "neck.", key)
            key = re.sub(r"^classifier\.", "head.", key).replace(".attn.attn.out_proj.", ".attn.attn.proj.")
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


def drop_path_rates(cfg: HRFormerConfig) -> list[float]:
    """Stochastic depth per block of stages 2 to 4, linear from 0; the branches of a module share their rates."""
    blocks = sum(m * b for m, b in zip(cfg.num_modules[1:], cfg.num_blocks[1:], strict=True))
    return [cfg.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]


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
