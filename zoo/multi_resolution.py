"""What the multi-resolution families share: HRNet's stem, fusion and classification head.

HRNet (Wang et al., 2020, https://arxiv.org/abs/1908.07919) keeps parallel branches at strides 4, 8, 16 and 32 and adds
them into each other after every module. Maps are logically (B, C, H, W); their memory is channels-last, so that the
same map is (B, H, W, C) for linear layers without a copy.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.lean import normed_conv
from zoo.norm import BatchNorm2d
from zoo.recompute import checkpoint_block

Size = tuple[int, int]
STRIDES = (4, 8, 16, 32)  # of the branches
STEM_WIDTH = 64  # channels of HRNet's stem, and width of its first stage


def conv_norm(dim: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = False) -> list:
    """A convolution that keeps the size (divided by `stride`, rounded up), and its BatchNorm."""
    conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return [conv, BatchNorm2d(out)]


class Normed(nn.Sequential):
    """A sequence in which a convolution and the BatchNorm after it are one step."""

    def forward(self, x: Tensor) -> Tensor:
        """See `normed_conv`."""
        layers = iter(self)
        for layer in layers:
            x = normed_conv(x, layer, next(layers)) if isinstance(layer, nn.Conv2d) else layer(x)
        return x


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with BatchNorm and ReLU: images -> maps at stride 4."""

    def __init__(self, in_chans: int, dim: int, out: int, bias: bool = False):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_chans, dim, 3, stride=2, bias=bias)
        self.conv2, self.bn2 = conv_norm(dim, out, 3, stride=2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(normed_conv(x.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1))
        return F.relu(normed_conv(x, self.conv2, self.bn2))


class Bottleneck(nn.Module):
    """ResNet's block of 1x1, 3x3, 1x1 convolutions to four times `width`; the 3x3 one may be depth-wise.

    The shortcut is a 1x1 convolution unless `project` is False.
    """

    expansion = 4

    def __init__(self, dim: int, width: int, depthwise: bool = False, project: bool = True):
        super().__init__()
        out = width * self.expansion
        self.conv1, self.bn1 = conv_norm(dim, width)
        self.conv2, self.bn2 = conv_norm(width, width, 3, groups=width if depthwise else 1)
        self.conv3, self.bn3 = conv_norm(width, out)
        self.downsample = Normed(*conv_norm(dim, out)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = F.relu(normed_conv(x, self.conv1, self.bn1))
        x = F.relu(normed_conv(x, self.conv2, self.bn2))
        return F.relu(normed_conv(x, self.conv3, self.bn3) + shortcut)


class Fusion(nn.ModuleList):
    """Adds every branch into every other: output i = activation(sum over j of path[i][j](branch j)).

    A list (outputs) of lists (inputs) of paths, None where there is none. Paths from lower resolutions (j > i) end at
    their input's size and are then enlarged by `upsample(x, factor, size)` to that of branch i.
    """

    def __init__(
        self,
        paths: Sequence[Sequence[nn.Module | None]],
        activation: Callable[[Tensor], Tensor],
        upsample: Callable[[Tensor, int, Size], Tensor],
    ):
        super().__init__([nn.ModuleList(row) for row in paths])
        self.activation = activation  # a function: a module would be an entry of the list
        self.upsample = upsample

    def keep(self, outputs: Sequence[int]) -> None:
        """Remove the paths to all but these outputs."""
        for i in range(len(self)):
            if i not in outputs:
                self[i] = nn.ModuleList()

    def forward(self, branches: list[Tensor], outputs: Sequence[int] | None = None) -> list[Tensor]:
        """Maps from high to low resolution -> the fused maps, all or those of `outputs`."""
        return [self._fuse(i, branches) for i in (range(len(self)) if outputs is None else outputs)]

    def _fuse(self, i: int, branches: list[Tensor]) -> Tensor:
        total = None
        for j, (path, branch) in enumerate(zip(self[i], branches, strict=True)):
            if path is None:
                continue
            x = path(branch)
            if j > i:
                x = self.upsample(x, 2 ** (j - i), tuple(branches[i].shape[-2:]))
            total = x if total is None else total + x
        return self.activation(total)


def upsample_nearest(x: Tensor, factor: int, size: Size) -> Tensor:
    """Enlarge by a whole factor; where that is not `size`, resample bilinearly, corners on corners."""
    x = F.interpolate(x, scale_factor=factor, mode="nearest")
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def upsample_bilinear(x: Tensor, factor: int, size: Size) -> Tensor:
    """Enlarge bilinearly by a whole factor, and once more to `size` where that differs."""
    x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ClassificationHead(nn.Module):
    """HRNetV2's: widen each branch by a bottleneck, add it to the one above after a stride, 1x1 convolution to `out`.

    `widths` are the bottlenecks' widths, a quarter of what they give. With `depthwise` every 3x3 convolution is
    depth-wise; the strided ones are then followed by a BatchNorm and a 1x1 convolution.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], out: int, depthwise: bool):
        super().__init__()
        wide = [Bottleneck.expansion * width for width in widths]
        self.incre_modules = nn.ModuleList(
            nn.Sequential(Bottleneck(dim, width, depthwise)) for dim, width in zip(channels, widths, strict=True)
        )
        self.downsamp_modules = nn.ModuleList()
        for dim, lower in itertools.pairwise(wide):
            if depthwise:
                strided = conv_norm(dim, dim, 3, stride=2, groups=dim, bias=True) + conv_norm(dim, lower, bias=True)
            else:
                strided = conv_norm(dim, lower, 3, stride=2, bias=True)
            self.downsamp_modules.append(Normed(*strided, nn.ReLU()))
        self.final_layer = Normed(*conv_norm(wide[-1], out, bias=True), nn.ReLU())

    def forward(self, branches: list[Tensor]) -> Tensor:
        """Maps from high to low resolution -> one map (B, out, H, W) of the lowest."""
        x = self.incre_modules[0](branches[0])
        for down, widen, branch in zip(self.downsamp_modules, self.incre_modules[1:], branches[1:], strict=True):
            x = widen(branch) + down(x)
        return self.final_layer(x)


def run_blocks(x: Tensor, blocks: Sequence[nn.Module], checkpointing: bool) -> Tensor:
    """A map (B, C, H, W) through blocks that take (B, H, W, C), a view of channels-last memory."""
    x = x.permute(0, 2, 3, 1)
    for block in blocks:
        x = checkpoint_block(block, x) if checkpointing else block(x)
    return x.permute(0, 3, 1, 2)


class MultiResolution(Backbone):
    """Base of the families whose last module makes all the maps, and HRNetV2's head (`neck`) joins them.

    The features before pooling are the neck's map (B, head_features, ceil(H / 32), ceil(W / 32)), or, where it was
    pruned, the map of the lowest resolution that is left.
    """

    maps = (0, 1, 2, 3)
    neck: nn.Module | None

    @staticmethod
    def num_maps(cfg: Any) -> int:
        return len(STRIDES)

    def _make(self, x: Tensor, outputs: Sequence[int]) -> list[Tensor]:
        """Images -> the maps `outputs` of the last module, channels-last in memory."""
        raise NotImplementedError

    def _run(self, x: Tensor, take: Sequence[int], whole: bool) -> tuple[Tensor, list[Tensor]]:
        outputs = self.maps if whole else tuple(sorted(set(take)))
        maps = dict(zip(outputs, self._make(x, outputs), strict=True))
        features = maps[outputs[-1]] if self.neck is None or not whole else self.neck(list(maps.values()))
        return features, [maps[index] for index in take]

    def _keep(self, take: Sequence[int]) -> bool:
        before, self.maps = self.maps, tuple(sorted(set(take)))
        return self.maps != before

    def _drop_head(self) -> None:
        self.neck = None
        super()._drop_head()


def fusion_path(channels: Sequence[int], source: int, target: int, depthwise: bool) -> nn.Module:
    """HRNet's path from branch `source` to branch `target`; what comes from below is enlarged after it.

    From above it is a chain of strided convolutions: dense, or `depthwise` and followed by a point-wise one.
    """
    if source == target:
        return nn.Identity()
    dim, out = channels[source], channels[target]
    if source > target:
        return Normed(*conv_norm(dim, out))
    steps = []
    for step in range(source + 1, target + 1):
        last = step == target
        wide = out if last else dim
        if depthwise:
            layers = conv_norm(dim, dim, 3, stride=2, groups=dim) + conv_norm(dim, wide)
        else:
            layers = conv_norm(dim, wide, 3, stride=2)
        steps.append(Normed(*layers, *([] if last else [nn.ReLU()])))
    return nn.Sequential(*steps)


class HRNetModule(nn.Module):
    """Parallel branches of blocks, and the fusion that ends them."""

    def __init__(self, branches: Sequence[Sequence[nn.Module]], fuse: Fusion):
        super().__init__()
        self.branches = nn.ModuleList(map(nn.ModuleList, branches))
        self.fuse_layers = fuse

    def forward(
        self, maps: list[Tensor], outputs: Sequence[int] | None = None, checkpointing: bool = False
    ) -> list[Tensor]:
        """Maps (B, C, H, W) of the branches -> the fused maps, all or those of `outputs`."""
        mixed = [run_blocks(x, blocks, checkpointing) for x, blocks in zip(maps, self.branches, strict=True)]
        return self.fuse_layers(mixed, outputs)


def transition(dim: int, out: int, stride: int) -> nn.Sequential:
    return Normed(*conv_norm(dim, out, 3, stride=stride), nn.ReLU())


class HRNetTrunk(MultiResolution):
    """HRNet: a stem, a first stage at stride 4, and three stages of modules, each with one branch more than the last.

    The configuration has `channels`, `num_modules`, `num_blocks`, `drop_path_rate`, `head_widths` and `head_features`;
    a family says what its blocks are.
    """

    maps_are_normed = False
    depthwise = False  # whether the convolutions of the fusions and of the classification head are

    def __init__(
        self,
        cfg: Any,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        self.config = cfg
        self.num_features = self.head_hidden_size = cfg.head_features
        self.stem = Stem(in_chans, STEM_WIDTH, STEM_WIDTH)
        self.layer1, wide = self._first_stage(cfg.num_modules[0] * cfg.num_blocks[0])
        # Nested as in the published checkpoints. A branch is born from the lowest resolution alone.
        c = cfg.channels
        self.transition1 = nn.ModuleList([transition(wide, c[0], 1), nn.Sequential(transition(wide, c[1], 2))])
        self.transition2 = nn.ModuleDict({"2": nn.Sequential(transition(c[1], c[2], 2))})
        self.transition3 = nn.ModuleDict({"3": nn.Sequential(transition(c[2], c[3], 2))})
        rates = iter(drop_path_rates(cfg))
        self.stage2, self.stage3, self.stage4 = (
            nn.ModuleList(
                self._module([next(rates) for _ in range(cfg.num_blocks[stage])], branches=stage + 1)
                for _ in range(cfg.num_modules[stage])
            )
            for stage in (1, 2, 3)
        )
        last = f"stage4.{cfg.num_modules[3] - 1}.fuse_layers"
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"{last}.{i}"}
            for i, (channels, stride) in enumerate(zip(c, STRIDES, strict=True))
        ]
        self.neck = ClassificationHead(c, cfg.head_widths, cfg.head_features, depthwise=self.depthwise)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def _first_stage(self, count: int) -> tuple[nn.Module, int]:
        """The first stage, (B, STEM_WIDTH, H, W) -> (B, C, H, W), of `count` blocks; and C."""
        wide = STEM_WIDTH * Bottleneck.expansion
        blocks = [Bottleneck(wide if i else STEM_WIDTH, STEM_WIDTH, project=not i) for i in range(count)]
        return nn.Sequential(*blocks), wide

    def _run_first_stage(self, x: Tensor, checkpointing: bool) -> Tensor:
        return self.layer1(x)

    def _blocks(self, branch: int, rates: Sequence[float]) -> list[nn.Module]:
        """What a branch of one module is made of: (B, H, W, C) -> the same; a stochastic depth for each block."""
        raise NotImplementedError

    def _fusion(self, branches: int, bilinear: bool = False) -> Fusion:
        """The fusion of so many branches."""
        c = self.config.channels
        paths = [[fusion_path(c, j, i, self.depthwise) for j in range(branches)] for i in range(branches)]
        return Fusion(paths, F.relu, upsample_bilinear if bilinear else upsample_nearest)

    def _module(self, rates: Sequence[float], branches: int) -> HRNetModule:
        return HRNetModule([self._blocks(branch, rates) for branch in range(branches)], self._fusion(branches))

    def _make(self, x: Tensor, outputs: Sequence[int]) -> list[Tensor]:
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        x = self._run_first_stage(self.stem(x), checkpointing)
        maps = [branch(x) for branch in self.transition1]
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

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return {"stem": r"^stem", "blocks": r"^(?:layer|transition|stage)(\d+)", "neck": r"^neck"}
        # A transition lies between the stage of its number and the next.
        blocks = [(r"^(?:layer|stage)(\d+)\.(\d+)", None), (r"^transition(\d+)", (9999,))]
        return {"stem": r"^stem", "blocks": blocks, "neck": r"^neck"}

    def published_key(self, key: str) -> str:
        return re.sub(r"^(?:stem|neck)\.", "", re.sub(r"^head\.", "classifier.", key))

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of HRNet's published code, or of timm's HRNet, under our names."""
        fitted = {}
        for key, value in state.items():
            key = re.sub(r"^(?=(?:conv|bn)[12]\.)", "stem.", key)
            key = re.sub(r"^(?=(?:incre_modules|downsamp_modules|final_layer)\.)", "neck.", key)
            fitted[re.sub(r"^classifier\.", "head.", key)] = value
        return fitted


def drop_path_rates(cfg: Any) -> list[float]:
    """Stochastic depth per block of stages 2 to 4, linear from 0; the branches of a module share their rates."""
    blocks = sum(m * b for m, b in zip(cfg.num_modules[1:], cfg.num_blocks[1:], strict=True))
    return [cfg.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
