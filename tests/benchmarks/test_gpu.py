"""What only a GPU shows: mixed precision, nccl, memory and speed. Skipped, with a message, where there is none."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file
from training_support import SENSITIVE, assert_the_same, curve, job, trained, with_engine

from benchmarks.distributed import measure_in_processes
from benchmarks.engine import Context
from benchmarks.job import Engine
from benchmarks.measure import measure
from runners.execute import Workplace, run_job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

SIZE = (256, 256)  # pixels: large enough for a GPU to be busy


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def large(**changes):
    """A training that a GPU notices: HiViT-T, 32 images of 256 pixels."""
    return with_engine(
        job("classification", model="hivit_tiny", label="hivit_tiny", input_size=SIZE, **changes),
        batch_size=32,
        iterations=12,
    )


def test_a_training_runs_on_the_gpu_and_tells_its_memory(data_root, tmp_path):
    outcome = measure(job("segmentation"), Context(tmp_path, data_root))
    how = outcome.details["engine"]
    assert how["device"] == torch.cuda.get_device_name()
    assert how["peak_gpu_memory_mb"] > 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_to_nearly_the_same_losses(precision, data_root, tmp_path):
    whole = trained(with_engine(job("classification"), **SENSITIVE), tmp_path / "float32", data_root)
    half = trained(with_engine(job("classification", precision=precision), **SENSITIVE), tmp_path / "half", data_root)
    assert half[0] == pytest.approx(whole[0], rel=0.05)
    assert half[0] != pytest.approx(whole[0], rel=1e-6)
    assert {value.dtype for value in half[1].values() if value.is_floating_point()} == {torch.float32}


def test_mixed_precision_is_faster_and_smaller(data_root, tmp_path):
    seconds, memory = {}, {}
    for precision in ("float32", "bfloat16"):
        measure(large(precision=precision), Context(tmp_path / "first" / precision, data_root))  # loads the kernels
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        outcome = measure(large(precision=precision, seed=1), Context(tmp_path / precision, data_root))
        seconds[precision] = time.monotonic() - started
        memory[precision] = outcome.details["engine"]["peak_gpu_memory_mb"]
    print(seconds, memory)
    assert memory["bfloat16"] < memory["float32"]
    assert seconds["bfloat16"] < 1.1 * seconds["float32"]  # loading the images is part of both


def test_gradient_checkpointing_takes_less_memory(data_root, tmp_path):
    memory = {}
    for checkpointing in (False, True):
        torch.cuda.reset_peak_memory_stats()
        asked = with_engine(large(), Engine(gradient_checkpointing=checkpointing))
        how = measure(asked, Context(tmp_path / str(checkpointing), data_root)).details["engine"]
        memory[checkpointing] = how["peak_gpu_memory_mb"]
    assert memory[True] < 0.8 * memory[False]


def test_compile_changes_no_number(data_root, tmp_path):
    plain = trained(with_engine(job("classification"), **SENSITIVE), tmp_path / "plain", data_root)
    compiled = with_engine(job("classification"), Engine(compile=True), **SENSITIVE)
    assert_the_same(trained(compiled, tmp_path / "compiled", data_root), plain)


def test_too_little_gpu_memory_is_a_record(data_root, tmp_path):
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        record, _ = run_job(large(), Workplace(tmp_path, data_root, "test"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert record.status == "failed"
    assert record.reason.startswith("out of memory for 32 images of 256x256: ")


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_group_of_one_gpu_trains_as_none(task, data_root, tmp_path):
    """nccl, synchronised norms and all that several GPUs need, on the one that every machine here has."""
    asked = with_engine(job(task), **SENSITIVE)
    plain = trained(asked, tmp_path / "plain", data_root)
    context = Context(tmp_path / "group", data_root)
    outcome = measure_in_processes(asked, context, {})
    weights = load_file(context.output / outcome.artifacts["weights"])
    assert_the_same((curve(context.output), weights, outcome), plain)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU on this machine")
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_two_gpus_train_as_one(task, data_root, tmp_path):
    """The segmentor has batch norms: their statistics are those of the whole batch."""
    sensitive = {**SENSITIVE, "augmentation": {}}
    one = trained(with_engine(job(task), **sensitive), tmp_path / "one", data_root)
    two = trained(with_engine(job(task), Engine(processes=2), **sensitive), tmp_path / "two", data_root)
    assert_the_same(two, one)
