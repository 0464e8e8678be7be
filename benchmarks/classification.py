"""Image classification: timm's models, transforms, Mixup, losses, averaging and optimizers in mmengine's Runner.

`Recipe.augmentation` holds arguments of `timm.data.create_transform` for training (scale, ratio, hflip, color_jitter,
auto_augment, re_prob, ...), `Recipe.evaluation` those for evaluation (crop_pct, ...), `Recipe.mixup` those of
`timm.data.Mixup` and `Recipe.ema` those of `timm.utils.ModelEmaV3`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, BaseModel, is_model_wrapper
from mmengine.runner import Runner
from safetensors.torch import load_file
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, default_collate

import zoo
from benchmarks import data
from benchmarks.data.images import Images, open_images
from benchmarks.distillation import distilled_targets, probability_maps
from benchmarks.draws import seeded
from benchmarks.engine import Context, Outcome, evaluate, train
from benchmarks.errors import InputError
from benchmarks.held_out import Scores, split
from benchmarks.job import SEARCH, Job, Recipe
from benchmarks.validation import Validation, evaluated

MIXING = 2**31  # tells the random numbers of a step's mixing from all others of the step (benchmarks.engine.JobHook)


class Mixing(BaseDataPreprocessor):
    """Mixes the images and labels of a training batch on their device, with timm's Mixup.

    timm draws from NumPy's generator. It is seeded with the training's seed and the step, so that a step is mixed alike
    however often the training was interrupted and, with one share for the whole batch (timm's mode "batch"), in
    however many forwards and processes it is done: `benchmarks.draws.StepSampler` keeps the pairs together.
    """

    def __init__(self, mixup: Mixup, with_mask: bool, seed: int = 0):
        super().__init__()
        self.mixup = mixup
        self.with_mask = with_mask
        self.seed = seed

    def forward(self, data: Sequence[Tensor], training: bool = False) -> Sequence[Tensor]:
        """(images, labels) -> (mixed images, mixed labels) and, for distillation, images and mask.

        The mask (B, 1, H, W) is what each image keeps of itself. Evaluation batches are left as they are.

        Raises:
            InputError: an odd number of images, which cannot be paired.
        """
        images, labels = data = super().forward(data, training)
        if not training:
            return data
        step = MessageHub.get_current_instance().get_info("iter", 0)  # mmengine's RuntimeInfoHook keeps it
        if len(images) % 2:
            raise InputError(f"recipe.mixup pairs the images of a batch, but one has {len(images)}; make it even")
        with seeded(self.seed, step, MIXING):
            mixed, targets = self.mixup(images.clone(), labels)
        if not self.with_mask:
            return [mixed, targets]
        # The same draws show the mask on images that are 1 in the first half of the batch and 0 in their partners.
        first = torch.zeros_like(images[:, :1])
        first[: len(images) // 2] = 1
        with seeded(self.seed, step, MIXING):
            blend, _ = self.mixup(first.clone(), labels)
        return [mixed, targets, images, 1 - (blend - first).abs()]


class Classifier(BaseModel):
    """A classifier in mmengine's terms: images (B, 3, H, W) and labels in; a loss, or scores (B, classes), out.

    Labels are classes (B,), or with Mixup the shares (B, classes). Where the recipe averages the weights, the average
    is part of the model, and with it of every checkpoint; it is what scores.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, seed: int = 0):
        super().__init__(_mixing(network, recipe, seed))
        self._is_init = True  # mmengine would initialise timm's networks anew
        self.recipe = recipe
        if recipe.linear_probe:
            _make_probe(network)
        self.network = network
        self.ema = _average(network, recipe)
        smoothing = recipe.label_smoothing  # with Mixup it is part of the labels
        self.criterion = SoftTargetCrossEntropy() if recipe.mixup else LabelSmoothingCrossEntropy(smoothing)

    def train(self, mode: bool = True) -> Classifier:
        """The average of the weights never trains, nor, in a linear probe, anything but the classifier."""
        super().train(mode)
        if self.ema is not None:
            self.ema.eval()
        if self.recipe.linear_probe:
            self.network.eval()
            self.network.get_classifier().train(mode)
        return self

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        unmixed: Tensor | None = None,
        mask: Tensor | None = None,
        mode: str = "tensor",
    ) -> Any:
        if mode == "loss":
            if unmixed is not None:
                maps = probability_maps(self.ema.module, unmixed)
                labels = distilled_targets(maps, mask, labels, self.recipe.distillation_alpha)
            # In float32 on any device: autocast leaves losses in bfloat16 on CPUs.
            return {"loss": self.criterion(self.network(inputs).float(), labels)}
        logits = (self.network if self.ema is None else self.ema.module)(inputs)
        if mode == "predict":
            return [{"scores": row, "label": int(label)} for row, label in zip(logits, labels, strict=True)]
        return logits


class Averaging(Hook):
    """Moves the average of the weights after each step of the optimizer."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.ema.update(model.network, step=batch_idx + 1)


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


def run_train(job: Job, context: Context, initial: Path | None = None) -> Outcome:
    """Trains the job's model from its newest checkpoint, else from the weights `initial`, else from fresh ones.

    Raises:
        InputError: the weights of `initial` are of another model, or timm does not take a setting of the recipe.
    """
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    dataset = build_dataset(job, root, training=True)
    hooks = [Averaging()] if job.recipe.ema else []
    looks = validation(job, root) if job.recipe.validate_every else None
    if job.stage == SEARCH:
        seen, held_out = split(job, len(dataset))
        images = open_images(data.describe(job.data), root, True, build_transform(job, training=False))
        dataset, looks = Subset(dataset, seen), _validation(job, Subset(images, held_out))
        hooks = [*hooks, Scores(job, context, looks)]
    loaded: list[str] = []

    def build() -> Classifier:
        network = build_model(job)
        if initial is not None:
            loaded.append(start_from(network, initial))
        return Classifier(network, job.recipe, job.seed)

    outcome = train(job, context, build, dataset, default_collate, hooks, looks)
    if job.stage == SEARCH:
        hooks[-1].add_to(outcome)
    if initial is not None:
        tell_start(outcome, job, context, initial, loaded[0])
    if job.recipe.linear_probe:
        outcome.notes.append("linear probe: the classifier alone was trained")
    return outcome


def run_evaluate(job: Job, context: Context, weights: Path) -> Outcome:
    """Top-1 and top-5 accuracy on the validation images, beside that of always naming the most frequent class."""
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    images = validation(job, root)
    metrics = evaluate(job, context, Classifier(build_model(job), job.recipe), weights, images)
    frequencies = Counter(images.dataset.labels)
    baseline = 100.0 * max(frequencies.values()) / frequencies.total()
    what, notes = evaluated(job, weights)
    return Outcome(
        metrics={**metrics, "baseline_top1": baseline},
        details={"images": frequencies.total(), "evaluated": what},
        notes=notes,
    )


def validation(job: Job, root: Path) -> Validation:
    """Top-1 and top-5 accuracy on the validation images below `root`."""
    return _validation(job, build_dataset(job, root, training=False))


def _validation(job: Job, dataset: Dataset) -> Validation:
    return Validation(dataset, default_collate, job.recipe.images_per_forward, TopK(), score="top1")


def start_from(network: nn.Module, weights: Path, fresh: Callable[[str], bool] | None = None) -> str:
    """Fills `network` with the finished weights of another training; returns in one line what was taken.

    Averaged weights are taken before others, and the encoder of an autoencoder. What `fresh` says of a name may keep
    its fresh weights: by default the classifier, which an autoencoder lacks and other classes do not fit.

    Raises:
        InputError: another part of the network got no weights.
    """
    report = zoo.load_published(network, load_file(weights))
    if fresh is None:
        names = (network.pretrained_cfg["classifier"], "fc_norm")
        fresh = lambda name: name.startswith(names)  # noqa: E731
    lacking = [name for name in (*report.missing, *report.mismatched) if not fresh(name)]
    if lacking:
        raise InputError(f"{weights} has no fitting weights for {', '.join(lacking[:3])}; start from the same model")
    return str(report)


def tell_start(outcome: Outcome, job: Job, context: Context, initial: Path, report: str) -> None:
    """Has the record say which weights the training started from; `report` is what was taken of them."""
    outcome.details["started_from"] = {"weights": str(initial.relative_to(context.output)), "report": report}
    what = {"pretrain": "pretraining", "train": "training"}[job.starts_from["stage"]]
    outcome.notes.append(f"started from the weights of the {what} {job.starts_from['label']}")


def build_dataset(job: Job, root: Path, training: bool) -> Images:
    """The images of a split in ImageNet's layout, with the recipe's transforms."""
    return open_images(data.describe(job.data), root, training, build_transform(job, training))


def build_transform(job: Job, training: bool) -> Any:
    """timm's transforms of the recipe, for training or evaluation. Raises InputError for what timm does not take."""
    arguments = job.recipe.augmentation if training else job.recipe.evaluation
    try:
        return create_transform(input_size=(3, *job.input_size), is_training=training, **arguments)
    except TypeError as error:
        raise InputError(f"recipe: timm's create_transform does not take these settings: {error}") from error


def _mixing(network: nn.Module, recipe: Recipe, seed: int) -> BaseDataPreprocessor | None:
    if not recipe.mixup:
        return None
    try:
        mixup = Mixup(num_classes=network.num_classes, label_smoothing=recipe.label_smoothing, **recipe.mixup)
    except TypeError as error:
        raise InputError(f"recipe.mixup: timm's Mixup does not take these settings: {error}") from error
    return Mixing(mixup, recipe.distillation_alpha is not None, seed)


def _average(network: nn.Module, recipe: Recipe) -> ModelEmaV3 | None:
    if not recipe.ema:
        return None
    try:
        return ModelEmaV3(network, **recipe.ema).requires_grad_(False)
    except TypeError as error:
        raise InputError(f"recipe.ema: timm's ModelEmaV3 does not take these settings: {error}") from error


def _make_probe(network: nn.Module) -> None:
    """Freezes all but a new classifier behind a batch norm without parameters, as He et al. (2022), A.1, probe."""
    network.requires_grad_(False)
    linear = network.get_classifier().requires_grad_(True)
    norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6)
    network.set_submodule(network.pretrained_cfg["classifier"], nn.Sequential(norm, linear))
