"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., ICCV 2021): variants of timm's.

Paper: https://arxiv.org/abs/2103.14030 (section 3). HRFormer's Table 8 compares Swin-T with one whose windows are not
shifted ("IntraWin-T"), both with and without the 3x3 depth-wise convolution of HRFormer in the feed-forward networks.
Its rows are timm's `swin_tiny_patch4_window7_224` (Swin-T itself), `swin_tiny_dw`, `intrawin_tiny`, `intrawin_tiny_dw`.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from zoo.backbone import FeatureMaps, pretrained_cfg
from zoo.errors import ZooError
from zoo.hrformer import ConvFeedForward
from zoo.lean import activated_linear, depthwise


class NormedFeedForward(ConvFeedForward):
    """HRFormer's feed-forward network, with a BatchNorm and a GELU after each of its three convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PlainFeedForward(nn.Module):
    """Swin's feed-forward network with a 3x3 depth-wise convolution and a second GELU in its middle."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dw3x3 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        x = self.fc1(x).permute(0, 3, 1, 2)
        x = depthwise(x, self.dw3x3.weight, self.dw3x3.bias, "gelu").permute(0, 2, 3, 1)
        return activated_linear("gelu", self.fc2.weight, self.fc2.bias, x)


class ConvBlock(SwinTransformerBlock):
    """timm's block with a feed-forward network that takes maps, not tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> the same."""
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SwinVariant(SwinTransformer):
    """timm's Swin with two more arguments and any image size; the others are timm's.

    Args:
        shifted: whether every second block moves its windows by half of their side (Table 8, rows 1 and 2: Swin-T);
            else none does (rows 3 and 4: IntraWin-T).
        depthwise_ffn: whether the feed-forward networks have a 3x3 depth-wise convolution (rows 2 and 4: 28.5 M, 4.6 G;
            rows 1 and 3, without: 28.3 M, 4.5 G).
        normed_ffn: whether these are HRFormer's own, with batch norms, or Swin's with the convolution alone. The paper
            does not tell, and the printed costs fit both.
    """

    def __init__(
        self, *args: Any, shifted: bool = True, depthwise_ffn: bool = False, normed_ffn: bool = True, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        for block in self.modules():
            if not isinstance(block, SwinTransformerBlock):
                continue
            if not shifted:
                block.target_shift_size = block.shift_size = (0, 0)
                block.attn_mask = None
            if depthwise_ffn:
                block.__class__ = ConvBlock  # timm's stage builds its blocks itself
                dim, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
                block.mlp = (NormedFeedForward if normed_ffn else PlainFeedForward)(dim, hidden)


VARIANTS = {
    "swin_tiny_dw": {"depthwise_ffn": True},
    "intrawin_tiny": {"shifted": False},
    "intrawin_tiny_dw": {"shifted": False, "depthwise_ffn": True},
}

default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(first_conv="patch_embed.proj", classifier="head.fc") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    tiny = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "strict_img_size": False}
    options = {**tiny, **VARIANTS[variant], **kwargs}
    for name in ("shifted", "depthwise_ffn", "normed_ffn"):
        if not isinstance(options.get(name, True), bool):
            raise ZooError(f"{variant}: {name}={options[name]!r} must be True or False")
    if not options.get("normed_ffn", True) and not options.get("depthwise_ffn"):
        raise ZooError(f"{variant}: normed_ffn=False is a form of the convolution: it needs depthwise_ffn=True")
    return build_model_with_cfg(
        SwinVariant,
        variant,
        pretrained,
        feature_cfg={"feature_cls": FeatureMaps, "out_indices": (0, 1, 2, 3)},
        **options,
    )


@register_model
def swin_tiny_dw(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Swin-T with the depth-wise convolution (HRFormer, Table 8, row 2): 28.5 M parameters, 4.5 GMACs at 224."""
    return _create("swin_tiny_dw", pretrained, **kwargs)


@register_model
def intrawin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """IntraWin-T, Swin-T without shifts (HRFormer, Table 8, row 3): 28.3 M parameters, 4.5 GMACs at 224."""
    return _create("intrawin_tiny", pretrained, **kwargs)


@register_model
def intrawin_tiny_dw(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """IntraWin-T with the depth-wise convolution (HRFormer, Table 8, row 4): 28.5 M parameters, 4.5 GMACs at 224."""
    return _create("intrawin_tiny_dw", pretrained, **kwargs)
