"""HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs (Yao, Li, Pan, Mei; TPAMI 2024).

Paper: https://arxiv.org/abs/2403.11999 (section 4, Table 1). No implementation is published: where the text leaves
something open, what is built here is the form that the parameters and MACs of the paper's Tables 2 to 8 single out
("fitted" below), or else the habit of the same authors' published code ("habit").

Five stages at strides 4 to 64. The first two and the stem split their convolutions in two branches: a light one at high
resolution, and one that first halves the resolution and then does the work. Maps lie in memory as NHWC throughout
(channels_last), so that convolutions, per-position linear layers, attention and norms take them as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import Attention
from zoo.backbone import Backbone, build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.lean import activated_linear
from zoo.norm import BatchNorm2d
from zoo.recompute import checkpoint_block, recompute


@dataclass(frozen=True)
class HiriViTConfig:
    """What a HIRI-ViT is made of; a number per stage follows Table 1. Raises ZooError for values that cannot work."""

    channels: tuple[int, int, int, int, int] = (32, 64, 128, 320, 512)  # C_i of Table 1
    depths: tuple[int, int, int, int, int] = (2, 2, 2, 9, 4)  # blocks per stage (Table 1)
    mlp_ratios: tuple[int, int, int, int, int] = (4, 4, 6, 5, 5)  # E_i of Table 1: expansion of the feed-forward layers
    num_heads: tuple[int, int] = (5, 8)  # H_4 and H_5 of Table 1: attention heads of the transformer stages
    stem_width: int = 32  # channels inside the HR-stem (fitted)
    down_strides: tuple[int, int, int, int] = (2, 2, 2, 2)  # of the IRDS before stages 2 to 5; the 224 form: 2, 1, 2, 2
    down_ratios: tuple[int, int, int, int] = (4, 4, 6, 6)  # hidden width over input width of each IRDS (fitted)
    shortcut_kernels: tuple[int, int, int, int] = (2, 2, 1, 1)  # of each IRDS: 1 (after pooling), 2 or 3 (fitted)
    head_ratio: int = 5  # hidden width of the classifier over C_5 (fitted)
    drop_path_rate: float = 0.15  # stochastic depth of the last block; grows linearly from 0 (habit)
    img_size: int | tuple[int, int] = 448  # pixels: for the record only, no parameter depends on it

    def __post_init__(self):
        check_fields(self)
        check_size(self.img_size)
        for name in ("channels", "depths", "mlp_ratios", "num_heads", "down_ratios"):
            if min(getattr(self, name)) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive numbers")
        for name in ("stem_width", "head_ratio"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive")
        for heads, width in zip(self.num_heads, self.channels[3:], strict=True):
            if width % heads:
                raise ZooError(f"num_heads={self.num_heads} must divide the last two of channels={self.channels}")
        if not set(self.down_strides) <= {1, 2}:
            raise ZooError(f"down_strides={self.down_strides} must be 1 or 2 each")
        if not set(self.shortcut_kernels) <= {1, 2, 3}:
            raise ZooError(f"shortcut_kernels={self.shortcut_kernels} must be 1, 2 or 3 each")
        if not 0 <= self.drop_path_rate < 1:
            raise ZooError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")


def conv(dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution whose output has ceil(side / stride) positions (odd kernels)."""
    return nn.Conv2d(dim, out, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


def conv_norm_act(
    dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Sequential:
    return nn.Sequential(conv(dim, out, kernel, stride, groups, bias), BatchNorm2d(out), nn.ReLU(inplace=True))


def drop_path_or_identity(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


class HRStem(nn.Module):
    """High resolution stem (section 4.1, Figure 3c): images (B, 3, H, W) -> (B, C_1, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, width: int, out: int):
        super().__init__()
        self.trunk = conv_norm_act(in_chans, width, 3, stride=2)
        self.high = nn.Sequential(conv_norm_act(width, width, 3, groups=width), conv(width, out, 3, stride=2))
        self.low = nn.Sequential(
            conv_norm_act(width, width, 3, stride=2), conv_norm_act(width, width, 3), conv(width, out, 1)
        )
        self.norm = BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.norm(self.high(x) + self.low(x))


class HRBlock(nn.Module):
    """High resolution block (section 4.2, Figure 4), residual (habit); its only norm is that of the low branch."""

    def __init__(self, dim: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.high = conv(dim, dim, 3, groups=dim)
        self.down = conv(dim, dim, 3, stride=2, groups=dim, bias=False)
        self.norm = BatchNorm2d(dim)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)
        self.drop_path = drop_path_or_identity(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        low = self.norm(self.down(x)).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, ceil(H / 2), ceil(W / 2), C)
        low = activated_linear("gelu", self.fc2.weight, self.fc2.bias, self.fc1(low)).permute(0, 3, 1, 2)
        low = F.interpolate(low, scale_factor=2.0, mode="nearest")[..., : x.shape[2], : x.shape[3]]
        return x + self.drop_path(self.high(x) + low)


class CFFN(nn.Module):
    """Convolutional feed-forward network, equation 3; autograd keeps the hidden features once, before the GELU."""

    def __init__(self, dim: int, mlp_ratio: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.dwconv = conv(mlp_ratio * dim, mlp_ratio * dim, 3, groups=mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, E * C)
        return recompute(self._second_half, hidden).permute(0, 3, 1, 2)

    def _second_half(self, hidden: Tensor) -> Tensor:
        z = F.gelu(hidden)
        return self.fc2(self.dwconv(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + z)


class CFFNBlock(nn.Module):
    """Residual CFFN with BatchNorm before it (section 4.4): the third stage."""

    def __init__(self, dim: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.norm = BatchNorm2d(dim)
        self.cffn = CFFN(dim, mlp_ratio)
        self.drop_path = drop_path_or_identity(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.cffn(self.norm(x)))


class TransformerBlock(nn.Module):
    """Attention over all tokens (equation 1) after a LayerNorm, CFFN after a BatchNorm (section 4.4)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = BatchNorm2d(dim)
        self.cffn = CFFN(dim, mlp_ratio)
        self.drop_path = drop_path_or_identity(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H * W, C)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        x = tokens.transpose(1, 2).reshape(x.shape)
        return x + self.drop_path(self.cffn(self.norm2(x)))


class Shortcut(nn.Module):
    """The convolution beside an IRDS (section 4.3: "extra downsampling shortcuts").

    Kernel 2 merges patches and pads with zeros on the right and bottom; kernel 1 follows an average pooling (habit).
    """

    def __init__(self, dim: int, out: int, kernel: int, stride: int):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv2d(dim, out, kernel, stride if kernel > 1 else 1, padding=1 if kernel == 3 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == 1 and self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        elif self.kernel == 2:
            bottom, right = (-side % 2 if self.stride == 2 else 1 for side in x.shape[-2:])
            if bottom or right:
                x = F.pad(x, (0, right, 0, bottom))
        return self.conv(x)


class IRDSa(nn.Module):
    """Inverted residual downsampling for high resolution (section 4.3, Figure 5b), before stages 2 and 3."""

    def __init__(self, dim: int, out: int, ratio: int, stride: int, shortcut_kernel: int):
        super().__init__()
        self.main = nn.Sequential(conv_norm_act(dim, ratio * dim, 3, stride, bias=True), conv(ratio * dim, out, 1))
        self.shortcut = Shortcut(dim, out, shortcut_kernel, stride)
        self.norm = BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.main(x) + self.shortcut(x))


class IRDSb(nn.Module):
    """Inverted residual downsampling (section 4.3, Figure 5c), before stages 4 and 5: norm and activation only once."""

    def __init__(self, dim: int, out: int, ratio: int, stride: int, shortcut_kernel: int):
        super().__init__()
        hidden = ratio * dim
        self.main = nn.Sequential(
            conv_norm_act(dim, hidden, 1, bias=True),
            conv(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, out, 1),
        )
        self.shortcut = Shortcut(dim, out, shortcut_kernel, stride)
        self.norm = LayerNorm2d(out, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.main(x) + self.shortcut(x))


class Stage(nn.Module):
    """Downsampling, blocks, and the norm that ends the stage (habit): BatchNorm in the first three (section 4.4)."""

    def __init__(self, cfg: HiriViTConfig, index: int, drop_path: list[float]):
        super().__init__()
        dim, ratio = cfg.channels[index], cfg.mlp_ratios[index]
        self.downsample: nn.Module = nn.Identity()
        if index > 0:
            down = index - 1
            self.downsample = (IRDSa, IRDSa, IRDSb, IRDSb)[down](
                cfg.channels[down], dim, cfg.down_ratios[down], cfg.down_strides[down], cfg.shortcut_kernels[down]
            )
        if index < 2:
            blocks = [HRBlock(dim, ratio, rate) for rate in drop_path]
        elif index == 2:
            blocks = [CFFNBlock(dim, ratio, rate) for rate in drop_path]
        else:
            blocks = [TransformerBlock(dim, cfg.num_heads[index - 3], ratio, rate) for rate in drop_path]
        self.blocks = nn.ModuleList(blocks)
        self.norm = BatchNorm2d(dim) if index < 3 else LayerNorm2d(dim, eps=1e-6)


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
    """HIRI-ViT image classifier; its dense maps are those of the five stages, each after the stage's norm.

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
        self.stem = HRStem(in_chans, cfg.stem_width, cfg.channels[0])
        self.stages = nn.ModuleList([Stage(cfg, index, rates[index]) for index in range(5)])
        self.feature_info, stride = [], 4
        for index, channels in enumerate(cfg.channels):
            stride *= cfg.down_strides[index - 1] if index else 1
            self.feature_info.append({"num_chs": channels, "reduction": stride, "module": f"stages.{index}.norm"})
        self.head: nn.Module = nn.Identity()
        self.apply(init_weights)
        self.reset_classifier(num_classes, global_pool)

    @staticmethod
    def num_maps(cfg: HiriViTConfig) -> int:
        return 5

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
    starts = [sum(cfg.depths[:index]) for index in range(5)]
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
            first_conv="stem.trunk.0",
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
def test_hiri_vit(**kwargs: Any) -> nn.Module:
    """A HIRI-ViT for tests: 64 pixels, at most 32 channels, one block per stage."""
    return _create("test_hiri_vit", **kwargs)
