"""What the training loop costs beside the training itself: `python -m benchmarks.loop_overhead`.

A training runs through the engine (seeded data, mmengine's Runner with all hooks, logs and curves). After each of its
steps, so that a drift of the machine meets all alike, a bare PyTorch loop makes a step of a copy of the model: once
with images that a plain DataLoader loads, in the same order, and once with a batch that is in memory. Images are
loaded in the same process. Checkpoints are not written: how often they are is a recipe's choice.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler, pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader, default_collate

from benchmarks import classification, data, segmentation
from benchmarks.engine import Context, forget_runners, training_runner
from benchmarks.job import Job, Recipe
from benchmarks.measure import deterministic
from benchmarks.optimizer import build_optimizer
from benchmarks.speed import hardware

WARMUP = 6  # steps before the clock counts: they allocate memory, and the first line of the log loads TensorBoard
EXAMPLES = (("classification", "hivit_tiny"), ("segmentation", "mit_b0"))  # (task, model)


def example(task: str, model: str, threads: int) -> Job:
    """A training of the demo's size."""
    return Job(
        stage="train",
        task=task,
        label=model,
        model=model,
        input_size=(48, 48) if task == "classification" else (64, 64),
        num_classes=data.describe(f"digit_scenes_{task}").num_classes,
        head="segformer" if task == "segmentation" else None,
        data=f"digit_scenes_{task}",
        recipe=Recipe(
            iterations=100,
            batch_size=16 if task == "classification" else 8,
            warmup_iterations=10,
            clip_gradient_norm=5.0,
            checkpoint_every=10**9,
            threads=threads,
        ),
    )


def bare_loop(job: Job, model: torch.nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """A loop that does nothing but train: one step for each `next`."""
    model.train()
    optimizer = build_optimizer(job, model)
    parameters = list(model.parameters())
    for batch in batches:
        inputs = model.data_preprocessor(batch, True)
        losses = model(**inputs, mode="loss") if isinstance(inputs, dict) else model(*inputs, mode="loss")
        sum(value for name, value in losses.items() if "loss" in name).backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.recipe.clip_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield


class _Interleaved(Hook):
    """Times each of the engine's steps, then one of each other loop."""

    priority = "LOWEST"  # after all that the engine does in a step

    def __init__(self, steps: int, others: dict[str, Iterator[None]]):
        self.steps = steps
        self.others = others
        self.seconds: dict[str, list[float]] = {"engine": [], **{name: [] for name in others}}
        self.start = time.perf_counter()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._tick("engine")
        for name, loop in self.others.items():
            next(loop)
            self._tick(name)
        runner.train_loop.stop_training = batch_idx + 1 == self.steps

    def _tick(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name].append(now - self.start)
        self.start = time.perf_counter()


def compare(job: Job, root: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of each step of the loops `engine`, `loader` and `memory`; the data are made below `root`."""
    init_default_scope("mmseg")
    segments = job.task == "segmentation"
    collate = pseudo_collate if segments else default_collate
    folder = data.prepare(job.data, root, job.data_options, report=lambda message: None)
    if segments:
        dataset = segmentation.training_data(job, folder)
    else:
        dataset = classification.build_dataset(job, folder, training=True)

    def build() -> torch.nn.Module:
        torch.manual_seed(job.seed)
        if segments:
            return segmentation.build_model(job)
        return classification.Classifier(classification.build_model(job), job.recipe)

    order = InfiniteSampler(dataset, seed=job.seed)
    loader = DataLoader(dataset, job.recipe.batch_size, sampler=order, collate_fn=collate)
    loops = {
        "loader": bare_loop(job, build(), loader),
        "memory": bare_loop(job, build(), itertools.repeat(collate([dataset[i] for i in range(loader.batch_size)]))),
    }
    clock = _Interleaved(WARMUP + steps, loops)
    with (
        deterministic(job),
        tempfile.TemporaryDirectory() as output,
        open(Path(output) / "log.txt", "w") as log,  # as a suite does
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            training_runner(job, Context(Path(output), root), build(), dataset, collate, [clock]).train()
        finally:
            forget_runners()
    return {name: seconds[WARMUP:] for name, seconds in clock.seconds.items()}


def overhead(engine: Sequence[float], bare: Sequence[float]) -> float:
    """How much longer the engine's steps take, in percent: the median over steps that were made one after the other."""
    return 100 * (statistics.median(ours / theirs for ours, theirs in zip(engine, bare, strict=True)) - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a row per training: medians of the steps, and how much longer the engine's take."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    rows: list[tuple[str, Callable[[dict[str, list[float]]], str]]] = [
        ("batch in memory, ms", lambda seconds: f"{1e3 * statistics.median(seconds['memory']):.1f}"),
        ("DataLoader, ms", lambda seconds: f"{1e3 * statistics.median(seconds['loader']):.1f}"),
        ("engine, ms", lambda seconds: f"{1e3 * statistics.median(seconds['engine']):.1f}"),
        ("engine over DataLoader", lambda seconds: f"{overhead(seconds['engine'], seconds['loader']):+.1f} %"),
        ("engine over memory", lambda seconds: f"{overhead(seconds['engine'], seconds['memory']):+.1f} %"),
    ]
    print(f"{hardware()['name']}, {options.threads} CPU threads, {options.steps} steps of each loop, medians\n")
    print(f"| training | {' | '.join(name for name, _ in rows)} |")
    print(f"|---|{'---|' * len(rows)}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for task, model in EXAMPLES:
            seconds = compare(example(task, model, options.threads), Path(root), options.steps)
            print(f"| {model} ({task}) | {' | '.join(cell(seconds) for _, cell in rows)} |", flush=True)


if __name__ == "__main__":
    main()
