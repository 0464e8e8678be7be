"""A thousand small jobs through Ray: `python -m runners.many_jobs [--jobs 1000] [--trials 24] [--slots 2]`.

Each job counts a small network at a size of its own: real jobs, with lock, claim, log and record. Prints what a job
takes beside its own work, beside what Ray Tune takes to start and end a trial that does nothing, on the same machine
in the same minutes; and whether the driver's memory, the ledger and the live view stay as they were.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.job import Job
from results.ledger import Ledger
from results.record import Record
from runners.config import Cluster
from runners.execute import Workplace
from runners.executors import outline
from runners.ray_executor import Ray, connected
from runners.view import View


def small_jobs(number: int) -> list[Job]:
    """Jobs of a fraction of a second, each with another input size."""
    sizes = [(32 + 8 * (n % 32), 32 + 8 * (n // 32)) for n in range(number)]
    shared = {"stage": "cost", "task": "classification", "label": "test_mit", "model": "test_mit", "num_classes": 10}
    return [Job(**shared, input_size=size) for size in sizes]


def run_many(jobs: Sequence[Job], output: Path, slots: int) -> dict[str, float]:
    """Runs them on a Ray cluster of this machine as a session does; returns seconds and mebibytes.

    `overhead`: seconds of a slot per job beside the job's own work, from the first record to the last.
    """
    workplace = Workplace(output, output, "many_jobs")
    output.mkdir(parents=True, exist_ok=True)
    records: dict[str, Record] = {}
    ends: list[float] = []
    figures: dict[str, float] = {}
    process = psutil.Process()
    console = Console(file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115 - lives as long as the process
    view = View(console, jobs, 0, len(jobs), {job.key: 1.0 for job in jobs}, slots, output / "progress")
    work = 0.0

    def done(record: Record, messages: Sequence[str]) -> None:
        nonlocal work
        assert record.done, record.reason
        view.finished(record.key)
        records[record.key] = outline(record)
        ends.append(time.monotonic())
        if len(ends) > slots:  # the first ones of each worker were begun before the clock
            work += record.provenance["seconds"]
        if len(ends) in (len(jobs) // 10, len(jobs)):
            figures[f"memory after {len(ends)}"] = process.memory_info().rss / 2**20

    with view:
        Ray(workplace, {}, Cluster.local, {}, slots).run(jobs, done)
    counted = len(ends) - slots
    figures["wall"] = ends[-1] - ends[slots - 1]
    figures["work"] = work / counted
    figures["overhead"] = figures["wall"] * slots / counted - figures["work"]
    started = time.monotonic()
    assert len(Ledger(workplace.ledger).records()) == len(jobs)
    figures["reading the ledger"] = time.monotonic() - started
    view.left = set(view.jobs)
    started = time.monotonic()
    view.render()
    figures["a picture of the live view"] = time.monotonic() - started
    return figures


def tune_overhead(trials: int, slots: int, folder: Path) -> float:
    """Seconds of a slot that Ray Tune takes for a trial that does nothing, beyond what the first four take."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=24, help="of Ray Tune, more than 4; 0: none")
    parser.add_argument("--slots", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        jobs = small_jobs(arguments.jobs)
        for job in jobs:
            assert job.key
        print(f"{len(jobs)} jobs and their keys: {time.monotonic() - started:.2f} s", flush=True)
        for name, value in run_many(jobs, Path(folder) / "run", arguments.slots).items():
            print(f"{name}: {value:.1f} MiB" if name.startswith("memory") else f"{name}: {value:.3f} s", flush=True)
        if arguments.trials:
            print(f"Ray Tune, a trial: {tune_overhead(arguments.trials, arguments.slots, Path(folder)):.3f} s")


if __name__ == "__main__":
    main()
