"""The interface that every model of the zoo shares: timm's, stated once.

timm's tools (feature extraction, layer-wise learning-rate decay, fine-tuning) and mmsegmentation's `TIMMBackbone` ask a
model for exactly these names; a family that derives from `Backbone` and is registered with timm needs no adapter.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from zoo.errors import ZooError, near_matches

MIN_SIZE = 32  # pixels: the smallest image side that the zoo's models are built and tested for

_logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Base class: an image classifier whose intermediate maps can be taken, with timm's meaning of each name.

    A family names itself and defines `num_maps` and `_run`; where its ends differ, `forward_head`, `_new_head`,
    `_drop_head`. It sets `num_features` (channels of the features before the head), `head_hidden_size`, `head_drop`,
    `head`, `num_classes`, `global_pool` (the last three by `reset_classifier`) and `feature_info`: one entry per map
    that can be taken, from high to low resolution, each a dict with ``num_chs`` (channels), ``reduction`` (stride in
    pixels) and ``module`` (the module that makes it).
    """

    family: str  # short name, for messages
    maps: tuple[int, ...] | None = None  # that are left of `feature_info` after pruning; None: all
    maps_are_normed = True  # whether a norm ends every map; if not, ``norm=True`` is refused

    num_classes: int
    num_features: int
    head_hidden_size: int
    global_pool: str = "avg"
    feature_info: list[dict]
    grad_checkpointing: bool = False

    @staticmethod
    def num_maps(cfg: Any) -> int:
        """How many maps the `feature_info` of a model of the config `cfg` will describe, known before it is built."""
        raise NotImplementedError

    def _run(self, x: Tensor, take: Sequence[int], whole: bool) -> tuple[Tensor, list[Tensor]]:
        """Images -> the features and the maps `take` of `feature_info`, NCHW.

        Without `whole` nothing is run that those maps do not need, and the features are the last of what was.
        """
        raise NotImplementedError

    def _keep(self, take: Sequence[int]) -> bool:
        """Remove what the maps `take` do not need, set `maps`; returns whether the features are others now."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the unpooled features that `forward_head` takes; see the family's class."""
        check_images(self.family, x)
        return self._run(x, (), True)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, C, h, w) -> logits (B, num_classes): mean over the positions, dropout, classifier.

        With `pre_logits` the pooled features (B, head_hidden_size).
        """
        if self.global_pool:
            x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes), or pooled features where the classifier was removed."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Images (B, 3, H, W) -> the maps of `feature_info`, from high to low resolution.

        Args:
            x: images; any size from 32 pixels, multiples of the stride or not.
            indices: which entries of `feature_info`: all (None), the last n (an int), or a sequence.
            norm: apply the model's final norm to the maps (no effect where they have it already; a family that has
                none refuses).
            stop_early: do not run what comes after the last map wanted.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: return the list of maps alone, not ``(forward_features(x), maps)``.

        The map of an (H, W) image at stride s has ceil(H / s) rows and ceil(W / s) columns, unless the family says so.

        Raises:
            ZooError: `norm` where the family has none, an unknown format, maps that were pruned, no batch of images.
        """
        if norm and not self.maps_are_normed:
            raise ZooError(f"{self.family} has no norm to apply to its maps: norm=True cannot be had")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ZooError(f"output_fmt={output_fmt!r} must be NCHW or NHWC")
        check_images(self.family, x)
        take = self._take(indices)
        features, maps = self._run(x, take, whole=not (stop_early or intermediates_only))
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (features, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of `indices` do not need; returns the indices counted from the front."""
        take = self._take(indices)
        if self._keep(take) or prune_head:
            self.num_features = self.head_hidden_size = self.feature_info[max(take)]["num_chs"]
            self._drop_head()
        return take

    def _take(self, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
        """The maps that `indices` mean, counted from the front. Raises ZooError for some that were pruned."""
        take, _ = feature_take_indices(len(self.feature_info), indices)
        if self.maps is not None and (missing := set(take) - set(self.maps)):
            raise ZooError(f"{self.family}: the maps {sorted(missing)} were pruned; left are {self.maps}")
        return take

    def _drop_head(self) -> None:
        self.reset_classifier(0)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes`; 0 removes it, `forward` then returns features.

        Raises ZooError for another `global_pool` than ``avg`` or, without a classifier, none (an empty string).
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        check_pool(self.family, global_pool, num_classes)
        self.num_classes, self.global_pool = num_classes, global_pool
        weight = next(self.parameters())
        self.head = self._new_head(device=weight.device, dtype=weight.dtype) if num_classes > 0 else nn.Identity()

    def _new_head(self, **factory: Any) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes, **factory)

    def get_classifier(self) -> nn.Module:
        """The last layer of the head (`nn.Identity` after ``reset_classifier(0)``)."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, beside biases and norms, that weight decay should leave alone."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth, for layer-wise learning-rate decay."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def published_key(self, key: str) -> str:
        """The name that the published implementation gives to our state_dict entry `key` (or to its first part)."""
        return key

    def published_parts(self, key: str) -> tuple[str, ...]:
        """The published entries that our entry `key` joins along its rows, in their order; one, unless stated."""
        return (self.published_key(key),)

    def to_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the published implementation's names; what we joined is taken apart again."""
        published = {}
        for key, value in state.items():
            parts = self.published_parts(key)
            published |= dict(zip(parts, value.chunk(len(parts)) if len(parts) > 1 else [value], strict=True))
        return published

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under our names, tensors resized where size allows; the family's checkpoint filter."""
        return state


class FeatureMaps(FeatureGetterNet):
    """timm's wrapper of a `features_only` model, which also tells optimizers what the model itself would."""

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """See `Backbone.group_matcher`."""
        groups = self.model.group_matcher(coarse)
        return {
            name: [(_below_model(pattern), ordinal) for pattern, ordinal in spec]
            if isinstance(spec, list | tuple)
            else _below_model(spec)
            for name, spec in groups.items()
        }


def _below_model(pattern: str) -> str:
    return r"^model\." + pattern.removeprefix("^")


def pretrained_cfg(**overrides: Any) -> dict[str, Any]:
    """timm's description of a variant's input and ends; no weights are hosted for the zoo's own models."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **overrides,
    }


# What every family takes beside its config's fields (timm's names), and what timm's builder consumes itself.
MODEL_ARGS = {"num_classes", "in_chans", "drop_rate", "global_pool"}
BUILDER_ARGS = {"features_only", "out_indices", "feature_cls", "device", "dtype", "pretrained_cfg"}
BUILDER_ARGS |= {"pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"}


def build(
    model_cls: type[nn.Module],
    variant: str,
    config: Any,
    pretrained: bool = False,
    model_args: set[str] = MODEL_ARGS,
    **kwargs: Any,
) -> nn.Module:
    """Build a registered variant through timm's builder: config fields are replaced, timm's own arguments passed on.

    A config may have a method `idle`, which yields the fields that change nothing beside the others (see
    `refuse_idle`); a model class `first_conv`, which gives the name of a config's first convolution to timm.

    Raises:
        ZooError: a keyword is neither a field of the family's config nor one of timm's arguments, or a field's value
            makes no network or changes nothing.
    """
    fields = [field.name for field in dataclasses.fields(config)]
    for name in kwargs:
        if name not in {*fields, *model_args, *BUILDER_ARGS}:
            known = [*fields, *sorted(model_args)]
            raise ZooError(f"{variant}: unknown option '{name}'{near_matches(name, known)}; known: {', '.join(known)}")
    try:
        chosen = dataclasses.replace(config, **{name: kwargs.pop(name) for name in fields if name in kwargs})
        refuse_idle(chosen, config)
    except ZooError as error:
        raise ZooError(f"{variant}: {error}") from None
    if pretrained and not (kwargs.get("pretrained_cfg_overlay") or isinstance(kwargs.get("pretrained_cfg"), dict)):
        # mmsegmentation's TIMMBackbone asks for pretrained weights unless told otherwise.
        _logger.warning("%s: no pretrained weights are hosted; built with random weights.", variant)
        pretrained = False
    if first_conv := getattr(model_cls, "first_conv", None):
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        kwargs["pretrained_cfg_overlay"] = {"first_conv": first_conv(chosen), **overlay}
    if kwargs.get("features_only"):
        kwargs.setdefault("out_indices", tuple(range(model_cls.num_maps(chosen))))
    elif kwargs.get("out_indices") is not None:
        raise ZooError(f"{variant}: out_indices needs features_only=True")
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    with torch.device(device) if device is not None else contextlib.nullcontext():
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            model_cfg=chosen,
            feature_cfg={"feature_cls": FeatureMaps},
            pretrained_filter_fn=lambda state, model: model.from_published(state),
            **kwargs,
        )
    return model if dtype is None else model.to(dtype)


def refuse_idle(chosen: Any, variant: Any) -> None:
    """Refuse fields of the config `chosen` that differ from those of the registered `variant` and change nothing.

    ``chosen.idle()`` yields such fields: the name, the position of the number if only one of several is meant (else
    None), and why. A field of another length than the variant's had to be given, and is accepted.

    Raises:
        ZooError: naming the field and the value that it has to keep.
    """
    for name, position, why in chosen.idle() if hasattr(chosen, "idle") else ():
        value, kept = getattr(chosen, name), getattr(variant, name)
        if position is None:
            changed = value != kept
        else:
            changed = len(value) == len(kept) and value[position] != kept[position]
        if changed:
            place = "" if position is None else f" at position {position + 1}"
            wanted = kept if position is None else kept[position]
            raise ZooError(f"{name}={value!r} changes nothing{place}, where {why}: leave it at {wanted!r}")


def check_size(img_size: Any) -> tuple[int, int]:
    """Return an image size in pixels as (height, width); an int means a square.

    Raises:
        ZooError: it is no size, or a side is under 32 pixels.
    """
    size = tuple(img_size) if isinstance(img_size, list | tuple) else (img_size, img_size)
    if len(size) != 2 or not all(map(_is_int, size)):
        raise ZooError(f"img_size={img_size!r} must be an int or two ints (height, width)")
    if min(size) < MIN_SIZE:
        raise ZooError(f"img_size={img_size} is too small: each side needs {MIN_SIZE} pixels or more")
    return size


def check_fields(config: Any) -> None:
    """Check the types of a config's fields against those of their defaults; sequences become tuples.

    A field of the type ``tuple[int, ...]`` or ``tuple[str, ...]`` takes any number of them. `img_size`, which has
    several forms, is left to `check_size`.

    Raises:
        ZooError: naming the field and what it must be.
    """
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.name == "img_size":
            continue
        if isinstance(default, bool):
            fits, wanted = isinstance(value, bool), "True or False"
        elif isinstance(default, str):
            fits, wanted = isinstance(value, str), "a name"
        elif isinstance(default, tuple):
            names = any(isinstance(item, str) for item in default)
            any_length = Ellipsis in get_args(field.type)
            fits = isinstance(value, Sequence) and not isinstance(value, str)
            fits = fits and all(isinstance(item, str) if names else _is_int(item) for item in value)
            fits = fits and (any_length or len(value) == len(default))
            wanted = f"{'any number of' if any_length else len(default)} {'names' if names else 'ints'}"
            if fits:
                object.__setattr__(config, field.name, tuple(value))
        elif isinstance(default, float):
            fits = _is_int(value) or (isinstance(value, float) and math.isfinite(value))
            wanted = "a number"
        else:
            fits, wanted = _is_int(value), "an int"
        if not fits:
            raise ZooError(f"{field.name}={value!r} must be {wanted}")


def check_pool(family: str, global_pool: Any, num_classes: int) -> None:
    """Raise ZooError for a pooling other than ``avg`` or, where there is no classifier, none (an empty string)."""
    if global_pool not in ("avg", ""):
        raise ZooError(f"{family}: global_pool={global_pool!r} must be 'avg' or '' (none)")
    if not global_pool and num_classes > 0:
        raise ZooError(f"{family}: global_pool='' (none) needs num_classes=0, not num_classes={num_classes}")


def check_images(family: str, x: Tensor) -> None:
    """Raise ZooError for what is no batch of images of at least 32 x 32 pixels."""
    if x.ndim != 4:
        raise ZooError(f"{family}: images must be (batch, channels, height, width), not of shape {tuple(x.shape)}")
    if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
        raise ZooError(f"{family}: images of {x.shape[2]} x {x.shape[3]} pixels; each side needs {MIN_SIZE} or more")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
