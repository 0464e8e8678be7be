"""A run of jobs that only count, without torch: what the tests of faults kill.

`light_jobs.py OUTPUT JOBS STEPS [SECONDS [CLUSTER]]`: SECONDS is how long the head of its cluster may be out of reach.
"""

from __future__ import annotations

import functools
import json
import os
import random
import secrets
import sys
import time
from pathlib import Path

from benchmarks.job import Job, Recipe
from results.files import write_atomic
from results.ledger import Ledger
from results.record import Record
from runners import execute, ray_executor
from runners.config import Cluster
from runners.execute import Workplace

SECONDS = 0.1  # of a step


def make_jobs(number: int) -> list[Job]:
    shared = {"stage": "evaluate", "task": "classification", "label": "light", "model": "test_mit", "num_classes": 10}
    shared |= {"data": "digit_scenes_classification", "input_size": (32, 32), "recipe": Recipe()}
    return [Job(**shared, seed=seed) for seed in range(number)]


def counted(key: str, output: Path) -> list[tuple[str, int]]:
    """(try, step) of all that was done for a job, in order."""
    lines = (output / "steps" / f"{key}.log").read_text().splitlines()
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def count(job: Job, workplace: Workplace) -> tuple[Record, list[str]]:
    """The real `run_job` with a measurement that counts to its number of steps, and keeps a checkpoint after each.

    Its outcome depends on the seed and on every step. A job of 0 steps counts until the file `end` is there,
    and at least once in each try, so that none goes unseen.
    """

    def measure(job, workplace, ledger, messages, tell, launch):
        steps, this = json.loads(workplace.command), f"{os.getpid()}-{secrets.token_hex(3)}"
        checkpoint = workplace.output / "steps" / f"{job.key}.json"
        step, state = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0.0)
        begun = step
        while step < steps or (not steps and (step == begun or not (workplace.output / "end").exists())):
            with open(checkpoint.with_suffix(".log"), "a") as log:
                log.write(f"{this} {step}\n")
            time.sleep(SECONDS)
            tell({"fraction": 0.5, "text": "counting"})
            state = (31 * state + random.Random(f"{job.seed} {step}").random()) % 1000
            step += 1
            write_atomic(checkpoint, json.dumps([step, state]))
        shared = {"key": job.key, "stage": job.stage, "task": job.task, "model": job.label, "family": "none"}
        metrics = {"iterations": step, "final_loss": state}
        return Record(**shared, status="done", input_size=[32, 32], seed=job.seed, metrics=metrics)

    execute._measure = measure
    return execute.run_job(job, workplace)


def main(output: Path, number: int, steps: int, cluster: Cluster = Cluster.auto) -> int:
    ray_executor.run_job = count  # of this script, which is why Ray sends the function itself
    workplace = Workplace(output, output, str(steps))
    (output / "steps").mkdir(parents=True, exist_ok=True)
    done = {record.key: record for record in Ledger(workplace.ledger).records() if record.done}
    missing = [job for job in make_jobs(number) if job.key not in done]

    def keep(record, messages):
        done[record.key] = record

    tell = functools.partial(print, flush=True)
    try:
        ray_executor.Ray(workplace, dict(done), cluster, {}, 2).run(missing, keep, tell)
    except OSError as error:
        print(f"error: {error}")
        return 1
    return 0 if all(record.done for record in done.values()) else 2


if __name__ == "__main__":
    ray_executor.SECONDS_FOR_HEAD = float(sys.argv[4]) if sys.argv[4:] else ray_executor.SECONDS_FOR_HEAD
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(Cluster, sys.argv[5:])))
