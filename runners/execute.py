"""One job, from its lock to its record. All executors call `run_job`; it never raises for what a job does."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import time
import traceback
from collections.abc import Callable
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

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NEARLY_FULL = 4 * 2**30  # bytes that may be free on a full disk: a checkpoint that did not fit was removed again
NOT_SHARED = errno.ENODEV  # of an output folder; no file system says that
SECONDS_TO_SEE = 30.0  # in which what one machine writes to a shared folder is there on all others
SHARED_MEMORY = ("/torch_", "/dev/shm")  # in the names of what PyTorch keeps there


class Superseded(Exception):
    """Another worker has taken the job over: what this one does counts no more."""


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Where the jobs of a run read and write; travels to the workers."""

    output: Path
    data_root: Path
    command: str
    mark: str | None = None  # what a file of the output folder says, on each machine that shares it; None: not checked

    def marked(self) -> Workplace:
        """The same with its folder made and marked, for workers to know it by. Raises OSError: it cannot be written."""
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._mark.with_suffix(".lock")):  # another run may begin here, too
            if not self._mark.exists():
                write_atomic(self._mark, secrets.token_hex(8))
        return dataclasses.replace(self, mark=self._mark.read_text())

    def check(self) -> None:
        """Raises OSError where the output folder is another one than that of who began the run, or is not there."""
        if self.mark is None:
            return
        end = time.monotonic() + SECONDS_TO_SEE
        while True:
            with contextlib.suppress(FileNotFoundError):
                if self._mark.read_text() == self.mark:
                    return
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        reason = f"the machine {platform.node()} does not see this folder; mount the same folder on all machines"
        raise OSError(NOT_SHARED, reason, str(self.output))

    @property
    def _mark(self) -> Path:
        return self.output / "locks" / "output.id"

    @property
    def ledger(self) -> Path:
        return self.output / "ledger"

    def progress(self, key: str) -> Path:
        """The file in which a running job says how far it is."""
        return self.output / "progress" / f"{key}.json"

    def claim(self, key: str) -> Path:
        """The file in which a worker says that a job is its own."""
        return self.output / "locks" / f"{key}.claim"


def run_job(
    job: Job,
    workplace: Workplace,
    watch: Callable[[dict[str, Any]], None] | None = None,
    launch: Launch | None = None,
    finished: Callable[[Record], bool] = lambda record: record.done,
) -> tuple[Record, list[str]]:
    """Runs a job that the ledger does not have yet, and writes its record.

    A lock per job lets two runs of one suite share an output folder: the second waits, then finds the first one's
    record. The lock is the operating system's and ends with the process, however that ends. Where locks do not reach,
    `_Claim` keeps a worker that was given up from writing over what its successor does.

    Args:
        job: What to do.
        workplace: Where to read and write.
        watch: Called with all that the job says of its progress; what it raises ends the job.
        launch: Starts the processes of a group; None: on this machine.
        finished: Whether a job with this record is not to be run again.

    Returns:
        The record, and one line for each thing that the user should know (damaged files and the like).

    Raises:
        WorkerLost: a process of the job's group died; there is no record, and the job may be begun again.
        OSError: the output folder cannot be written. A full disk is no error of the job, which goes on from its last
            checkpoint once there is space. Nor is a folder that this machine does not share with who began the run.
    """
    workplace.check()  # else results would be written where nobody finds them
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
        if record is None or not finished(record):
            tell.claim = _Claim(workplace.claim(job.key))
            tell({"fraction": 0.0, "text": "starting"}, force=True)
            record = _measure(job, workplace, ledger, messages, tell, launch)
            tell.claim.check()
            record = ledger.put(record)
        if tell.claim is None or tell.claim.holds():
            discard_checkpoints(record, workplace.output)  # not before the ledger knows the weights
        if tell.claim is not None:
            tell.claim.end()
        return record, messages
    except Superseded as error:
        record = ledger.get(job.key)
        if record is None or not finished(record):
            record = make_record(job, "failed", str(error))  # not kept: the other worker's record will stand
        return record, messages
    except OSError as error:
        if error.errno in FULL and not error.filename:
            raise OSError(error.errno, error.strerror, str(workplace.output)) from error
        raise
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
        except Superseded:
            raise
        except WorkerLost:
            traceback.print_exc()
            raise
        except Exception as error:
            if (number := _disk_full(error, workplace.output)) is not None:
                raise OSError(number, os.strerror(number), str(workplace.output)) from error
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


def discard_checkpoints(record: Record, output: Path) -> None:
    """Removes what is left of a finished training's checkpoints; a kill may have come between its record and this."""
    folder = output / "jobs" / record.key
    if record.done and record.stage in TRAININGS and any(folder.glob("iter_*")):
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


def _disk_full(error: BaseException | None, output: Path) -> int | None:
    """The operating system's number for a disk or a quota that is full, if `output` is on it and it is behind `error`.

    Other things fill up as well, and say the same: the shared memory of data-loading processes, a folder of temporary
    files. These are errors of the job.
    """
    while error is not None:
        text, number = str(error), None
        if isinstance(error, OSError) and error.errno in FULL:
            number = error.errno
        # Libraries that write for themselves keep the text only: safetensors, torch.save, TensorBoard.
        elif "No space left on device" in text:
            number = errno.ENOSPC
        elif "Disk quota exceeded" in text:
            number = errno.EDQUOT
        if number is not None and not any(sign in text for sign in SHARED_MEMORY):
            # How much of a quota is left cannot be asked.
            named, nameless_quota = f"{output}{os.sep}" in text, number != errno.ENOSPC and "/" not in text
            if named or nameless_quota or shutil.disk_usage(output).free < NEARLY_FULL:
                return number
        error = error.__cause__ or error.__context__
    return None


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


class _Claim:
    """Whose job it is, where locks do not say it.

    A worker that is cut off from its cluster, but not from the shared folder, goes on while the cluster starts its job
    again on another machine; and not every shared folder holds locks between machines. So who begins a job writes
    its name down, and who finds another's there (or none: the other is done) stops, at its next step at the latest,
    and leaves no record. What both may write in one step is whole in any case: all files are replaced, never changed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.name = f"{platform.node()} {os.getpid()} {secrets.token_hex(8)}"
        write_atomic(path, self.name)

    def check(self) -> None:
        """Raises `Superseded` if the job is another worker's by now."""
        if (holder := self._holder()) != self.name:
            raise Superseded(f"another worker has taken it over ({holder.rpartition(' ')[0] or 'and is done'})")

    def holds(self) -> bool:
        """Whether the job is still this worker's."""
        return self._holder() == self.name

    def end(self) -> None:
        """Gives the job up; a successor's claim stays."""
        if self.holds():
            self.path.unlink(missing_ok=True)

    def _holder(self) -> str:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return ""


class _Progress:
    """Writes a job's progress to a file, at most once a second; stops a job that is another worker's by now."""

    def __init__(self, path: Path, watch: Callable[[dict[str, Any]], None] | None = None):
        self.path = path
        self.last = 0.0
        self.watch = watch
        self.claim: _Claim | None = None

    def __call__(self, state: dict[str, Any], force: bool = False) -> None:
        if self.claim is not None:
            self.claim.check()
        if self.watch is not None:
            self.watch(state)
        now = time.monotonic()
        if force or now - self.last >= 1.0:
            self.last = now
            write_atomic(self.path, json.dumps(state).encode())

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


class _Log(io.TextIOWrapper):
    """A file that ends where it cannot be written: no job fails for its log, and no thread complains elsewhere."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _into(log: Path):
    """Sends all that a job prints, warns of or logs into its log file."""
    with (
        _Log(open(log, "ab"), encoding="utf-8", line_buffering=True) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield
