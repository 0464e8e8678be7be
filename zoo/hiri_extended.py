"""HIRI-ViT's structure in front of HRNet, PVTv2 and DaViT (Yao, Li, Pan, Mei; TPAMI 2024), for larger images.

Paper: https://arxiv.org/abs/2403.11999 (section 5.7, Table 9), which does not describe the construction. What its
parameters and GFLOPs single out is one more stage in front, and all else kept: timm's network loses its own stem;
HR-stem, HR blocks, a norm and an IRDS come in its place, and its old stages run on the grids that they had at 224
pixels (strides 8 to 64). Of 4,320 settings of this form five give all six printed numbers; this one has the HR blocks
of HIRI-ViT-S.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbone import MODEL_ARGS, build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.hiri_blocks import HRBlock
from zoo.hiri_downsampling import HRStem, IRDSa
from zoo.hiri_vit import init_weights
from zoo.norm import BatchNorm2d


@dataclass(frozen=True)
class FrontConfig:
    """The stage in front. Raises ZooError for values that cannot work."""

    stem_width: int = 16  # channels inside the HR-stem (fitted: 32, as in HIRI-ViT-S, would cost 0.2 GMACs too much)
    channels: int = 32  # of the stage
    depth: int = 2  # HR blocks
    mlp_ratio: int = 4  # their expansion
    down_ratio: int = 6  # hidden width of the IRDS over its input width (fitted)
    img_size: int | tuple[int, int] = 448  # pixels: for the record only, no parameter depends on it

    def __post_init__(self):
        check_fields(self)
        check_size(self.img_size)
        for name in ("stem_width", "channels", "mlp_ratio", "down_ratio"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name}={getattr(self, name)} must be positive")
        if self.depth < 0:
            raise ZooError(f"depth={self.depth} must be 0 or more")

    def idle(self) -> Iterator[tuple[str, int | None, str]]:
        """Fields that change nothing beside the others; see `zoo.backbone.refuse_idle`."""
        if not self.depth:
            yield "mlp_ratio", None, "depth=0 leaves no HR blocks"


class Front(nn.Sequential):
    """Images (B, 3, H, W) -> (B, width, ceil(H / 8), ceil(W / 8)), or with `last` (B, ceil(H / 8), ceil(W / 8), width).

    `width` is what the network behind it begins with.
    """

    def __init__(self, cfg: FrontConfig, in_chans: int, width: int, last: bool = False):
        super().__init__(
            HRStem(in_chans, cfg.stem_width, cfg.channels),
            *(HRBlock(cfg.channels, cfg.mlp_ratio, 0.0) for _ in range(cfg.depth)),
            BatchNorm2d(cfg.channels),
            IRDSa(cfg.channels, width, cfg.down_ratio, 2, 2, "batch"),
        )
        self.last = last
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        x = super().forward(images)
        return x.permute(0, 2, 3, 1) if self.last else x


def _hrnet(model: nn.Module, front: Callable[..., Front]) -> None:
    for name in ("bn1", "act1", "conv2", "bn2", "act2"):
        setattr(model, name, nn.Identity())
    model.conv1 = front(64)


def _pvt(model: nn.Module, front: Callable[..., Front]) -> None:
    model.patch_embed = front(model.patch_embed.proj.out_channels, last=True)


def _davit(model: nn.Module, front: Callable[..., Front]) -> None:
    model.stem = front(model.stem.out_chs)


# How the front takes the place of timm's stem, and where its first convolution is then.
_NETWORKS = {
    "hrnet_w18": (_hrnet, "conv1"),
    "pvt_v2_b2": (_pvt, "patch_embed"),
    "davit_tiny": (_davit, "stem"),
}


def extended(network: str, cfg: FrontConfig, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """timm's `network`, its stem replaced by the stage that `cfg` describes; `kwargs` are arguments of timm's model.

    What timm tells of the network's maps no longer holds: their strides are doubled.
    """
    model = timm.create_model(network, in_chans=in_chans, **kwargs)
    _NETWORKS[network][0](model, partial(Front, cfg, in_chans))
    model.config = cfg
    return model


VARIANTS = {f"{network}_hiri": network for network in _NETWORKS}

default_cfgs = generate_default_cfgs(
    {
        name: pretrained_cfg(
            first_conv=f"{_NETWORKS[network][1]}.0.trunk.0",
            classifier=timm.get_pretrained_cfg(network).classifier,
            input_size=(3, 448, 448),
        )
        for name, network in VARIANTS.items()
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if kwargs.pop("features_only", False):
        raise ZooError(f"{variant} has no dense maps: the paper only classifies with it")
    arguments = MODEL_ARGS | {"drop_path_rate"}
    return build(partial(extended, VARIANTS[variant]), variant, FrontConfig(), pretrained, arguments, **kwargs)


@register_model
def hrnet_w18_hiri(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HRNet-W18 with HIRI-ViT's structure: 21.4 M parameters, 4.6 GMACs at 448 (Table 9)."""
    return _create("hrnet_w18_hiri", pretrained, **kwargs)


@register_model
def pvt_v2_b2_hiri(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVTv2-B2 with HIRI-ViT's structure: 25.5 M parameters, 4.4 GMACs at 448 (Table 9)."""
    return _create("pvt_v2_b2_hiri", pretrained, **kwargs)


@register_model
def davit_tiny_hiri(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DaViT-T with HIRI-ViT's structure: 28.5 M parameters, 5.0 GMACs at 448 (Table 9)."""
    return _create("davit_tiny_hiri", pretrained, **kwargs)
