"""Shared by the tests of the training engine: a training of a second, what came out of it, and how to kill it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.engine import Context, Outcome
from benchmarks.job import Engine, Job, Recipe
from benchmarks.measure import measure
from results.ledger import Ledger
from runners.execute import Workplace, run_job

DATA = {"train": 40, "validation": 20}


def job(task: str, **changes) -> Job:
    recipe = {
        "iterations": 8,
        "batch_size": 4,
        "warmup_iterations": 2,
        "checkpoint_every": 3,
        "learning_rate": 1e-3,
        "drop_path_rate": 0.3,
        "label_smoothing": 0.1,
    }
    segmentation = task == "segmentation"
    if segmentation:
        recipe["augmentation"] = {
            "resize": [64, 64],
            "ratio_range": [0.5, 2.0],
            "flip": 0.5,
            "photometric_distortion": True,
        }
    else:
        recipe["augmentation"] = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "color_jitter": 0.4}
    settings = {
        "stage": "train",
        "task": task,
        "label": "test_hivit",
        "model": "test_hivit",
        "input_size": (32, 32),
        "num_classes": 11 if segmentation else 10,
        "head": "segformer" if segmentation else None,
        "data": f"digit_scenes_{task}",
        "data_version": 1,
        "data_options": DATA,
        "recipe": Recipe(**recipe),
    }
    return Job(**settings | changes)


def with_engine(job: Job, engine: Engine | None = None, **recipe) -> Job:
    """`job` with another way to run, and other fields of its recipe."""
    changed = recipe if engine is None else {**recipe, "engine": engine}
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, **changed))


# A learning rate and an optimizer with which a wrong scale of the gradients, or a lost one, shows.
SENSITIVE = {"optimizer": "sgd", "learning_rate": 0.03, "clip_gradient_norm": None, "drop_path_rate": 0.0}


def curve(output: Path) -> list[float]:
    """The loss of each step, as mmengine's visualizer wrote it down."""
    (file,) = output.rglob("scalars.json")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def trained(job: Job, output: Path, data_root: Path) -> tuple[list[float], dict[str, torch.Tensor], Outcome]:
    """The losses of the steps, the finished weights, and the outcome."""
    outcome = measure(job, Context(output, data_root))
    return curve(output), load_file(output / outcome.artifacts["weights"]), outcome


def assert_the_same(found, expected):
    losses, weights, _ = found
    assert max(expected[0]) - min(expected[0]) > 0.01  # else nothing would be compared
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


def kill_in_training(job: Job, workplace: Workplace, dice: random.Random) -> list[psutil.Process]:
    """Starts the job in a process of its own and kills it (SIGKILL) at some moment after its first checkpoint.

    Returns the processes that it had started. It is forked, as a new interpreter would take seconds to import PyTorch.
    """
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=run_job, args=(job, workplace))
        process.start()
        while process.exitcode is None and not list(workplace.output.rglob("iter_*.pth")):
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.3))
        children = psutil.Process(process.pid).children(recursive=True) if process.exitcode is None else []
        process.kill()
        process.join()
        if Ledger(workplace.ledger).get(job.key) is None:
            return children
        shutil.rmtree(workplace.output)  # the training was faster than the kill
    raise AssertionError("no training could be caught between its first checkpoint and its end")
