"""Semantic segmentation: any backbone of the zoo in mmsegmentation's segmentors, with its heads and transforms.

`Recipe.augmentation` of a training: `resize` ([width, height], or null to keep the size), `ratio_range` of the random
rescaling, `crop` (default: the job's input size), `maximum_class_share` of a crop, `flip` (probability),
`photometric_distortion` (bool). `Recipe.evaluation`: `resize` ([width, height] that the image is fitted into, or null),
`mode` ("whole" or "slide"), `stride` (of sliding windows of the input size), `size_divisor` (sides are padded to it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModule
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder

import zoo
from benchmarks import data, heads
from benchmarks.engine import Context, Outcome, evaluate, train
from benchmarks.job import BARE, Job

# ImageNet's statistics in units of 8-bit pixels, RGB.
MEAN = [123.675, 116.28, 103.53]
STD = [58.395, 57.12, 57.375]


class ZooBackbone(BaseModule):
    """A backbone of the zoo (or of timm) as mmsegmentation wants it: images (B, 3, H, W) in, a tuple of maps out."""

    def __init__(self, name: str, **config: Any):
        super().__init__()
        self._is_init = True  # the zoo's weights stay
        self.network = zoo.create_model(name, features_only=True, **config)
        self.channels = list(self.network.feature_info.channels())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network(images))


def build_model(job: Job) -> EncoderDecoder | ZooBackbone:
    """The job's segmentor with fresh weights: backbone, head and auxiliary head (a bare job's is the backbone)."""
    config = dict(job.model_config)
    if job.recipe is not None and job.recipe.drop_path_rate is not None:
        config.setdefault("drop_path_rate", job.recipe.drop_path_rate)
    config = {"name": job.model, "img_size": job.input_size, **config}
    backbone = ZooBackbone(**config)
    if job.head == BARE:
        return backbone
    parts = heads.settings(job.head, backbone.channels, job.num_classes, job.head_config)
    evaluation = job.recipe.evaluation if job.recipe is not None else {}
    test = {"mode": evaluation.get("mode", "whole")}
    if test["mode"] == "slide":
        test |= {"crop_size": job.input_size, "stride": tuple(evaluation["stride"])}
    return parts.pop("type")(
        backbone={"type": lambda: backbone},  # is built already: the heads are made for its channels
        **parts,
        test_cfg=ConfigDict(test),
        data_preprocessor={
            "type": "SegDataPreProcessor",
            "mean": MEAN,
            "std": STD,
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
            "size": _crop(job),
            "test_cfg": {"size_divisor": evaluation.get("size_divisor", 1)},
        },
    )


def run_train(job: Job, context: Context) -> Outcome:
    """Trains the job's segmentor from its newest checkpoint, or from fresh weights."""
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    return train(job, context, lambda: build_model(job), _dataset(job, root, training=True), pseudo_collate)


def run_evaluate(job: Job, context: Context, weights: Path) -> Outcome:
    """mIoU, mAcc and aAcc on the validation images, beside the mIoU of one class everywhere (the most frequent)."""
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    dataset, metric = _dataset(job, root, training=False), IoUMetric(iou_metrics=["mIoU"])
    # One image at a time: their sizes differ.
    metrics = evaluate(job, context, build_model(job), weights, dataset, pseudo_collate, 1, metric)
    shown = {name: metrics[name] for name in ("mIoU", "mAcc", "aAcc")}
    return Outcome(metrics={**shown, "baseline_mIoU": _baseline(dataset)}, details={"images": len(dataset)})


def _baseline(dataset: BaseSegDataset) -> float:
    """mIoU, in percent, of painting every pixel with the most frequent class of `dataset`'s labels."""
    classes = len(dataset.metainfo["classes"])
    load = dataset.pipeline.transforms[-2]  # LoadAnnotations, just before the packing
    counts = np.zeros(classes, dtype=np.int64)
    for index in range(len(dataset)):
        labels = load(dataset.get_data_info(index))["gt_seg_map"]
        counts += np.bincount(labels[labels < classes], minlength=classes)
    painted = torch.zeros(classes, dtype=torch.float64)
    painted[counts.argmax()] = counts.sum()
    labelled = torch.from_numpy(counts).double()
    intersection = torch.minimum(painted, labelled)
    metrics = IoUMetric.total_area_to_metrics(intersection, painted + labelled - intersection, painted, labelled)
    return 100.0 * float(np.nanmean(metrics["IoU"]))


def _dataset(job: Job, root: Path, training: bool) -> BaseSegDataset:
    """mmsegmentation's dataset over the described folders, with the recipe's transforms."""
    described = data.describe(job.data)
    labels = {"type": "LoadAnnotations", "reduce_zero_label": described.reduce_zero_label}
    augmentation, evaluation = job.recipe.augmentation, job.recipe.evaluation
    if training:
        pipeline: list[dict[str, Any]] = [{"type": "LoadImageFromFile"}, labels]
        if augmentation.get("resize"):
            pipeline.append(
                {
                    "type": "RandomResize",
                    "scale": tuple(augmentation["resize"]),
                    "ratio_range": tuple(augmentation.get("ratio_range", (1.0, 1.0))),
                    "keep_ratio": True,
                }
            )
        pipeline.append(
            {
                "type": "RandomCrop",
                "crop_size": _crop(job),
                "cat_max_ratio": augmentation.get("maximum_class_share", 1.0),
            }
        )
        if augmentation.get("flip"):
            pipeline.append({"type": "RandomFlip", "prob": augmentation["flip"]})
        if augmentation.get("photometric_distortion"):
            pipeline.append({"type": "PhotoMetricDistortion"})
    else:
        pipeline = [{"type": "LoadImageFromFile"}]
        if evaluation.get("resize"):
            pipeline.append({"type": "Resize", "scale": tuple(evaluation["resize"]), "keep_ratio": True})
        pipeline.append(labels)  # after the resizing: metrics are computed at the labels' own size
    pipeline.append({"type": "PackSegInputs"})
    split = described.training if training else described.validation
    arguments: dict[str, Any] = {
        "data_root": str(root),
        "data_prefix": {
            "img_path": described.images.format(split=split),
            "seg_map_path": described.annotations.format(split=split),
        },
        "ann_file": described.split_list.format(split=split),
        "img_suffix": described.image_suffix,
        "seg_map_suffix": described.annotation_suffix,
        "reduce_zero_label": described.reduce_zero_label,
        "pipeline": pipeline,
        "test_mode": not training,
    }
    if job.data == "ade20k":
        return ADE20KDataset(**arguments)
    classes = described.classes
    shades = np.random.default_rng(0).integers(0, 256, (len(classes), 3)).tolist()
    return BaseSegDataset(metainfo={"classes": classes, "palette": shades}, **arguments)


def _crop(job: Job) -> tuple[int, int]:
    """Height and width of a training crop, pixels."""
    return tuple((job.recipe.augmentation if job.recipe is not None else {}).get("crop", job.input_size))
