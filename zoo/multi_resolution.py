"""What the multi-resolution families share: HRNet's stem, fusion and classification head.

HRNet (Wang et al., 2020, https://arxiv.org/abs/1908.07919) keeps parallel branches at strides 4, 8, 16 and 32 and adds
them into each other after every module. Maps are logically (B, C, H, W); their memory is channels-last, so that the
same map is (B, H, W, C) for linear layers without a copy.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.lean import normed_conv
from zoo.norm import BatchNorm2d

Size = tuple[int, int]
STRIDES = (4, 8, 16, 32)  # of the branches


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
