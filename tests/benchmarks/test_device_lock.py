"""Timings of two runs on one device: one after the other."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests_support import ROOT

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
    """A folder of this test's own: no other run is waited for."""
    monkeypatch.setattr(device_lock, "FOLDER", tmp_path)
    monkeypatch.setattr(device_lock, "SECONDS", 0.1)


# Another run's timing, as far as the lock goes: it says what it does, and ends with its standard input.
TIMING = """
import sys
from pathlib import Path
from benchmarks import device_lock

device_lock.FOLDER = Path(sys.argv[1])
with device_lock.alone_on("cpu", lambda: print("waits", flush=True)):
    print("times", flush=True)
    sys.stdin.read()
"""


def other_run(folder: Path) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", TIMING, str(folder)], env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes
    )


def test_two_processes_time_one_after_the_other(tmp_path, monkeypatch):
    """A job waits while another process times, says so, and keeps others waiting while it times itself."""
    before, real, said = other_run(tmp_path), measure.measure_speed, []
    meanwhile: list[subprocess.Popen] = []

    def listen(state: dict) -> None:
        said.append(state["text"])
        if state["text"] == WAITS:
            before.stdin.close()

    def watched(*arguments, **settings):
        assert before.wait(timeout=30) == 0
        meanwhile.append(other_run(tmp_path))
        assert meanwhile[0].stdout.readline() == "waits\n"
        return real(*arguments, **settings)

    monkeypatch.setattr(measure, "measure_speed", watched)
    assert before.stdout.readline() == "times\n"
    record, _ = run_job(JOB, Workplace(tmp_path / "output", tmp_path, "test"), watch=listen)
    assert record.status == "done", record.reason
    assert WAITS in said
    assert not any("without the lock" in note for note in record.notes)
    printed, _ = meanwhile[0].communicate(timeout=30)
    assert printed.endswith("times\n")


def test_no_temporary_folder_of_its_own_gives_a_process_a_lock_of_its_own(tmp_path):
    """Schedulers of clusters set one for each job."""
    printed = [
        subprocess.run(
            [sys.executable, "-c", "from benchmarks.device_lock import FOLDER; print(FOLDER)"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
            capture_output=True,
            check=True,
        ).stdout
        for folder in (tmp_path, tmp_path.parent)
    ]
    assert printed[0] == printed[1] != b""


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
