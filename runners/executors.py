"""Ways to run jobs behind one call: in this process, in a few more of this machine, or as Ray tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any, Protocol

from benchmarks.errors import InputError
from benchmarks.job import TRAININGS, Job
from results.record import Record
from runners.config import Cluster
from runners.execute import Workplace, make_record, run_job
from runners.machine import usable_cpus

RETRIES = 3  # of a job whose worker died; errors of the job itself are not retried
GIB_PER_WORKER = 1.5  # what a training of the demo's size takes, libraries included

Done = Callable[[Record, Sequence[str]], None]


def workers(free_gib: float) -> int:
    """How many jobs run side by side on this machine: one for each CPU, as far as the memory reaches."""
    return max(1, min(usable_cpus(), int(free_gib / GIB_PER_WORKER)))


class Executor(Protocol):
    """Runs jobs, those that others depend on first, and calls `done` with each record as it comes."""

    slots: int  # jobs side by side

    def run(self, jobs: Sequence[Job], done: Done) -> None: ...


class Queue:
    """The jobs that are still to run: which are ready, and which never will be."""

    def __init__(self, jobs: Sequence[Job], finished: Mapping[str, Record]):
        self.waiting = {job.key: job for job in jobs}
        self.records = dict(finished)

    def ready(self) -> list[Job]:
        """The jobs whose dependencies are done, in the order given."""
        return [job for job in self.waiting.values() if all(self._done(key) for key in job.depends_on)]

    def hopeless(self) -> list[Record]:
        """Takes out the jobs that depend on one that was not done; returns their records, to be shown and not kept."""
        records = []
        for job in list(self.waiting.values()):
            for key in job.depends_on:
                before = self.records.get(key)
                if before is not None and before.status != "done":
                    del self.waiting[job.key]
                    reason = before.reason if before.status == "blocked" else f"its {before.stage} {before.status}"
                    records.append(make_record(job, "blocked", reason, details=before.details))
        return records

    def _done(self, key: str) -> bool:
        return key in self.records and self.records[key].status == "done"


class Inline:
    """One job after the other in this process. Never imports ray: for debugging and small machines."""

    slots = 1

    def __init__(self, workplace: Workplace, finished: Mapping[str, Record]):
        self.workplace = workplace
        self.finished = finished

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        queue = Queue(jobs, self.finished)
        while queue.waiting:
            for record in queue.hopeless():
                done(record, [])
            ready = queue.ready()
            if not ready:
                break
            # What has just become possible goes first: a trained model is evaluated before the next is trained.
            job = next((job for job in ready if job.depends_on), ready[0])
            del queue.waiting[job.key]
            record, messages = run_job(job, self.workplace)
            queue.records[job.key] = record
            done(record, messages)


class Processes:
    """Jobs that need a CPU core for a second and depend on none (counting, above all), in processes of this machine.

    They start in the time that the libraries take to load, once for all of them. Should one be killed, the jobs that
    are left run in this process.
    """

    def __init__(self, workplace: Workplace, count: int):
        self.workplace = workplace
        self.slots = count
        # A process that the workers are forks of begins to load now; a fork of this one would have its threads' locks.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["benchmarks.measure", "benchmarks.classification", "benchmarks.segmentation"]
        )
        with _silent():  # some libraries complain while they load
            forkserver.ensure_running()

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        pool = ProcessPoolExecutor(self.slots, mp_context=self._context, initializer=_start_worker)
        left = {job.key: job for job in jobs}
        try:
            for future in as_completed([pool.submit(run_job, job, self.workplace) for job in jobs]):
                record, messages = future.result()
                del left[record.key]
                done(record, messages)
        except BrokenProcessPool:
            Inline(self.workplace, {}).run(list(left.values()), done)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _silent() -> Iterator[None]:
    """What is started inside prints nothing: its standard output and error go nowhere."""
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream, _ in kept:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _start_worker() -> None:
    import torch

    from benchmarks.distributed import end_with_parent

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends the pool
    end_with_parent()  # it would wait for its next job for ever


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
            from results.ledger import Ledger

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
