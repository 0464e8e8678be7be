"""Where HIRI-ViT lowers the resolution: its stem and downsampling (sections 4.1 and 4.3), and those of its ablation.

Each stem takes (channels of the images, width inside, channels out, norm), each downsampling (channels in, channels
out, hidden ratio, stride, kernel of the shortcut, norm); what one has no use for it leaves alone.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from zoo.norm import BatchNorm2d

NORMS = {"batch": BatchNorm2d, "layer": lambda dim: LayerNorm2d(dim, eps=1e-6)}


def channel_norm(kind: str, dim: int) -> nn.Module:
    """A norm of (B, C, H, W): over the batch and its positions, or over the channels."""
    return NORMS[kind](dim)


def conv(dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution whose output has ceil(side / stride) positions (odd kernels)."""
    return nn.Conv2d(dim, out, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


def conv_norm_act(
    dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Sequential:
    return nn.Sequential(conv(dim, out, kernel, stride, groups, bias), BatchNorm2d(out), nn.ReLU(inplace=True))


class HRStem(nn.Module):
    """High resolution stem (section 4.1, Figure 3c): images (B, 3, H, W) -> (B, C_1, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, width: int, out: int, norm: str = "batch"):
        super().__init__()
        self.trunk = conv_norm_act(in_chans, width, 3, stride=2)
        self.high = nn.Sequential(conv_norm_act(width, width, 3, groups=width), conv(width, out, 3, stride=2))
        self.low = nn.Sequential(
            conv_norm_act(width, width, 3, stride=2), conv_norm_act(width, width, 3), conv(width, out, 1)
        )
        self.norm = channel_norm(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.norm(self.high(x) + self.low(x))


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

    def __init__(self, dim: int, out: int, ratio: int, stride: int, shortcut_kernel: int, norm: str):
        super().__init__()
        self.main = nn.Sequential(conv_norm_act(dim, ratio * dim, 3, stride, bias=True), conv(ratio * dim, out, 1))
        self.shortcut = Shortcut(dim, out, shortcut_kernel, stride)
        self.norm = channel_norm(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.main(x) + self.shortcut(x))


class IRDSb(nn.Module):
    """Inverted residual downsampling (section 4.3, Figure 5c), before stages 4 and 5: norm and activation only once."""

    def __init__(self, dim: int, out: int, ratio: int, stride: int, shortcut_kernel: int, norm: str):
        super().__init__()
        hidden = ratio * dim
        self.main = nn.Sequential(
            conv_norm_act(dim, hidden, 1, bias=True),
            conv(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, out, 1),
        )
        self.shortcut = Shortcut(dim, out, shortcut_kernel, stride)
        self.norm = channel_norm(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.main(x) + self.shortcut(x))


def conv_stem(in_chans: int, width: int, out: int, norm: str) -> nn.Sequential:
    """Conv-stem (Figure 3b; widths fitted): images (B, 3, H, W) -> (B, C_1, ceil(H / 4), ceil(W / 4))."""
    return nn.Sequential(
        conv_norm_act(in_chans, width, 3, stride=2),
        conv_norm_act(width, width, 3),
        conv_norm_act(width, width, 3),
        conv(width, out, 3, stride=2),
        channel_norm(norm, out),
    )


def vit_stem(in_chans: int, width: int, out: int, norm: str) -> nn.Sequential:
    """ViT-stem (Figure 3a; kernel fitted): images (B, 3, H, W) -> (B, C_1, ceil(H / 4), ceil(W / 4))."""
    return nn.Sequential(conv(in_chans, out, 7, stride=4), channel_norm(norm, out))


class PositionEmbedding(nn.Module):
    """A learned vector for each position of a map (B, C, h, w), added to it; for other sizes resized as in PVT."""

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, dim, *grid))
        nn.init.normal_(self.table, std=0.02)

    @staticmethod
    def resized(table: Tensor, size: tuple[int, int]) -> Tensor:
        return table if table.shape[-2:] == size else F.interpolate(table, size, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.resized(self.table, x.shape[-2:])


def conv_down(dim: int, out: int, ratio: int, stride: int, shortcut_kernel: int, norm: str) -> nn.Sequential:
    """The "single strided convolution" of the base model (section 5.4; kernel fitted) and a norm."""
    return nn.Sequential(conv(dim, out, 3, stride), channel_norm(norm, out))


STEMS = {"hr": HRStem, "conv": conv_stem, "vit": vit_stem}
FIRST_CONVS = {"hr": "trunk.0", "conv": "0.0", "vit": "0"}  # inside each stem
DOWNSAMPLING = {"irds_a": IRDSa, "irds_b": IRDSb, "conv": conv_down}
