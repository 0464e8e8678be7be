"""EMA distillation: HIRI-ViT, section 4.5 (Yao et al., 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import InputError
from zoo.hiri_vit import HiriViT


@torch.no_grad()
def probability_maps(teacher: nn.Module, images: Tensor) -> Tensor:
    """What the classifier says at each position of its last map: images (B, 3, H, W) -> probabilities (B, h, w, K).

    Section 4.5: "the average pooling operation over the last feature map is removed".

    Raises:
        InputError: the model is none whose classifier can be applied to single positions.
    """
    if not isinstance(teacher, HiriViT):
        raise InputError(f"recipe.distillation_alpha needs a HIRI-ViT, not {type(teacher).__name__}; set it to null")
    return teacher.head(teacher.forward_features(images).movedim(1, -1)).float().softmax(-1)


def distilled_targets(maps: Tensor, keep: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """Equation 5 and the combination after it.

    Image i of a mixed batch is `keep` of image i and the rest of image B - 1 - i, as timm mixes.

    Args:
        maps: The teacher's probabilities (B, h, w, K) of the images before they were mixed, P_a.
        keep: The mask M (B, 1, H, W), in [0, 1], that the images were mixed with. The paper multiplies it with maps of
            another size: here each position has the mean of its part of the mask, so that the mean stays lambda.
        targets: The mixed labels (B, K) of equation 4.
        alpha: The weight of the labels.

    Returns:
        The targets (B, K) that the student learns.
    """
    share = F.adaptive_avg_pool2d(keep, maps.shape[1:3]).movedim(1, -1)  # (B, h, w, 1)
    mixed = share * maps + (1 - share) * maps.flip(0)
    return alpha * targets + (1 - alpha) * mixed.mean((1, 2))
