"""Jobs as Ray tasks, on this machine or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.errors import InputError
from benchmarks.job import TRAININGS, Job
from results.ledger import Ledger
from results.record import Record
from runners.config import Cluster
from runners.execute import Workplace, make_record, run_job
from runners.executors import Done, Queue, workers

RETRIES = 3  # of a job whose worker died; errors of the job itself are not retried


class Ray:
    """Jobs as Ray tasks: what wants a machine to itself first, then the longest first.

    A task whose worker died (killed, out of memory, its node lost) is started again by Ray, up to `RETRIES` times, and
    goes on from its last checkpoint. Ray's token authentication stays on, its dashboard off; nothing is reported home.
    """

    def __init__(
        self,
        workplace: Workplace,
        finished: Mapping[str, Record],
        cluster: Cluster,
        needs: Callable[[Job], dict[str, Any]],
        free_gib: float,
    ):
        self.workplace = workplace
        self.finished = finished
        self.cluster = cluster
        self.needs = needs
        self.slots = workers(free_gib)  # jobs side by side, on this machine

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        import ray

        self._connect()
        try:
            widest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
            # mmengine trains on a GPU where there is one: then one of them for each process of a training.
            any_gpu = min(1, int(ray.cluster_resources().get("GPU", 0)))
            task = ray.remote(run_job)
            needs = {job.key: self.needs(job) for job in jobs}
            queue = Queue(
                sorted(jobs, key=lambda job: (not needs[job.key]["alone"], -needs[job.key]["seconds"])), self.finished
            )
            running: dict[Any, Job] = {}
            while queue.waiting or running:
                for record in queue.hopeless():
                    done(record, [])
                ready = queue.ready()
                busy = [needs[job.key]["alone"] for job in running.values()]
                if alone := [job for job in ready if needs[job.key]["alone"]]:
                    # They come first and take every CPU of a node, so that no other job falsifies their timings.
                    ready = alone if all(busy) else []
                elif any(busy):
                    ready = []
                for job in ready:
                    del queue.waiting[job.key]
                    cpus = widest if needs[job.key]["alone"] else min(needs[job.key]["cpus"], widest)
                    options = {"num_cpus": cpus, "max_retries": RETRIES, "retry_exceptions": False, "name": job.title}
                    if job.stage in (*TRAININGS, "evaluate"):
                        options["num_gpus"] = any_gpu * job.recipe.engine.processes
                    running[task.options(**options).remote(job, self.workplace)] = job
                if not running:
                    break
                for reference in ray.wait(list(running), timeout=1.0)[0]:
                    job = running.pop(reference)
                    record, messages = self._collect(job, reference)
                    queue.records[job.key] = record
                    done(record, messages)
        finally:
            ray.shutdown()

    def _collect(self, job: Job, reference: Any) -> tuple[Record, list[str]]:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            reason = (
                f"its worker died {RETRIES + 1} times ({type(error).__name__}): killed, or the machine is out of memory"
            )
            return Ledger(self.workplace.ledger).put(make_record(job, "failed", reason)), []

    def _connect(self) -> None:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # Ray counts these apart, and without an end
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self.cluster is Cluster.auto:
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError as error:
                raise InputError(
                    "cluster=auto: no Ray cluster runs on this machine; start one with 'ray start --head', "
                    "or use cluster=local"
                ) from error
            return
        try:
            # "local" is a cluster of this run's own: without it Ray would join whatever runs on this machine.
            ray.init(
                address="local",
                num_cpus=self.slots,
                include_dashboard=False,
                object_store_memory=100 * 2**20,  # records are small; the default is a third of the memory
                **quiet,
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"Ray cannot start on this machine: {reason}; executor=inline does without") from error
