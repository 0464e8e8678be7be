"""One job on several nodes of a Ray cluster: each node's processes join one process group over the network."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from benchmarks.distributed import Part, measure_in_processes
from benchmarks.engine import Context, Outcome
from benchmarks.errors import WorkerLost
from benchmarks.job import Job
from results.record import Record
from runners.execute import Workplace, run_job
from runners.placement import Placement

SECONDS_TO_END = 30.0  # for the other nodes, once the first process has its outcome


def run_job_on_nodes(job: Job, workplace: Workplace, placement: Placement) -> tuple[Record, list[str]]:
    """`run_job` within the first bundle of a placement group: the processes of all nodes are started from here."""
    return run_job(job, workplace, launch=functools.partial(_measure_on_nodes, placement, workplace))


def _measure_on_nodes(
    placement: Placement, workplace: Workplace, job: Job, context: Context, trained: Mapping[str, str]
) -> Outcome:
    group = ray.util.get_current_placement_group()
    rendezvous = f"tcp://{ray.util.get_node_ip_address()}:{_free_port()}"
    others, first = [], placement[0].processes
    for bundle, share in enumerate(placement[1:], start=1):
        task = ray.remote(_work_on_node).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            name=f"{job.title}, processes {first} to {first + share.processes - 1}",
            max_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        )
        part = Part(first, share.processes, rendezvous)
        others.append(task.remote(part, job, workplace, dict(trained)))
        first += share.processes

    def look_after_others() -> None:
        ended, _ = ray.wait(others, num_returns=len(others), timeout=0)
        for reference in ended:
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise WorkerLost(f"a node of its group was lost ({type(error).__name__})") from None

    try:
        part = Part(0, placement[0].processes, rendezvous)
        outcome = measure_in_processes(job, context, trained, part, look_after_others)
        ray.wait(others, num_returns=len(others), timeout=SECONDS_TO_END)
        return outcome
    finally:
        for reference in others:
            ray.cancel(reference, force=True)


def _work_on_node(part: Part, job: Job, workplace: Workplace, trained: Mapping[str, str]) -> None:
    workplace.check()
    measure_in_processes(job, Context(workplace.output, workplace.data_root), trained, part)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]
