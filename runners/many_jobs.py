"""A thousand small jobs through Ray, as a run does them: `python -m runners.many_jobs [--jobs 1000] [--trials 24]`.

Each job is a training of one step, with its lock, claim, log, weights and record. Prints what a job takes beside its
own work, and what Ray Tune takes to start and end a trial that does nothing, on the same machine in the same minutes;
what the driver's memory does meanwhile; and how long the plan of as many jobs takes (the whole command), the ledger
to be read, and the live view to be drawn. Exit status 1, with a line for each, where that is more than it may be.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.job import Job
from results.ledger import Ledger
from results.record import Record
from runners.config import Cluster, Config, register
from runners.executors import Done, Executor, Tell, workers
from runners.machine import free_gib
from runners.ray_executor import connected
from runners.run import CONF
from runners.session import COMPLETE, Session
from runners.view import View

PLAN, READING, PICTURE = "the plan, CPU seconds", "reading the ledger, seconds", "a picture of the live view, seconds"
OVERHEAD, TRIAL = "overhead of a job, seconds", "a trial of Ray Tune, seconds"
MEMORY = "memory of the driver, MiB"
GROWTH = f"growth of the {MEMORY}, from a tenth of the jobs to the last"
LIMITS = {PLAN: 2.0, READING: 5.0, PICTURE: 0.1, GROWTH: 20.0, OVERHEAD: 1.0}
PLANNED = 40  # jobs of the planned suite, of each seed


def configuration(jobs: int, folder: Path) -> Config:
    """A suite of so many trainings of a step, each with a seed of its own."""
    recipe = {"iterations": 1, "warmup_iterations": 0, "batch_size": 2, "checkpoint_every": 1000, "threads": 1}
    settings = ["suite=demo", "models=[test_mit]", "stages=[train]", f"seeds=[{','.join(map(str, range(jobs)))}]"]
    settings += [f"output={folder / 'run'}", f"data_root={folder / 'data'}"]
    settings += [f"suite.benchmarks.classification.recipe.{name}={value}" for name, value in recipe.items()]
    settings.append("suite.benchmarks.classification.input_size=[32,32]")
    settings.append("+suite.benchmarks.classification.data_options={train:10,validation:10}")
    settings.append("suite.benchmarks.segmentation.stages=[cost]")
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return OmegaConf.to_object(compose("config", settings))


@dataclass
class _Told:
    """An executor that also tells another of each record."""

    executor: Executor
    ended: Callable[[Record], None]

    @property
    def slots(self) -> int:
        return self.executor.slots

    def run(self, jobs: Sequence[Job], done: Done, tell: Tell) -> None:
        def both(record: Record, messages: Sequence[str]) -> None:
            done(record, messages)
            self.ended(record)

        self.executor.run(jobs, both, tell)


class _Watched(Session):
    """A session, and what each job took of its time and memory."""

    def __init__(self, config: Config, console: Console):
        super().__init__(config, "many_jobs", console, time.monotonic())
        self.slots = workers(free_gib())
        self.ends: list[float] = []
        self.work: list[float] = []
        self.memory: list[float] = []

    def _slots(self, free: float) -> int:
        return self.slots

    def _execute(self, executor: Executor, jobs: Sequence[Job]) -> None:
        super()._execute(_Told(executor, self._ended), jobs)

    def _ended(self, record: Record) -> None:
        assert record.done, record.reason
        self.ends.append(time.monotonic())
        self.work.append(record.provenance["seconds"])
        self.memory.append(psutil.Process().memory_info().rss / 2**20)


def run_many(config: Config) -> dict[str, float]:
    """Runs a suite of trainings on a Ray of this machine; returns what it took.

    The overhead is what a slot takes per job beside the job's own work, from the first record to the last.
    """
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, force_terminal=True)
        session = _Watched(config, console)
        assert session.run() == COMPLETE
        jobs, slots = session.jobs, session.slots
        counted = len(jobs) - slots  # the first one of each worker was begun before the clock
        wall, work = session.ends[-1] - session.ends[slots - 1], sum(session.work[slots:])
        tenth = len(jobs) // 10
        figures = {
            "the run, seconds": wall,
            "a job's own work, seconds": work / counted,
            OVERHEAD: (wall * slots - work) / counted,
            f"{MEMORY}, after {tenth} jobs": session.memory[tenth - 1],
            f"{MEMORY}, after {len(jobs)} jobs": session.memory[-1],
            GROWTH: session.memory[-1] - session.memory[tenth - 1],
        }
        workplace = session.workplace
        figures[READING] = _seconds(lambda: Ledger(workplace.ledger).records())
        for job in jobs[:slots]:
            workplace.progress(job.key).write_text(json.dumps({"fraction": 0.5, "text": "loss 1.0"}))
        seconds = {job.key: 1.0 for job in jobs}
        view = View(console, jobs, 0, len(jobs), seconds, slots, workplace.output / "progress")
        figures[PICTURE] = _seconds(lambda: console.print(view.render()))
    return figures


def _seconds(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def plan_seconds(jobs: int, folder: Path) -> float:
    """CPU seconds of the whole command that plans so many jobs of a suite of the project."""

    def taken() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    command = [sys.executable, str(CONF.parent / "run.py"), "suite=ade20k_segformer", "stages=[train,evaluate]"]
    before = taken()
    printed = subprocess.run(
        [*command, f"seeds=[{','.join(map(str, range(jobs // PLANNED)))}]", "plan=true", f"output={folder / 'plan'}"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    planned = jobs // PLANNED * PLANNED
    assert f"To do: {planned} of {planned} jobs" in printed
    return taken() - before


def tune_overhead(trials: int, slots: int, folder: Path) -> float:
    """Seconds of a slot that Ray Tune takes for a trial that does nothing, beyond what the first four take."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables are of no interest here
    from ray import tune

    def trial(config: dict) -> None:
        tune.report({"score": config["number"]})

    def seconds(number: int) -> float:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"number": tune.grid_search(list(range(number)))},
            run_config=tune.RunConfig(storage_path=str(folder), name=f"tune{number}", verbose=0),
        )
        started = time.monotonic()
        assert not tuner.fit().errors
        return time.monotonic() - started

    with connected(Cluster.local, slots):
        few = seconds(4)
        return (seconds(trials) - few) / (trials - 4) * slots


def broken(figures: Mapping[str, float]) -> list[str]:
    """One line for each figure that is more than it may be. A job may take what a trial of Tune does, if that ran."""
    limits = LIMITS | {OVERHEAD: figures.get(TRIAL, LIMITS[OVERHEAD])}
    return [
        f"{name}: {figures[name]:.3f}, and it may be {limit:.3f}"
        for name, limit in limits.items()
        if not figures[name] < limit
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; returns 0, or 1 where one is more than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000, help=f"at least {PLANNED}")
    parser.add_argument("--trials", type=int, default=24, help="of Ray Tune, more than 4; 0: none")
    settings = parser.parse_args(arguments)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{settings.jobs} jobs", flush=True)
        figures[PLAN] = plan_seconds(settings.jobs, folder)
        figures |= run_many(configuration(settings.jobs, folder))
        if settings.trials:
            figures[TRIAL] = tune_overhead(settings.trials, workers(free_gib()), folder)
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    for line in (told := broken(figures)):
        print(f"too much: {line}", file=sys.stderr)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
