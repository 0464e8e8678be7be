"""From a job to its outcome: the one place that knows which stage of which task is done by what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch

from benchmarks import cost, speed
from benchmarks.engine import Context, Outcome, forget_runners
from benchmarks.errors import Blocked
from benchmarks.job import Job


def measure(job: Job, context: Context, trained: Mapping[str, str] | None = None) -> Outcome:
    """Does the job.

    Args:
        job: What to measure.
        context: Where to read and write, and whom to tell.
        trained: For an evaluation, the artifacts of the training that it depends on.

    Raises:
        Blocked: what the job needs is not there.
        InputError: the job asks for something impossible (a size that the model cannot take, for instance).
    """
    try:
        if job.stage == "cost":
            return _cost(job)
        if job.stage == "speed":
            return _speed(job)
        with _deterministic(job):
            if job.stage == "train":
                return _task(job).run_train(job, context)
            weights = context.output / (trained or {}).get("weights", "")
            if not weights.is_file():
                raise Blocked(f"the training of {job.label} left no weights", looked_in=str(weights))
            return _task(job).run_evaluate(job, context, weights)
    finally:
        forget_runners()


def _task(job: Job) -> ModuleType:
    from benchmarks import classification, segmentation

    return {"classification": classification, "segmentation": segmentation}[job.task]


def _cost(job: Job) -> Outcome:
    counted = cost.count(_task(job).build_model(job), (3, *job.input_size))
    return Outcome(
        metrics={
            "params": counted.params,
            "params_auxiliary": counted.params_auxiliary,
            "macs": counted.macs,
            "activations": counted.activations,
        },
        details={
            "convention": counted.convention,
            "by_operator": counted.by_operator,
            "by_module": counted.by_module,
            "uncounted": counted.uncounted,
        },
    )


def _speed(job: Job) -> Outcome:
    settings = job.speed
    measured = speed.measure(
        _task(job).build_model(job),
        (3, *job.input_size),
        batch_size=settings.batch_size,
        repeats=settings.repeats,
        warmup=settings.warmup,
        train_step=settings.train_step,
        device=settings.device,
        yardstick=speed.default_yardstick(),
    )
    return Outcome(
        metrics=measured.metrics(), samples=measured.samples, details=measured.details(), notes=list(measured.notes)
    )


@contextmanager
def _deterministic(job: Job) -> Iterator[None]:
    """The process as a training of this recipe needs it: its CPU threads, its seed, denormal numbers as zero.

    Denormal numbers slow a training on a CPU many times over once its gradients become small.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(job.recipe.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(job.seed)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
