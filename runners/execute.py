"""One job, from its lock to its record. All executors call `run_job`; it never raises for what a job does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from benchmarks.errors import Blocked, InputError, WorkerLost
from benchmarks.job import SEARCH, TRAININGS, Job
from results.files import write_atomic
from results.ledger import Ledger
from results.record import Record
from runners.provenance import provenance

if TYPE_CHECKING:
    from benchmarks.measure import Launch


@dataclass(frozen=True)
class Workplace:
    """Where the jobs of a run read and write; travels to the workers."""

    output: Path
    data_root: Path
    command: str

    @property
    def ledger(self) -> Path:
        return self.output / "ledger"

    def progress(self, key: str) -> Path:
        """The file in which a running job says how far it is."""
        return self.output / "progress" / f"{key}.json"


def run_job(
    job: Job,
    workplace: Workplace,
    watch: Callable[[dict[str, Any]], None] | None = None,
    launch: Launch | None = None,
) -> tuple[Record, list[str]]:
    """Runs a job that the ledger does not have yet, and writes its record.

    A lock per job lets two runs of one suite share an output folder: the second waits, then finds the first one's
    record. The lock is the operating system's and ends with the process, however that ends.

    Args:
        job: What to do.
        workplace: Where to read and write.
        watch: Called with all that the job says of its progress; what it raises ends the job.
        launch: Starts the processes of a group; None: on this machine.

    Returns:
        The record, and one line for each thing that the user should know (damaged files and the like).

    Raises:
        WorkerLost: a process of the job's group died; there is no record, and the job may be begun again.
        OSError: the output folder cannot be written.
    """
    messages: list[str] = []
    ledger = Ledger(workplace.ledger, messages.append)
    tell = _Progress(workplace.progress(job.key), watch)
    locks = workplace.output / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{job.key}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell({"fraction": 0.0, "text": "another run is at it; waiting"}, force=True)
            lock.acquire()
        record = ledger.get(job.key)
        if record is not None and record.done and not weights_are_there(record, workplace.output):
            ledger.retire(job.key, "its weights are missing or damaged")
            record = None
        if record is None or not record.done:
            tell({"fraction": 0.0, "text": "starting"}, force=True)
            record = _measure(job, workplace, ledger, messages, tell, launch)
            ledger.put(record)
            if record.done and job.stage in TRAININGS:
                _discard_checkpoints(workplace.output / "jobs" / job.key)  # not before the ledger knows the weights
        return record, messages
    finally:
        tell.end()
        lock.release()


def _measure(
    job: Job, workplace: Workplace, ledger: Ledger, messages: list[str], tell: _Progress, launch: Launch | None
) -> Record:
    from benchmarks.engine import Context
    from benchmarks.measure import measure

    context = Context(workplace.output, workplace.data_root, progress=tell, report=messages.append)
    log = context.folder(job.key) / "log.txt"
    started, clock = datetime.now(UTC), time.monotonic()
    trained = ledger.get(job.depends_on[0]) if job.depends_on else None
    with _into(log):
        try:
            artifacts = {} if trained is None else trained.artifacts
            outcome = measure(job, context, artifacts, **({} if launch is None else {"launch": launch}))
            status, reason = "done", None
        except WorkerLost:
            traceback.print_exc()
            raise
        except Exception as error:
            traceback.print_exc()
            outcome = None
            status, reason = ("blocked" if isinstance(error, Blocked) else "failed"), explain(error, job)
            details = _details(error, job)
            if job.stage == SEARCH and isinstance(error, FloatingPointError):
                status, details = "stopped", {"diverged": True}  # a finding about the recipe, and not to be tried again
    return make_record(
        job,
        status,
        reason,
        metrics=outcome.metrics if outcome else {},
        samples=outcome.samples if outcome else {},
        details=outcome.details if outcome else details,
        artifacts=(outcome.artifacts if outcome else {}) | {"log": f"jobs/{job.key}/log.txt"},
        notes=outcome.notes if outcome else [],
        provenance=provenance(workplace.command, started.isoformat(timespec="seconds"), time.monotonic() - clock),
    )


def _discard_checkpoints(folder: Path) -> None:
    from benchmarks.checkpoints import discard  # PyTorch: not before it is needed

    discard(folder)


def weights_are_there(record: Record, output: Path) -> bool:
    """Whether a finished training still has the files that its record speaks of; true for all other jobs."""
    if record.stage not in TRAININGS:
        return True
    digests = {"weights": record.details["weights_sha256"]}
    if "best" in record.details:
        digests["best"] = record.details["best"]["weights_sha256"]
    return all(_is_whole(output / record.artifacts[name], digest) for name, digest in digests.items())


def _is_whole(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def make_record(job: Job, status: str, reason: str | None, **measured: Any) -> Record:
    """The ledger's record of a job."""
    import zoo

    return Record(
        key=job.key,
        status=status,
        reason=reason,
        stage=job.stage,
        task=job.task,
        model=job.label,
        family=zoo.family(job.model),
        head=job.head,
        data=f"{job.data}@{job.data_version}" if job.data else None,
        input_size=list(job.input_size),
        precision=job.precision,
        seed=job.seed,
        job=job.content(),
        **{"metrics": {}, "samples": {}, "details": {}, "artifacts": {}, "notes": [], "provenance": {}, **measured},
    )


def explain(error: BaseException, job: Job | None = None) -> str:
    """One line for a person: what an error means, without its traceback; of too little memory, also what for."""
    text = str(error)
    if "Original Traceback" in text:  # of a data-loading process: the last line is the error
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split()) or type(error).__name__
    if _out_of_memory(error):
        asked = re.search(r"tried to allocate (\d[\d.]* ?\w+)", text, re.IGNORECASE)
        what = f"{asked[1]} could not be had" if asked else text[:200]
        less = (
            "raise recipe.engine.accumulate" if job is not None and job.stage in TRAININGS else "lower the batch size"
        )
        size = f" for {_size(job)}" if job is not None else ""
        return f"out of memory{size}: {what}; {less}, lower the input size, or free memory"
    if isinstance(error, Blocked | InputError | WorkerLost | FloatingPointError):
        return text
    return f"{type(error).__name__}: {text[:300]}"


def _out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the machine or of its GPU; PyTorch says so in several ways."""
    text = "" if isinstance(error, WorkerLost) else str(error).lower()  # why it died is not known
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
    )


def _images(job: Job) -> int:
    """How many images a forward of the job takes at once."""
    if job.stage == "speed":
        return job.speed.batch_size
    if job.stage == "cost" or (job.stage == "evaluate" and job.task == "segmentation"):
        return 1
    return job.recipe.images_per_forward


def _size(job: Job) -> str:
    images, (height, width) = _images(job), job.input_size
    return f"{images} image{'s' if images > 1 else ''} of {height}x{width}"


def _details(error: BaseException, job: Job) -> dict[str, Any]:
    """What a record tells about an error, beside the line."""
    if isinstance(error, Blocked):
        return {"looked_in": error.looked_in, "how_to_get": error.how_to_get}
    if _out_of_memory(error):
        return {"out_of_memory": {"images": _images(job), "input_size": list(job.input_size)}}
    return {}


class _Progress:
    """Writes a job's progress to a file, at most once a second."""

    def __init__(self, path: Path, watch: Callable[[dict[str, Any]], None] | None = None):
        self.path = path
        self.last = 0.0
        self.watch = watch

    def __call__(self, state: dict[str, Any], force: bool = False) -> None:
        if self.watch is not None:
            self.watch(state)
        now = time.monotonic()
        if force or now - self.last >= 1.0:
            self.last = now
            write_atomic(self.path, json.dumps(state).encode())

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _into(log: Path):
    """Sends all that a job prints, warns of or logs into its log file."""
    with (
        open(log, "a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield
