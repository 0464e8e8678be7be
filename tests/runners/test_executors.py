"""The executors: dependencies, hopeless jobs, dead workers, errors that cross from a worker."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import platform
import time

import psutil
import pytest
from rich.console import Console
from tests_support import configuration

from benchmarks.errors import InputError, WorkerLost
from benchmarks.job import Job, Recipe, SpeedSettings
from results.ledger import Ledger
from results.record import Record
from runners import execute, executors, ray_executor, session
from runners.config import Cluster
from runners.execute import Workplace, explain, make_record
from runners.placement import Node


def job(stage: str = "train", **changes) -> Job:
    settings = {
        "stage": stage,
        "task": "classification",
        "label": "test_mit",
        "model": "test_mit",
        "input_size": (32, 32),
        "num_classes": 10,
        "data": "digit_scenes_classification",
        "recipe": Recipe(),
        "speed": SpeedSettings(),
    }
    return Job(**settings | changes)


@pytest.fixture
def workplace(tmp_path) -> Workplace:
    return Workplace(output=tmp_path / "output", data_root=tmp_path / "data", command="test")


def ray(workplace: Workplace) -> ray_executor.Ray:
    return ray_executor.Ray(workplace, {}, Cluster.local, {}, slots=1)


def test_what_depends_on_a_failure_is_not_run():
    first = job()
    second = job("evaluate", depends_on=(first.key,))
    third = job("evaluate", depends_on=(second.key,))
    queue = executors.Queue([first, second, third], {})
    assert [ready.key for ready in queue.ready()] == [first.key]
    assert queue.hopeless() == []
    del queue.waiting[first.key]
    queue.records[first.key] = make_record(first, "failed", "no luck")
    assert queue.ready() == []
    records = queue.hopeless()
    assert [record.key for record in records] == [second.key, third.key]
    assert {(record.status, record.reason) for record in records} == {("blocked", "its train failed")}
    assert not queue.waiting


def test_what_is_in_the_ledger_counts_as_done():
    first = job()
    second = job("evaluate", depends_on=(first.key,))
    queue = executors.Queue([second], {first.key: make_record(first, "done", None)})
    assert [ready.key for ready in queue.ready()] == [second.key]


def test_a_worker_that_always_dies_is_a_failed_record(workplace, monkeypatch, capfd):
    """Its first place is a node that is gone, of which Ray tells: no death, since it never began there."""
    look, looks = ray_executor.alive_nodes, []

    def look_too_early():
        looks.append(look())
        return [*looks[-1], Node("ab" * 28, cpus=64)] if len(looks) == 1 else looks[-1]

    def die(job, workplace):
        with open(workplace.output / "starts", "a") as starts:
            starts.write("x")
        workplace.progress(job.key).touch()
        os._exit(1)

    def tell(message):
        told.append(message)
        assert not workplace.progress(job().key).exists()

    told = []
    workplace.progress("").parent.mkdir(parents=True)
    monkeypatch.setattr(ray_executor, "run_job", die)
    monkeypatch.setattr(ray_executor, "alive_nodes", look_too_early)
    monkeypatch.setattr(executors, "RETRIES", 1)
    done = []
    ray(workplace).run([job()], lambda record, messages: done.append(record), tell)
    assert [record.status for record in done] == ["failed"]
    assert len(told) == 1
    assert told[0].startswith(f"{job().title}: its worker died (")
    assert told[0].endswith("); going on from its last checkpoint (retry 1 of 1)")
    assert "raylet" not in "".join(capfd.readouterr())
    assert "its worker died 2 times" in done[0].reason
    assert (workplace.output / "starts").read_text() == "xx"
    assert Ledger(workplace.ledger).get(job().key) == done[0]


def test_an_error_of_the_disk_comes_through_as_it_was(workplace, monkeypatch):
    def fill(job, workplace):
        workplace.output.mkdir(exist_ok=True)
        with open(workplace.output / "starts", "a") as starts:
            starts.write("x")
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/record.json")

    monkeypatch.setattr(ray_executor, "run_job", fill)
    monkeypatch.setattr(executors, "PAUSE", 0.01)
    with pytest.raises(OSError, match="No space left") as error:
        ray(workplace).run([job()], lambda record, messages: None)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/somewhere/record.json")
    assert type(error.value) is OSError
    assert (workplace.output / "starts").read_text() == "x" * (1 + executors.RETRIES)


def test_a_machine_that_does_not_share_the_output_folder_writes_nothing_there(workplace, monkeypatch, tmp_path):
    """It has none, or one of its own; nothing is tried again, and the run says which machine."""
    monkeypatch.setattr(execute, "SECONDS_TO_SEE", 0.0)
    marked = workplace.marked()
    assert marked.marked() == marked
    marked.check()
    elsewhere = dataclasses.replace(marked, output=tmp_path / "elsewhere")
    for _ in ("none", "its own"):
        with pytest.raises(OSError, match=f"{platform.node()} does not see this folder") as error:
            executors.Inline(elsewhere, {}).run([job()], lambda record, messages: None)
        assert error.value.filename == str(elsewhere.output)
        assert not elsewhere.ledger.exists()
        dataclasses.replace(elsewhere, mark=None).marked()


def test_a_group_that_always_loses_a_process_is_a_failed_record(workplace, monkeypatch):
    """In this process, too; one that loses one once is none."""
    lost = []

    def lose(job, workplace):
        lost.append(job.key)
        if job.seed == 0 or len(lost) == 1:
            raise WorkerLost("process 1 of its group died (signal 9)")
        return make_record(job, "done", None), []

    monkeypatch.setattr(executors, "run_job", lose)
    done = []
    executors.Inline(workplace, {}).run([job(seed=1)], lambda record, messages: done.append(record))
    assert (done[0].status, len(lost)) == ("done", 2)
    log = workplace.output / "jobs" / job().key / "log.txt"
    log.parent.mkdir(parents=True)
    log.touch()
    executors.Inline(workplace, {}).run([job()], lambda record, messages: done.append(record))
    assert workplace.output / done[1].artifacts["log"] == log
    assert done[1].reason == "its worker died 4 times (process 1 of its group died (signal 9))"
    assert Ledger(workplace.ledger).get(job().key) == done[1]


@pytest.mark.parametrize("log", [None, "jobs/it/log.txt"])
def test_a_failed_job_names_its_log_where_it_has_one(log, tmp_path):
    printed = io.StringIO()
    settings = configuration("suite=demo", "stages=[cost]", f"output={tmp_path}")
    run = session.Session(settings, "test", Console(file=printed, width=100), 0.0)
    run.jobs = [job()]
    run.records[job().key] = make_record(job(), "failed", "no luck", artifacts={"log": log} if log else {})
    assert run._close(computed=1) == session.INCOMPLETE
    (said,) = (line for line in printed.getvalue().splitlines() if line.startswith("Failed: "))
    assert said.endswith(f"no luck; its log: {tmp_path}/{log}" if log else "no luck")


def test_gpus_that_this_machine_has_not_are_said_with_the_setting_that_asks_for_them(tmp_path):
    settings = configuration("suite=demo", "executor=ray", f"output={tmp_path}")
    run = session.Session(settings, "test", Console(file=io.StringIO()), 0.0)
    run.nodes = [Node("here", cpus=4)]
    timed = job("speed", speed=SpeedSettings(device="cuda"), recipe=None)
    with pytest.raises(InputError) as error:
        run._check_places([job(), timed])
    assert str(error.value) == (
        "speed test_mit (classification) needs a GPU, and this machine has none; change suite.speed.device=cuda, or "
        "run on a cluster with cluster=auto (plan=true shows all needs)"
    )


def counts(sizes) -> list[Job]:
    return [job("cost", input_size=(size, size)) for size in sizes]


def test_counting_in_processes_gives_the_same_and_survives_the_death_of_one(tmp_path):
    jobs = counts(range(32, 128, 4))
    places = {name: Workplace(tmp_path / name, tmp_path, "test") for name in ("one", "several")}
    found: dict[str, list[Record]] = {name: [] for name in places}
    executors.Inline(places["one"], {}).run(jobs, lambda record, messages: found["one"].append(record))

    def kill_a_worker(record, messages):
        if not found["several"]:
            workers = [p for p in psutil.Process().children(recursive=True) if p.ppid() != os.getpid()]
            workers[-1].kill()
        found["several"].append(record)

    executors.Processes(places["several"], 2).run(jobs, kill_a_worker)
    several = {record.key: record.metrics for record in found["several"]}
    assert len(found["several"]) == len(jobs)
    assert several == {record.key: record.metrics for record in found["one"]}
    assert {r.key for r in Ledger(places["several"].ledger).records()} == several.keys()


def test_counting_in_processes_goes_on_after_a_full_disk(workplace, monkeypatch):
    """In this process, where each job gets its tries."""
    monkeypatch.setattr(executors, "FULL", (errno.ENOTDIR, errno.EEXIST))  # what a file in a folder's place gives
    monkeypatch.setattr(executors, "PAUSE", 0.0)
    workplace.output.mkdir()
    workplace.ledger.touch()
    jobs, done, told = counts(range(32, 80, 8)), [], []

    def tell(message: str) -> None:
        told.append(message)
        workplace.ledger.unlink()

    executors.Processes(workplace, 2).run(jobs, lambda record, messages: done.append(record), tell)
    assert len(told) == 1
    assert {record.key for record in done} == {each.key for each in jobs}
    assert all(record.done for record in done)


def test_no_worker_outlives_a_killed_run(command_line):
    """A pool's workers would wait for their next job for ever."""
    run = command_line.start("suite=resolution_scaling", "stages=[cost]", miniature=False)
    started = psutil.Process(run.pid)
    deadline = time.monotonic() + 120
    while not list(command_line.output.glob("ledger/*.json")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = started.children(recursive=True)
    assert len(workers) > 2
    run.kill()
    run.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "lower the batch size"),
        (ValueError("line one\nline two"), "ValueError: line one line two"),
    ],
)
def test_errors_of_a_job_are_one_line(error, said):
    assert said in explain(error)
    assert "\n" not in explain(error)
