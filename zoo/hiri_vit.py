"""HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs (Yao, Li, Pan, Mei; TPAMI 2024).

Paper: https://arxiv.org/abs/2403.11999 (section 4, Table 1). No implementation is published: where the text leaves
something open, what is built here is the form that the parameters and MACs of the paper's Tables 2 to 8 single out
("fitted" below), or else the habit of the same authors' published code ("habit").

Five stages at strides 4 to 64. The first two and the stem split their convolutions in two branches: a light one at high
resolution, and one that first halves the resolution and then does the work. Maps lie in memory as NHWC throughout
(channels_last), so that convolutions, per-position linear layers, attention and norms take them as they are.

The paper's ablations are fields. Table 7 starts from row 1, a plain network of four stages, and ends in the five of
HIRI-ViT-S. `m_vit` is row 6, the last of four stages that sees 224 pixels; row 7 is the same at 448. What rows 5 to 1
lack, each beside what the row above it lacks:

- (5) ``downsampling=("conv", "conv", "conv")``
- (4) ``stem="vit"``
- (3) ``norms=("layer", "layer", "layer", "layer"), ffn_norm="layer"``
- (2) ``blocks=("transformer",) * 4, num_heads=(1, 2, 5, 8), reductions=(8, 4, 1, 1)``
- (1) ``ffn_convolution=False``; its printed parameters need ``position_embedding=True``, too, which the text has not

Rows 8 to 11 are fields of `hiri_vit_small`, which is row 10 (and 11, with the recipe's distillation):

- (8) ``blocks=("cffn", "cffn", "cffn", "transformer", "transformer"), depths=(1, 1, 2, 9, 4), stem="conv"``
- (9) the same without ``stem``

Table 8, likewise: `blocks`, with ``depths=(2, 2, 2, 11, 4), num_heads=(8,)`` for HR-HR-HR-HR-T (the number of blocks is
not given), and ``mlp_ratios=(4, 4, 4, 5, 5), num_heads=(2, 5, 8)`` for HR-HR-T-T-T. Table 9: `zoo.hiri_extended`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import Attention as ReducedAttention
from torch import Tensor, nn

from zoo.attention import Attention
from zoo.backbone import Backbone, build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.hiri_blocks import CFFN, FFN, HRBlock, drop_path_or_identity
from zoo.hiri_downsampling import DOWNSAMPLING, FIRST_CONVS, NORMS, STEMS, PositionEmbedding, channel_norm
from zoo.recompute import checkpoint_block

POSITIONS = "stem.2.table"  # where the position embedding is
KINDS = {  # of the fields that name a part
    "blocks": ("hr", "cffn", "transformer"),
    "norms": tuple(NORMS),
    "ffn_norm": tuple(NORMS),
    "stem": tuple(STEMS),
    "downsampling": tuple(DOWNSAMPLING),
}


@dataclass(frozen=True)
class HiriViTConfig:
    """What a HIRI-ViT is made of; a number per stage follows Table 1. Raises ZooError for values that cannot work."""

    channels: tuple[int, ...] = (32, 64, 128, 320, 512)  # C_i of Table 1
    depths: tuple[int, ...] = (2, 2, 2, 9, 4)  # blocks per stage (Table 1)
    mlp_ratios: tuple[int, ...] = (4, 4, 6, 5, 5)  # E_i of Table 1: expansion of the feed-forward layers
    blocks: tuple[str, ...] = ("hr", "hr", "cffn", "transformer", "transformer")  # kind per stage (Table 8)
    num_heads: tuple[int, ...] = (5, 8)  # H_4 and H_5 of Table 1: attention heads per transformer stage
    reductions: tuple[int, ...] = (1, 1, 1, 1, 1)  # of rows and columns of attention's keys (Table 7, rows 1 and 2)
    norms: tuple[str, ...] = ("batch", "batch", "batch", "layer", "layer")  # at both ends of a stage (section 4.4)
    ffn_norm: str = "batch"  # before the feed-forward network of a block, or "layer" (Table 7, row 4)
    ffn_convolution: bool = True  # CFFN, else FFN (Table 7, row 2)
    stem: str = "hr"  # "hr", "conv" or "vit" (Table 7, rows 5 and 9)
    position_embedding: bool = False  # learned, added after the ViT-stem (Table 7, row 1: its parameters need one)
    stem_width: int = 32  # channels inside the HR-stem and the Conv-stem (fitted)
    downsampling: tuple[str, ...] = ("irds_a", "irds_a", "irds_b", "irds_b")  # or "conv" (Table 7, row 6)
    down_strides: tuple[int, ...] = (2, 2, 2, 2)  # before stages 2 to 5; the 224 form: 2, 1, 2, 2
    down_ratios: tuple[int, ...] = (4, 4, 6, 6)  # hidden width over input width of each IRDS (fitted)
    shortcut_kernels: tuple[int, ...] = (2, 2, 1, 1)  # of each IRDS: 1 (after pooling), 2 or 3 (fitted)
    head_ratio: int = 5  # hidden width of the classifier over C_5 (fitted)
    drop_path_rate: float = 0.15  # stochastic depth of the last block; grows linearly from 0 (habit)
    img_size: int | tuple[int, int] = 448  # pixels: for the record only, unless there is a position embedding

    def __post_init__(self):
        check_fields(self)
        check_size(self.img_size)
        self._check_stages()
        if self.position_embedding and self.stem != "vit":
            raise ZooError(f"position_embedding=True needs stem='vit', whose patches it is for, not stem={self.stem!r}")
        for name in ("channels", "depths", "mlp_ratios", "num_heads", "reductions", "down_ratios"):
            if min(getattr(self, name), default=1) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive numbers")
        for name in ("stem_width", "head_ratio"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive")
        for heads, index in zip(self.num_heads, self.transformers, strict=True):
            if self.channels[index] % heads:
                raise ZooError(f"num_heads={self.num_heads} must divide those of channels={self.channels}")
        if not set(self.down_strides) <= {1, 2}:
            raise ZooError(f"down_strides={self.down_strides} must be 1 or 2 each")
        if not set(self.shortcut_kernels) <= {1, 2, 3}:
            raise ZooError(f"shortcut_kernels={self.shortcut_kernels} must be 1, 2 or 3 each")
        if not 0 <= self.drop_path_rate < 1:
            raise ZooError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")

    @property
    def transformers(self) -> list[int]:
        """The indices of the stages of transformer blocks."""
        return [index for index, kind in enumerate(self.blocks) if kind == "transformer"]

    def _check_stages(self) -> None:
        """Refuse unknown kinds, and fields that do not have a value for each stage."""
        stages = len(self.channels)
        for name in ("depths", "mlp_ratios", "blocks", "reductions", "norms"):
            if len(getattr(self, name)) != stages:
                raise ZooError(f"{name}={getattr(self, name)} must have a value for each of channels={self.channels}")
        for name in ("downsampling", "down_strides", "down_ratios", "shortcut_kernels"):
            if len(getattr(self, name)) != stages - 1:
                raise ZooError(
                    f"{name}={getattr(self, name)} must have a value for each of {stages} stages but the first"
                )
        for name, known in KINDS.items():
            value = getattr(self, name)
            if not {*([value] if isinstance(value, str) else value)} <= set(known):
                raise ZooError(f"{name}={value!r} must be of {', '.join(known)}")
        if len(self.num_heads) != len(self.transformers):
            raise ZooError(
                f"num_heads={self.num_heads} must have a value for each transformer stage of blocks={self.blocks}"
            )
        if any(self.reductions[index] > 1 for index in range(stages) if index not in self.transformers):
            raise ZooError(f"reductions={self.reductions} must be 1 where blocks={self.blocks} have no attention")

    def idle(self) -> Iterator[tuple[str, int | None, str]]:
        """Fields that change nothing beside the others; see `zoo.backbone.refuse_idle`."""
        if self.stem == "vit":
            yield "stem_width", None, "stem='vit' has no channels inside"
        for index, kind in enumerate(self.downsampling):
            if kind == "conv":
                for name in ("down_ratios", "shortcut_kernels"):
                    yield name, index, f"downsampling={self.downsampling} has a single convolution"
        if set(self.blocks) == {"hr"}:
            for name in ("ffn_norm", "ffn_convolution"):
                yield name, None, f"blocks={self.blocks} have no such network"


class CFFNBlock(nn.Module):
    """Residual CFFN with BatchNorm before it (section 4.4): the third stage."""

    def __init__(self, cfg: HiriViTConfig, index: int, drop_path: float):
        super().__init__()
        dim = cfg.channels[index]
        self.norm = channel_norm(cfg.ffn_norm, dim)
        self.cffn = (CFFN if cfg.ffn_convolution else FFN)(dim, cfg.mlp_ratios[index])
        self.drop_path = drop_path_or_identity(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.cffn(self.norm(x)))


class TransformerBlock(nn.Module):
    """Attention over all tokens (equation 1) after a LayerNorm, CFFN after a BatchNorm (section 4.4).

    With reduced keys and values the attention is PVT's, which the ablation's base model follows (section 5.4).
    """

    def __init__(self, cfg: HiriViTConfig, index: int, drop_path: float):
        super().__init__()
        dim, reduction = cfg.channels[index], cfg.reductions[index]
        heads = cfg.num_heads[cfg.transformers.index(index)]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReducedAttention(dim, heads, reduction) if reduction > 1 else Attention(dim, heads)
        self.norm2 = channel_norm(cfg.ffn_norm, dim)
        self.cffn = (CFFN if cfg.ffn_convolution else FFN)(dim, cfg.mlp_ratios[index])
        self.drop_path = drop_path_or_identity(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H * W, C)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), x.shape[2:]))
        x = tokens.transpose(1, 2).reshape(x.shape)
        return x + self.drop_path(self.cffn(self.norm2(x)))


def make_block(cfg: HiriViTConfig, index: int, drop_path: float) -> nn.Module:
    """A block of the stage `index`, counted from 0."""
    match cfg.blocks[index]:
        case "hr":
            return HRBlock(cfg.channels[index], cfg.mlp_ratios[index], drop_path)
        case "cffn":
            return CFFNBlock(cfg, index, drop_path)
        case _:
            return TransformerBlock(cfg, index, drop_path)


class Stage(nn.Module):
    """Downsampling, blocks, and the norm that ends the stage (habit): BatchNorm in the first three (section 4.4)."""

    def __init__(self, cfg: HiriViTConfig, index: int, drop_path: list[float]):
        super().__init__()
        dim, norm = cfg.channels[index], cfg.norms[index]
        self.downsample: nn.Module = nn.Identity()
        if index > 0:
            down = index - 1
            self.downsample = DOWNSAMPLING[cfg.downsampling[down]](
                cfg.channels[down], dim, cfg.down_ratios[down], cfg.down_strides[down], cfg.shortcut_kernels[down], norm
            )
        self.blocks = nn.ModuleList([make_block(cfg, index, rate) for rate in drop_path])
        self.norm = channel_norm(norm, dim)


class Head(nn.Module):
    """Classifier (fitted): Linear, LayerNorm, GELU, Linear over the last dimension of pooled features or positions."""

    def __init__(self, dim: int, ratio: int, num_classes: int, drop_rate: float, **factory: Any):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim, **factory)
        self.norm = nn.LayerNorm(ratio * dim, eps=1e-6, **factory)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(ratio * dim, num_classes, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(self.norm(self.fc1(x)))))


class HiriViT(Backbone):
    """HIRI-ViT image classifier; its dense maps are those of its stages, each after the stage's norm.

    The paper's detection and segmentation networks take the last four of the five (``out_indices=(1, 2, 3, 4)``).

    Any image size works as it is: every operation of stride 2 gives ceil(side / 2) positions. The classifier is a
    two-layer head; `reset_classifier` replaces its last layer, and with 0 classes removes both.
    The features before pooling are the last map, (B, C_5, h, w) with h = ceil(H / 64) (224 form: H / 32).
    """

    family = "HIRI-ViT"

    def __init__(
        self,
        cfg: HiriViTConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        self.config = cfg
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = cfg.channels[-1]
        rates = drop_path_rates(cfg)
        self.stem = STEMS[cfg.stem](in_chans, cfg.stem_width, cfg.channels[0], cfg.norms[0])
        if cfg.position_embedding:
            self.stem.append(
                PositionEmbedding(cfg.channels[0], tuple(-(-side // 4) for side in check_size(cfg.img_size)))
            )
        self.stages = nn.ModuleList([Stage(cfg, index, rates[index]) for index in range(len(rates))])
        self.feature_info, stride = [], 4
        for index, channels in enumerate(cfg.channels):
            stride *= cfg.down_strides[index - 1] if index else 1
            self.feature_info.append({"num_chs": channels, "reduction": stride, "module": f"stages.{index}.norm"})
        self.head: nn.Module = nn.Identity()
        self.apply(init_weights)
        self.reset_classifier(num_classes, global_pool)

    @staticmethod
    def num_maps(cfg: HiriViTConfig) -> int:
        return len(cfg.channels)

    @staticmethod
    def first_conv(cfg: HiriViTConfig) -> str:
        """The name of the convolution that sees the images."""
        return f"stem.{FIRST_CONVS[cfg.stem]}"

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, then the two-layer head: (B, C_5, h, w) -> (B, num_classes)."""
        if self.global_pool:
            x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def _run(self, x: Tensor, take: Sequence[int], whole: bool) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages if whole else self.stages[: max(take) + 1]:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = checkpoint_block(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
            x = stage.norm(x)
            maps.append(x)
        return x, [maps[index] for index in take]

    def _keep(self, take: Sequence[int]) -> bool:
        self.maps = tuple(range(max(take) + 1))
        shortened = max(take) < len(self.stages) - 1
        self.stages = self.stages[: max(take) + 1]
        return shortened

    def no_weight_decay(self) -> set[str]:
        return {POSITIONS} if self.config.position_embedding else set()

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our own state dict, with the position embedding of another image size resized."""
        if self.config.position_embedding and POSITIONS in state and state[POSITIONS].ndim == 4:
            return state | {POSITIONS: self.stem[-1].resized(state[POSITIONS], self.stem[-1].table.shape[-2:])}
        return state

    def get_classifier(self) -> nn.Module:
        return self.head.fc2 if isinstance(self.head, Head) else self.head

    def _new_head(self, **factory: Any) -> nn.Module:
        if isinstance(self.head, Head):
            new = self.head.fc2 = nn.Linear(self.head.fc2.in_features, self.num_classes, **factory)
        else:
            ratio = self.config.head_ratio
            new = self.head = Head(self.num_features, ratio, self.num_classes, self.drop_rate, **factory)
        new.apply(init_weights)
        return self.head.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stage = r"^(?:.*\.)?stages\.(\d+)\."
        blocks = [(stage + "downsample", (-1,)), (stage + r"blocks\.(\d+)", None), (stage + "norm", (99999,))]
        return {"stem": r"^(?:.*\.)?stem", "blocks": stage if coarse else blocks}


def drop_path_rates(cfg: HiriViTConfig) -> list[list[float]]:
    """Stochastic depth per stage and block, linear from 0 to the configured rate over all blocks."""
    step = cfg.drop_path_rate / max(sum(cfg.depths) - 1, 1)
    starts = [sum(cfg.depths[:index]) for index in range(len(cfg.depths))]
    return [[step * (start + j) for j in range(depth)] for start, depth in zip(starts, cfg.depths, strict=True)]


def init_weights(module: nn.Module) -> None:
    """Linear: normal, deviation 0.02; convolutions: normal, sqrt(2 / fan out); biases 0 (habit)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


VARIANTS = {
    "hiri_vit_small": HiriViTConfig(),
    "hiri_vit_base": HiriViTConfig(
        channels=(64, 96, 192, 320, 640),
        depths=(2, 2, 3, 17, 4),
        mlp_ratios=(4, 4, 5, 4, 5),
        num_heads=(5, 10),
        stem_width=64,
    ),
    "hiri_vit_large": HiriViTConfig(
        channels=(80, 160, 224, 448, 640),
        depths=(4, 4, 5, 25, 5),
        mlp_ratios=(4, 4, 5, 3, 5),
        num_heads=(7, 10),
        stem_width=64,
        drop_path_rate=0.3,
    ),
    "m_vit": HiriViTConfig(
        channels=(64, 128, 320, 512),
        depths=(1, 2, 9, 4),
        mlp_ratios=(4, 6, 5, 5),
        blocks=("cffn", "cffn", "transformer", "transformer"),
        reductions=(1, 1, 1, 1),
        norms=("batch", "batch", "layer", "layer"),
        stem="conv",
        downsampling=("irds_b", "irds_b", "irds_b"),
        down_strides=(2, 2, 2),
        down_ratios=(6, 6, 6),
        shortcut_kernels=(1, 1, 1),
        img_size=224,
    ),
    "test_hiri_vit": HiriViTConfig(
        channels=(8, 16, 16, 32, 32),
        depths=(1, 1, 1, 1, 1),
        mlp_ratios=(2, 2, 2, 2, 2),
        num_heads=(1, 2),
        stem_width=8,
        drop_path_rate=0.1,
        img_size=64,
    ),
}
# The same weights at 224 pixels, on the grids that Table 2's MACs at 224 need: 56, 28, 28, 14, 7 positions a side.
VARIANTS |= {
    f"{name}_224": replace(VARIANTS[name], down_strides=(2, 1, 2, 2), img_size=224)
    for name in ("hiri_vit_small", "hiri_vit_base", "hiri_vit_large")
}

default_cfgs = generate_default_cfgs(
    {
        name: pretrained_cfg(
            first_conv=HiriViT.first_conv(cfg),
            classifier="head.fc2",
            input_size=(3, cfg.img_size, cfg.img_size),
            crop_pct=0.96,  # habit
        )
        for name, cfg in VARIANTS.items()
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build(HiriViT, variant, VARIANTS[variant], pretrained, **kwargs)


@register_model
def hiri_vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HIRI-ViT-S: 34.8 M parameters, 5.0 GMACs at 448 (Table 2), 16.0 at 768."""
    return _create("hiri_vit_small", pretrained, **kwargs)


@register_model
def hiri_vit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HIRI-ViT-B: 54.4 M parameters, 9.9 GMACs at 448 (Table 2), 31.6 at 768."""
    return _create("hiri_vit_base", pretrained, **kwargs)


@register_model
def hiri_vit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HIRI-ViT-L: 94.4 M parameters, 19.9 GMACs at 448 (Table 2), 63.6 at 768."""
    return _create("hiri_vit_large", pretrained, **kwargs)


@register_model
def hiri_vit_small_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HIRI-ViT-S for 224 pixels, maps at strides 4, 8, 8, 16, 32: 4.5 GMACs (Table 2)."""
    return _create("hiri_vit_small_224", pretrained, **kwargs)


@register_model
def hiri_vit_base_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HIRI-ViT-B for 224 pixels, maps at strides 4, 8, 8, 16, 32: 8.0 GMACs (Table 2 says 8.2)."""
    return _create("hiri_vit_base_224", pretrained, **kwargs)


@register_model
def hiri_vit_large_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HIRI-ViT-L for 224 pixels, maps at strides 4, 8, 8, 16, 32: 16.9 GMACs (Table 2 says 17.0)."""
    return _create("hiri_vit_large_224", pretrained, **kwargs)


@register_model
def m_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """M-ViT, four stages at 224 pixels, as row 6 of Table 7 has it: 34.5 M, 4.7 GMACs (its base, row 1: 35.0, 4.4)."""
    return _create("m_vit", pretrained, **kwargs)


@register_model
def test_hiri_vit(**kwargs: Any) -> nn.Module:
    """A HIRI-ViT for tests: 64 pixels, at most 32 channels, one block per stage."""
    return _create("test_hiri_vit", **kwargs)
