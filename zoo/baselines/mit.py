"""MiT, the Mix Transformer encoder of SegFormer (Xie et al., NeurIPS 2021): mmsegmentation's, behind our interface.

Paper: https://arxiv.org/abs/2105.15203 (Table 6 of its appendix). mmsegmentation is imported when a MiT is built, not
with the zoo. Its module reads values while it is built, so it is built on the CPU and then moved.

HRViT's Table 4 compares B0 to B4, Table 9 B0 to B3, all with SegFormer's head. As printed, that of B2 to B4 has 768
channels (mmsegmentation's configurations give them 256, as B0 and B1 have).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.backbone import Backbone, build, check_fields, check_size, pretrained_cfg
from zoo.errors import ZooError

HEADS = (1, 2, 5, 8)  # per stage; a stage is embed_dim * heads wide
STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class MiTConfig:
    """What differs between B0 and B5. Raises ZooError for values that cannot work."""

    embed_dim: int = 64  # channels per attention head
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)  # blocks per stage (strides 4, 8, 16, 32)
    drop_path_rate: float = 0.1  # stochastic depth of the last block; grows linearly from 0
    img_size: int | tuple[int, int] | None = None  # accepted for uniformity: MiT has no parameter that depends on it

    def __post_init__(self):
        check_fields(self)
        if self.img_size is not None:
            check_size(self.img_size)
        if min(self.depths) < 1:
            raise ZooError(f"depths={self.depths} must be four positive numbers of blocks")
        if self.embed_dim < 1:
            raise ZooError(f"embed_dim={self.embed_dim} must be positive")
        if not 0 <= self.drop_path_rate < 1:
            raise ZooError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")


class MiT(Backbone):
    """`backbone` is mmsegmentation's MixVisionTransformer; the head is a mean over the last map and a Linear.

    The features before pooling are that map, (B, 8 * embed_dim, ceil(H / 32), ceil(W / 32)); all maps are normed.
    """

    family = "MiT"

    def __init__(
        self,
        cfg: MiTConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        from mmseg.models.backbones import MixVisionTransformer

        self.config = cfg
        with torch.device("cpu"):
            self.backbone = MixVisionTransformer(
                in_channels=in_chans,
                embed_dims=cfg.embed_dim,
                num_layers=list(cfg.depths),
                num_heads=list(HEADS),
                sr_ratios=[8, 4, 2, 1],
                drop_path_rate=cfg.drop_path_rate,
            )
        self.backbone.init_weights()
        self.backbone.to(torch.get_default_device())
        self.feature_info = [
            {"num_chs": cfg.embed_dim * heads, "reduction": stride, "module": f"backbone.layers.{index}"}
            for index, (heads, stride) in enumerate(zip(HEADS, STRIDES, strict=True))
        ]
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @staticmethod
    def num_maps(cfg: MiTConfig) -> int:
        return 4

    def _run(self, x: Tensor, take: Sequence[int], whole: bool) -> tuple[Tensor, list[Tensor]]:
        maps = self.backbone(x)  # no further than it was pruned
        return maps[-1], [maps[index] for index in take]

    def _keep(self, take: Sequence[int]) -> bool:
        self.maps = tuple(range(max(take) + 1))
        deepest = max(take)
        shortened = deepest < len(self.backbone.layers) - 1
        self.backbone.layers = self.backbone.layers[: deepest + 1]
        self.backbone.out_indices = tuple(range(deepest + 1))
        return shortened

    def _new_head(self, **factory: Any) -> nn.Module:
        head = super()._new_head(**factory)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        # mmsegmentation's own `with_cp` is the reentrant kind, which distributed training does not go with.
        for stage in self.backbone.layers:
            for block in stage[1]:
                block.__dict__.pop("forward", None)
                if enable:
                    block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stage = r"^(?:.*\.)?backbone\.layers\.(\d+)\."
        if coarse:
            return {"blocks": stage}
        return {"blocks": [(stage + r"0", (-1,)), (stage + r"1\.(\d+)", None), (stage + r"2", (99999,))]}

    def published_key(self, key: str) -> str:
        return key.removeprefix("backbone.")

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"backbone.{key}" if key.startswith("layers.") else key: value for key, value in state.items()}


VARIANTS = {
    "mit_b0": MiTConfig(embed_dim=32, depths=(2, 2, 2, 2)),
    "mit_b1": MiTConfig(depths=(2, 2, 2, 2)),
    "mit_b2": MiTConfig(depths=(3, 4, 6, 3)),
    "mit_b3": MiTConfig(depths=(3, 4, 18, 3)),
    "mit_b4": MiTConfig(depths=(3, 8, 27, 3)),
    "mit_b5": MiTConfig(depths=(3, 6, 40, 3)),
    "test_mit": MiTConfig(embed_dim=8, depths=(1, 1, 1, 1)),
}

default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(first_conv="backbone.layers.0.0.projection", classifier="head") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build(MiT, variant, VARIANTS[variant], pretrained, **kwargs)


@register_model
def mit_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MiT-B0, the encoder of SegFormer-B0."""
    return _create("mit_b0", pretrained, **kwargs)


@register_model
def mit_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MiT-B1, the encoder of SegFormer-B1."""
    return _create("mit_b1", pretrained, **kwargs)


@register_model
def mit_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MiT-B2, the encoder of SegFormer-B2."""
    return _create("mit_b2", pretrained, **kwargs)


@register_model
def mit_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MiT-B3, the encoder of SegFormer-B3."""
    return _create("mit_b3", pretrained, **kwargs)


@register_model
def mit_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MiT-B4, the encoder of SegFormer-B4."""
    return _create("mit_b4", pretrained, **kwargs)


@register_model
def mit_b5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MiT-B5, the encoder of SegFormer-B5."""
    return _create("mit_b5", pretrained, **kwargs)


@register_model
def test_mit(**kwargs: Any) -> nn.Module:
    """A MiT for tests: 8 channels per head, one block per stage."""
    return _create("test_mit", **kwargs)
