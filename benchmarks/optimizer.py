"""The optimizer of a recipe, made by timm."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

from benchmarks.errors import InputError
from benchmarks.job import Job

FUSED = ("adam", "adamw")  # PyTorch's own, which update all weights in one operator: several times faster


def build_optimizer(job: Job, model: torch.nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer with the recipe's groups, for the parameters that are to be trained.

    No weight decay on biases, norms and what any module's `no_weight_decay()` names; the heads of a segmentor, the
    auxiliary one included, learn `head_learning_rate_multiplier` times as fast; with `layer_decay` each layer of a
    classifier or backbone, as its `group_matcher()` counts them, learns more slowly than the one after it.

    Raises:
        InputError: the optimizer does not take the recipe's `optimizer_options`.
    """
    recipe = job.recipe
    heads = [head for name in ("decode_head", "auxiliary_head") if (head := getattr(model, name, None)) is not None]
    backbone = model.backbone if heads else model
    # A segmentor's head is the layer after the last of its backbone, as the classifier is in a classifier.
    parts = [(getattr(backbone, "network", backbone), recipe.layer_decay if heads and recipe.layer_decay else 1.0)]
    parts += [(head, recipe.head_learning_rate_multiplier) for head in heads]
    groups = []
    for module, multiplier in parts:
        settings = {"weight_decay": recipe.weight_decay, "no_weight_decay_list": _not_decayed(module)}
        if recipe.layer_decay is None or module in heads:
            found = param_groups_weight_decay(module, **settings)
        else:
            found = param_groups_layer_decay(module, layer_decay=recipe.layer_decay, **settings)
        for group in found:
            scale = multiplier * group.pop("lr_scale", 1.0)  # timm leaves it to its own schedulers
            groups.append(group | {"lr": recipe.peak_learning_rate * scale})
    options = {"fused": True} if recipe.optimizer in FUSED else {}
    options |= recipe.optimizer_options
    try:
        return create_optimizer_v2(
            groups, opt=recipe.optimizer, lr=recipe.peak_learning_rate, weight_decay=0.0, **options
        )
    except TypeError as error:
        raise InputError(f"recipe: {recipe.optimizer} does not take these optimizer_options: {error}") from error


def _not_decayed(model: torch.nn.Module) -> set[str]:
    """Full names of the parameters that the modules of `model` want without weight decay."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
