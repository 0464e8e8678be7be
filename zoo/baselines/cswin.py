"""CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows (Dong et al., CVPR 2022).

Paper: https://arxiv.org/abs/2107.00652 (section 3). The numbers follow the published implementation. Half of the
channels attend inside vertical stripes of the map, half inside horizontal ones; those of the last stage to all of it.

HRViT's Tables 4 and 9 compare CSWin-Ti (`cswin_nano`), CSWin-T and CSWin-S, Table 9 under UPerNet, too. The parameters
printed for CSWin-S with SegFormer's head need one of 768 channels; those of the other two the usual 256.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, use_fused_attn
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbone import Backbone, build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.hivit import Mlp
from zoo.lean import depthwise
from zoo.recompute import checkpoint_block

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class CSWinConfig:
    """What a CSWin is made of. Raises ZooError for values that cannot work."""

    embed_dim: int = 64  # channels of the first stage; every further one has twice as many
    depths: tuple[int, int, int, int] = (1, 2, 21, 1)  # blocks per stage (strides 4, 8, 16, 32)
    num_heads: tuple[int, int, int, int] = (2, 4, 8, 16)  # per stage, of both directions together
    stripe_width: tuple[int, int, int] = (1, 2, 7)  # tokens, stages 1 to 3; published for 384 pixels: 1, 2, 12
    mlp_ratio: float = 4.0  # hidden width over width of the feed-forward network
    drop_path_rate: float = 0.2  # stochastic depth of the last block; grows linearly from 0
    img_size: int | tuple[int, int] | None = None  # accepted for uniformity: no parameter depends on it

    def __post_init__(self):
        check_fields(self)
        if self.img_size is not None:
            check_size(self.img_size)
        for name in ("depths", "num_heads", "stripe_width"):
            if min(getattr(self, name)) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive")
        if self.embed_dim < 1:
            raise ZooError(f"embed_dim={self.embed_dim} must be positive")
        if any(heads % 2 for heads in self.num_heads[:3]):
            raise ZooError(f"num_heads={self.num_heads}: the first three are shared by two directions and must be even")
        if any(self.embed_dim * 2**stage % heads for stage, heads in enumerate(self.num_heads)):
            raise ZooError(f"num_heads={self.num_heads} do not divide embed_dim={self.embed_dim} and its 2, 4, 8 times")
        if not self.mlp_ratio > 0:
            raise ZooError(f"mlp_ratio={self.mlp_ratio} must be positive")
        if not 0 <= self.drop_path_rate < 1:
            raise ZooError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")


class StripeAttention(nn.Module):
    """Attention inside rectangles of the map, with a locally enhanced positional encoding: a convolution of the values.

    The convolution sees zeros around each rectangle. A map that has no whole number of them is padded with zeros after
    the projection, half before (rounded down) and half after; as published, the padding is not masked.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """Queries, keys and values (B, H, W, 3, C) and the (height, width) of a rectangle -> (B, H, W, C)."""
        b, h, w, _, c = qkv.shape
        rows, columns = -h % size[0], -w % size[1]
        top, left = rows // 2, columns // 2
        if rows or columns:
            qkv = F.pad(qkv, (0, 0, 0, 0, left, columns - left, top, rows - top))
        grid = (h + rows) // size[0], (w + columns) // size[1]
        qkv = qkv.reshape(b, grid[0], size[0], grid[1], size[1], 3, c).permute(5, 0, 1, 3, 2, 4, 6)
        qkv = qkv.reshape(3, b * grid[0] * grid[1], size[0] * size[1], c)
        local = qkv[2].unflatten(1, size).permute(0, 3, 1, 2)  # (B * rectangles, C, height, width)
        local = depthwise(local, self.local.weight, self.local.bias).permute(0, 2, 3, 1)
        query, key, value = qkv.unflatten(-1, (self.heads, c // self.heads)).transpose(2, 3).unbind(0)
        if use_fused_attn():
            x = F.scaled_dot_product_attention(query, key, value)
        else:
            logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            x = logits.softmax(-1).to(value.dtype) @ value
        x = x.transpose(1, 2).reshape(local.shape) + local
        x = x.view(b, *grid, *size, c).transpose(2, 3).reshape(b, h + rows, w + columns, c)
        return x[:, top : top + h, left : left + w]


class CrossAttention(nn.Module):
    """Cross-shaped window attention: the first half of the channels in vertical stripes, the second in horizontal ones.

    A stripe is `width` tokens wide; None: one attention of all channels to the whole map.
    """

    def __init__(self, dim: int, heads: int, width: int | None):
        super().__init__()
        self.width = width
        self.qkv = nn.Linear(dim, 3 * dim)
        directions = 1 if width is None else 2
        self.stripes = nn.ModuleList(StripeAttention(dim // directions, heads // directions) for _ in range(directions))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        h, w = x.shape[1:3]
        sizes = [(h, w)] if self.width is None else [(h, self.width), (self.width, w)]
        parts = self.qkv(x).unflatten(-1, (3, -1)).chunk(len(sizes), -1)
        attended = [stripes(part, size) for stripes, part, size in zip(self.stripes, parts, sizes, strict=True)]
        return self.proj(torch.cat(attended, -1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, width: int | None, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads, width)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Embed(nn.Module):
    """A convolution that shrinks the map, and a LayerNorm."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding=(kernel - stride + 1) // 2)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), out)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Overlapping patches, blocks, and the norm of the map that is taken; the next stage goes on without that norm."""

    def __init__(self, cfg: CSWinConfig, index: int, in_chans: int, rates: Sequence[float], normed: bool):
        super().__init__()
        dim = cfg.embed_dim * 2**index
        width = cfg.stripe_width[index] if index < len(cfg.stripe_width) else None
        self.embed = Embed(in_chans, dim, 3, 2) if index else Embed(in_chans, dim, 7, 4)
        self.blocks = nn.ModuleList(Block(dim, cfg.num_heads[index], width, cfg.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim) if normed else nn.Identity()


class CSWin(Backbone):
    """CSWin image classifier; `DenseCSWin` differs in the norms of its maps.

    Any image size works: images are zero-padded on the right and bottom to multiples of 4, so that the maps have
    ceil(side / stride) rows and columns (the published first map leaves out the last pixel or two of other sides). The
    features before pooling are the normed last map, (B, 8 * embed_dim, ceil(H / 32), ceil(W / 32)); the other maps of a
    classifier have no norm.
    """

    family = "CSWin"
    maps_are_normed = dense = False

    def __init__(
        self,
        cfg: CSWinConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        self.config = cfg
        widths = [in_chans, *(cfg.embed_dim * 2**stage for stage in range(len(STRIDES)))]
        last = sum(cfg.depths) - 1
        rates = iter([cfg.drop_path_rate * block / max(last, 1) for block in range(last + 1)])
        self.stages = nn.ModuleList(
            Stage(cfg, i, widths[i], [next(rates) for _ in range(depth)], self.dense or i == len(STRIDES) - 1)
            for i, depth in enumerate(cfg.depths)
        )
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"stages.{i}.norm"}
            for i, (width, stride) in enumerate(zip(widths[1:], STRIDES, strict=True))
        ]
        self.num_features = self.head_hidden_size = widths[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_weights)

    @staticmethod
    def num_maps(cfg: CSWinConfig) -> int:
        return len(STRIDES)

    def _run(self, x: Tensor, take: Sequence[int], whole: bool) -> tuple[Tensor, list[Tensor]]:
        last = len(self.stages) - 1 if whole else max(take)
        if x.shape[2] % STRIDES[0] or x.shape[3] % STRIDES[0]:
            x = F.pad(x, (0, -x.shape[3] % STRIDES[0], 0, -x.shape[2] % STRIDES[0]))
        x = x.permute(0, 2, 3, 1)
        maps: dict[int, Tensor] = {}
        for index, stage in enumerate(self.stages[: last + 1]):
            x = stage.embed(x)
            for block in stage.blocks:
                x = checkpoint_block(block, x) if self.grad_checkpointing else block(x)
            if index in take or index == last:
                maps[index] = stage.norm(x).permute(0, 3, 1, 2)
        return maps[last], [maps[index] for index in take]

    def _keep(self, take: Sequence[int]) -> bool:
        self.maps = tuple(sorted(take))
        shortened = self.maps[-1] < len(self.stages) - 1
        self.stages = self.stages[: self.maps[-1] + 1]
        for index, stage in enumerate(self.stages):
            if index not in self.maps:
                stage.norm = nn.Identity()
        return shortened

    def _new_head(self, **factory: Any) -> nn.Module:
        head = super()._new_head(**factory)
        init_weights(head)
        return head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stage = r"^(?:.*\.)?stages\.(\d+)\."
        if coarse:
            return {"blocks": stage}
        return {"blocks": [(stage + "embed", (-1,)), (stage + r"blocks\.(\d+)", None), (stage + "norm", (99999,))]}

    def published_key(self, key: str) -> str:
        def stage(match: re.Match) -> str:
            index = int(match[1])
            embed = f"merge{index}." if index else "stage1_conv_embed."
            norm = f"norm{index + 1}." if self.dense else "norm."
            return {"embed.": embed, "blocks.": f"stage{index + 1}.", "norm.": norm}[match[2]]

        key = re.sub(r"^stages\.(\d)\.(embed\.|blocks\.|norm\.)", stage, key)
        for ours, theirs in PUBLISHED_NAMES:
            key = key.replace(ours, theirs)
        return key

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict (classifier or segmentation backbone) under our names."""
        ours = {self.published_key(key): key for key in self.state_dict()}
        return {ours.get(key, key): value for key, value in state.items()}


class DenseCSWin(CSWin):
    """CSWin as the published segmentation code has it, built for `features_only`: every map has a norm of its own."""

    maps_are_normed = dense = True


PUBLISHED_NAMES = [
    ("stage1_conv_embed.conv.", "stage1_conv_embed.0."),
    ("stage1_conv_embed.norm.", "stage1_conv_embed.2."),
    (".attn.stripes.", ".attns."),
    (".local.", ".get_v."),
    (".attn.", "."),
]


def init_weights(module: nn.Module) -> None:
    """Linear layers: normal, deviation 0.02, biases 0; the rest is PyTorch's default.

    The published code cuts the normal off at 2, 100 deviations away.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


VARIANTS = {
    "cswin_nano": CSWinConfig(embed_dim=32),
    "cswin_tiny": CSWinConfig(),
    "cswin_small": CSWinConfig(depths=(2, 4, 32, 2), drop_path_rate=0.4),
    "cswin_base": CSWinConfig(embed_dim=96, depths=(2, 4, 32, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    # No drop path rate is known for the large model: the base model's is used.
    "cswin_large": CSWinConfig(embed_dim=144, depths=(2, 4, 32, 2), num_heads=(6, 12, 24, 24), drop_path_rate=0.5),
    "test_cswin": CSWinConfig(
        embed_dim=8, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4), stripe_width=(1, 2, 3), drop_path_rate=0.1
    ),
}

default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(first_conv="stages.0.embed.conv", classifier="head") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model_cls = DenseCSWin if kwargs.get("features_only") else CSWin
    return build(model_cls, variant, VARIANTS[variant], pretrained, **kwargs)


@register_model
def cswin_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-Ti of HRViT's Tables 4 and 9: CSWin-T with half of its channels, 5.7 M parameters, 1.2 GMACs at 224."""
    return _create("cswin_nano", pretrained, **kwargs)


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-T: 22.3 M parameters, 4.3 GMACs at 224."""
    return _create("cswin_tiny", pretrained, **kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-S: 34.6 M parameters, 6.8 GMACs at 224 (the paper has 6.9)."""
    return _create("cswin_small", pretrained, **kwargs)


@register_model
def cswin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-B: 77.4 M parameters, 15.0 GMACs at 224."""
    return _create("cswin_base", pretrained, **kwargs)


@register_model
def cswin_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CSWin-L: 173.3 M parameters, 33.1 GMACs at 224 (the paper has 31.5)."""
    return _create("cswin_large", pretrained, **kwargs)


@register_model
def test_cswin(**kwargs: Any) -> nn.Module:
    """A CSWin for tests: 8 channels, five blocks, stripes of 1, 2 and 3 tokens."""
    return _create("test_cswin", **kwargs)
