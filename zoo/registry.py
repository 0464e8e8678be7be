"""Find and build models by name: the zoo's own, and any of timm's as a baseline."""

import fnmatch
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers import Format
from timm.models import get_arch_name, is_model, model_entrypoint
from torch import Tensor, nn

from zoo.backbone import check_size
from zoo.errors import ZooError, near_matches
from zoo.published import load_published

_logger = logging.getLogger(__name__)

# Display names of the families, by the module that registers them; a longer prefix of the model's name wins.
_FAMILIES = {
    "hivit": "HiViT",
    "hivit_mae": "HiViT",
    "hrvit": "HRViT",
    "hrformer": "HRFormer",
    "hiri_vit": "HIRI-ViT",
    "mit": "SegFormer (MiT)",
    "cswin": "CSWin",
    "beit": "BEiT",
    "cait": "CaiT",
    "coat": "CoaT",
    "coatnet": "CoAtNet",
    "convit": "ConViT",
    "convnext": "ConvNeXt",
    "crossvit": "CrossViT",
    "davit": "DaViT",
    "deit": "DeiT",
    "deit3": "DeiT III",
    "efficientnet": "EfficientNet",
    "hiera": "Hiera",
    "hrnet": "HRNet",
    "hrnet_cswin": "HRNet-ViT",
    "hrnet_mit": "HRNet-ViT",
    "maxvit": "MaxViT",
    "maxxvit": "MaxViT",
    "mvitv2": "MViTv2",
    "pvt_v2": "PVTv2",
    "regnet": "RegNet",
    "resnet": "ResNet",
    "swin_transformer": "Swin",
    "swin_transformer_v2": "Swin V2",
    "twins": "Twins",
    "vision_transformer": "ViT",
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo's own models that match a shell-style `pattern`, sorted.

    Models for tests (``test_*``) are listed only when the pattern begins with ``test``. timm's names, which
    `create_model` takes as well, are listed by `timm.list_models`.
    """
    names = [name for name in timm.list_models() if _is_own(name)]
    names = [name for name in names if pattern.startswith("test") or not name.startswith("test")]
    return sorted(fnmatch.filter(names, pattern))


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    features_only: bool = False,
    img_size: int | tuple[int, int] | None = None,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    **config: Any,
) -> nn.Module:
    """Build a model with random weights, or with those of `checkpoint`.

    Args:
        name: one of `list_models()`, or any model name of timm.
        num_classes: classes of the head; 0 for pooled features. Without meaning for `features_only` and autoencoders.
        features_only: the model returns the list of its NCHW maps, from high to low resolution (`out_indices` selects).
        img_size: pixels, an int or (height, width): the size that size-dependent parameters are made for. None is the
            model's default. timm models that take any size ignore it.
        checkpoint: a file or state dict for `load_published`, under published or our own names.
        **config: fields of the family's configuration, and timm's ``in_chans``, ``drop_rate``, ``out_indices``; for a
            baseline, arguments of timm's model.

    Raises:
        ZooError: unknown name or option, impossible value, unusable checkpoint; one line that says what is allowed.
    """
    if not isinstance(name, str) or not is_model(get_arch_name(name)):
        name = str(name)
        known = [*list_models(), *timm.list_models()]
        raise ZooError(f"unknown model '{name}'{near_matches(name, known)}; own models: {', '.join(list_models())}")
    if not isinstance(num_classes, int) or num_classes < 0:
        raise ZooError(f"{name}: num_classes={num_classes!r} must be 0 or a positive int")
    options = dict(config)
    if features_only:
        options["features_only"] = True
    elif num_classes != 1000 or not _is_own(name):
        options["num_classes"] = num_classes
    if img_size is not None:
        try:
            size = check_size(img_size)
        except ZooError as error:
            raise ZooError(f"{name}: {error}") from None
        if _is_own(name) or _default_cfg(name).fixed_input_size:
            options["img_size"] = size
    try:
        model = timm.create_model(name, **options)
        if features_only and getattr(model, "output_fmt", None) == Format.NHWC:
            # timm's Swin and its like give NHWC maps unless they are asked through forward_intermediates.
            model = timm.create_model(name, **options, feature_cls="getter")
    except ZooError:
        raise
    except Exception as error:  # timm's models raise whatever their constructors do
        told = " ".join(str(error).split()) or type(error).__name__
        raise ZooError(f"{name}: cannot be built with {options}: {told}") from error
    if checkpoint is not None:
        report = load_published(model, checkpoint)
        _logger.log(logging.INFO if report.complete else logging.WARNING, "%s: %s", name, report)
    return model


def family(name: str) -> str:
    """The display name of a model's family ("HiViT", "Swin", "SegFormer (MiT)"), for tables and plots.

    Raises:
        ZooError: neither the zoo nor timm knows the model.
    """
    arch = get_arch_name(name)
    if not is_model(arch):
        raise ZooError(f"unknown model '{name}'{near_matches(name, [*list_models(), *timm.list_models()])}")
    module = model_entrypoint(arch).__module__.rsplit(".", 1)[-1]
    prefixes = [prefix for prefix in _FAMILIES if arch.removeprefix("test_").startswith(prefix)]
    key = max(prefixes, key=len) if prefixes else module
    return _FAMILIES.get(key) or _FAMILIES.get(module) or module.replace("_", " ").title()


def _is_own(name: str) -> bool:
    return is_model(name) and model_entrypoint(name).__module__.startswith("zoo.")


def _default_cfg(name: str):
    return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
