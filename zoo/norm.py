"""Batch norms that also train on one value per channel (batch 1, a map of one position)."""

import torch.nn.functional as F
from torch import Tensor, nn


class _OneValue:
    """One value has no variance: PyTorch refuses it. The running statistics are used there."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same."""
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class BatchNorm1d(_OneValue, nn.BatchNorm1d):
    """Of (B, C)."""


class BatchNorm2d(_OneValue, nn.BatchNorm2d):
    """Of (B, C, H, W)."""
