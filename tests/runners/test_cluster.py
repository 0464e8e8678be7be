"""A real Ray cluster of two nodes on this machine, each with two CPUs and two GPUs that Ray is only told of."""

from __future__ import annotations

import errno
import platform
import random
import sys
import threading
import time
import types

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster as RayCluster
from safetensors.torch import load_file
from training_support import SENSITIVE, assert_the_same, curve, job, trained, with_engine

from benchmarks.engine import Context
from benchmarks.errors import InputError
from benchmarks.job import Engine, Job, Recipe, SpeedSettings
from benchmarks.measure import measure
from results.record import Record
from runners import ray_executor, ray_group, run
from runners.config import Cluster
from runners.execute import Workplace
from runners.ray_executor import Ray

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="workers would look for the GPUs that are not there")


@pytest.fixture(scope="module")
def address():
    """Of the cluster. Its second node has GPUs of a type with a name."""
    nodes = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80 * 2**20}
    cluster = RayCluster(initialize_head=True, head_node_args=nodes | {"include_dashboard": False})
    cluster.add_node(**nodes, resources={"accelerator_type:H100": 1})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def two_nodes(address, monkeypatch, tmp_path):
    """Runs jobs on the cluster and returns their records."""
    monkeypatch.setenv("RAY_ADDRESS", address)  # other clusters may run on this machine
    workplace = Workplace(output=tmp_path / "output", data_root=tmp_path / "data", command="test")

    def ran(jobs: list[Job]) -> dict[str, Record]:
        found: dict[str, Record] = {}

        def done(record: Record, messages: list[str]) -> None:
            found[record.key] = record
            ran.messages += messages

        Ray(workplace, {}, Cluster.auto, {}, slots=4).run(jobs, done)
        return found

    ran.workplace, ran.messages = workplace, []
    return ran


def small(number: int, stage: str = "train", **settings) -> Job:
    shared = {"task": "classification", "label": "test_mit", "model": "test_mit", "num_classes": 10}
    return Job(stage=stage, input_size=(32 + number, 32), data="digit_scenes_classification", **shared, **settings)


# What replaces a job stands within a function: so it travels to the workers, which do not know this file.


def that_notes_its_time():
    def note_time(job, workplace, placement=None):
        import ray

        began = time.time()
        context = ray.get_runtime_context()
        device = [context.get_node_id(), context.get_accelerator_ids()["GPU"]]
        if job.stage == "train" and job.recipe.engine.gpu_fraction < 1:  # it waits for the other one on its device
            workplace.output.mkdir(exist_ok=True)
            met = "-".join([device[0], *device[1]])
            (workplace.output / f"{met}-{job.key}").touch()
            while len(list(workplace.output.glob(f"{met}-*"))) < 2 and time.time() < began + 120:
                time.sleep(0.05)
        time.sleep(0.5)
        record = Record(
            key=job.key,
            status="done",
            stage=job.stage,
            task=job.task,
            model=job.label,
            family="x",
            input_size=[32, 32],
            details={"device": device, "began": began, "ended": time.time()},
        )
        return record, []

    return note_time


def overlap(one: Record, other: Record) -> bool:
    return one.details["began"] < other.details["ended"] and other.details["began"] < one.details["ended"]


def test_no_two_timings_share_a_device_and_small_trainings_do(two_nodes, monkeypatch):
    monkeypatch.setattr(ray_executor, "run_job", that_notes_its_time())
    timed = [small(n, "speed", speed=SpeedSettings(device="cuda", gpu_type="H100")) for n in range(3)]
    shares = [small(n, recipe=Recipe(engine=Engine(gpu_fraction=0.5))) for n in range(2)]
    found = two_nodes([*shares, *timed])
    speeds, trainings = ([found[each.key] for each in jobs] for jobs in (timed, shares))
    assert len({record.details["device"][0] for record in speeds}) == 1  # the node with that type
    for record in speeds:
        assert len(record.details["device"][1]) == 1
        for other in found.values():
            if other is not record and other.details["device"] == record.details["device"]:
                assert not overlap(record, other)
    one, two = trainings
    assert one.details["device"] == two.details["device"]
    assert overlap(one, two)


def test_groups_that_each_need_three_of_four_gpus_wait_for_each_other(two_nodes, monkeypatch):
    monkeypatch.setattr(ray_group, "run_job_on_nodes", that_notes_its_time())
    groups = [small(n, recipe=Recipe(engine=Engine(processes=3))) for n in range(2)]
    one, two = two_nodes(groups).values()
    assert not overlap(one, two)


def test_what_lost_nodes_alone_could_run_is_blocked_after_a_while(two_nodes, monkeypatch):
    monkeypatch.setattr(ray_executor, "SECONDS_FOR_NODES", 0.0)
    monkeypatch.setattr(ray_executor, "run_job", that_notes_its_time())
    large = small(0, recipe=Recipe(batch_size=10, engine=Engine(processes=5)))
    found = two_nodes([large, small(1, recipe=Recipe())])
    assert sorted(record.status for record in found.values()) == ["blocked", "done"]
    assert found[large.key].reason == "it needs 5 GPUs, and the cluster has 4 (H100): nodes were lost"


def test_a_machine_that_cannot_run_jobs_is_named(two_nodes, monkeypatch):
    """One line, whatever is wrong there: a folder that it may not write, code that it has not."""

    def without_rights(job, workplace):
        raise PermissionError(errno.EACCES, "Permission denied", "/mounted/output")

    monkeypatch.setattr(ray_executor, "run_job", without_rights)
    start = f"the machine {platform.node()} cannot run train test_mit"
    with pytest.raises(InputError, match=f"^{start}.*: /mounted/output: Permission denied; mount the same folder"):
        two_nodes([small(0, recipe=Recipe())])
    only_here = types.ModuleType("only_here")
    exec("def run_job(job, workplace): pass", vars(only_here))
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    monkeypatch.setattr(ray_executor, "run_job", only_here.run_job)
    with pytest.raises(
        InputError, match=rf"^{start}.*: ModuleNotFoundError: No module named 'only_here'; install[^\n]*$"
    ):
        two_nodes([small(0, recipe=Recipe())])


def test_a_group_on_two_nodes_trains_as_one_process_does(two_nodes, tmp_path):
    """And says how far it is, wherever its first process is."""
    three = with_engine(job("classification"), Engine(processes=3), **SENSITIVE, iterations=8, batch_size=6)
    seen: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            for file in (two_nodes.workplace.output / "progress").glob("*.json"):
                seen.add(file.read_text())

    watcher = threading.Thread(target=look)
    watcher.start()
    (record,) = two_nodes([three]).values()
    ended.set()
    watcher.join()
    assert record.status == "done", record.reason
    assert record.details["engine"]["processes"] == 3
    assert any('"text": "loss ' in state for state in seen)
    output = two_nodes.workplace.output
    expected = trained(with_engine(three, Engine()), tmp_path / "one", tmp_path / "data")
    assert_the_same((curve(output), load_file(output / record.artifacts["weights"]), None), expected)


@pytest.mark.long
def test_a_group_on_two_nodes_goes_on_after_the_death_of_a_process(two_nodes, tmp_path):
    """Of any: it ends with the bits of a group that nobody disturbed."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown by pytest when the test fails
    dice = random.Random(seed)
    engine = Engine(processes=3)
    three = with_engine(job("classification"), engine, **SENSITIVE, iterations=60, batch_size=6, checkpoint_every=1)
    killed = []

    def kill() -> None:
        while not list(two_nodes.workplace.output.rglob("iter_*.pth")):
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 1))
        workers = psutil.Process().children(recursive=True)
        victim = dice.choice([each for each in workers if "spawn_main" in " ".join(each.cmdline())])
        victim.kill()
        killed.append(victim.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    (record,) = two_nodes([three]).values()
    killer.join()
    assert killed
    assert record.status == "done", record.reason
    assert record.details["resumed_from"]
    alone = measure(three, Context(tmp_path / "alone", tmp_path / "data"))
    assert record.details["weights_sha256"] == alone.details["weights_sha256"]
    assert record.metrics == alone.metrics


GROUP = ["suite.benchmarks.classification.recipe.batch_size=10", "suite.benchmarks.classification.recipe.mixup={}"]


@pytest.mark.parametrize(
    ("plan", "overrides", "said"),
    [
        (
            True,
            ["suite.speed.device=cuda", "suite.speed.gpu_type=H200", "stages=[speed]"],
            "speed test_mit (classification) needs a GPU of the type H200, and the cluster has 4 (H100); "
            "change suite.speed.device=cuda and suite.speed.gpu_type=H200, or add nodes (",
        ),
        (
            False,
            ["suite.benchmarks.classification.recipe.engine.processes=5", *GROUP, "stages=[train]"],
            "train test_mit (classification) needs 5 GPUs, and the cluster has 4 (H100); "
            "change recipe.engine.processes=5, or add nodes (",
        ),
    ],
)
def test_gpus_that_the_cluster_has_not(plan, overrides, said, address, monkeypatch, command_line, capsys):
    """One line before anything runs, rather than a run that waits for ever."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: `main` sets it
    monkeypatch.setattr("sys.argv", ["run.py"])
    arguments = command_line.command("models=[test_mit]", "cluster=auto", f"plan={plan}", *overrides)[2:]
    assert run.main(arguments) == 1
    printed, error = capsys.readouterr()
    assert error.startswith(f"error: {said}")
    assert len(error.strip().splitlines()) == 1
    assert ("needs" in printed) == plan
    assert not (command_line.output / "ledger").exists()
