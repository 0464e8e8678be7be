"""HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer (Zhang et al., ICLR 2023).

Paper: https://arxiv.org/abs/2205.14949 (section 3, Appendix A, Table 7). Where the paper and the published
implementation differ, the numbers follow the implementation: the main stage has a learned absolute position embedding
beside its relative position bias, and one "block" of the first two stages is two MLP units.

The first two stages only mix channels and merge neighbours inside each 16x16 patch, so a patch is one row of every
tensor, (B, patches, positions inside the patch, channels): masked image modeling simply leaves rows out.

The paper's ablations are fields of `hivit_base`. Table 2, the path from ViT-B to Swin-B, whose row (c) is HiViT-B:

- (o) ``hierarchical=False, patch_norm=False, depths=(0, 0, 12), embed_dim=768, num_heads=12``, and
  ``relative_position_bias=False``
- (a) ``hierarchical=False, depths=(0, 0, 24), relative_position_bias=False``
- (b) ``hierarchical=False, depths=(0, 0, 24)``
- (c') ``low_attention=True, absolute_position=False``
- (d) ``low_attention=True, mid_attention=True, depths=(2, 2, 18), last_depth=2, num_heads=16, absolute_position=False``

(c') and (d) mix windows of tokens in the first two stages, which rows of patches do not allow: `zoo.hivit_windows` has
them. Table 9, the depths of the shallow stages, is `depths`, from ``(0, 0, 24)`` to ``(4, 4, 16)``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import Attention
from zoo.backbone import Backbone, build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.lean import activated_linear
from zoo.recompute import checkpoint_block
from zoo.relative_position import Grid, resize_table

PATCH = 16  # pixels: side of the patch that becomes one token of the main stage
DENSE_POSITION_GRID: Grid = (14, 14)  # tokens: published dense backbones store the embedding for 224 pixels
RELATIVE_TABLE = "relative_position_bias_table"
# Per model: expanded biases kept for inference, heads * tokens^2 * bytes per value in each main block. For the base
# model in float32 they are 25 MB at 224 pixels, 0.7 GB at 512, 1.6 GB at 640; at 1024 they would be 11 GB: not kept.
BIAS_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class HiViTConfig:
    """What a HiViT is made of; the names of Table 7 spelled out. Raises ZooError for values that cannot work."""

    embed_dim: int = 512  # channels of the main stage (stride 16); the first two stages have a quarter and a half
    depths: tuple[int, int, int] = (2, 2, 20)  # blocks per stage (strides 4, 8, 16); in the first two, two MLPs each
    num_heads: int = 8  # attention heads of the main stage
    shallow_mlp_ratio: float = 3.0  # hidden width over width, MLP units of the first two stages
    mlp_ratio: float = 4.0  # hidden width over width, blocks of the main stage
    drop_path_rate: float = 0.5  # stochastic depth of the last block; grows linearly from 0 over all units
    img_size: int | tuple[int, int] = 224  # pixels: positions are stored for this size, others interpolate
    relative_position_bias: bool = True  # a bias table in every main block (Table 2, row b)
    absolute_position: bool = True  # a learned embedding added at the main stage
    published_taps: bool = False  # dense maps where the published segmentation code takes them (strides 4 to 32)
    hierarchical: bool = True  # patches of 4 pixels and two shallow stages; else 16 and none (Table 2, rows o to b)
    patch_norm: bool = True  # a LayerNorm after the patch embedding (Table 2, row o has none)
    low_attention: bool = False  # shifted windows of 7 in the first two stages (Table 2, rows c' and d)
    mid_attention: bool = False  # the same in the third (Table 2, row d)
    last_depth: int = 0  # blocks of a fourth stage (stride 32, twice the channels), in such windows (Table 2, row d)

    def __post_init__(self):
        check_fields(self)
        check_size(self.img_size)
        if min(self.depths) < 0 or self.depths[2] < 1:
            raise ZooError(f"depths={self.depths} must be three numbers of blocks, the last at least 1")
        if self.embed_dim < 4 or self.embed_dim % 4:
            raise ZooError(f"embed_dim={self.embed_dim} must be a positive multiple of 4")
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ZooError(f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}")
        if not (self.shallow_mlp_ratio > 0 and self.mlp_ratio > 0):
            raise ZooError("mlp_ratio and shallow_mlp_ratio must be positive")
        if not 0 <= self.drop_path_rate < 1:
            raise ZooError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")
        if self.published_taps and not 1 <= self.depths[0] <= self.depths[1]:
            raise ZooError(f"published_taps=True needs 1 <= depths[0] <= depths[1], not depths={self.depths}")
        self._check_ablations()

    def _check_ablations(self) -> None:
        """Refuse combinations of Table 2's fields that make no network."""
        if not self.hierarchical and (self.low_attention or self.depths[:2] != (0, 0)):
            raise ZooError(
                f"hierarchical=False has no first two stages: depths={self.depths} must be (0, 0, n), and "
                f"low_attention={self.low_attention} must be False"
            )
        if self.shallow_mlp_ratio != HiViTConfig.shallow_mlp_ratio and (self.low_attention or not sum(self.depths[:2])):
            raise ZooError(f"shallow_mlp_ratio={self.shallow_mlp_ratio}: the first two stages have no MLP units")
        if self.last_depth < 0:
            raise ZooError(f"last_depth={self.last_depth} must be 0 (no fourth stage) or more")
        if not self.low_attention:
            if self.mid_attention or self.last_depth:
                raise ZooError("mid_attention and last_depth need low_attention=True: rows of patches have no windows")
        elif self.published_taps or not self.relative_position_bias:
            raise ZooError("low_attention=True needs relative_position_bias=True and published_taps=False")
        elif self.num_heads % 4:
            raise ZooError(f"low_attention=True: num_heads={self.num_heads} (third stage's) must be a multiple of 4")
        elif not (any(self.depths[:2]) or self.mid_attention or self.last_depth):
            raise ZooError(f"low_attention=True needs blocks in the first two stages, not depths={self.depths}")


def layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


class PatchEmbed(nn.Module):
    """4x4 pixels -> one vector, as a matrix product on patches that are already cut out of the image.

    The 16 positions of a 16x16 patch are ordered so that both merges join neighbours in memory: by the (column, row) of
    its 8x8 quarter, then by the (column, row) inside the quarter. With `side` 16 the patch is one position.
    """

    def __init__(self, in_chans: int, dim: int, side: int = 4, norm: bool = True):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=side, stride=side)
        self.norm = layer_norm(dim) if norm else nn.Identity()
        self.positions = (PATCH // side) ** 2

    def cut(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> a view (B, H/16, W/16, 2, 2, 2, 2, 3, 4, 4) of their patches; no copy.

        Of one position: (B, H/16, W/16, 3, 16, 16).
        """
        b, c, h, w = images.shape
        if self.positions == 1:
            return images.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
        pixels = images.reshape(b, c, h // PATCH, 2, 2, 4, w // PATCH, 2, 2, 4)
        return pixels.permute(0, 2, 6, 7, 3, 8, 4, 1, 5, 9)

    def forward(self, patches: Tensor) -> Tensor:
        """Cut patches (B, patches, 16, 3 * 4 * 4) -> (B, patches, 16, dim); of one position likewise."""
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class Mlp(nn.Module):
    """Linear, GELU, Linear; autograd keeps the hidden features once, before the GELU."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return activated_linear("gelu", self.fc2.weight, self.fc2.bias, self.fc1(x))


class MlpUnit(nn.Module):
    """Half a block of the first two stages: a residual MLP, position by position (section 3.2, step c)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerge(nn.Module):
    """2x2 neighbours -> one position of twice the width."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = layer_norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, positions, c = x.shape  # the order inside a patch makes the concatenation a view
        return self.reduction(self.norm(x.reshape(b, n, positions // 4, 4 * c)))


class Block(nn.Module):
    """Pre-norm transformer block of the main stage."""

    def __init__(self, dim: int, attention: Attention, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = attention
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HiViTBase(Backbone):
    """What all forms of HiViT share: the classifier, and which parameters do not decay."""

    family = "HiViT"
    maps_are_normed = False

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the tokens, LayerNorm, Linear: (B, C, h, w) -> (B, num_classes)."""
        if self.global_pool:
            x = self.head_drop(self.fc_norm(x.mean((2, 3))))
        return x if pre_logits else self.head(x)

    def _drop_head(self) -> None:
        self.fc_norm = nn.Identity()
        super()._drop_head()

    def _new_head(self, **factory: Any) -> nn.Module:
        head = super()._new_head(**factory)
        init_weights(head)
        return head

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("absolute_pos_embed", RELATIVE_TABLE))}


class HiViT(HiViTBase):
    """HiViT image classifier; `DenseHiViT` differs in the positions that it stores.

    Any image size works: images are zero-padded on the right and bottom to multiples of 16 and the position information
    is interpolated; maps are cropped to ceil(side / stride), so that they lie on the image and not on its padding.
    `position_grid` is the grid of tokens that the absolute position embedding is stored for. The features before
    pooling are the main stage's map (B, C, ceil(H / 16), ceil(W / 16)); no norm follows it. The map at stride 32 of
    `published_taps` is the one at 16, max-pooled: its sides are rounded down.
    """

    dense = False

    def __init__(
        self,
        cfg: HiViTConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        self.config = cfg
        self.num_features = self.head_hidden_size = dim = cfg.embed_dim
        self.table_grid: Grid = tuple(-(-side // PATCH) for side in check_size(cfg.img_size))
        self.position_grid = DENSE_POSITION_GRID if self.dense else self.table_grid

        shallow = (2 * cfg.depths[0], 2 * cfg.depths[1]) if cfg.hierarchical else ()  # MLP units
        self.main_start = sum(shallow) + len(shallow)
        rates = drop_path_rates(cfg)
        side = 4 if cfg.hierarchical else PATCH
        self.patch_embed = PatchEmbed(in_chans, dim * side // PATCH, side, cfg.patch_norm)
        blocks: list[nn.Module] = []
        for width, units in zip((dim // 4, dim // 2), shallow, strict=False):
            blocks += [MlpUnit(width, cfg.shallow_mlp_ratio, next(rates)) for _ in range(units)]
            blocks += [PatchMerge(width)]
        for _ in range(cfg.depths[2]):
            table_grid = self.table_grid if cfg.relative_position_bias else None
            attention = Attention(dim, cfg.num_heads, table_grid, BIAS_CACHE_BYTES // cfg.depths[2])
            blocks += [Block(dim, attention, cfg.mlp_ratio, next(rates))]
        self.blocks = nn.ModuleList(blocks)  # one flat list, as in the published checkpoints
        self.absolute_pos_embed: nn.Parameter | None = None
        if cfg.absolute_position:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, math.prod(self.position_grid), dim))

        last = len(blocks) - 1
        self.stage_ends = (shallow[0] - 1, self.main_start - 2, last) if cfg.hierarchical else (last,)
        taps = self.stage_ends  # -1: the patch embedding
        if cfg.published_taps:
            # The published segmentation code counts one unit per block where there are two: its first map leaves out
            # the stage's later half, and its second is taken before the second stage has begun. Its checkpoints were
            # trained so. The fourth map is the third, max-pooled.
            taps = cfg.depths[0] - 1, cfg.depths[0] + cfg.depths[1], last, last
        self.taps = taps
        shapes = ((dim // 4, 4), (dim // 2, 8), (dim, 16), (dim, 32)) if cfg.hierarchical else ((dim, PATCH),)
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"blocks.{tap}" if tap >= 0 else "patch_embed"}
            for (channels, stride), tap in zip(shapes, taps, strict=False)
        ]

        self.fc_norm = layer_norm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_weights)
        self.reset_classifier(num_classes, global_pool)
        if self.absolute_pos_embed is not None:
            nn.init.normal_(self.absolute_pos_embed, std=0.02)
        if self.dense:
            for name, table in self.named_parameters():
                if name.endswith(RELATIVE_TABLE):
                    nn.init.zeros_(table)

    @staticmethod
    def num_maps(cfg: HiViTConfig) -> int:
        return 1 if not cfg.hierarchical else 4 if cfg.published_taps else 3

    def _run(self, x: Tensor, take: Sequence[int], whole: bool) -> tuple[Tensor, list[Tensor]]:
        last = len(self.blocks) - 1 if whole else self.taps[max(take)]
        features, maps = self._forward(x, [self.taps[index] for index in take], last)
        return features, [F.max_pool2d(m, 2) if index == 3 else m for index, m in zip(take, maps, strict=True)]

    def _forward(self, images: Tensor, taps: list[int] | tuple[int, ...], last: int) -> tuple[Tensor, list[Tensor]]:
        """Run up to block `last`; returns its map and the maps after the blocks `taps`, all NCHW."""
        height, width = images.shape[-2:]
        if height % PATCH or width % PATCH:
            images = F.pad(images, (0, -width % PATCH, 0, -height % PATCH))
        patches = self.patch_embed.cut(images)
        grid = tuple(patches.shape[1:3])
        patches = patches.reshape(patches.shape[0], grid[0] * grid[1], self.patch_embed.positions, -1)
        maps: dict[int, Tensor] = {}
        for index, x in self.run_blocks(self.patch_embed(patches), self.position(grid), grid, last):
            if index in taps or index == last:
                maps[index] = to_map(x, grid, (height, width))
        return maps[last], [maps[tap] for tap in taps]

    def run_blocks(
        self, x: Tensor, position: Tensor | None, grid: Grid | None, last: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (index, output) of the embedding (-1) and of each block up to `last`.

        `x` is (B, patches, 16, C/4), or (B, patches, 1, C) without shallow stages; the main stage's outputs are
        (B, patches, C). `position` is added where it starts.
        Patches may be any subset of the image's when the model has no relative bias (then `grid` is None).
        """
        yield -1, x
        for index, block in enumerate(self.blocks[: last + 1]):
            args = ()
            if index >= self.main_start:
                args = (grid,)
                if index == self.main_start:
                    x = x.squeeze(2) if position is None else x.squeeze(2) + position
            x = self.run_block(block, x, *args)
            yield index, x

    def run_block(self, block: nn.Module, *args: Any) -> Tensor:
        """Call a block, under gradient checkpointing where that is on."""
        return checkpoint_block(block, *args) if self.grad_checkpointing else block(*args)

    def position(self, grid: Grid) -> Tensor | None:
        """The absolute position embedding (1, h * w, C) of a grid of patches, interpolated as published."""
        embedding = self.absolute_pos_embed
        return embedding if embedding is None else resize_position(embedding, self.position_grid, grid)

    def _keep(self, take: Sequence[int]) -> bool:
        self.maps = tuple(range(max(take) + 1))
        last = self.taps[max(take)]
        shortened = last < len(self.blocks) - 1
        self.blocks = self.blocks[: last + 1]
        if last < self.main_start:
            self.absolute_pos_embed = None
        return shortened

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^(?:.*\.)?(?:patch_embed|absolute_pos_embed)",
            "blocks": [(r"^(?:.*\.)?blocks\.(\d+)", None), (r"^(?:.*\.)?fc_norm", (99999,))],
        }

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict (classifier, dense backbone or MAE): same names, positions fitted to the model.

        The index buffers are left out (they follow from the size). Positions whose number of rows is not the model's
        are resized from the square grid that this number tells. A source without relative tables (a masked
        autoencoder) gives zeros, from which the published fine-tuning starts.
        """
        own = dict(self.named_parameters())
        position = state.get("absolute_pos_embed")
        # The tables of a model whose tokens are no square grid may have a square number of rows all the same.
        is_square = position is None or (position.ndim == 3 and square_grid(position.shape[1]) is not None)
        fitted = {}
        for key, value in state.items():
            if key.endswith("relative_position_index"):
                continue
            if is_square and key in own and value.ndim == own[key].ndim:
                if key == "absolute_pos_embed" and value.shape[1] != own[key].shape[1]:
                    value = resize_position(value, square_grid(value.shape[1]), self.position_grid)
                elif key.endswith(RELATIVE_TABLE) and len(value) != len(own[key]):
                    offsets = square_grid(len(value))  # along a side: 2 * tokens - 1
                    if offsets and offsets[0] % 2:
                        side = (offsets[0] + 1) // 2
                        value = resize_table(value, (side, side), self.table_grid)
            fitted[key] = value
        if not any(key.endswith(RELATIVE_TABLE) for key in state):
            tables = [key for key in own if key.endswith(RELATIVE_TABLE)]
            fitted |= {k: torch.zeros_like(own[k]) for k in tables if k.replace(RELATIVE_TABLE, "qkv.weight") in state}
        return fitted


class DenseHiViT(HiViT):
    """HiViT as the published segmentation code has it, built for `features_only`.

    The absolute positions are those of 224 pixels, resized at run time whatever the image size, and the relative tables
    start from zero.
    """

    dense = True


def drop_path_rates(cfg: HiViTConfig) -> Iterator[float]:
    """Stochastic depth per unit, linear from 0 to the configured rate: two per shallow block, one per main block."""
    units = 2 * cfg.depths[0] + 2 * cfg.depths[1] + cfg.depths[2]
    return iter([cfg.drop_path_rate * unit / max(units - 1, 1) for unit in range(units)])


def in_reading_order(x: Tensor, grid: Grid) -> Tensor:
    """Rows of patches (B, h * w, 16 | 4 | 1, C) or (B, h * w, C) -> (B, h * side, w * side, C), side 4, 2 or 1."""
    b, c = x.shape[0], x.shape[-1]
    levels = {1: 0, 4: 1, 16: 2}[x.shape[2] if x.ndim == 4 else 1]  # merges still to come
    x = x.reshape(b, *grid, *(2, 2) * levels, c)  # B, h, w, (column, row) of each level, C
    columns, rows = range(3, 3 + 2 * levels, 2), range(4, 4 + 2 * levels, 2)
    x = x.permute(0, 1, *rows, 2, *columns, x.ndim - 1)
    return x.reshape(b, grid[0] << levels, grid[1] << levels, c)


def to_map(x: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Rows of patches -> the map (B, C, ceil(H / stride), ceil(W / stride)) of an image of `size` (H, W)."""
    x = in_reading_order(x, grid)
    stride = PATCH * grid[0] // x.shape[1]
    return x[:, : -(-size[0] // stride), : -(-size[1] // stride)].permute(0, 3, 1, 2)


def resize_position(embedding: Tensor, source: Grid, target: Grid) -> Tensor:
    """Resize an absolute position embedding (1, h * w, C) from one grid to another, bicubically as published."""
    if source == target:
        return embedding
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    grid = embedding.to(dtype).reshape(1, *source, -1).permute(0, 3, 1, 2)
    # The 0.1 guards the rounding of the size; being passed as the scale, it also shifts the samples, as published.
    scale = tuple((new + 0.1) / old for new, old in zip(target, source, strict=True))
    resized = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return resized.flatten(2).transpose(1, 2).to(embedding.dtype)


def square_grid(tokens: int) -> Grid | None:
    """The square grid of so many tokens, None where there is none."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def init_weights(module: nn.Module) -> None:
    """Linear layers and relative tables: normal, deviation 0.02; biases 0; the rest is PyTorch's default.

    The published code cuts the normal off at 2, 100 deviations away, where rounding puts about one weight in 2^24.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Attention) and module.relative_position_bias_table is not None:
        nn.init.normal_(module.relative_position_bias_table, std=0.02)


VARIANTS = {
    "hivit_tiny": HiViTConfig(embed_dim=384, depths=(1, 1, 10), num_heads=6, drop_path_rate=0.05),
    "hivit_small": HiViTConfig(embed_dim=384, depths=(2, 2, 20), num_heads=6, drop_path_rate=0.3),
    "hivit_base": HiViTConfig(embed_dim=512, depths=(2, 2, 20), num_heads=8, drop_path_rate=0.5),
    # The paper trains no large model with labels and gives no drop path rate for it: the base model's is used.
    "hivit_large": HiViTConfig(embed_dim=768, depths=(4, 4, 36), num_heads=12, drop_path_rate=0.5),
    "test_hivit": HiViTConfig(embed_dim=32, depths=(1, 1, 2), num_heads=2, drop_path_rate=0.1, img_size=64),
}

default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(first_conv="patch_embed.proj", classifier="head") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model_cls = DenseHiViT if kwargs.get("features_only") else HiViT
    if kwargs.get("low_attention"):  # another layout of the tokens
        from zoo.hivit_windows import WindowHiViT as model_cls
    return build(model_cls, variant, VARIANTS[variant], pretrained, **kwargs)


@register_model
def hivit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-T: 19.2 M parameters, 4.6 GMACs at 224 (Table 7)."""
    return _create("hivit_tiny", pretrained, **kwargs)


@register_model
def hivit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-S: 37.5 M parameters, 9.1 GMACs at 224 (Table 7)."""
    return _create("hivit_small", pretrained, **kwargs)


@register_model
def hivit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-B: 66.4 M parameters, 15.9 GMACs at 224 (Table 7)."""
    return _create("hivit_base", pretrained, **kwargs)


@register_model
def hivit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-L: 266.8 M parameters, 63.8 GMACs at 224 (Table 7)."""
    return _create("hivit_large", pretrained, **kwargs)


@register_model
def test_hivit(**kwargs: Any) -> nn.Module:
    """A HiViT for tests: 64 pixels, 32 channels, two main blocks."""
    return _create("test_hivit", **kwargs)
