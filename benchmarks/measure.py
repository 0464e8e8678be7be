"""From a job to its outcome: the one place that knows which stage of which task is done by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from mmengine.registry import init_default_scope
from torch import nn

from benchmarks import cost
from benchmarks.conventions import CONVENTIONS, paper_convention
from benchmarks.device_lock import alone_on
from benchmarks.distributed import measure_in_processes
from benchmarks.engine import Context, Outcome, forget_runners
from benchmarks.errors import Blocked
from benchmarks.job import Job, SpeedSettings, is_gpu_type
from benchmarks.speed import default_yardstick
from benchmarks.speed import measure as measure_speed
from benchmarks.trace import on_meta

Launch = Callable[[Job, Context, Mapping[str, str]], Outcome]  # measures a job in a group of processes


def measure(
    job: Job, context: Context, trained: Mapping[str, str] | None = None, launch: Launch = measure_in_processes
) -> Outcome:
    """Does the job; a training or an evaluation in as many processes as its recipe says.

    Args:
        job: What to measure.
        context: Where to read and write, and whom to tell.
        trained: The artifacts of the training that the job depends on, where it depends on one.
        launch: Starts the processes of a group, on this machine unless said otherwise.

    Raises:
        Blocked: what the job needs is not there.
        WorkerLost: a process of a group died.
        InputError: the job asks for something impossible (a size that the model cannot take, for instance).
    """
    init_default_scope("mmseg")  # where mmengine looks for what configurations name
    try:
        if job.stage == "cost":
            return _cost(job)
        if job.stage == "speed":
            return _speed(job, context)
        if job.recipe.engine.processes > 1 and not torch.distributed.is_initialized():
            return launch(job, context, trained or {})
        with deterministic(job):
            taken = "best" if job.stage == "evaluate" and job.recipe.evaluate_best else "weights"
            weights = context.output / (trained or {}).get(taken, "")
            if (job.depends_on or job.stage == "evaluate") and not weights.is_file():
                raise Blocked(f"the training that {job.label} starts from left no weights", looked_in=str(weights))
            if job.stage == "evaluate":
                return _task(job).run_evaluate(job, context, weights)
            return _task(job).run_train(job, context, **({"initial": weights} if job.depends_on else {}))
    finally:
        forget_runners()


def _task(job: Job) -> ModuleType:
    from benchmarks import classification, pretraining, segmentation

    if job.stage == "pretrain":
        return pretraining
    return {"classification": classification, "segmentation": segmentation}[job.task]


def _cost(job: Job) -> Outcome:
    model = _build_without_weights(job)
    counted = cost.count(model, (3, *job.input_size))
    metrics = {
        "params": counted.params,
        "params_auxiliary": counted.params_auxiliary,
        "macs": counted.macs,
        "activations": counted.activations,
    }
    details = {
        "convention": counted.convention,
        "by_operator": counted.by_operator,
        "by_module": counted.by_module,
        "uncounted": counted.uncounted,
    }
    details["macs_by_convention"] = {way.name: way.macs(model, counted) for way in CONVENTIONS}
    if (convention := paper_convention(model)) is not None:
        metrics["macs_paper"] = details["macs_by_convention"][convention.name]
        details["paper_convention"] = {"name": convention.name, "text": convention.text}
    return Outcome(metrics=metrics, details=details)


def count_cost(job: Job) -> cost.Cost:
    """The cost of the job's model, whatever the job's stage. Raises InputError for a size that it cannot take."""
    init_default_scope("mmseg")
    return cost.count(_build_without_weights(job), (3, *job.input_size))


def _build_without_weights(job: Job) -> nn.Module:
    try:
        with on_meta():
            return _task(job).build_model(job)
    except (RuntimeError, NotImplementedError):  # it reads values while it is built
        return _task(job).build_model(job)


def _speed(job: Job, context: Context) -> Outcome:
    settings = job.speed
    _check_device(settings)
    model, yardstick = _task(job).build_model(job), default_yardstick()
    waits = {"fraction": 0.0, "text": "another run times on this device; waiting"}
    with alone_on(settings.device, lambda: context.progress(waits)) as no_lock:
        speed = measure_speed(
            model,
            (3, *job.input_size),
            batch_size=settings.batch_size,
            device=settings.device,
            repeats=settings.repeats,
            warmup=settings.warmup,
            max_seconds=settings.max_seconds,
            train_step=settings.train_step,
            yardstick=yardstick,
            threads=settings.threads,
        )
    milli, mega = 1e3, 1e-6
    metrics = {
        "throughput": speed.throughput,
        "peak_memory_mb": speed.peak_memory * mega,
        "yardstick_ms": speed.yardstick_forward.median * milli,
        "ratio_to_yardstick": speed.ratio,
    }
    timings = {"latency_ms": speed.forward}
    if speed.train_step is not None:
        timings["train_step_ms"] = speed.train_step
        metrics |= {
            "train_peak_memory_mb": speed.train_peak_memory * mega,
            "saved_mb": speed.saved_bytes * mega,
            "train_step_ratio_to_yardstick": speed.train_step_ratio,
        }
    for name, timing in timings.items():
        low, high = timing.interval
        metrics |= {name: timing.median * milli, f"{name}_low": low * milli, f"{name}_high": high * milli}
    return Outcome(
        metrics=metrics,
        samples={name: [sample * milli for sample in timing.samples] for name, timing in timings.items()},
        details={
            "batch_size": speed.batch_size,
            "device": speed.device,
            "threads": speed.threads,
            "interval_coverage": speed.forward.coverage,
            "foreign_load": speed.foreign_load,
            "yardstick": "timm convnext_tiny, features only, interleaved with the model",
        },
        notes=[*speed.notes, *([no_lock] if no_lock else [])],
    )


def _check_device(settings: SpeedSettings) -> None:
    """Whether this machine has the GPU that is asked for; of a name that is not there Ray never gets here."""
    if settings.gpu_type is None or not torch.cuda.is_available():
        return  # the measurement says itself that there is no GPU
    if not is_gpu_type(settings.gpu_type, name := torch.cuda.get_device_name(settings.device)):
        raise Blocked(f"speed.gpu_type is {settings.gpu_type}, and this machine has {name}")


@contextmanager
def deterministic(job: Job) -> Iterator[None]:
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
