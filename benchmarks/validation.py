"""Looks at the validation images: the one of an evaluation, and those that a training takes on its way.

No look changes a training: each step seeds its random numbers anew (`benchmarks.engine.JobHook`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dataset import DefaultSampler
from mmengine.dist import broadcast, get_world_size, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, ValLoop
from safetensors import safe_open
from torch.utils.data import Dataset

from benchmarks import checkpoints
from benchmarks.draws import loader
from benchmarks.job import Job, Recipe

if TYPE_CHECKING:
    from benchmarks.engine import Context


@dataclass(frozen=True)
class Validation:
    """The validation images, or those that a search holds out, and what is computed on them."""

    dataset: Dataset
    collate: Callable  # makes a batch of samples
    batch_size: int
    metric: BaseMetric
    score: str  # that of the metric's numbers by which weights are compared; the highest is best

    def settings(self, job: Job, context: Context) -> dict[str, Any]:
        """What mmengine's Runner takes to look at the images, each of them once over all processes."""
        self.metric.collect_dir = str(context.folder(job.key) / "collected")  # the default is the current directory
        sampler = DefaultSampler(self.dataset, shuffle=False)
        return {
            "val_dataloader": loader(job, self.dataset, self.batch_size, self.collate, sampler=sampler),
            "val_cfg": {"type": Looks},
            "val_evaluator": [self.metric],
        }


class Looks(ValLoop):
    """mmengine's loop, with the buffers that the first process has: they are those that are kept.

    Without GPUs the running statistics of batch norms differ between processes. Each gets its own back.
    """

    def run(self) -> dict[str, float]:
        if get_world_size() == 1:
            return super().run()
        buffers = list(self.runner.model.buffers())
        own = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            broadcast(buffer)
        try:
            return super().run()
        finally:
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)


class KeepBest(Hook):
    """Keeps the weights that scored highest in a training's looks, the first of equal ones: in a file, and in every
    checkpoint, so that a resumed training knows them.

    mmengine's own `save_best` deletes the file before it writes the next, and its checkpoints have the score alone:
    after a resumption that does not go the same way to the last bit (on GPUs), the two would not belong together.
    """

    priority = "LOWEST"  # the first look of a resumed training comes after all that the others do before it

    def __init__(self, recipe: Recipe, score: str, file: Path):
        self.recipe = recipe
        self.score = score
        self.file = file
        self.best: dict[str, Any] | None = None  # iteration, score and, in the first process, weights

    def details(self) -> dict[str, Any]:
        """For the training's record."""
        return self._said() | {"looks": looks(self.recipe), "weights_sha256": checkpoints.sha256(self.file)}

    def before_train(self, runner: Runner) -> None:
        # A checkpoint is written before the look of the same iteration: a kill between the two must not cost the look.
        if runner.iter and (runner.iter % self.recipe.validate_every == 0 or runner.iter == runner.max_iters):
            runner.val_loop.run()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        score = float(metrics[self.score])
        if self.best is not None and score <= self.best["score"]:
            return
        self.best = {"iteration": runner.iter, "score": score}
        if is_main_process():
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            self.best["weights"] = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
            self._write()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["best"] = self.best

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.best = checkpoint["best"]
        if self.best is not None:
            self.best["weights"] = {name: value.cpu() for name, value in self.best["weights"].items()}
            if is_main_process():
                self._write()

    def _said(self) -> dict[str, Any]:
        return {"metric": self.score, "score": self.best["score"], "iteration": self.best["iteration"]}

    def _write(self) -> None:
        # One entry: several would be written in an order that changes from run to run, and with it the file's digest.
        checkpoints.save_weights(self.best["weights"], self.file, {"best": json.dumps(self._said())})


def looks(recipe: Recipe) -> int:
    """How often a training of the recipe looks at the validation images; its end is one of the times."""
    return -(-recipe.iterations // recipe.validate_every)


def evaluated(job: Job, weights: Path) -> tuple[str, list[str]]:
    """Which weights the file `weights` has, in words, and what a table has to say about their score."""
    average = "the moving average of the weights" if job.recipe.ema else "the weights"
    if not job.recipe.evaluate_best:
        return average if job.recipe.ema else f"{average} of the last iteration", []
    with safe_open(weights, framework="pt") as file:
        iteration = json.loads(file.metadata()["best"])["iteration"]
    best = f"the best of {looks(job.recipe)} looks at the validation images"
    return f"{average} of iteration {iteration}, {best}", [f"the score is {best}: a chosen maximum"]
