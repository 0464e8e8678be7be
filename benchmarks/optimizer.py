"""The optimizer of a recipe, made by timm."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from benchmarks.job import Job


def build_optimizer(job: Job, model: torch.nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer with the recipe's groups.

    No weight decay on biases, norms and what any module's `no_weight_decay()` names; the decode head of a segmentor
    learns `head_learning_rate_multiplier` times as fast.
    """
    recipe = job.recipe
    head = getattr(model, "decode_head", None)
    parts = (
        {"": (model, 1.0)}
        if head is None
        else {
            "backbone.": (model.backbone, 1.0),
            "decode_head.": (head, recipe.head_learning_rate_multiplier),
        }
    )
    groups = []
    for module, multiplier in parts.values():
        for group in param_groups_weight_decay(module, recipe.weight_decay, no_weight_decay_list=_not_decayed(module)):
            groups.append(group | {"lr": recipe.learning_rate * multiplier})
    return create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=0.0)


def _not_decayed(model: torch.nn.Module) -> set[str]:
    """Full names of the parameters that the modules of `model` want without weight decay."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
