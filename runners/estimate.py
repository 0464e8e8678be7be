"""What a job will take, before it runs: multiply-accumulates, devices, and a guess of the time.

The guess is as good as its two assumptions, `GPU_MACS_PER_SECOND` and that a group of N is N times as fast: right in
its proportions, by which jobs are put in order, rather than in its height.
"""

from __future__ import annotations

import contextlib
import csv
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import data
from benchmarks.errors import Blocked, InputError
from benchmarks.job import TRAININGS, Job
from results.record import Record
from runners.placement import Needs, Node

GPU_MACS_PER_SECOND = 10e12  # of one GPU in mixed precision: assumed, not measured
CPU_MACS_PER_SECOND = 20e9  # of one core in a training: measured on the demo's models
ASSUMED = (
    "GPU hours: MACs of a forward x 3 in a training (4 with a teacher, 1 in a probe) x images, at "
    f"{GPU_MACS_PER_SECOND / 1e12:.0f} TMAC/s, which is assumed of one GPU in mixed precision, not measured."
)
UNKNOWN_MACS = 1e9  # of a model that cannot be counted
UNKNOWN_IMAGES = 1000  # of a validation split of any size
PUBLISHED = Path(__file__).parent.parent / "results" / "published" / "cost" / "leaderboard_cost.csv"


def known_macs(records: Iterable[Record]) -> dict[str, float]:
    """MACs of one image by `Job.counted_as`: from records, else from the costs that the project has published."""
    macs: dict[str, float] = {}
    if PUBLISHED.is_file():  # not where the packages are installed without the checkout
        with PUBLISHED.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                if row["macs"]:
                    macs |= dict.fromkeys(row["records"].split(), float(row["macs"]))
    return macs | {r.key: r.metrics["macs"] for r in records if r.stage == "cost" and r.status == "done"}


def count_macs(jobs: Iterable[Job], known: Mapping[str, float]) -> dict[str, float]:
    """`known` and what it lacks, counted now: a fraction of a second each. What cannot be counted is left out."""
    macs = dict(known)
    for job in jobs:
        if (key := job.counted_as) not in macs:
            with _quiet():
                from benchmarks.measure import count_cost
                from zoo import ZooError

                try:
                    macs[key] = count_cost(job).macs
                except (InputError, Blocked, ZooError):
                    continue  # its own row will say so, or `runners.plan.check_models`
    return macs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Some libraries complain while they load, and warn of what is never run here."""
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def work(job: Job, macs: float) -> float:
    """Multiply-accumulates of a training or an evaluation, of a model that takes `macs` for one image."""
    recipe = job.recipe
    images = job.data_options.get("validation") or data.describe(job.data).validation_count or UNKNOWN_IMAGES
    if job.stage in TRAININGS:
        forwards = 1 if recipe.linear_probe else 3 + (recipe.distillation_alpha is not None)
        looks = recipe.iterations // recipe.validate_every if recipe.validate_every else 0
        return macs * (forwards * recipe.batch_size * recipe.iterations + looks * images)
    settings = recipe.evaluation
    views = 1 + (2 if settings.get("flip") else 1) * sum(scale**2 for scale in settings.get("scales", ()))
    return macs * views * images


def gpu_hours(job: Job, macs: Mapping[str, float]) -> float:
    """Hours of one GPU at the assumed rate, for all devices of the job together; 0 for what needs none."""
    if job.recipe is None:
        return 0.0
    return work(job, macs.get(job.counted_as, UNKNOWN_MACS)) / GPU_MACS_PER_SECOND / 3600


def needs(job: Job, macs: Mapping[str, float], nodes: Sequence[Node]) -> Needs:
    """What an executor needs to place a job on `nodes`.

    Costs need no device. A speed job has a GPU to itself, or on a CPU all of a node. Trainings and evaluations take
    GPUs where the cluster has any, one or a share of one for each process, else CPU threads.
    """
    if job.stage == "cost":
        return Needs(cpus=1, seconds=1.0)
    if job.stage == "speed":
        seconds, gpu = 2.0 + 2 * job.speed.max_seconds, job.speed.device.startswith("cuda")
        kind = job.speed.gpu_type if gpu else None
        return Needs(gpus=float(gpu), gpu_type=kind, alone=not gpu, first=True, seconds=seconds)
    engine, threads = job.recipe.engine, job.recipe.threads
    gpus = engine.gpu_fraction if engine.gpu_type or any(node.gpus for node in nodes) else 0.0
    rate = GPU_MACS_PER_SECOND * gpus if gpus else CPU_MACS_PER_SECOND * threads
    seconds = 1.0 + work(job, macs.get(job.counted_as, UNKNOWN_MACS)) / (rate * engine.processes)
    return Needs(threads, gpus, engine.processes, engine.gpu_type, seconds=seconds)
