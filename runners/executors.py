"""Ways to run jobs behind one call: in this process, or in a few more of this machine; as Ray tasks in ray_executor."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Protocol, TypeVar

from benchmarks.cpus import usable_cpus
from benchmarks.errors import WorkerLost
from benchmarks.job import Job
from results.ledger import Ledger
from results.record import Record
from runners.execute import FULL, Workplace, make_record, run_job

RETRIES = 3  # of a job whose worker died, and of one that met a full disk; errors of the job itself are not retried
PAUSE = 2.0  # seconds, after which a full disk is tried again; doubled each time
GIB_PER_WORKER = 1.5  # what a training of the demo's size takes, libraries included

Done = Callable[[Record, Sequence[str]], None]
Tell = Callable[[str], None]
Result = TypeVar("Result")


def workers(free_gib: float) -> int:
    """How many jobs run side by side on this machine: one for each CPU, as far as the memory reaches."""
    return max(1, min(usable_cpus(), int(free_gib / GIB_PER_WORKER)))


class Executor(Protocol):
    """Runs jobs, those that others depend on first, and calls `done` with each record as it comes.

    A job whose worker died, or that met a full disk, is begun again as `Tries` says; `tell` gets a line for the user.

    Raises:
        OSError: the output folder cannot be written, or its disk stayed full.
    """

    slots: int  # jobs side by side

    def run(self, jobs: Sequence[Job], done: Done, tell: Tell = ...) -> None: ...


def tell_nobody(message: str) -> None:
    """What an executor tells, where nobody listens."""


class Tries:
    """How often each job was begun again for what is no fault of its own, and whether it may be once more."""

    def __init__(self, workplace: Workplace, tell: Tell):
        self.workplace = workplace
        self.tell = tell
        self.deaths: Counter[str] = Counter()
        self.full: Counter[str] = Counter()

    def after_death(self, job: Job, error: WorkerLost) -> Record | None:
        """None: the job may go on from its last checkpoint. Else its record: it has been given up."""
        self.deaths[job.key] += 1
        self.workplace.progress(job.key).unlink(missing_ok=True)  # else it would be shown as running
        if self.deaths[job.key] <= RETRIES:
            tries = f"retry {self.deaths[job.key]} of {RETRIES}"
            self.tell(f"{job.title}: its worker died ({error}); going on from its last checkpoint ({tries})")
            return None
        return Ledger(self.workplace.ledger).put(worker_died(job, self.workplace, self.deaths[job.key], error))

    def after_error(self, job: Job, error: OSError) -> float:
        """Seconds after which the job may go on from its last checkpoint. Raises `error` where it is not to."""
        self.full[job.key] += 1
        if error.errno not in FULL or self.full[job.key] > RETRIES:
            raise error
        pause = PAUSE * 2 ** (self.full[job.key] - 1)
        self.tell(f"the disk of {self.workplace.output} is full ({error.strerror}); trying again in {pause:g} s")
        return pause

    def run(self, job: Job, begin: Callable[[], Result]) -> Result:
        """What `begin` returns, which is called again after each pause that a full disk makes."""
        while True:
            try:
                return begin()
            except OSError as error:
                time.sleep(self.after_error(job, error))


def outline(record: Record) -> Record:
    """What a run keeps of a record, so that its memory does not grow with what its jobs measure; the ledger has all."""
    details = {name: record.details[name] for name in ("looked_in", "how_to_get") if name in record.details}
    return dataclasses.replace(record, job={}, metrics={}, samples={}, details=details, notes=[], provenance={})


class Queue:
    """The jobs that are still to run: which are ready, and which never will be."""

    def __init__(self, jobs: Sequence[Job], finished: Mapping[str, Record]):
        self.waiting = {job.key: job for job in jobs}
        self.records = dict(finished)

    def ready(self) -> list[Job]:
        """The jobs whose dependencies are done, in the order given."""
        return [job for job in self.waiting.values() if all(self._done(key) for key in job.depends_on)]

    def hopeless(self) -> list[Record]:
        """Takes out the jobs that depend, through any chain, on one that was not done.

        Returns:
            Their records, which are to be shown and not to be kept in the ledger.
        """
        records = []
        for job in list(self.waiting.values()):  # what depends on others comes after them
            before = [self.records[key] for key in job.depends_on if key in self.records]
            bad = next((record for record in before if record.status != "done"), None)
            if bad is not None:
                del self.waiting[job.key]
                reason = bad.reason if bad.status == "blocked" else f"its {bad.stage} {bad.status}"
                self.records[job.key] = make_record(job, "blocked", reason, details=bad.details)
                records.append(self.records[job.key])
        return records

    def _done(self, key: str) -> bool:
        return key in self.records and self.records[key].status == "done"


class Inline:
    """One job after the other in this process. Never imports ray: for debugging and small machines."""

    slots = 1

    def __init__(self, workplace: Workplace, finished: Mapping[str, Record]):
        self.workplace = workplace
        self.finished = finished

    def run(self, jobs: Sequence[Job], done: Done, tell: Tell = tell_nobody) -> None:
        queue, tries = Queue(jobs, self.finished), Tries(self.workplace, tell)
        while queue.waiting:
            for record in queue.hopeless():
                done(record, [])
            ready = queue.ready()
            if not ready:
                break
            # What has just become possible goes first: a trained model is evaluated before the next is trained.
            job = next((job for job in ready if job.depends_on), ready[0])
            del queue.waiting[job.key]
            record, messages = self._run(job, tries)
            queue.records[job.key] = outline(record)
            done(record, messages)

    def _run(self, job: Job, tries: Tries) -> tuple[Record, list[str]]:
        while True:
            try:
                return tries.run(job, lambda: run_job(job, self.workplace))
            except WorkerLost as error:
                if (given_up := tries.after_death(job, error)) is not None:
                    return given_up, []


def worker_died(job: Job, workplace: Workplace, times: int, error: WorkerLost) -> Record:
    """The record of a job that is given up, with its log where it came to write one."""
    log = f"jobs/{job.key}/log.txt"
    artifacts = {"log": log} if (workplace.output / log).is_file() else {}
    return make_record(job, "failed", f"its worker died {times} times ({error})", artifacts=artifacts)


class Processes:
    """Jobs that need a CPU core for a second and depend on none (counting, above all), in processes of this machine.

    They start in the time that the libraries take to load, once for all of them. Should one be killed, or meet a full
    disk, the jobs that are left run in this process.
    """

    def __init__(self, workplace: Workplace, count: int):
        self.workplace = workplace
        self.slots = count
        # A process that the workers are forks of begins to load now; a fork of this one would have its threads' locks.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["benchmarks.measure", "benchmarks.classification", "benchmarks.segmentation"]
        )
        with silent():  # some libraries complain while they load
            forkserver.ensure_running()

    def run(self, jobs: Sequence[Job], done: Done, tell: Tell = tell_nobody) -> None:
        pool = ProcessPoolExecutor(self.slots, mp_context=self._context, initializer=_start_worker)
        left = {job.key: job for job in jobs}
        try:
            for future in as_completed([pool.submit(run_job, job, self.workplace) for job in jobs]):
                record, messages = future.result()
                del left[record.key]
                done(record, messages)
        except (BrokenProcessPool, OSError) as error:
            if isinstance(error, OSError) and error.errno not in FULL:
                raise
            pool.shutdown(cancel_futures=True)
            Inline(self.workplace, {}).run(list(left.values()), done, tell)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def silent() -> Iterator[None]:
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
