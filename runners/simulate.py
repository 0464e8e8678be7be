"""Suites on a cluster that is not there: `python -m runners.simulate ade20k_segformer imagenet_classification`.

The schedule is that of a run; durations are those of runners.estimate. Prints how long all jobs take together, from the
first start to the last end, beside what no order of the jobs could undercut.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.job import Job
from runners.config import register
from runners.estimate import ASSUMED, count_macs, known_macs, needs
from runners.placement import Node, Timeline, simulate
from runners.plan import make_jobs
from runners.plan_table import duration
from runners.run import CONF


def jobs_of(suites: Sequence[str]) -> list[Job]:
    """The jobs of several suites."""
    register()
    jobs: dict[str, Job] = {}
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        for suite in suites:
            jobs |= {job.key: job for job in make_jobs(OmegaConf.to_object(compose("config", [f"suite={suite}"])))}
    return list(jobs.values())


def in_processes(job: Job, processes: int | None) -> Job:
    """`job` in a group of so many, where it is a training or an evaluation; None: as its recipe says."""
    if processes is None or job.recipe is None:
        return job
    engine = dataclasses.replace(job.recipe.engine, processes=processes)
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, engine=engine))


def simulate_jobs(jobs: Sequence[Job], macs: Mapping[str, float], nodes: Sequence[Node]) -> Timeline:
    """The jobs on `nodes`; `macs` as runners.estimate has them."""
    return simulate(
        {job.key: needs(job, macs, nodes) for job in jobs}, {job.key: job.depends_on for job in jobs}, nodes
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the makespan and its lower bound."""
    parser = argparse.ArgumentParser(prog="python -m runners.simulate", description=__doc__.partition("\n")[0])
    known = sorted(path.stem for path in (CONF / "suite").glob("*.yaml"))
    parser.add_argument("suites", nargs="+", choices=known, metavar="SUITE", help=", ".join(known))
    parser.add_argument("--nodes", type=_positive, default=8)
    parser.add_argument("--gpus", type=_positive, default=8, help="of each node")
    parser.add_argument("--cpus", type=_positive, default=64, help="of each node")
    parser.add_argument("--processes", type=_positive, help="of each training, a GPU each; without: as the recipes say")
    settings = parser.parse_args(arguments)
    nodes = [Node(f"node {number}", settings.cpus, settings.gpus) for number in range(settings.nodes)]
    jobs = [in_processes(job, settings.processes) for job in jobs_of(settings.suites)]
    found = simulate_jobs(jobs, count_macs(jobs, known_macs([])), nodes)
    print(
        f"{len(found.spans)} of {len(jobs)} jobs on {len(nodes)} nodes with {settings.gpus} GPUs each: "
        f"{duration(found.makespan)}; lower bound {duration(found.lower_bound)}; "
        f"{100 * (found.makespan / found.lower_bound - 1):.2f} % above it. {ASSUMED}"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; name at least 1")
    return number


if __name__ == "__main__":
    main()
