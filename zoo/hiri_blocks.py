"""Of HIRI-ViT (sections 4.2 and 4.4): the high resolution block, and the feed-forward networks of the other blocks."""

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.hiri_downsampling import conv
from zoo.lean import activated_linear
from zoo.norm import BatchNorm2d
from zoo.recompute import recompute


def drop_path_or_identity(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


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


class FFN(nn.Module):
    """The same without its convolution: that of a plain transformer block."""

    def __init__(self, dim: int, mlp_ratio: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x.permute(0, 2, 3, 1))
        return activated_linear("gelu", self.fc2.weight, self.fc2.bias, hidden).permute(0, 3, 1, 2)
