"""Segmentation data as mmsegmentation's datasets, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmseg.datasets
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmseg.datasets import BaseSegDataset

from benchmarks.data.catalogue import Dataset
from benchmarks.errors import Damaged

IGNORED = 255  # the label of pixels without a class, once loaded


class LoadImage(LoadImageFromFile):
    """mmcv's transform; raises `Damaged` for an image that cannot be decoded."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().transform(results)
        except Exception as error:  # OpenCV's and mmcv's own, of many types
            raise Damaged(f"cannot read the image {results['img_path']}: {_one_line(error)}") from error


class LoadLabels(BaseTransform):
    """mmsegmentation's LoadAnnotations; raises `Damaged` for what is no label map of the dataset.

    Labels are numbers of classes, `IGNORED` where there is none.
    """

    def __init__(self, dataset: Dataset):
        self.num_classes = dataset.num_classes
        self.load = mmseg.datasets.LoadAnnotations()

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["seg_map_path"]
        try:
            results = self.load(results)
        except Exception as error:  # Pillow's, of many types
            raise Damaged(f"cannot read the labels {path}: {_one_line(error)}") from error
        labels = results["gt_seg_map"]
        if labels.ndim != 2:
            raise Damaged(f"the labels {path} are no map of one byte per pixel, but of shape {labels.shape}")
        size = results.get("ori_shape", labels.shape)
        if labels.shape != size:
            raise Damaged(f"the labels {path} are of size {labels.shape}, but their image of {size}")
        wrong = labels[(labels >= self.num_classes) & (labels != IGNORED)]
        if wrong.size:
            raise Damaged(
                f"the labels {path} hold class {wrong.max()}, but the {self.num_classes} classes are 0 to "
                f"{self.num_classes - 1}, and {IGNORED} for none; were they converted?"
            )
        return results


def open_scenes(dataset: Dataset, folder: Path, training: bool, pipeline: list[dict | BaseTransform]) -> BaseSegDataset:
    """The images and label maps of a split below `folder`, through the transforms of `pipeline`."""
    split = dataset.training if training else dataset.validation
    kind, named = BaseSegDataset, {}
    if dataset.mmseg_class:
        kind = getattr(mmseg.datasets, dataset.mmseg_class)
    else:
        colours = np.random.default_rng(0).integers(0, 256, (dataset.num_classes, 3)).tolist()
        named["metainfo"] = {"classes": dataset.classes, "palette": colours}
    return kind(
        data_root=str(folder),
        data_prefix={
            "img_path": dataset.images.format(split=split),
            "seg_map_path": dataset.annotations.format(split=split),
        },
        ann_file=dataset.split_list.format(split=split),
        img_suffix=dataset.image_suffix,
        seg_map_suffix=dataset.annotation_suffix,
        reduce_zero_label=dataset.reduce_zero_label,
        pipeline=pipeline,
        test_mode=not training,
        **named,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
