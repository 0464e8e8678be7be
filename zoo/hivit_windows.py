"""HiViT with windows of tokens in its stages: rows (c') and (d) of HiViT's Table 2, between HiViT-B and Swin-B.

Chosen by `HiViTConfig.low_attention`. The blocks are timm's Swin blocks (Liu et al., 2021), and those of HiViT where
the third stage attends globally. Windows join neighbouring patches, so that tokens are a map (B, H, W, C) here.

What the paper leaves open is set as its parameters and FLOPs need or, where these cannot tell, as in Swin: windows of
7, shifted by 3 in every second block; heads double from stage to stage, `num_heads` being those of the third. Row (c')
has 2, 4 and 8, of 64 channels each as in HiViT-B, row (d) 4, 8, 16 and 32, of 32 channels each as in Swin-B.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from zoo.attention import Attention
from zoo.backbone import check_size
from zoo.hivit import BIAS_CACHE_BYTES, Block, HiViTBase, HiViTConfig, init_weights, layer_norm, resize_position
from zoo.recompute import checkpoint_block
from zoo.relative_position import Grid

WINDOW = 7  # tokens: side of a window (section 3.2, step c')
MAIN = 2  # the stage of stride 16
norm_layer = partial(nn.LayerNorm, eps=1e-6)


class Stage(nn.Module):
    """Patch merging (but in the first stage), the position embedding in the third, and the blocks."""

    def __init__(self, cfg: HiViTConfig, index: int, grid: Grid, rates: Sequence[float]):
        super().__init__()
        dim, heads = cfg.embed_dim * 2**index // 4, cfg.num_heads * 2**index // 4
        self.grid = grid  # that it is built for
        self.is_global = index == MAIN and not cfg.mid_attention
        self.merge = PatchMerging(dim // 2, norm_layer=norm_layer) if index else nn.Identity()
        self.absolute_pos_embed: nn.Parameter | None = None
        if index == MAIN and cfg.absolute_position:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
        if self.is_global:
            cache = BIAS_CACHE_BYTES // cfg.depths[MAIN]
            blocks = [Block(dim, Attention(dim, heads, grid, cache), cfg.mlp_ratio, rate) for rate in rates]
        else:
            # As in Swin, a map within one window is not shifted, and its table has the map's size.
            swin = partial(SwinTransformerBlock, dim, grid, heads, window_size=WINDOW, dynamic_mask=True)
            swin = partial(swin, mlp_ratio=cfg.mlp_ratio, norm_layer=norm_layer)
            blocks = [swin(shift_size=j % 2 * (WINDOW // 2), drop_path=rate) for j, rate in enumerate(rates)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
        """A map (B, H, W, C), of the first stage already in its size -> (B, ceil(H / 2), ceil(W / 2), 2 C).

        `call` runs a block on its arguments.
        """
        x = self.merge(x)
        grid = x.shape[1], x.shape[2]
        if self.absolute_pos_embed is not None:
            x = x + resize_position(self.absolute_pos_embed, self.grid, grid).unflatten(1, grid)
        x = x.flatten(1, 2) if self.is_global else x
        for block in self.blocks:
            x = call(block, x, grid) if self.is_global else call(block, x)
        return x.unflatten(1, grid) if self.is_global else x


class WindowHiViT(HiViTBase):
    """HiViT whose first two stages, and if so configured the third and a fourth, attend within shifted windows.

    Any image size works: what is left over is padded with zeros on the right and bottom, the image to a multiple of 4,
    each map to whole windows. The features before pooling are the last map (B, C, h, w); no norm follows it.
    """

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
        depths = (*cfg.depths, cfg.last_depth) if cfg.last_depth else cfg.depths
        rates = iter(torch.linspace(0, cfg.drop_path_rate, sum(depths), device="cpu").tolist())
        norm = norm_layer if cfg.patch_norm else None
        self.patch_embed = PatchEmbed(
            None, 4, in_chans, cfg.embed_dim // 4, norm, output_fmt="NHWC", dynamic_img_pad=True
        )
        stages, self.feature_info = [], []
        for index, depth in enumerate(depths):
            stride, channels = 4 * 2**index, cfg.embed_dim * 2**index // 4
            grid: Grid = tuple(-(-side // stride) for side in check_size(cfg.img_size))
            stages.append(Stage(cfg, index, grid, [next(rates) for _ in range(depth)]))
            self.feature_info.append({"num_chs": channels, "reduction": stride, "module": f"stages.{index}"})
        self.stages = nn.ModuleList(stages)
        self.num_features = self.head_hidden_size = channels
        self.fc_norm = layer_norm(channels)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("absolute_pos_embed"):
                nn.init.normal_(parameter, std=0.02)
        self.reset_classifier(num_classes, global_pool)

    @staticmethod
    def num_maps(cfg: HiViTConfig) -> int:
        return 4 if cfg.last_depth else 3

    def _run(self, x: Tensor, take: Sequence[int], whole: bool) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(x)
        maps = []
        for stage in self.stages if whole else self.stages[: max(take) + 1]:
            x = stage(x, self._call)
            maps.append(x.permute(0, 3, 1, 2))
        return maps[-1], [maps[index] for index in take]

    def _call(self, block: nn.Module, *args: Any) -> Tensor:
        return checkpoint_block(block, *args) if self.grad_checkpointing else block(*args)

    def _keep(self, take: Sequence[int]) -> bool:
        self.maps = tuple(range(max(take) + 1))
        shortened = max(take) < len(self.stages) - 1
        self.stages = self.stages[: max(take) + 1]
        return shortened

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stage = r"^(?:.*\.)?stages\.(\d+)\."
        blocks = [(stage + "(?:merge|absolute_pos_embed)", (-1,)), (stage + r"blocks\.(\d+)", None)]
        return {"stem": r"^(?:.*\.)?patch_embed", "blocks": stage if coarse else [*blocks, (r"^fc_norm", (99999,))]}
