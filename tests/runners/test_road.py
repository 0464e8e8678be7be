"""The whole road in miniature, as real processes: run it, run it again, kill it, damage it, run it twice at once."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.cluster_utils import Cluster as RayCluster
from tests_support import CommandLine, comparable

from results.ledger import Ledger
from results.record import Record
from runners import ray_executor, run, view

JOBS = 2 * 2 * 4  # models x tasks x stages
BUSY = ("ray::speed", "ray::train", "ray::evaluate")  # how Ray calls a worker while it has a job
STAGES = "stages=[cost,speed,train,evaluate]"  # all but the report
# One of the two segmentations starts from a classification; timings have more threads than Ray gives its workers.
SUITE = """
defaults: [demo, _self_]
speed: {threads: 3}
benchmarks:
  classification: {models: {test_hivit: {}, test_mit: {}}}
  segmentation: {models: {test_hivit: {}, test_mit: {initialize_from: classification/test_mit}}}
"""


def records(output: Path) -> dict[str, Record]:
    ledger = Ledger(output / "ledger")
    found = {record.key: record for record in ledger.records()}
    assert not ledger.reports
    return found


def scores(output: Path) -> dict[str, dict[str, float]]:
    """What does not depend on the machine's speed, by job."""
    return {key: record.metrics for key, record in records(output).items() if record.stage != "speed"}


def weights(output: Path) -> dict[str, str]:
    return {key: r.details["weights_sha256"] for key, r in records(output).items() if r.stage == "train"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> CommandLine:
    """The suite, run once in one process and left alone."""
    suite = tmp_path_factory.mktemp("conf") / "suite" / "road.yaml"
    suite.parent.mkdir()
    suite.write_text(SUITE)
    settings = ["--config-dir", str(suite.parent.parent), "suite=road"]
    line = CommandLine(tmp_path_factory.mktemp("undisturbed"), settings)
    line.printed = line.run("executor=inline")
    return line


@pytest.fixture
def started(command_line, undisturbed):
    """A command line that shares the data, but nothing else, with the undisturbed run."""
    command_line.settings = undisturbed.settings
    (command_line.folder / "data").symlink_to(undisturbed.folder / "data")
    return command_line


def test_everything_is_there(undisturbed):
    found = records(undisturbed.output)
    assert len(found) == JOBS
    assert {record.status for record in found.values()} == {"done"}
    for name in ("report.html", "plots/overview.png", "plots/overview.svg", "tables/segmentation.csv"):
        assert (undisturbed.output / name).stat().st_size > 100
    for kind in ("classification", "segmentation", "cost"):
        for suffix in ("csv", "md", "tex"):
            assert (undisturbed.output / "tables" / f"{kind}.{suffix}").exists()
        assert (undisturbed.output / f"leaderboard_{kind}.csv").exists()
    for kind in ("classification", "segmentation"):
        lines = (undisturbed.output / f"leaderboard_{kind}.csv").read_text().splitlines()
        assert len(lines) == 1 + 2  # a row for each model: its cost, speed and score belong together
        assert "not run" not in "".join(lines)
    for record in found.values():
        assert (undisturbed.output / record.artifacts["log"]).exists()
        for fact in ("revision", "command", "versions", "hardware", "started", "seconds"):
            assert fact in record.provenance
    assert not list((undisturbed.output / "progress").iterdir())
    assert "Complete: 16 jobs run" in undisturbed.printed
    assert "trivial baseline" in undisturbed.printed


def test_trivial_baselines_are_those_of_the_labels(undisturbed):
    evaluated = [record for record in records(undisturbed.output).values() if record.stage == "evaluate"]
    for record in evaluated:
        if record.task == "classification":
            assert record.metrics["baseline_top1"] == pytest.approx(10.0)  # ten classes, equally often
        else:
            background = 11 * record.metrics["baseline_mIoU"] / 100  # the other ten classes have an IoU of 0
            assert 0.5 < background < 0.95


def test_again_computes_nothing(undisturbed):
    before = {path: path.read_bytes() for path in (undisturbed.output / "ledger").glob("*.json")}
    started = time.monotonic()
    printed = undisturbed.run()  # the executor is not part of a job: Ray would find nothing to do either
    assert time.monotonic() - started < 15
    assert "Nothing was left to compute: all 16 jobs were done." in printed
    assert before == {path: path.read_bytes() for path in (undisturbed.output / "ledger").glob("*.json")}


def copy_records(undisturbed: CommandLine, started: CommandLine, *patterns: str) -> set[str]:
    """Has the jobs with such keys done, as if `started` had run them; returns their keys."""
    for path in (path for pattern in patterns for path in undisturbed.output.glob(f"*/{pattern}")):
        if path.parent.name in ("ledger", "jobs"):
            place = started.output / path.parent.name / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, place)
    return set(records(started.output))


@pytest.fixture
def run_here(started, monkeypatch, capsys):
    """As `started.run`, but in this process, which has the libraries already."""

    def run_here(*overrides: str) -> str:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: `main` sets it
        monkeypatch.setattr("sys.argv", ["run.py"])
        assert run.main(started.command(*overrides, STAGES)[2:]) == 0
        return capsys.readouterr().out

    return run_here


def test_ray_gives_the_same_records_and_a_new_model_runs_alone(started, undisturbed, run_here):
    """On this machine, and beside what is there already, which stays as it is."""
    copy_records(undisturbed, started, "*-cla-test_hivit-*")
    before = {path: path.read_bytes() for path in (started.output / "ledger").iterdir()}
    assert len(before) == 4
    assert "Complete: 12 jobs run, 4 were done before" in run_here()
    assert {path: path.read_bytes() for path in before} == before
    assert comparable(started.output) == comparable(undisturbed.output)


@pytest.fixture
def two_nodes(monkeypatch) -> Iterator[None]:
    """A Ray cluster of two nodes on this machine, open to those alone who have its token."""
    with monkeypatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "")  # what follows sets it: to be taken back
        patch.delenv("RAY_AUTH_MODE")
        enable_token_auth_by_default()
        ensure_token_if_auth_enabled()
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        cluster = RayCluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        cluster.add_node(**node)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield
        cluster.shutdown()


def that_says_where_it_is():
    """Stands within a function: so it travels to the workers, which do not know this file."""

    def watched(job, workplace):
        import os

        import ray
        import torch
        from torch.nn.modules.module import register_module_forward_pre_hook

        from runners.execute import run_job

        seen = set()
        hook = register_module_forward_pre_hook(lambda module, inputs: seen.add(torch.get_num_threads()))
        try:
            record, messages = run_job(job, workplace)
        finally:
            hook.remove()
        threads = f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, used {sorted(seen)}"
        return record, [*messages, f"{job.title} on {ray.get_runtime_context().get_node_id()}: {threads}"]

    return watched


@pytest.mark.skipif(torch.cuda.is_available(), reason="workers would look for the GPUs that are not there")
def test_two_nodes_give_the_same_records(two_nodes, started, undisturbed, run_here, tmp_path, monkeypatch):
    """With the threads that timings ask for, though Ray gives its workers other numbers; the progress of the jobs of
    both nodes is shown. Meanwhile two others knock: one does not say that it has a token, the other has none.
    """
    strangers = []
    for mode in ({}, {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}):
        with monkeypatch.context() as patch:
            patch.delenv("RAY_AUTH_MODE")
            patch.setenv("RAY_NUM_REDIS_GET_RETRIES", "2")  # seconds that it goes on knocking
            for name, value in mode.items():
                patch.setenv(name, value)
            strangers.append(started.start("cluster=auto", f"output={tmp_path / 'stranger'}"))

    monkeypatch.setattr(ray_executor, "run_job", that_says_where_it_is())
    monkeypatch.setattr(view, "SECONDS_BETWEEN_LINES", 0.05)
    lines = run_here("cluster=auto").splitlines()
    expected = comparable(undisturbed.output)
    assert comparable(started.output) == expected
    assert [found["details"]["threads"] for found in expected.values() if found["stage"] == "speed"] == [3] * 4
    assert sum("starts_from" in found["job"] for found in expected.values()) == 2  # a training and its evaluation

    said = [re.fullmatch(r"! (.+) on (\w+): OMP_NUM_THREADS=(\w+), used (.+)", line) for line in lines]
    jobs = {found[1]: found for found in said if found}
    assert len(jobs) == JOBS - 4  # all but the counts, which are this process's
    for title, found in jobs.items():
        assert found[3] != "3"
        assert found[4] == ("[3]" if title.startswith("speed") else "[1]")
    running = [{jobs[title][2] for title in jobs if title in line} for line in lines if " running · " in line]
    assert any(len(nodes) == 2 for nodes in running)
    assert any(" running · " in line and "loss " in line for line in lines)

    for stranger in strangers:
        printed, _ = stranger.communicate(timeout=120)
        assert stranger.returncode == 1
        assert len(printed.strip().splitlines()) == 2  # the name of the suite before it
        line = printed.strip().splitlines()[-1]
        assert line.startswith("error: cluster=auto: the Ray cluster at RAY_ADDRESS=")
        assert "'ray get-auth-token --generate' made it" in line
    assert not (tmp_path / "stranger" / "ledger").exists()


def worker_with_a_job(process: subprocess.Popen, dice: random.Random) -> psutil.Process:
    """One of the Ray workers of a run that have a job, as soon as there is any."""
    deadline = time.monotonic() + 120
    while True:
        children = psutil.Process(process.pid).children(recursive=True)
        if workers := [each for each in children if _name(each).startswith(BUSY)]:
            return dice.choice(workers)
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def test_kill_at_any_moment_and_start_again(started, undisturbed):
    """kill -9, at random moments: nothing is lost, doubled or half-written."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown by pytest when the test fails
    dice = random.Random(seed)
    kills = 0
    for _ in range(4):
        process = started.start("executor=inline")
        try:
            process.wait(timeout=dice.uniform(2, 8))
            process.communicate()
            break
        except subprocess.TimeoutExpired:
            done_before = set(records(started.output)) if started.output.exists() else set()
            process.kill()
            kills += 1
            process.communicate()
            assert done_before <= set(records(started.output))
    started.run("executor=inline")
    assert kills
    assert_as_undisturbed(started, undisturbed)


def test_kill_a_worker_then_the_run_and_start_again(started, undisturbed):
    """kill -9 of a Ray worker with a job, and of the run somewhat later, which goes on with that job meanwhile."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown by pytest when the test fails
    dice = random.Random(seed)
    copy_records(undisturbed, started, "cost-*", "speed-*")
    process = started.start(STAGES)
    worker_with_a_job(process, dice)
    time.sleep(dice.uniform(0, 3))
    worker_with_a_job(process, dice).kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=dice.uniform(0, 15))
    done_before = set(records(started.output))
    process.kill()
    process.communicate()
    assert done_before <= set(records(started.output))
    started.run(STAGES)
    assert_as_undisturbed(started, undisturbed)


def assert_as_undisturbed(started: CommandLine, undisturbed: CommandLine) -> None:
    assert scores(started.output) == scores(undisturbed.output)
    assert weights(started.output) == weights(undisturbed.output)  # resumed trainings end in the same bits
    assert not (started.output / "ledger" / "damaged").exists()


def test_two_runs_at_once(started, undisturbed):
    runs = [started.start("executor=inline") for _ in range(2)]
    printed = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(printed)
    assert scores(started.output) == scores(undisturbed.output)
    # Each job was done once: every log has one start of a training.
    for log in started.output.glob("jobs/train-*/log.txt"):
        assert log.read_text().count("Iter(train) [12/12]") == 1


def test_damage_is_reported_and_mended(started, undisturbed):
    copy_records(undisturbed, started, "*-test_mit-*")
    ledger = started.output / "ledger"
    cost = next(ledger.glob("cost-cla-test_mit-*.json"))
    cost.write_text(cost.read_text()[:-40])
    evaluated = next(ledger.glob("evaluate-cla-test_mit-*.json"))
    record = json.loads(evaluated.read_text())
    record["record"]["metrics"]["top1"] += 1.0  # a flipped digit
    evaluated.write_text(json.dumps(record))
    next(ledger.glob("evaluate-seg-test_mit-*.json")).unlink()
    damaged_weights = next(started.output.glob("jobs/train-seg-test_mit-*/weights.safetensors"))
    damaged_weights.write_bytes(damaged_weights.read_bytes()[:-10])
    plan = started.run("plan=true", "models=[test_mit]")
    assert plan.count("to do") == 4  # two records damaged, one gone, one without its weights
    assert len(list(ledger.glob("train-*.json"))) == 2  # a plan takes no record away that can be read
    printed = plan + started.run("executor=inline", "models=[test_mit]")
    for path in (cost, evaluated, damaged_weights):
        assert str(path) in printed
    assert "is trained again" in printed
    assert len(list((ledger / "damaged").glob("*.json"))) == 3
    expected = {key: value for key, value in scores(undisturbed.output).items() if "test_mit" in key}
    assert scores(started.output) == expected


def kill_after_a_checkpoint(started: CommandLine) -> list[Path]:
    """Kills a run once a training has written a checkpoint and is not done; returns its checkpoints, oldest first."""
    for _ in range(5):
        process = started.start("executor=inline", "models=[test_mit]", "stages=[train]")
        while process.poll() is None and not list(started.output.glob("jobs/train-*/iter_*.pth")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = list(started.output.glob("jobs/train-*/iter_*.pth"))
        if found:
            return sorted(found, key=lambda path: int(path.stem.removeprefix("iter_")))
        shutil.rmtree(started.output)  # the training was faster than the kill
    raise AssertionError("no training could be caught between its first checkpoint and its end")


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_training_goes_on_from_its_last_whole_checkpoint(started, undisturbed, damaged):
    checkpoints = kill_after_a_checkpoint(started)
    newest = checkpoints[-1]
    if damaged:
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        checkpoints.pop()
    printed = started.run("executor=inline", "models=[test_mit]", "stages=[train]")
    assert (f"the checkpoint {newest} is damaged" in printed) == damaged
    record = records(started.output)[newest.parent.name]
    assert record.details["resumed_from"] == (checkpoints[-1].name if checkpoints else None)
    expected = {key: value for key, value in scores(undisturbed.output).items() if key in scores(started.output)}
    assert scores(started.output) == expected
    assert len(expected) == 2
    assert not list(newest.parent.glob("*.tmp"))


def test_the_report_is_on_the_whole_ledger(undisturbed):
    """A run of some stages or models does not take the others out of the tables."""
    before = (undisturbed.output / "leaderboard_segmentation.csv").read_bytes()
    undisturbed.run("executor=inline", "stages=[report]")
    undisturbed.run("executor=inline", "stages=[cost,report]", "models=[test_mit]")
    assert (undisturbed.output / "leaderboard_segmentation.csv").read_bytes() == before


def test_damaged_data_are_remade(started, undisturbed):
    copy_records(undisturbed, started, "train-*-test_mit-*")
    (started.folder / "data").unlink()
    shutil.copytree(undisturbed.folder / "data", started.folder / "data")
    folder = next((started.folder / "data").glob("digit_scenes_segmentation*"))
    image = next(folder.glob("images/training/*.jpg"))
    image.write_bytes(b"not an image")
    printed = started.run("executor=inline", "models=[test_hivit]", "stages=[train]")
    assert folder.name in printed
    assert image.read_bytes() != b"not an image"
    expected = weights(undisturbed.output)
    assert weights(started.output) == expected


def test_an_error_of_one_job_does_not_stop_the_others(started, undisturbed):
    """A loss that becomes infinite, weights of terabytes: those jobs fail with a reason, the rest is complete."""
    copy_records(undisturbed, started, "*-cla-test_mit-*", "cost-seg-*", "speed-seg-*")
    printed = started.run(
        STAGES,
        "+suite.benchmarks.classification.models.test_hivit.config.mlp_ratio=1e9",
        "suite.benchmarks.segmentation.recipe.learning_rate=1e30",
        "suite.benchmarks.segmentation.recipe.clip_gradient_norm=null",
        status=2,
    )
    for model in ("test_mit", "test_hivit"):
        assert f"Failed: train {model} (segmentation): the loss became" in printed
    assert "Failed: speed test_hivit (classification): out of memory for 1 image of 32x32: " in printed
    assert "Failed: train test_hivit (classification): out of memory for 4 images of 32x32: " in printed
    assert "Traceback" not in printed
    by_status = [record.status for record in records(started.output).values()]
    assert by_status.count("failed") == 4
    assert by_status.count("done") == 9
    assert "Incomplete: 7 of 16 jobs have no result" in printed
