"""What is lost, and what it costs: workers, nodes, drivers and disk space, at random moments, for real.

`pytest -m long tests/runners/test_faults.py -s` kills at least twenty times, and fills the disk in between; a number in
SEED repeats its moments.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import light_jobs
import psutil
import pytest
import ray
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster
from tests_support import ROOT, CommandLine, comparable, may_mount

from results.ledger import Ledger
from runners import config, executors, ray_executor
from runners.execute import Workplace, make_record
from runners.executors import RETRIES
from runners.run import WRONG_INPUT
from runners.session import INCOMPLETE

BUSY = ("ray::speed", "ray::train", "ray::evaluate")  # how Ray calls a worker while it has a job


class Nodes:
    """A Ray cluster of real nodes on this machine: a head without a CPU, on which the driver is, and two more."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            self.cluster.add_node(num_cpus=1)

    def workers(self) -> list[psutil.Process]:
        """The processes that run jobs, on all nodes."""
        found = []
        for child in psutil.Process().children(recursive=True):
            try:
                busy = child.name().startswith(BUSY) and child.status() != psutil.STATUS_ZOMBIE
                found += [child] if busy else []
            except psutil.NoSuchProcess:
                continue
        return found

    def lose(self, node) -> None:
        """Kills all that Ray runs on a node, and starts another for it."""
        self.cluster.remove_node(node, allow_graceful=False)
        for tries in range(5):
            try:
                self.cluster.add_node(wait=False, num_cpus=1)
                return
            except Exception:  # Ray gives a node half a minute to start, which a busy machine may exceed
                if tries == 4:
                    raise


class Disk:
    """A file system of this process and what it starts, for an output folder: small, so that it can be filled."""

    def __init__(self, folder: Path, megabytes: int):
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=True)
        self.filler = folder / "filler"

    def fill(self, seconds: float) -> None:
        """Keeps it full to the last byte for so long: what somebody gives back is taken, too."""
        end = time.monotonic() + seconds
        with open(self.filler, "wb", buffering=0) as file:
            while time.monotonic() < end:
                for block in (2**16, 2**10, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(block)):
                            pass
                time.sleep(0.05)
        self.filler.unlink()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: the names of sockets are limited
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "")  # what follows sets it: to be taken back
        patch.delenv("RAY_AUTH_MODE")
        enable_token_auth_by_default()  # the default of ray.init, but not of a test's cluster
        patch.setenv("RAY_health_check_period_ms", "500")  # a lost node is noticed in seconds, not in half a minute
        patch.setenv("RAY_health_check_timeout_ms", "1000")
        made = Nodes()
        patch.setenv("RAY_ADDRESS", made.cluster.address)
        yield made
        ray.shutdown()
        made.cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def dice_of(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"{request.node.name}: SEED={seed}")  # shown by pytest when the test fails
    return random.Random(seed)


def done_files(output: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in output.glob("ledger/*.json") if b'"status": "done"' in path.read_bytes()
    }


Start = Callable[[Path], subprocess.Popen]  # of a run that writes into a folder


def started(command: Sequence[str], output: Path) -> subprocess.Popen:
    """What it prints is beside its output folder."""
    with open(output.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )


def light(jobs: int, steps: int) -> Start:
    script = [sys.executable, light_jobs.__file__]
    return lambda output: started([*script, str(output), str(jobs), str(steps)], output)


def trainings(data: Path, *overrides: str) -> Start:
    """The miniature of the demo, as a user starts it."""

    def start(output: Path) -> subprocess.Popen:
        line = CommandLine(output.parent)
        return started(line.command(*overrides, *LONG, f"output={output}", f"data_root={data}"), output)

    return start


def wait_until(true: Callable[[], Any], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lose(what: str, nodes: Nodes, driver: subprocess.Popen, dice: random.Random) -> None:
    """Kills one of them."""
    if what == "driver":
        driver.kill()
        driver.wait()
    elif what == "node":
        nodes.lose(dice.choice(sorted(nodes.cluster.worker_nodes, key=lambda node: node.unique_id)))
    elif workers := nodes.workers():
        dice.choice(workers).kill()


def check_steps(output: Path) -> int:
    """That no step of a light job was lost, and none done twice but one that was cut off; returns the tries."""
    tries = 0
    for job in Ledger(output / "ledger").records():
        done = light_jobs.counted(job.key, output)
        turns = [each for each, _ in itertools.groupby(each for each, _ in done)]
        assert len(turns) == len(set(turns))  # one try after the other, never two at a time
        steps = int(job.metrics["iterations"])
        assert set(range(steps)) <= {step for _, step in done} <= set(range(steps + 1))
        assert len(done) <= steps + len(turns)  # each repeats at most the step that its predecessor did not finish
        tries += len(turns)
    return tries


def test_a_worker_a_node_and_a_driver_are_lost(nodes, tmp_path, request):
    """Each once, in any order, at random moments: jobs go on from their last step elsewhere, and none is done twice."""
    dice = dice_of(request)
    start, output = light(jobs=4, steps=0), tmp_path / "output"

    def tries() -> int:
        logs = [path.read_text().splitlines() for path in output.glob("steps/*.log")]
        return sum(len({line.split()[0] for line in log}) for log in logs)

    driver = start(output)
    for lost, what in enumerate(dice.sample(["worker", "node", "driver"], 3)):
        # Both nodes at work, and what the last loss cut off goes on.
        wait_until(lambda lost=lost: tries() >= 2 + lost and len(nodes.workers()) == 2)
        time.sleep(dice.uniform(0, 0.7))
        print(f"{what} lost in try {tries()}")
        lose(what, nodes, driver, dice)
        if what == "driver":
            driver = start(output)
    (output / "end").touch()  # no job ends before: all three find some at work
    assert driver.wait(timeout=300) == 0
    assert {record.key for record in Ledger(output / "ledger").records()} == {j.key for j in light_jobs.make_jobs(4)}
    assert check_steps(output) >= 4 + 2  # the third loss may come with the end


def test_a_job_that_meets_a_full_disk_goes_on_elsewhere_after_a_pause(nodes, tmp_path, monkeypatch):
    """On the other node, since the disk may be a node's own; where both were full, on either."""
    pauses = (0.3, 0.6)

    def meet(job, workplace):
        with open(workplace.output / "starts", "a+") as starts:
            starts.write(f"{ray.get_runtime_context().get_node_id()} {time.time()}\n")
            starts.seek(0)
            if len(starts.readlines()) < 3:
                raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        return make_record(job, "done", None), []

    monkeypatch.setattr(ray_executor, "run_job", meet)
    monkeypatch.setattr(executors, "PAUSE", 0.3)
    (job,), done, told = light_jobs.make_jobs(1), [], []
    executor = ray_executor.Ray(Workplace(tmp_path, tmp_path, "test"), {}, config.Cluster.auto, {}, 2)
    executor.run([job], lambda record, messages: done.append(record.status), told.append)
    assert done == ["done"]
    starts = [line.split() for line in (tmp_path / "starts").read_text().splitlines()]
    assert len(starts) == 3
    assert starts[0][0] != starts[1][0]
    times = [float(at) for _, at in starts]
    for pause, (before, after) in zip(pauses, itertools.pairwise(times), strict=True):
        assert after - before >= pause
    assert [line.rpartition("; ")[2] for line in told] == [f"trying again in {pause} s" for pause in pauses]


KILLS = 20
RESUMED = ("resumed_from",)  # what a training tells of its being resumed
KINDS = {"worker", "node", "driver", "disk"}
INSIDE = "MAY_MOUNT"  # an environment variable of the process that may
MEGABYTES = {"light": 16, "trainings": 100}  # of the disk; several times what a run writes
LONGEST_FILLING = 5.0  # seconds: less than the pauses of a job that meets a full disk
LONG = [
    "seeds=[0,1]",
    *(
        f"suite.benchmarks.{task}.recipe.{setting}"
        for task in ("classification", "segmentation")
        for setting in ("iterations=150", "checkpoint_every=10")
    ),
]


def enough(kills: Counter[str], kinds: set[str]) -> bool:
    return kills.total() - kills["disk"] >= KILLS and kills.keys() == kinds


def disturb(
    nodes: Nodes, start: Start, output: Path, disk: Disk | None, dice: random.Random, kills: Counter[str]
) -> Counter[int]:
    """A run in which something dies or fills again and again, started anew where it was the run, until all is done.

    Returns:
        How often a driver that was not killed ended with which exit status.
    """
    began = time.monotonic()
    before = kills.total()
    kinds = KINDS if disk else KINDS - {"disk"}
    kept: dict[Path, bytes] = {}
    driver = start(output)
    wait_until(nodes.workers)
    pace = time.monotonic() - began  # of a start: with faster kills nothing would happen in between
    ends: Counter[int] = Counter()
    suffered = filled = 0  # deaths among this driver's workers, and full disks
    while ends.total() < 20:
        what = None
        try:
            driver.wait(timeout=None if enough(kills, kinds) else dice.uniform(0.1, 1.5) * pace)
        except subprocess.TimeoutExpired:
            kept |= done_files(output)
            possible = sorted(kinds) if nodes.workers() else ["driver", "node"]
            what = dice.choice([*possible, "worker"] if "worker" in possible else possible)
            at = f"{time.monotonic() - began:4.0f} s"
            if what == "disk":
                seconds = dice.uniform(0.5, LONGEST_FILLING)
                print(f"  {at}: disk full for {seconds:.1f} s, {len(kept)} records done", flush=True)
                disk.fill(seconds)
            else:
                print(f"  {at}: {what} killed, {len(kept)} records done", flush=True)
                lose(what, nodes, driver, dice)
            kills[what] += 1
            suffered += what in ("worker", "node")
            filled += what == "disk"
        if driver.poll() is None:
            continue
        if what != "driver":
            ends[driver.returncode] += 1
            assert driver.returncode != INCOMPLETE or suffered > RETRIES  # no single loss uses up several tries
            assert driver.returncode != WRONG_INPUT or filled > 1  # nor does a disk that is full once
            if driver.returncode == 0:
                break
        driver = start(output)
        suffered = filled = 0
    assert driver.returncode == 0
    assert not list(output.glob("ledger/damaged/*"))
    for path, content in kept.items():
        assert path.read_bytes() == content  # what was done was not done again
    print(f"  {time.monotonic() - began:4.0f} s: done; {kills.total() - before} kills; exit statuses {dict(ends)}")
    return ends


@pytest.mark.long
@pytest.mark.parametrize("what", ["light", "trainings"])
def test_twenty_kills(tmp_path, request, what):
    """Beside an undisturbed run: the same jobs, the same records, nothing lost and nothing done twice.

    The test runs itself once more in a namespace, where it may mount the disk that fills.
    """
    if INSIDE not in os.environ and may_mount():
        again = [sys.executable, "-m", "pytest", "-m", "long", "-s", "--basetemp", str(tmp_path / "inside")]
        again += [request.node.nodeid]
        done = subprocess.run(["unshare", "-rm", *again], env=os.environ | {INSIDE: "1"}, cwd=request.config.rootpath)
        assert done.returncode == 0
        return
    nodes = request.getfixturevalue("nodes")
    dice = dice_of(request)
    began = time.monotonic()
    undisturbed = tmp_path / "undisturbed"
    if what == "light":
        start = light(jobs=12, steps=60)
        assert start(undisturbed).wait() == 0
    else:
        start = trainings(tmp_path / "data", "executor=ray", "cluster=auto")
        assert trainings(tmp_path / "data", "executor=inline")(undisturbed).wait() == 0
    expected = comparable(undisturbed, RESUMED)
    print(f"undisturbed: {len(expected)} jobs, {time.monotonic() - began:.0f} s")
    kills: Counter[str] = Counter()
    resumed = refused = rounds = 0
    while not enough(kills, KINDS if INSIDE in os.environ else KINDS - {"disk"}):
        rounds += 1
        output = tmp_path / f"disturbed{rounds}"
        disk = Disk(output, MEGABYTES[what]) if INSIDE in os.environ else None
        ends = disturb(nodes, start, output, disk, dice, kills)
        assert comparable(output, RESUMED) == expected
        refused += output.with_suffix(".log").read_text().count("trying again")
        if what == "light":
            assert ends.keys() <= {0, WRONG_INPUT, INCOMPLETE}  # no driver broke down
            resumed += check_steps(output) - len(expected)
        else:
            records = Ledger(output / "ledger").records()
            resumed += sum(record.details.get("resumed_from") is not None for record in records)
    counts = f"{kills.total() - kills['disk']} kills {dict(kills)} in {rounds} runs, {time.monotonic() - began:.0f} s"
    print(f"{counts}; jobs that went on from a checkpoint: {resumed}; times that a full disk was told of: {refused}")
    assert resumed
    assert refused or kills["disk"] < 3  # a short one may meet jobs that write nothing just then


@pytest.mark.long
def test_a_killed_head_of_a_runs_own_cluster_ends_all_of_it(tmp_path):
    """Nothing that Ray started there outlives the run."""
    run = subprocess.Popen(
        [sys.executable, light_jobs.__file__, str(tmp_path), "2", "0", "40", "local"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: list(tmp_path.glob("steps/*.log")))
    started = psutil.Process(run.pid).children(recursive=True)
    (head,) = (process for process in started if process.name() == "gcs_server")
    head.kill()
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 1
    (said,) = errors.strip().splitlines()
    assert said.startswith("error: the head of this run's own Ray (127.0.0.1:")
    assert said.endswith("for 5 s; finished jobs are kept, and the same command continues")
    assert len(started) > 4
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_a_killed_head_ends_the_run_with_one_line(nodes, tmp_path):
    """The last test here, since it is the head of all. What was done is kept, as after the death of the run."""
    command = [sys.executable, light_jobs.__file__, str(tmp_path), "2", "0", "2"]
    run = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: list(tmp_path.glob("steps/*.log")))
    address = nodes.cluster.address
    nodes.cluster.remove_node(nodes.cluster.head_node, allow_graceful=False)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert said == [
        f"error: the head of the Ray cluster ({address}) has been out of reach for 2 s; finished jobs are kept, "
        "and the same command continues on a cluster that runs"
    ]
