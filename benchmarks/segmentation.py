"""Semantic segmentation: any backbone of the zoo in mmsegmentation's segmentors, with its heads and transforms.

`Recipe.augmentation` of a training: `resize` ([width, height], or null to keep the size), `ratio_range` of the random
rescaling, `crop` ([height, width]; default: the job's input size), `maximum_class_share` of a crop, `flip`
(probability), `photometric_distortion` (bool). `Recipe.evaluation`: `resize` ([width, height] that the image is fitted
into, or null), `mode` ("whole" or "slide"), `stride` ([height, width] between sliding windows of the input size),
`size_divisor` (sides are padded to it), `scales` (several, as multiples of `resize`: the image is evaluated a second
time, as the mean of the class probabilities of all scales) and `flip` (bool: each of these scales mirrored too).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModule
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, SegTTAModel

import zoo
from benchmarks import data, heads
from benchmarks.classification import start_from, tell_start
from benchmarks.data.scenes import LoadImage, LoadLabels, open_scenes
from benchmarks.engine import Context, Outcome, evaluate, train
from benchmarks.errors import InputError, choose
from benchmarks.held_out import Scores, split
from benchmarks.job import BARE, SEARCH, Job
from benchmarks.validation import Validation, evaluated

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
    test = {"mode": choose("mode", evaluation.get("mode", "whole"), ("whole", "slide"), "recipe.evaluation")}
    if test["mode"] == "slide":
        if "stride" not in evaluation:
            raise InputError("recipe.evaluation: mode slide needs a stride, [height, width] in pixels")
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


class SeveralScales(SegTTAModel):
    """mmsegmentation's mean over scales and flips, in the place of a segmentor that the engine evaluates."""

    def val_step(self, data: dict) -> list:
        return self.test_step(data)

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        return self.module.load_state_dict(state_dict, *arguments, **options)


def run_train(job: Job, context: Context, initial: Path | None = None) -> Outcome:
    """Trains the job's segmentor from its newest checkpoint, else from fresh weights.

    The backbone starts from `initial`, the finished weights of a classification, or from the `checkpoint` that the
    model's configuration names; its classifier is left behind.

    Raises:
        InputError: the weights of `initial` are of another backbone.
    """
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    looks = validation(job, root) if job.recipe.validate_every else None
    loaded: list[str] = []

    def build() -> EncoderDecoder:
        model = build_model(job)
        if initial is not None:
            # Some backbones have a norm at the end of each map, which a classifier lacks.
            loaded.append(start_from(model.backbone.network, initial, lambda name: "norm" in name))
        return model

    dataset, hooks = training_data(job, root), []
    if job.stage == SEARCH:
        seen, held_out = split(job, len(dataset))
        looks = _validation(evaluation_data(job, root, training=True).get_subset(held_out))
        dataset, hooks = dataset.get_subset(seen), [Scores(job, context, looks)]
    outcome = train(job, context, build, dataset, pseudo_collate, hooks, looks)
    if job.stage == SEARCH:
        hooks[-1].add_to(outcome)
    if initial is not None:
        tell_start(outcome, job, context, initial, loaded[0])
    elif checkpoint := job.model_config.get("checkpoint"):
        outcome.notes.append(f"the backbone started from {checkpoint}")
    return outcome


def run_evaluate(job: Job, context: Context, weights: Path) -> Outcome:
    """mIoU, mAcc and aAcc on the validation images, beside the mIoU of one class everywhere (the most frequent).

    With `scales` in the recipe's evaluation also mIoU_ms, of several scales.
    """
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    model, images = build_model(job), validation(job, root)
    scales = _scales(job)
    share = 1 / (1 + len(scales))
    found = evaluate(job, _part(context, 0, share), model, weights, images)
    what, notes = evaluated(job, weights)
    metrics = {name: found[name] for name in ("mIoU", "mAcc", "aAcc")} | {"baseline_mIoU": _baseline(images.dataset)}
    details: dict[str, Any] = {"images": len(images.dataset), "evaluated": what}
    if scales:
        several = validation(job, root, scales)
        found = evaluate(job, _part(context, share, 1 - share), SeveralScales(model), weights, several)
        metrics["mIoU_ms"] = found["mIoU"]
        details["several_scales"] = {"scales": scales, "flip": bool(job.recipe.evaluation.get("flip"))}
    return Outcome(metrics=metrics, details=details, notes=notes)


def validation(job: Job, root: Path, scales: list[float] | None = None) -> Validation:
    """mIoU, mAcc and aAcc on the validation images below `root`, one scale of them or the mean of several."""
    return _validation(evaluation_data(job, root, scales))


def _validation(dataset: BaseSegDataset) -> Validation:
    # One image at a time: their sizes differ.
    return Validation(dataset, pseudo_collate, 1, IoUMetric(iou_metrics=["mIoU"]), score="mIoU")


def _part(context: Context, start: float, length: float) -> Context:
    """The context of a part of a job, which begins at `start` and is `length` of the whole."""
    return dataclasses.replace(
        context, progress=lambda state: context.progress(state | {"fraction": start + length * state["fraction"]})
    )


def _scales(job: Job) -> list[float]:
    scales = list(job.recipe.evaluation.get("scales", ()))
    if any(scale <= 0 for scale in scales):
        raise InputError(f"recipe.evaluation.scales are {scales}; each must be above 0")
    return scales


def _baseline(dataset: BaseSegDataset) -> float:
    """mIoU, in percent, of painting every pixel with the most frequent class of `dataset`'s labels."""
    classes = len(dataset.metainfo["classes"])
    load = next(step for step in dataset.pipeline.transforms if isinstance(step, LoadLabels))
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


def training_data(job: Job, root: Path) -> BaseSegDataset:
    """The training images below `root` with their labels, through the recipe's augmentation."""
    described, settings = data.describe(job.data), job.recipe.augmentation
    pipeline: list[Any] = [LoadImage(), LoadLabels(described)]
    if settings.get("resize"):
        pipeline.append(
            {
                "type": "RandomResize",
                "scale": tuple(settings["resize"]),
                "ratio_range": tuple(settings.get("ratio_range", (1.0, 1.0))),
                "keep_ratio": True,
            }
        )
    share = settings.get("maximum_class_share", 1.0)
    pipeline.append({"type": "RandomCrop", "crop_size": _crop(job), "cat_max_ratio": share})
    if settings.get("flip"):
        pipeline.append({"type": "RandomFlip", "prob": settings["flip"]})
    if settings.get("photometric_distortion"):
        pipeline.append({"type": "PhotoMetricDistortion"})
    return open_scenes(described, root, True, [*pipeline, {"type": "PackSegInputs"}])


def evaluation_data(job: Job, root: Path, scales: list[float] | None = None, training: bool = False) -> BaseSegDataset:
    """The validation images below `root` as the recipe's evaluation has them, or each of them at several scales.

    With `training` the training images in their place. Labels keep their own size, at which metrics are computed.
    """
    described, settings = data.describe(job.data), job.recipe.evaluation
    labels, pack, size = LoadLabels(described), {"type": "PackSegInputs"}, settings.get("resize")
    if not scales:
        resize = [{"type": "Resize", "scale": tuple(size), "keep_ratio": True}] if size else []
        return open_scenes(described, root, training, [LoadImage(), *resize, labels, pack])
    sizes = [
        {"scale": tuple(round(side * scale) for side in size)} if size else {"scale_factor": scale} for scale in scales
    ]
    several = {
        "type": "TestTimeAug",
        "transforms": [
            [{"type": "Resize", "keep_ratio": True, **size} for size in sizes],
            [{"type": "RandomFlip", "prob": prob} for prob in ((0.0, 1.0) if settings.get("flip") else (0.0,))],
            [labels],
            [pack],
        ],
    }
    return open_scenes(described, root, training, [LoadImage(), several])


def _crop(job: Job) -> tuple[int, int]:
    """Height and width of a training crop, pixels."""
    return tuple((job.recipe.augmentation if job.recipe is not None else {}).get("crop", job.input_size))
