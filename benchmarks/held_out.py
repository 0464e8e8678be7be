"""A trial of a search: a training that is scored, a few times on its way, on training images that it does not see."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from benchmarks.engine import Context, Outcome
from benchmarks.errors import InputError
from benchmarks.job import Job
from benchmarks.validation import Validation

SPLIT_SEED = 0  # the same images for every search, whatever its seeds


def split(job: Job, count: int) -> tuple[list[int], list[int]]:
    """The indices of the `count` training images that a trial trains on, and of those that score it.

    Raises:
        InputError: one of the two parts would be empty.
    """
    share = job.scoring.held_out
    held_out = round(count * share)
    if not 0 < held_out < count:
        raise InputError(f"search.held_out {share} of {count} training images are {held_out}; choose another share")
    order = np.random.default_rng(SPLIT_SEED).permutation(count).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def scored_at(iterations: int, times: int) -> list[int]:
    """The iterations after which a training of `iterations` is scored `times` times (or at each, if it has fewer)."""
    return sorted({-(-iterations * time // times) for time in range(1, times + 1)})


class Scores(Hook):
    """Scores a training on held-out images; its progress carries `scores`, as [iteration, percent], so far.

    The scores are part of every checkpoint. They are computed in float32 by the training's looks at `images`
    (benchmarks.validation), each image once over all processes, and change nothing in the training.
    """

    def __init__(self, job: Job, context: Context, images: Validation):
        self.job = job
        self.context = context
        self.images = images
        self.when = scored_at(job.recipe.iterations, job.scoring.times)
        self.scores: list[list[float]] = []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["scores"] = self.scores

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.scores = checkpoint["scores"]
        self._tell(self.scores[-1][0] if self.scores else 0)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        iteration = batch_idx + 1
        if iteration in self.when:
            score = float(runner.val_loop.run()[self.images.score])
            self.scores.append([iteration, score])
            runner.visualizer.add_scalar(f"held_out_{self.images.score}", score, iteration)
            self._tell(iteration)

    def add_to(self, outcome: Outcome) -> None:
        """Adds the scores to the `outcome` of the training."""
        name = f"held_out_{self.images.score}"
        iterations, scores = zip(*self.scores, strict=True)
        outcome.metrics[name] = scores[-1]
        outcome.samples |= {name: list(scores), "iteration": list(map(float, iterations))}
        outcome.details["held_out_images"] = len(self.images.dataset)

    def _tell(self, iteration: int) -> None:
        text = f"held-out {self.images.score} {self.scores[-1][1]:.1f} %" if self.scores else ""
        fraction = iteration / self.job.recipe.iterations
        self.context.progress({"fraction": fraction, "text": text, "scores": self.scores})
