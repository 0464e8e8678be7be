"""The optimizer of a recipe, made by timm."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from benchmarks.job import Job


def build_optimizer(job: Job, model: torch.nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer with the recipe's groups.

    No weight decay on biases, norms and what any module's `no_weight_decay()` names; the heads of a segmentor, the
    auxiliary one included, learn `head_learning_rate_multiplier` times as fast.
    """
    recipe = job.recipe
    heads = [head for name in ("decode_head", "auxiliary_head") if (head := getattr(model, name, None)) is not None]
    parts = [(model.backbone if heads else model, 1.0)]
    parts += [(head, recipe.head_learning_rate_multiplier) for head in heads]
    groups = []
    for module, multiplier in parts:
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
