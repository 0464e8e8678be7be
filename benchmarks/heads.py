"""The segmentors: which of mmsegmentation's heads sit on the maps of a backbone, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmseg.models import CascadeEncoderDecoder, EncoderDecoder
from torch import nn

from benchmarks.errors import choose

AUXILIARY_WEIGHT = 0.4  # of the auxiliary loss, for all heads that have one


class BiasedConv2d(nn.Conv2d):
    """A convolution that keeps its bias in front of a norm, where mmcv's ConvModule leaves it out."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"bias": True})


def settings(head: str, channels: Sequence[int], num_classes: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The class of the segmentor (`type`) and mmsegmentation's settings of its heads.

    Args:
        head: One of `segformer`, `upernet`, `ocr`.
        channels: Channels of the backbone's maps, from high to low resolution.
        num_classes: Classes of the logits.
        config: Settings of the decode head that differ from the default, under mmsegmentation's names.

    Raises:
        InputError: the head is not known.
    """
    choose("head", head, _HEADS)
    shared = {
        "in_channels": list(channels),
        "in_index": list(range(len(channels))),
        "num_classes": num_classes,
        "norm_cfg": {"type": "SyncBN" if torch.distributed.is_initialized() else "BN"},
        "align_corners": False,
    }
    return _HEADS[head](shared, dict(config))


def _segformer(shared: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Xie et al. 2021; 256 channels as for MiT-B0 and B1."""
    head = shared | {"type": "SegformerHead", "channels": 256, "dropout_ratio": 0.1} | config
    return {"type": EncoderDecoder, "decode_head": head}


def _upernet(shared: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Xiao et al. 2018, as mmsegmentation sets it for Swin; the auxiliary head reads the third map (stride 16)."""
    head = shared | {"type": "UPerHead", "channels": 512, "pool_scales": (1, 2, 3, 6), "dropout_ratio": 0.1} | config
    index = min(2, len(shared["in_channels"]) - 1)
    auxiliary = shared | {
        "type": "FCNHead",
        "in_channels": shared["in_channels"][index],
        "in_index": index,
        "channels": 256,
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0.1,
        "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": AUXILIARY_WEIGHT},
    }
    return {"type": EncoderDecoder, "decode_head": head, "auxiliary_head": auxiliary}


def _ocr(shared: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Yuan et al. 2020 over HRNetV2's concatenation of the maps, in the form that HRFormer's published code has.

    It differs from mmsegmentation's own OCRNet in the coarse head, whose convolution is 3x3 to 512 channels, in a bias
    in front of each norm, in aligned corners and in the dropout. The coarse head makes the object regions, so that it
    is needed in evaluation too and its parameters count as the model's own.
    """
    shared = shared | {
        "input_transform": "resize_concat",
        "align_corners": True,
        "channels": 512,
        "conv_cfg": {"type": BiasedConv2d},
    }
    coarse = shared | {
        "type": "FCNHead",
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0,
        "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": AUXILIARY_WEIGHT},
    }
    head = shared | {"type": "OCRHead", "ocr_channels": 256, "dropout_ratio": 0.05} | config
    return {"type": CascadeEncoderDecoder, "num_stages": 2, "decode_head": [coarse, head]}


_HEADS = {"segformer": _segformer, "upernet": _upernet, "ocr": _ocr}
