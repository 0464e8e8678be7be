"""Several processes train and evaluate as one does, are killed and resumed like one, and leave nothing running."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
from training_support import SENSITIVE, assert_the_same, job, kill_in_training, trained, with_engine

from benchmarks import distributed
from benchmarks.distributed import measure_in_processes
from benchmarks.engine import Context
from benchmarks.errors import Blocked, WorkerLost
from benchmarks.job import Engine
from benchmarks.measure import measure
from runners.execute import Workplace, explain, run_job

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these are for CPUs: run this file once more with CUDA_VISIBLE_DEVICES= (empty)"
)

TWO = with_engine(
    job("classification"), Engine(processes=2, accumulate=2), **SENSITIVE, iterations=30, checkpoint_every=1
)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def both(data_root, tmp_path_factory):
    """A training on two processes, started as in earnest, each in two parts per step."""
    return trained(TWO, tmp_path_factory.mktemp("two"), data_root)


@pytest.fixture
def forked(monkeypatch):
    """Processes that start in no time; a new interpreter for each would import PyTorch anew."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(distributed.multiprocessing, "get_context", lambda kind: fork)


def test_two_processes_train_as_one(both, data_root, tmp_path):
    one = trained(with_engine(TWO, Engine()), tmp_path, data_root)
    assert_the_same(both, one)
    assert both[2].details["engine"] == {"processes": 2, "accumulate": 2, "images_per_forward": 1, "device": "cpu"}
    assert one[2].details["engine"]["images_per_forward"] == 4
    assert both[2].metrics == pytest.approx(one[2].metrics, rel=1e-4)


@pytest.mark.parametrize("model", ["test_mit", "test_hivit"])
def test_gradient_checkpointing_on_two_processes(model, forked, data_root, tmp_path):
    """Both kinds of blocks that are computed twice: mmsegmentation's and those of the zoo."""
    short = with_engine(job("classification", model=model, label=model), **SENSITIVE, iterations=4)
    one = trained(with_engine(short, Engine()), tmp_path / "one", data_root)
    two = trained(
        with_engine(short, Engine(processes=2, accumulate=2, gradient_checkpointing=True)), tmp_path / "two", data_root
    )
    assert_the_same(two, one)


def test_two_processes_train_a_segmentor(forked, data_root, tmp_path):
    """Its head has batch norms, which see the images of one process: that is said."""
    (note,) = measure(with_engine(job("segmentation"), Engine(processes=2)), Context(tmp_path, data_root)).notes
    assert note.startswith("batch norms saw the images of one process only")


def test_synchronised_norms_keep_the_activations_within_them(monkeypatch):
    """timm has norms that contain the activation behind them. There is no group here: the forward is compared."""
    kept = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(distributed, "MMDistributedDataParallel", lambda model, **settings: kept.append(model))
    model = timm.create_model("regnety_002", num_classes=10).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        distributed.wrap(model)
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in kept[0].modules())
        torch.testing.assert_close(kept[0].eval()(images), expected)


def test_killed_at_any_moment_two_processes_go_on_to_the_same_bits(both, forked, data_root, tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown by pytest when the test fails
    workplace = Workplace(tmp_path / "output", data_root, "test")
    children = kill_in_training(TWO, workplace, random.Random(seed))
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    record, _ = run_job(TWO, workplace)
    assert record.status == "done"
    assert record.details["weights_sha256"] == both[2].details["weights_sha256"]
    assert record.metrics == both[2].metrics


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_two_processes_evaluate_as_one(task, forked, data_root, tmp_path, monkeypatch):
    """Fifteen batches for two, or twenty-one images: none is counted twice."""
    context = Context(tmp_path, data_root)
    options = {"train": 40, "validation": 21 if task == "segmentation" else 30}  # of ten classes, in batches of 2
    asked = with_engine(job(task, data_options=options), iterations=3)
    artifacts = measure(asked, context).artifacts
    found = []
    monkeypatch.chdir(tmp_path)
    for engine in (Engine(), Engine(processes=2)):
        evaluation = with_engine(job(task, stage="evaluate", data_options=options), engine)
        found.append(measure(evaluation, context, artifacts).metrics)
    assert found[0] == pytest.approx(found[1])
    assert not (tmp_path / ".dist_test").exists()


def test_an_error_in_one_process_is_the_jobs(forked, data_root, tmp_path):
    wild = with_engine(TWO, learning_rate=1e30)
    record, _ = run_job(wild, Workplace(tmp_path, data_root, "test"))
    assert record.status == "failed"
    assert record.reason.startswith("the loss became nan at iteration")
    log = (tmp_path / record.artifacts["log"]).read_text()
    assert "FloatingPointError" in log  # the traceback is in the job's own log


def test_a_process_that_dies_ends_the_job_and_the_others(forked, data_root, tmp_path):
    def kill(state):
        multiprocessing.active_children()[-1].kill()

    started = time.monotonic()
    with pytest.raises(WorkerLost, match=r"process \d of its group died \(signal 9\); killed, perhaps") as died:
        measure_in_processes(TWO, Context(tmp_path, data_root, progress=kill), {})
    assert explain(died.value, TWO) == str(died.value)  # no size is said to have failed
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 60


def test_progress_and_reports_reach_the_caller(forked, data_root, tmp_path):
    """Those of the first process, each once."""
    folder = Context(tmp_path, data_root).folder(TWO.key)
    (folder / "iter_3.pth").write_bytes(b"damaged")
    states, said = [], []
    measure(TWO, Context(tmp_path, data_root, progress=states.append, report=said.append))
    assert [state["fraction"] for state in states] == pytest.approx([step / 30 for step in range(1, 31)])
    assert said == [f"the checkpoint {folder / 'iter_3.pth'} is damaged: set aside as iter_3.damaged"]


def test_errors_that_cannot_travel_are_told():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    assert str(distributed._that_travels(Odd("a", "b"))) == "Odd: a b"
    blocked = Blocked("why", looked_in="there")
    assert distributed._that_travels(blocked) is blocked


def test_more_processes_than_gpus_are_refused(monkeypatch, data_root, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Blocked, match="asks for 2 processes, a GPU each, and this machine has 1"):
        measure_in_processes(TWO, Context(tmp_path, data_root), {})


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """However that goes: here it is killed while its child sleeps."""
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        child = multiprocessing.get_context("fork").Process(target=_sleep, args=(writer,))
        child.start()
        child.join()
        os._exit(0)
    child = psutil.Process(int(os.read(reader, 20)))
    with pytest.raises(psutil.TimeoutExpired):
        child.wait(0.2)  # it lives as long as its parent
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone or child.status() == psutil.STATUS_ZOMBIE


def _sleep(writer: int) -> None:
    distributed.end_with_parent()
    os.write(writer, str(os.getpid()).encode())
    time.sleep(60)
