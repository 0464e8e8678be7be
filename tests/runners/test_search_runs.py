"""Searches as real processes: killed, on a cluster that loses a node, in trials of several processes."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import shutil
import sys
import time

import psutil
import pytest
import torch
from omegaconf import OmegaConf
from ray.cluster_utils import Cluster as RayCluster
from tests_support import MINIATURE, configuration

from benchmarks.job import Recipe
from results.ledger import Ledger
from runners import run
from runners.execute import Workplace, run_job
from runners.plan import trainings
from runners.trials import draw_trials


def records(output):
    return {record.key: record for record in Ledger(output / "ledger").records()}


def kill_in_trial(command_line, folder, *options: str) -> None:
    """Kills (SIGKILL) the driver of a search when a trial has its first checkpoint in `folder`.

    Nothing of the search may listen to other machines.
    """
    printed = ""
    for _ in range(3):
        process = command_line.start(*options)
        while process.poll() is None and not folder.exists():
            time.sleep(0.002)
        if process.poll() is None:
            listening = set()
            for each in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended
                    found = [c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                    listening |= {(each.name(), address) for address in found}
            assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
            assert {address for _, address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
        while process.poll() is None and not list(folder.glob("iter_*.pth")):
            time.sleep(0.002)
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        printed = process.communicate()[0]
        psutil.wait_procs(family, timeout=20)
        if list(folder.glob("iter_*.pth")):
            return
        shutil.rmtree(command_line.output)  # the trial was faster than the kill
    raise AssertionError(f"no trial could be caught between its first checkpoint and its end\n{printed}")


def test_a_search_that_is_killed_goes_on(command_line, tmp_path, capsys, monkeypatch):
    """kill -9 of the driver in a trial: what was done stays, the trial goes on, a hopeless one is stopped early."""
    options = [
        *("search=asha", "search.scores=3", "search.concurrent=1", "models=[test_mit]"),
        "suite.benchmarks.classification.stages=[cost]",
        *("~search.space.drop_path_rate", "~search.space.batch_size"),
        # Trial 1 learns nothing: it is behind trial 0 from the first score on.
        *("search.space.learning_rate.low=1e-6", "search.space.learning_rate.high=1e-5"),
    ]
    output = command_line.output
    _, _, chain = trainings(configuration(*MINIATURE, *options))[0]
    asked = configuration(*MINIATURE, *options).search
    first, second, third = draw_trials(dataclasses.replace(asked, trials=3), chain[-1])
    folder = output / "jobs" / first.key
    kill_in_trial(command_line, folder, *options, "search.trials=2")
    assert not records(output)

    printed = command_line.run(*options, "search.trials=3")
    found = records(output)
    assert set(found) == {first.key, second.key, third.key}
    record = found[first.key]
    assert record.done
    assert record.details["resumed_from"].startswith("iter_")
    alone = run_job(first.job, Workplace(tmp_path / "alone", command_line.folder / "data", "test"))[0]
    assert record.samples == alone.samples
    assert record.details["weights_sha256"] == alone.details["weights_sha256"]
    for trial in (second, third):
        record = found[trial.key]
        assert (record.status, record.metrics["iterations"]) == ("stopped", 4)
        assert record.reason == "stopped early by asha at iteration 4 of 12"
        assert list(record.samples["iteration"]) == [4.0]
        assert not list((output / "jobs" / trial.key).glob("*.pth"))
    assert "Best: the recipe as it stands" in printed

    # Once more: nothing is left to compute. In this process, which has the libraries already.
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = {path: path.stat().st_mtime_ns for path in (output / "ledger").iterdir()}
    assert run.main(command_line.command(*options, "search.trials=3")[2:]) == 0
    assert "3 trials, 3 of them in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (output / "ledger").iterdir()} == before

    outcome = output / "search" / "segmentation_test_mit"
    rows = list(csv.DictReader((outcome / "search.csv").open()))
    assert [(row["trial"], row["state"]) for row in rows] == [
        ("0", "finished"),
        *((number, "stopped early") for number in sorted("12", key=lambda n: -float(rows_score(rows, n)))),
    ]
    assert not list((output / "search").glob(".tune"))
    best = configuration_of(outcome / "recipe" / "best.yaml")
    assert best == first.job.recipe


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="workers would look for GPUs")
@pytest.mark.parametrize("replaced", [True, False])
def test_a_search_whose_node_is_lost(command_line, monkeypatch, replaced):
    """Its trial goes on when there is another node, from its checkpoint; else the search ends, and says why."""
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # a lost node is noticed in seconds
    monkeypatch.setenv("RAY_health_check_timeout_ms", "1000")
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        process = command_line.start(
            *("search=asha", "search.scores=3", "search.trials=2", "models=[test_mit]", "cluster=auto"),
            *("suite.benchmarks.classification.stages=[cost]", "suite.benchmarks.segmentation.recipe.iterations=300"),
            "~search.space.batch_size",
        )
        while process.poll() is None and not list(command_line.output.rglob("iter_*.pth")):
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
        cluster.remove_node(node, allow_graceful=False)
        if replaced:
            cluster.add_node(num_cpus=1)
        printed, _ = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    print(printed)
    assert "Traceback" not in printed
    assert "trial 0 of test_mit (segmentation): its worker died; it goes on from its last checkpoint" in printed
    found = records(command_line.output).values()
    if replaced:
        assert process.returncode == 0, printed
        assert {record.status for record in found} <= {"done", "stopped"}
        assert any(str(record.details.get("resumed_from")).startswith("iter_") for record in found), printed
    else:
        assert process.returncode == 1, printed
        said = "trial 0 of test_mit (segmentation) needs CPUs, and the cluster has no node with any: nodes were lost; "
        assert f"error: {said}" in printed
        assert not found


@pytest.mark.long
def test_trials_of_two_processes(command_line):
    """Side by side on the CPUs of this machine; one is stopped early, and its batch can be shared."""
    recipe = "suite.benchmarks.segmentation.recipe"
    printed = command_line.run(
        *("search=asha", "search.scores=3", "search.trials=2", "models=[test_mit]"),
        "suite.benchmarks.classification.stages=[cost]",
        *("~search.space.drop_path_rate", "search.space.batch_size.values=[0.6]"),
        *("search.space.learning_rate.low=1e-6", "search.space.learning_rate.high=1e-5"),
        *(f"{recipe}.engine.processes=2", f"{recipe}.iterations=60"),
    )
    first, second = sorted(records(command_line.output).values(), key=lambda record: record.status)
    assert (first.status, first.details["engine"]["processes"]) == ("done", 2)
    assert (second.status, second.job["recipe"]["batch_size"]) == ("stopped", 2), printed
    assert second.metrics["iterations"] < second.job["recipe"]["iterations"] == 120


def rows_score(rows, number):
    return next(row["score"] for row in rows if row["trial"] == number)


def configuration_of(path) -> Recipe:
    """The recipe of a file, as Hydra reads it."""
    values = OmegaConf.load(path)
    assert values.pop("defaults") == ["schema", "_self_"]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values))
