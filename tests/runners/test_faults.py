"""What is lost, and what it costs: workers, nodes, drivers and disk space, at random moments, for real.

`pytest -m long tests/runners/test_faults.py -s` kills at least twenty times; a number in SEED repeats its moments.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import light_jobs
import psutil
import pytest
import ray
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster
from tests_support import ROOT, CommandLine

from results.ledger import Ledger
from runners.executors import RETRIES
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


def scores(output: Path) -> dict[str, dict[str, float]]:
    """What does not depend on the machine's speed, by job, and the digests of what was trained."""
    ledger = Ledger(output / "ledger")
    records = ledger.records()
    assert not ledger.reports
    assert {record.status for record in records} == {"done"}
    return {
        record.key: {} if record.stage == "speed" else record.metrics | {"sha": record.details.get("weights_sha256")}
        for record in records
    }


def done_files(output: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in output.glob("ledger/*.json") if b'"status": "done"' in path.read_bytes()
    }


Start = Callable[[Path], subprocess.Popen]  # of a run that writes into a folder


def light(jobs: int, steps: int) -> Start:
    script = [sys.executable, light_jobs.__file__]
    return lambda output: subprocess.Popen(
        [*script, str(output), str(jobs), str(steps)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def trainings(data: Path, *overrides: str) -> Start:
    """The miniature of the demo, as a user starts it."""

    def start(output: Path) -> subprocess.Popen:
        output.mkdir(exist_ok=True)
        line = CommandLine(output.parent)
        command = line.command(*overrides, *LONG, f"output={output}", f"data_root={data}")
        with open(output.with_suffix(".log"), "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

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
    """That no step of a light job was lost, and none done twice but one that a kill cut off; returns the workers."""
    workers = 0
    for job in Ledger(output / "ledger").records():
        done = light_jobs.counted(job.key, output)
        turns = [process for process, _ in itertools.groupby(process for process, _ in done)]
        assert len(turns) == len(set(turns))  # one worker after the other, never two at a time
        steps = int(job.metrics["iterations"])
        assert set(range(steps)) <= {step for _, step in done} <= set(range(steps + 1))
        assert len(done) <= steps + len(turns)  # each repeats at most the step that its predecessor did not finish
        workers += len(turns)
    return workers


def test_a_worker_a_node_and_a_driver_are_lost(nodes, tmp_path, request):
    """Each once, in any order, at random moments: jobs go on from their last step elsewhere, and none is done twice."""
    dice = dice_of(request)
    start = light(jobs=4, steps=0)

    def steps() -> int:
        return sum(len(path.read_text().splitlines()) for path in tmp_path.glob("steps/*.log"))

    driver = start(tmp_path)
    for what in dice.sample(["worker", "node", "driver"], 3):
        before = steps()
        wait_until(lambda before=before: steps() > before and nodes.workers())
        time.sleep(dice.uniform(0, 0.7))
        print(f"{what} lost after {steps()} steps")
        lose(what, nodes, driver, dice)
        if what == "driver":
            driver = start(tmp_path)
    (tmp_path / "end").touch()  # no job ends before: all three find some at work
    assert driver.wait(timeout=300) == 0
    assert {record.key for record in Ledger(tmp_path / "ledger").records()} == {j.key for j in light_jobs.make_jobs(4)}
    assert check_steps(tmp_path) > 4


KILLS = 20
LONG = [
    "seeds=[0,1]",
    *(
        f"suite.benchmarks.{task}.recipe.{setting}"
        for task in ("classification", "segmentation")
        for setting in ("iterations=150", "checkpoint_every=10")
    ),
]


def disturb(nodes: Nodes, start: Start, output: Path, dice: random.Random, kills: Counter[str]) -> Counter[int]:
    """A run in which something dies again and again, started anew where it was the run, until all is done.

    Returns:
        How often a driver that was not killed ended with which exit status.
    """
    began = time.monotonic()
    before = kills.total()
    kept: dict[Path, bytes] = {}
    driver = start(output)
    wait_until(nodes.workers)
    pace = time.monotonic() - began  # of a start: with faster kills nothing would happen in between
    ends: Counter[int] = Counter()
    suffered = 0  # deaths among this driver's workers
    while ends.total() < 20:
        try:
            driver.wait(timeout=dice.uniform(0.1, 1.5) * pace if kills.total() < KILLS else None)
        except subprocess.TimeoutExpired:
            kept |= done_files(output)
            what = dice.choice(["worker", "worker", "node", "driver"] if nodes.workers() else ["node", "driver"])
            lose(what, nodes, driver, dice)
            kills[what] += 1
            suffered += what != "driver"
            print(f"  {time.monotonic() - began:4.0f} s: {what} killed, {len(kept)} records done", flush=True)
        else:
            ends[driver.returncode] += 1
            assert driver.returncode != INCOMPLETE or suffered > RETRIES  # no single loss uses up several tries
            if driver.returncode == 0:
                break
        if driver.poll() is not None:
            driver = start(output)
            suffered = 0
    assert driver.returncode == 0
    assert not list(output.glob("ledger/damaged/*"))
    for path, content in kept.items():
        assert path.read_bytes() == content  # what was done was not done again
    print(f"  {time.monotonic() - began:4.0f} s: done; {kills.total() - before} kills; exit statuses {dict(ends)}")
    return ends


@pytest.mark.long
@pytest.mark.parametrize("what", ["light", "trainings"])
def test_twenty_kills(nodes, tmp_path, request, what):
    """Beside an undisturbed run: the same jobs, the same numbers, nothing lost and nothing done twice."""
    dice = dice_of(request)
    began = time.monotonic()
    undisturbed = tmp_path / "undisturbed"
    if what == "light":
        start = light(jobs=12, steps=60)
        assert start(undisturbed).wait() == 0
    else:
        start = trainings(tmp_path / "data", "executor=ray", "cluster=auto")
        assert trainings(tmp_path / "data", "executor=inline")(undisturbed).wait() == 0
    print(f"undisturbed: {time.monotonic() - began:.0f} s")
    kills: Counter[str] = Counter()
    resumed = rounds = 0
    while kills.total() < KILLS:
        rounds += 1
        output = tmp_path / f"disturbed{rounds}"
        ends = disturb(nodes, start, output, dice, kills)
        assert scores(output) == scores(undisturbed)
        if what == "light":
            assert ends.keys() <= {0, INCOMPLETE}  # no driver broke down
            resumed += check_steps(output) - len(scores(output))
        else:
            records = Ledger(output / "ledger").records()
            resumed += sum(record.details.get("resumed_from") is not None for record in records)
    print(f"{kills.total()} kills {dict(kills)} in {rounds} runs; jobs that went on from a checkpoint: {resumed}")
    assert resumed
