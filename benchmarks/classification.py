"""Image classification: timm's models, transforms, loss and optimizers in mmengine's Runner.

`Recipe.augmentation` holds arguments of `timm.data.create_transform` for training (scale, ratio, hflip, color_jitter,
auto_augment, re_prob, ...), `Recipe.evaluation` those for evaluation (crop_pct, ...).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from timm.data import create_transform
from timm.loss import LabelSmoothingCrossEntropy
from torch.utils.data import default_collate

import zoo
from benchmarks import data
from benchmarks.data.images import Images, open_images
from benchmarks.engine import Context, Outcome, evaluate, train
from benchmarks.errors import InputError
from benchmarks.job import Job


class Classifier(BaseModel):
    """A classifier in mmengine's terms: images (B, 3, H, W) and labels (B,) in; a loss, or scores (B, classes), out."""

    def __init__(self, network: torch.nn.Module, label_smoothing: float = 0.0):
        super().__init__()
        self.network = network
        self._is_init = True  # mmengine would initialise timm's networks anew
        self.criterion = LabelSmoothingCrossEntropy(label_smoothing)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None, mode: str = "tensor") -> Any:
        logits = self.network(inputs)
        if mode == "loss":
            return {"loss": self.criterion(logits, labels)}
        if mode == "predict":
            return [{"scores": row, "label": int(label)} for row, label in zip(logits, labels, strict=True)]
        return logits


class TopK(BaseMetric):
    """Share of images, in percent, whose true class is among the 1 (5) with the highest scores."""

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            ranked = sample["scores"].topk(min(5, len(sample["scores"]))).indices.tolist()
            self.results.append((ranked[0] == sample["label"], sample["label"] in ranked))

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {
            name: 100.0 * sum(result[i] for result in results) / len(results) for i, name in enumerate(("top1", "top5"))
        }


def build_model(job: Job) -> torch.nn.Module:
    """The job's classifier with fresh weights."""
    config = dict(job.model_config)
    if job.recipe is not None and job.recipe.drop_path_rate is not None:
        config.setdefault("drop_path_rate", job.recipe.drop_path_rate)
    return zoo.create_model(job.model, num_classes=job.num_classes, img_size=job.input_size, **config)


def run_train(job: Job, context: Context) -> Outcome:
    """Trains the job's model from its newest checkpoint, or from fresh weights."""
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    return train(job, context, lambda: _classifier(job), _dataset(job, root, training=True), default_collate)


def run_evaluate(job: Job, context: Context, weights: Path) -> Outcome:
    """Top-1 and top-5 accuracy on the validation images, beside that of always naming the most frequent class."""
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    dataset = _dataset(job, root, training=False)
    model, batch_size = _classifier(job), job.recipe.batch_size
    metrics = evaluate(job, context, model, weights, dataset, default_collate, batch_size, TopK())
    frequencies = Counter(dataset.labels)
    baseline = 100.0 * max(frequencies.values()) / frequencies.total()
    return Outcome(metrics={**metrics, "baseline_top1": baseline}, details={"images": frequencies.total()})


def _classifier(job: Job) -> Classifier:
    return Classifier(build_model(job), job.recipe.label_smoothing)


def _dataset(job: Job, root: Path, training: bool) -> Images:
    """The images of a split in ImageNet's layout, with the recipe's transforms."""
    described = data.describe(job.data)
    arguments = job.recipe.augmentation if training else job.recipe.evaluation
    try:
        transform = create_transform(input_size=(3, *job.input_size), is_training=training, **arguments)
    except TypeError as error:
        raise InputError(f"recipe: timm's create_transform does not take these settings: {error}") from error
    return open_images(described, root, training, transform)
