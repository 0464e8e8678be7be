"""The whole road in miniature, as real processes: run it, run it again, kill it, damage it, run it twice at once."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tests_support import CommandLine

from results.ledger import Ledger
from results.record import Record

JOBS = 2 * 2 * 4  # models x tasks x stages


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
    line = CommandLine(tmp_path_factory.mktemp("undisturbed"))
    line.printed = line.run("executor=inline")
    return line


@pytest.fixture
def started(command_line, undisturbed):
    """A command line that shares the data, but nothing else, with the undisturbed run."""
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


def test_ray_gives_the_same_and_a_new_model_runs_alone(started, undisturbed):
    printed = started.run("models=[test_hivit]")
    assert "Complete: 8 jobs run" in printed
    before = records(started.output)
    printed = started.run("models=[test_hivit,test_mit]")
    assert "Complete: 8 jobs run, 8 were done before" in printed
    after = records(started.output)
    assert {key: after[key] for key in before} == before
    assert scores(started.output) == scores(undisturbed.output)
    assert weights(started.output) == weights(undisturbed.output)


def kill_tree(process: subprocess.Popen, only_worker: bool, dice: random.Random) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "run_job" in " ".join(_command(child)) or "ray::" in child.name()]
    if only_worker and workers:
        dice.choice(workers).kill()
    else:
        process.kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_kill_at_any_moment_and_start_again(started, undisturbed, executor):
    """kill -9, at random moments, of the driver or of a Ray worker: nothing is lost, doubled or half-written."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown by pytest when the test fails
    dice = random.Random(seed)
    kills = 0
    for _ in range(4 if executor == "inline" else 3):
        process = started.start(f"executor={executor}")
        wait = dice.uniform(2, 8) if executor == "inline" else dice.uniform(5, 15)
        try:
            process.wait(timeout=wait)
            process.communicate()
            break
        except subprocess.TimeoutExpired:
            done_before = set(records(started.output)) if started.output.exists() else set()
            kill_tree(process, only_worker=executor == "ray" and dice.random() < 0.5, dice=dice)
            kills += 1
            if process.poll() is None:  # a worker was killed: the run goes on by itself
                try:
                    process.wait(timeout=dice.uniform(5, 20))
                except subprocess.TimeoutExpired:
                    process.kill()
            process.communicate()
            assert done_before <= set(records(started.output))
    started.run(f"executor={executor}")
    assert kills
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
    started.run("executor=inline", "models=[test_mit]")
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
    (started.folder / "data").unlink()
    started.run("executor=inline", "models=[test_mit]", "stages=[train]")
    folder = next((started.folder / "data").glob("digit_scenes_segmentation*"))
    image = next(folder.glob("images/training/*.jpg"))
    image.write_bytes(b"not an image")
    printed = started.run("executor=inline", "models=[test_hivit]", "stages=[train]")
    assert folder.name in printed
    assert image.read_bytes() != b"not an image"
    expected = weights(undisturbed.output)
    assert weights(started.output) == expected


def test_an_error_of_one_job_does_not_stop_the_others(started):
    """A loss that becomes infinite, weights of terabytes: those jobs fail with a reason, the rest is complete."""
    printed = started.run(
        "executor=ray",
        "models=[test_mit,hivit_tiny]",
        "+suite.benchmarks.classification.models.hivit_tiny.config.mlp_ratio=1e8",
        "suite.benchmarks.segmentation.recipe.learning_rate=1e30",
        "suite.benchmarks.segmentation.recipe.clip_gradient_norm=null",
        status=2,
    )
    assert "Failed: train test_mit (segmentation): the loss became" in printed
    assert "Failed: speed hivit_tiny (classification): out of memory for 1 image of 32x32: " in printed
    assert "Failed: train hivit_tiny (classification): out of memory for 4 images of 32x32: " in printed
    assert "Traceback" not in printed
    by_status = [record.status for record in records(started.output).values()]
    assert by_status.count("failed") == 3
    assert by_status.count("done") == 11
    assert "Incomplete: 5 of 16 jobs have no result" in printed
