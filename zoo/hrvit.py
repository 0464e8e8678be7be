"""HRViT: Multi-Scale High-Resolution Vision Transformer for Semantic Segmentation (Gu et al., CVPR 2022).

Paper: https://arxiv.org/abs/2111.01236 (section 2, Figures 1 to 4, Table 2). Where the paper and the published
implementation differ, the numbers follow the implementation, and a comment says so.

Branches at strides 4, 8, 16 and 32 run in parallel, each a row of transformer blocks with attention inside crossed
stripes and a feed-forward network with mixed depth-wise convolutions; before every module all branches are added into
all, and a branch may be born.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, use_fused_attn
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbone import build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.hivit import Mlp
from zoo.lean import activated_linear, can_fold, depthwise, fold
from zoo.multi_resolution import STRIDES, ClassificationHead, Fusion, MultiResolution, Normed, Size, Stem, conv_norm
from zoo.norm import BatchNorm1d
from zoo.recompute import checkpoint_block

DENSE_SHORTCUT = 64  # channels: up to here a CPU multiplies whole tokens faster (measured)
STEM_WIDTHS = (32, 64)  # channels of the stem's two convolutions, in all variants


@dataclass(frozen=True)
class HRViTConfig:
    """What an HRViT is made of (Table 2). Raises ZooError for impossible values.

    Each row of Table 5 sets one of the fields from `key_value_sharing` to `diverse_shortcut` to False, in their order,
    and its last row ("All block opt.") all seven, perhaps beside `linear_conv`. Table 7 is `hrvit_b3` with
    ``window_size=(1, 2, s, s)``, s = 7 (the default), 9 (b3's row in Table 4), 11, 13 and 15. Table 8 is `hrvit_b1`
    with `third_branch_blocks` of ``(6, 6, 6, 2)`` (the default), ``(8, 8, 2, 2)``, ``(9, 9, 1, 1)`` and ``(17, 1, 1,
    1)``. The other networks of Tables 4, 6 and 9 are in baselines/ (cswin.py, mit.py, hrnet.py).
    """

    channels: tuple[int, int, int, int] = (32, 64, 128, 256)  # of the branches, strides 4 to 32
    num_modules: tuple[int, int, int, int] = (1, 1, 2, 2)  # per stage; a stage has one branch more than the last
    num_blocks: tuple[int, int, int, int] = (1, 1, 6, 2)  # per branch of a module
    last_blocks: tuple[int, int, int, int] = (1, 1, 6, 2)  # the same of the last module
    head_dim: int = 32  # channels of an attention head
    window_size: int | tuple[int, int, int, int] = (1, 2, 7, 7)  # tokens, a stripe's width: one, or one per branch
    mlp_ratio: tuple[int, int, int, int] = (4, 4, 4, 4)  # hidden width over width of MixCFN, per branch
    key_value_sharing: bool = True  # the values are the keys, too; else queries, keys and values are projected apart
    efficient_patch_embed: bool = True  # point-wise and depth-wise convolution; else one dense 3x3 convolution
    mix_cfn: bool = True  # 3x3 and 5x5 depth-wise convolutions in the feed-forward networks; else linear layers alone
    parallel_conv: bool = True  # Hardswish and depth-wise convolution of the values beside the attention
    attention_nonlinearity: bool = True  # Hardswish before attention's projection and BatchNorm after it
    dense_fusion: bool = True  # every branch is added to every other; else to its neighbours alone
    diverse_shortcut: bool = True  # the shortcut beside the attention
    # A convolution of the values without a Hardswish, where `parallel_conv` is False: CSWin's, but over the whole map.
    # CSWin's sees zeros around each stripe: another function at the same cost.
    linear_conv: bool = False
    # Of the third branch, one number per module that has it, in place of those in `num_blocks` and `last_blocks`.
    third_branch_blocks: tuple[int, ...] = ()
    drop_path_rate: float = 0.1  # stochastic depth of the last block; grows linearly from 0
    dense_init: bool = False  # linear layers start as in the published dense networks: std 0.02, no bias
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
        names = ("channels", "num_modules", "num_blocks", "last_blocks", "window_size", "mlp_ratio", "head_widths")
        for name in names:
            if min(getattr(self, name)) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive")
        for name in ("head_dim", "head_features"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive")
        if self.linear_conv and self.parallel_conv:
            raise ZooError("linear_conv=True takes the place of the parallel path: it needs parallel_conv=False")
        thirds, modules = self.third_branch_blocks, sum(self.num_modules[2:])
        if thirds and (len(thirds) != modules or min(thirds) < 1):
            raise ZooError(f"third_branch_blocks={thirds} must be {modules} positive ints: one per module that has it")
        for dim in self.channels:
            if dim % 2 or dim % shortcut_columns(dim):
                raise ZooError(f"channels={self.channels}: {dim} is not even, or no multiple of its shortcut's columns")
            if dim // 2 % num_heads(dim, self.head_dim):
                raise ZooError(f"head_dim={self.head_dim} leaves unequal heads in half of {dim} channels")
        if not 0 <= self.drop_path_rate < 1:
            raise ZooError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")

    def idle(self) -> Iterator[tuple[str, int | None, str]]:
        """Fields that change nothing beside the others; see `zoo.backbone.refuse_idle`."""
        if self.third_branch_blocks:
            for name in ("num_blocks", "last_blocks"):
                yield name, 2, f"third_branch_blocks={self.third_branch_blocks} takes its place"


def num_heads(dim: int, head_dim: int) -> int:
    """Heads of each of the two directions, which have half of the channels."""
    return max(dim // 2 // head_dim, 1)


def shortcut_columns(dim: int) -> int:
    """Columns of the matrix that a token is in its shortcut: the paper's sqrt(C) as a power of 2, as published."""
    exponent = dim.bit_length() - 1
    return 2 ** (exponent - exponent // 2)


class CrossAttention(nn.Module):
    """Cross-shaped attention (section 2.2, Figure 2): half of the channels in rows of tokens, half in columns.

    A stripe is `width` rows (columns) of the map. The published code pads the map to whole stripes and masks the
    padding; here the last stripe is narrower, which is the same.
    """

    def __init__(self, dim: int, heads: int, width: int, cfg: HRViTConfig | None = None):
        super().__init__()
        cfg = HRViTConfig() if cfg is None else cfg
        self.heads = heads
        self.width = width
        self.parts = 2 if cfg.key_value_sharing else 3  # shared: the values are the keys, too
        self.qv = nn.Linear(dim, self.parts * dim)
        self.local: nn.Conv2d | None = None
        self.local_activation = "hardswish" if cfg.parallel_conv else None
        if cfg.parallel_conv or cfg.linear_conv:
            self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.norm: BatchNorm1d | None = None
        if cfg.attention_nonlinearity:
            self.norm = BatchNorm1d(dim)
            # The paper starts from an identity projection; the published code from zero: the shortcut alone.
            nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        parts = self.qv(x).chunk(2 * self.parts, -1)  # queries, (keys,) values: each for rows, then for columns
        rows = self._attend(*parts[::2])
        columns = self._attend(*(part.transpose(1, 2) for part in parts[1::2])).transpose(1, 2)
        mixed = [rows, columns]
        if self.local is not None:
            weights, biases = self.local.weight.chunk(2), self.local.bias.chunk(2)
            for i, (v, weight, bias) in enumerate(zip(parts[-2:], weights, biases, strict=True)):
                local = depthwise(v.permute(0, 3, 1, 2), weight, bias, self.local_activation).permute(0, 2, 3, 1)
                mixed[i] = local + mixed[i]
        if self.norm is None:
            return self.proj(torch.cat(mixed, -1))
        # The paper has the Hardswish after the projection; the published code before it.
        if can_fold(self.proj, self.norm, x):
            return activated_linear("hardswish", *fold(self.proj, self.norm), *mixed)
        x = activated_linear("hardswish", self.proj.weight, self.proj.bias, *mixed)
        return self.norm(x.flatten(0, 2)).view(x.shape)

    def _attend(self, q: Tensor, *kv: Tensor) -> Tensor:
        """Attention inside stripes of rows: queries, keys and values (or both in one), (B, H, W, C / 2) -> the same."""
        whole = q.shape[1] - q.shape[1] % self.width
        parts = []
        for begin, end, width in ((0, whole, self.width), (whole, q.shape[1], q.shape[1] - whole)):
            if begin < end:
                query, *both = (self._stripes(t[:, begin:end], width) for t in (q, *kv))
                key, value = both[0], both[-1]
                if use_fused_attn():
                    out = F.scaled_dot_product_attention(query, key, value)
                else:
                    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
                    out = logits.softmax(-1).to(value.dtype) @ value
                parts.append(out.transpose(1, 2).reshape(q.shape[0], end - begin, *q.shape[2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _stripes(self, x: Tensor, width: int) -> Tensor:
        """(B, H, W, C) -> (B * stripes, heads, width * W, C / heads)."""
        b, h, w, c = x.shape
        return x.reshape(b * (h // width), width * w, self.heads, c // self.heads).transpose(1, 2)


class DiverseShortcut(nn.Module):
    """Diversity-enhanced shortcut (section 2.2): a token as a matrix, multiplied from both sides.

    The paper has no biases and a Hardswish; the published code biases and a GELU.
    """

    def __init__(self, dim: int):
        super().__init__()
        columns = shortcut_columns(dim)
        self.shape = (dim // columns, columns)
        self.right = nn.Linear(self.shape[1], self.shape[1])
        self.left = nn.Linear(self.shape[0], self.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same."""
        right, left = self.right, self.left
        if not (x.is_cpu and x.shape[-1] <= DENSE_SHORTCUT):
            x = right(x.unflatten(-1, self.shape)).transpose(-1, -2)
            return activated_linear("gelu", left.weight, left.bias, x).transpose(-1, -2).flatten(-2)
        # For a CPU these products are too small: one with each Kronecker product of theirs takes a fifth of the time.
        rows, columns = self.shape
        x = F.linear(x, torch.kron(torch.eye(rows).to(x), right.weight), right.bias.repeat(rows))
        weight = torch.kron(left.weight, torch.eye(columns).to(x))
        return activated_linear("gelu", weight, left.bias.repeat_interleave(columns), x)


class MixFeedForward(nn.Module):
    """MixCFN (section 2.2, Figure 3): half of the hidden channels go through 3x3, half through 5x5."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        half = hidden // 2
        self.fc1 = nn.Linear(dim, hidden)
        self.dw3x3 = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.dw5x5 = nn.Conv2d(half, half, 5, padding=2, groups=half)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        convolved = []
        for weight, bias, conv in zip(
            self.fc1.weight.chunk(2), self.fc1.bias.chunk(2), (self.dw3x3, self.dw5x5), strict=True
        ):
            half = F.linear(x, weight, bias).permute(0, 3, 1, 2)
            convolved.append(depthwise(half, conv.weight, conv.bias).permute(0, 2, 3, 1))
        return activated_linear("gelu", self.fc2.weight, self.fc2.bias, *convolved)


class Block(nn.Module):
    """HRViT block (section 2.2): attention beside the shortcut, then the feed-forward network."""

    def __init__(self, dim: int, width: int, mlp_ratio: int, cfg: HRViTConfig, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, num_heads(dim, cfg.head_dim), width, cfg)
        self.shortcut = DiverseShortcut(dim) if cfg.diverse_shortcut else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MixFeedForward(dim, dim * mlp_ratio) if cfg.mix_cfn else Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        mixed = self.attn(self.norm1(x))
        x = x + self.drop_path(mixed if self.shortcut is None else mixed + self.shortcut(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Efficient patch embedding (section 2.2): point-wise and depth-wise convolution, LayerNorm.

    If not `efficient`, one dense convolution takes the place of both.
    """

    def __init__(self, dim: int, out: int, efficient: bool):
        super().__init__()
        self.efficient = efficient
        if efficient:
            self.pw = nn.Conv2d(dim, out, 1)
            self.dw3x3 = nn.Conv2d(out, out, 3, padding=1, groups=out)
        else:
            self.conv3x3 = nn.Conv2d(dim, out, 3, padding=1)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, H, W) -> (B, H, W, out)."""
        x = self.dw3x3(self.pw(x)) if self.efficient else self.conv3x3(x)
        return self.norm(x.permute(0, 2, 3, 1))


class Module(nn.Module):
    """Parallel branches: patch embedding, blocks, LayerNorm (Figure 1)."""

    def __init__(self, cfg: HRViTConfig, ins: Sequence[int], blocks: Sequence[int], rates: Sequence[float]):
        super().__init__()
        outs = cfg.channels[: len(ins)]
        self.patch_embed = nn.ModuleList(
            PatchEmbed(dim, out, cfg.efficient_patch_embed) for dim, out in zip(ins, outs, strict=True)
        )
        # The blocks of a short branch have the first, lowest rates of the module.
        self.branches = nn.ModuleList(
            nn.ModuleList(Block(dim, cfg.window_size[i], cfg.mlp_ratio[i], cfg, rate) for rate in rates[: blocks[i]])
            for i, dim in enumerate(outs)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for dim in outs)

    def keep(self, outputs: Sequence[int]) -> None:
        """Remove all but these branches."""
        for i in range(len(self.norm)):
            if i not in outputs:
                self.patch_embed[i], self.branches[i], self.norm[i] = nn.Identity(), nn.ModuleList(), nn.Identity()

    def forward(self, maps: list[Tensor], outputs: Sequence[int], checkpointing: bool = False) -> list[Tensor]:
        """Maps (B, C, H, W) of the branches `outputs` -> maps of the same sizes, channels-last in memory."""
        mixed = []
        for i, x in zip(outputs, maps, strict=True):
            x = self.patch_embed[i](x)
            for block in self.branches[i]:
                x = checkpoint_block(block, x) if checkpointing else block(x)
            mixed.append(self.norm[i](x).permute(0, 3, 1, 2))
        return mixed


def fusion_path(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """The path from branch `source` to branch `target`; what comes from below is enlarged after it."""
    if source == target:
        return nn.Identity()
    dim, out = channels[source], channels[target]
    if source > target:
        return Normed(*conv_norm(dim, out, bias=True))
    stride = 2 ** (target - source)
    return Normed(*conv_norm(dim, dim, stride + 1, stride, groups=dim), *conv_norm(dim, out, bias=True))


def fusion(channels: Sequence[int], sources: int, targets: int, dense: bool) -> Fusion:
    """Cross-resolution fusion (Figure 4), with the GELU at its end that the paper does not show.

    If not `dense`, there are paths between neighbours alone; a new branch has one, from the lowest of the others.
    """
    paths = [
        [fusion_path(channels, j, i) if dense or abs(i - j) <= 1 else None for j in range(sources)]
        for i in range(targets)
    ]
    return Fusion(paths, F.gelu, upsample_cropped)


def upsample_cropped(x: Tensor, factor: int, size: Size) -> Tensor:
    """Nearest neighbour by a whole factor, cut to `size` (where they differ, the published code fails)."""
    return F.interpolate(x, scale_factor=factor, mode="nearest")[..., : size[0], : size[1]]


class HRViT(MultiResolution):
    """HRViT image classifier with four maps at strides 4, 8, 16 and 32 (section 2, Figure 1).

    Any image size from 32 pixels works: the branches have ceil(side / stride) rows and columns. The features before
    pooling are the map (B, head_features, ceil(H / 32), ceil(W / 32)) of the HRNetV2 head.
    """

    family = "HRViT"

    def __init__(
        self,
        cfg: HRViTConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.1,
        global_pool: str = "avg",
    ):
        super().__init__()
        self.config = cfg
        self.num_features = self.head_hidden_size = cfg.head_features
        self.stem = Stem(in_chans, *STEM_WIDTHS, bias=True)
        self.features = nn.ModuleList()  # fusion and module in turn, as in the published checkpoints
        before = 1  # branches
        for m, (blocks, rates) in enumerate(zip(module_blocks(cfg), drop_path_rates(cfg), strict=True)):
            ins = cfg.channels[: len(blocks)] if m else STEM_WIDTHS[1:]
            self.features.append(fusion(cfg.channels, before, len(blocks), cfg.dense_fusion))
            self.features.append(Module(cfg, ins, blocks, rates))
            before = len(blocks)
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"features.{len(self.features) - 1}.norm.{i}"}
            for i, (channels, stride) in enumerate(zip(cfg.channels, STRIDES, strict=True))
        ]
        self.neck = ClassificationHead(cfg.channels, cfg.head_widths, cfg.head_features, depthwise=False)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        if cfg.dense_init:
            for linear in self.modules():
                if isinstance(linear, nn.Linear):
                    # Published: cut off at 100 standard deviations, where rounding can put a weight.
                    nn.init.normal_(linear.weight, std=0.02)
                    nn.init.zeros_(linear.bias)

    def _make(self, x: Tensor, outputs: Sequence[int]) -> list[Tensor]:
        maps = [self.stem(x)]
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        for m in range(0, len(self.features), 2):
            fuse, module = self.features[m], self.features[m + 1]
            wanted = outputs if m == len(self.features) - 2 else range(len(fuse))
            maps = module(fuse(maps, wanted), wanted, checkpointing)
        return maps

    def _keep(self, take: Sequence[int]) -> bool:
        for last in self.features[-2:]:
            last.keep(take)
        return super()._keep(take)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return {"stem": r"^stem", "blocks": r"^features\.(\d+)", "neck": r"^neck"}
        blocks = [
            (r"^features\.(\d+)\.branches\.\d+\.(\d+)", None),
            (r"^features\.(\d+)\.norm", (9999,)),
            (r"^features\.(\d+)", (-1,)),
        ]
        return {"stem": r"^stem", "blocks": blocks, "neck": r"^neck"}

    def published_key(self, key: str) -> str:
        key = re.sub(r"^neck\.", "head.", re.sub(r"^head\.", "head.classifier.", key))
        key = re.sub(r"^(features\.\d*[02468])\.", r"\1.blocks.", key)
        for ours, theirs in PUBLISHED_NAMES:
            key = key.replace(ours, theirs)
        return key

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict (classifier or segmentation backbone) under our names."""
        ours = {self.published_key(key): key for key in self.state_dict()}
        return {ours.get(key, key): value for key, value in state.items()}


PUBLISHED_NAMES = [
    (".pw.", ".proj.0."),
    (".attn.proj.", ".attn.to_out.0."),
    (".attn.qv.", ".attn.to_qkv."),
    (".attn.local.", ".attn.parallel_conv.1."),
    (".attn.norm.", ".attn.attn_bn."),
    (".norm1.", ".attn_norm."),
    (".norm2.", ".ffn_norm."),
    (".shortcut.", ".des.proj_"),
    (".mlp.dw3x3.", ".ffn.conv.conv_3."),
    (".mlp.dw5x5.", ".ffn.conv.conv_5."),
    (".mlp.", ".ffn."),
    (".dw3x3.", ".proj.1."),  # of the patch embeddings
]


def module_blocks(cfg: HRViTConfig) -> list[list[int]]:
    """The number of blocks of every branch, module by module."""
    blocks = [list(cfg.num_blocks[: i + 1]) for i, modules in enumerate(cfg.num_modules) for _ in range(modules)]
    blocks[-1] = list(cfg.last_blocks)
    if cfg.third_branch_blocks:
        for branches, third in zip(blocks[-len(cfg.third_branch_blocks) :], cfg.third_branch_blocks, strict=True):
            branches[2] = third
    return blocks


def drop_path_rates(cfg: HRViTConfig) -> list[list[float]]:
    """Stochastic depth of each module's blocks, linear from 0; the branches of a module share their rates."""
    depths = [max(blocks) for blocks in module_blocks(cfg)]
    rates = iter([cfg.drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


VARIANTS = {
    "hrvit_b1": HRViTConfig(last_blocks=(1, 1, 2, 2)),
    "hrvit_b2": HRViTConfig(channels=(48, 96, 240, 384), head_dim=24, mlp_ratio=(2, 3, 3, 3)),
    "hrvit_b3": HRViTConfig(
        channels=(64, 128, 256, 512), num_blocks=(1, 1, 6, 3), last_blocks=(1, 1, 6, 3), mlp_ratio=(2, 2, 2, 2)
    ),
    "test_hrvit": HRViTConfig(
        channels=(8, 16, 24, 32),
        num_modules=(1, 1, 1, 1),
        num_blocks=(1, 1, 2, 1),
        last_blocks=(1, 1, 1, 1),
        head_dim=8,
        window_size=(1, 2, 3, 3),
        mlp_ratio=(2, 2, 2, 2),
        head_widths=(4, 4, 8, 8),
        head_features=64,
    ),
}

default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(first_conv="stem.conv1", classifier="head") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build(HRViT, variant, VARIANTS[variant], pretrained, **kwargs)


@register_model
def hrvit_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HRViT-b1: 19.7 M parameters, 2.8 GMACs at 224 (Table 3 has 2.7)."""
    return _create("hrvit_b1", pretrained, **kwargs)


@register_model
def hrvit_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HRViT-b2: 32.5 M parameters, 5.3 GMACs at 224 (Table 3 has 5.1)."""
    return _create("hrvit_b2", pretrained, **kwargs)


@register_model
def hrvit_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HRViT-b3: 37.9 M parameters, 5.9 GMACs at 224 (Table 3 has 5.7)."""
    return _create("hrvit_b3", pretrained, **kwargs)


@register_model
def test_hrvit(**kwargs: Any) -> nn.Module:
    """An HRViT for tests: small and shallow, without dropout."""
    return _create("test_hrvit", **{"drop_rate": 0.0, **kwargs})
