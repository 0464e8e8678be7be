"""A full disk, and a worker that was given up and does not know it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from tests_support import ROOT, CommandLine, may_mount

from benchmarks import measure
from benchmarks.engine import Outcome
from benchmarks.errors import WorkerLost
from benchmarks.job import Job, Recipe
from results.ledger import Ledger
from runners import execute, executors
from runners.execute import Workplace, run_job

# A file system of its own, which the test's process cannot see: the runs, the filling and the freeing are all in there.
INSIDE = textwrap.dedent("""
    import subprocess, sys, time
    from pathlib import Path

    output, size, delay, *command = sys.argv[1:]
    output = Path(output)
    output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(output)], check=True)

    def run(pause):
        # A real run, but for the length of its pauses.
        code = f"from runners import executors, run; import sys; executors.PAUSE = {pause}; sys.exit(run.main())"
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, "-c", code, *command[2:]], **pipes)

    def fill(process):
        before = {path.name for path in output.glob("jobs/train-*/iter_*.pth")}
        while process.poll() is None and {path.name for path in output.glob("jobs/train-*/iter_*.pth")} <= before:
            time.sleep(0.01)
        time.sleep(float(delay))
        with open(output / "filler", "wb", buffering=0) as filler:
            for block in (2**16, 2**10, 1):  # to the last byte
                try:
                    while True:
                        filler.write(b"0" * block)
                except OSError:
                    continue

    first = run(0.05)
    fill(first)
    printed, errors = first.communicate()
    print("first", first.returncode, len(list(output.glob("ledger/*.json"))), flush=True)
    print(printed, errors, flush=True)
    (output / "filler").unlink()
    again = run(0.5)
    fill(again)
    told = ""
    while "trying again" not in told and (line := again.stdout.readline()):
        told += line
    (output / "filler").unlink()
    rest, errors = again.communicate()
    print("second", again.returncode, flush=True)
    print(told + rest, errors)
    subprocess.run(["cp", "-r", str(output / "ledger"), str(output.with_name("kept"))], check=True)
""")


@pytest.mark.skipif(not may_mount(), reason="this machine lets no user mount a file system of their own")
def test_a_full_disk_loses_nothing(tmp_path):
    """Full at a random moment of a training, for good: exit status 1, one line. Full for a while: the run goes on."""
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"SEED={seed}")  # shown by pytest when the test fails
    delay = random.Random(seed).uniform(0, 0.5)
    line = CommandLine(tmp_path)
    one = [f"suite.benchmarks.classification.recipe.{each}" for each in ("iterations=600", "checkpoint_every=10")]
    one.append("suite.benchmarks.segmentation.stages=[cost]")
    command = line.command("executor=inline", "models=[test_mit]", "stages=[train]", *one)
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", INSIDE, str(line.output), "30m", str(delay), *command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    first, again = done.stdout.split("\nsecond ")
    assert first.startswith("first 1 0\n"), first  # no record
    assert "Traceback" not in first
    told = [text for text in first.splitlines() if "trying again" in text]
    assert len(told) == 3  # each a longer pause
    assert all(f"the disk of {line.output} is full (No space left on device); trying again in" in each for each in told)
    (error,) = (text for text in first.splitlines() if text.startswith(" error: ") or text.startswith("error: "))
    assert str(line.output) in error
    assert "No space left on device; free some space" in error
    assert again.startswith("0"), again
    assert "trying again in 0.5 s" in again
    ledger = Ledger(tmp_path / "kept")
    (record,) = ledger.records()
    assert not ledger.reports
    assert record.done
    assert record.details["resumed_from"]


@pytest.fixture
def job(tmp_path) -> tuple[Job, Workplace]:
    job = Job(stage="cost", task="classification", label="light", model="test_mit", input_size=(32, 32), num_classes=10)
    return job, Workplace(tmp_path, tmp_path, "test")


def test_a_full_disk_is_tried_again_after_longer_and_longer_pauses(job, monkeypatch):
    """As often as the death of a worker, and apart from it; other errors of the folder are not."""
    errors, pauses, told = [], [], []

    def meet(job, workplace):
        if errors:
            raise errors.pop(0)
        return execute.make_record(job, "done", None), []

    def full() -> OSError:
        return OSError(errno.ENOSPC, "No space left on device", str(job[1].output))

    monkeypatch.setattr(executors, "run_job", meet)
    monkeypatch.setattr(executors.time, "sleep", pauses.append)
    done = []

    def run() -> None:
        executors.Inline(job[1], {}).run([job[0]], lambda record, messages: done.append(record.status), told.append)

    errors += [full(), WorkerLost("killed"), full(), full()]
    run()
    assert done == ["done"]
    assert pauses == [2.0, 4.0, 8.0]
    where = f"the disk of {job[1].output} is full (No space left on device)"
    died = told.pop(1)
    assert died.endswith("its worker died (killed); going on from its last checkpoint (retry 1 of 3)")
    assert told == [f"{where}; trying again in {pause} s" for pause in (2, 4, 8)]
    errors += [full() for _ in range(4)]
    with pytest.raises(OSError, match="No space left"):
        run()
    assert len(pauses) == 6
    assert not errors
    errors.append(PermissionError(errno.EACCES, "Permission denied", "record.json"))
    with pytest.raises(PermissionError):
        run()
    assert len(pauses) == 6
    assert done == ["done"]


@pytest.mark.parametrize("said", ["", "Error while serializing: I/O error: No space left on device (os error 28)"])
def test_a_full_disk_is_no_error_of_the_job(job, monkeypatch, said):
    """Also where a library has kept only the text."""

    def fill(*arguments):
        raise RuntimeError(said) from (None if said else OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(measure, "measure", fill)
    monkeypatch.setattr(execute.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="No space left") as error:
        run_job(*job)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(job[1].output))
    assert not Ledger(job[1].ledger).records()


def test_what_else_is_full_is_an_error_of_the_job(job, monkeypatch):
    """Shared memory, or another disk than that of the output folder; not what is named in there."""
    output, free = job[1].output, [2**40]
    monkeypatch.setattr(execute.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    elsewhere = OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")
    assert execute._disk_full(elsewhere, output) is None
    assert execute._disk_full(OSError(errno.ENOSPC, "No space left on device", f"{output}/a"), output) == errno.ENOSPC
    free[0] = 2**20
    assert execute._disk_full(elsewhere, output) == errno.ENOSPC
    shared = RuntimeError("unable to write to file </torch_12_34_5>: No space left on device (28)")
    assert execute._disk_full(shared, output) is None

    def fill(*arguments):
        raise shared

    monkeypatch.setattr(measure, "measure", fill)
    record, _ = run_job(*job)
    assert (record.status, "/torch_12_34_5" in record.reason) == ("failed", True)


@pytest.mark.parametrize("status", ["done", "failed"])
def test_checkpoints_that_a_kill_left_beside_a_record_go(job, status):
    training = dataclasses.replace(job[0], stage="train", recipe=Recipe())
    left = job[1].output / "jobs" / training.key / "iter_10.pth"
    left.parent.mkdir(parents=True)
    left.touch()
    execute.discard_checkpoints(execute.make_record(training, status, "test"), job[1].output)
    assert left.exists() == (status == "failed")  # from which it goes on


def test_a_worker_leaves_the_claim_of_its_successor(tmp_path):
    first = execute._Claim(tmp_path / "claim")
    second = execute._Claim(tmp_path / "claim")
    first.end()
    second.check()
    second.end()
    assert not (tmp_path / "claim").exists()


@pytest.mark.parametrize("ends", ["steps", "ends"])
def test_a_worker_that_was_given_up_writes_nothing_over_its_successor(job, monkeypatch, ends):
    """Where the file system holds no locks between machines: the successor does the job while the first is at it."""
    monkeypatch.setattr(execute, "FileLock", lambda path: contextlib.nullcontext(None))
    monkeypatch.setattr(contextlib.nullcontext, "acquire", lambda self, timeout=None: None, raising=False)
    monkeypatch.setattr(contextlib.nullcontext, "release", lambda self: None, raising=False)
    successors = []

    def work(job, context, trained):
        if not successors:
            successors.append(None)
            successors[0] = run_job(job, Workplace(context.output, context.data_root, "successor"))[0]
            if ends == "steps":
                context.progress({"fraction": 0.5, "text": "still here"})
                raise AssertionError("it was not stopped at its next step")
            return Outcome(metrics={"params": 1})
        return Outcome(metrics={"params": 2})

    monkeypatch.setattr(measure, "measure", work)
    record, _ = run_job(*job)
    assert record == successors[0]
    assert Ledger(job[1].ledger).records() == successors
    assert successors[0].metrics == {"params": 2}
