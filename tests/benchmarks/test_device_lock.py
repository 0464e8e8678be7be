"""Timings of two runs on one device: one after the other."""

from __future__ import annotations

import multiprocessing
import os
import stat
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch

from benchmarks import device_lock, measure
from benchmarks.device_lock import alone_on
from benchmarks.job import Job, SpeedSettings
from runners.execute import Workplace, run_job

JOB = Job(
    stage="speed",
    task="classification",
    label="test_mit",
    model="test_mit",
    input_size=(32, 32),
    num_classes=10,
    speed=SpeedSettings(repeats=5, warmup=1, max_seconds=0.2, train_step=False, threads=1),
)
WAITS = "another run times on this device; waiting"


@pytest.fixture(autouse=True)
def _machine(tmp_path, monkeypatch):
    """A temporary folder of this test's own: no other run is waited for."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(device_lock, "SECONDS", 0.1)


def time_slowly(output: Path, found: Queue) -> None:
    """Runs the job; tells when it began to load, when it measured, and what it said meanwhile."""
    real, spans, said = measure.measure_speed, [], []

    def watched(*arguments, **settings):
        began = time.monotonic()
        speed = real(*arguments, **settings)
        time.sleep(0.5)
        spans.append((began, time.monotonic()))
        return speed

    measure.measure_speed = watched
    record, _ = run_job(JOB, Workplace(output, output, "test"), watch=lambda state: said.append(state["text"]))
    found.put((record.status, spans, said, record.notes))


def test_two_runs_with_folders_of_their_own_time_one_after_the_other(tmp_path):
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()
    runs = [fork.Process(target=time_slowly, args=(tmp_path / name, found)) for name in ("one", "other")]
    for run in runs:
        run.start()
    first, second = sorted((found.get(timeout=60) for _ in runs), key=lambda each: each[1])
    for run in runs:
        run.join()
    assert (first[0], second[0]) == ("done", "done")
    ((_, ended),), ((began, _),) = first[1], second[1]
    assert ended <= began
    assert WAITS not in first[2]
    assert WAITS in second[2]
    assert not any("without the lock" in note for note in [*first[3], *second[3]])


def test_other_users_may_take_the_lock(tmp_path):
    before = os.umask(0o077)
    try:
        with alone_on("cpu", pytest.fail) as problem:
            assert problem is None
    finally:
        os.umask(before)
    (lock,) = tmp_path.glob("*.lock")
    assert stat.S_IMODE(lock.stat().st_mode) == 0o666


def test_a_lock_that_cannot_be_made_is_a_note(tmp_path, monkeypatch):
    (tmp_path / "hires-vit-benchmark-cpu.lock").mkdir()
    record, _ = run_job(JOB, Workplace(tmp_path / "output", tmp_path, "test"))
    assert record.status == "done"
    (note,) = (note for note in record.notes if "lock" in note)
    assert note.startswith(f"timed without the lock {tmp_path}/hires-vit-benchmark-cpu.lock (Is a directory): ")


def test_who_is_told_may_end_the_wait():
    """A job that another worker has taken over, for instance; and the lock of a process that has ended is free."""

    def stop() -> None:
        raise InterruptedError("superseded")

    with alone_on("cpu", pytest.fail), pytest.raises(InterruptedError, match="superseded"), alone_on("cpu", stop):
        pass
    with alone_on("cpu", pytest.fail) as problem:
        assert problem is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_known_by_its_number_alone():
    assert device_lock._name("cuda") == device_lock._name("cuda:0") != device_lock._name("cpu")
