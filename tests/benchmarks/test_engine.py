"""Training is exactly resumable, its data depend on seed and step alone, and nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.runner.checkpoint import CheckpointLoader

from benchmarks import engine
from benchmarks.checkpoints import AtomicBackend, newest_checkpoint
from benchmarks.checkpoints import install as install_engine
from benchmarks.draws import (
    NumberedSampler,
    SeededDataset,
    seeded,
)
from benchmarks.engine import Context
from benchmarks.job import Job, Recipe, SpeedSettings, scheduling
from benchmarks.measure import measure

DATA = {"train": 40, "validation": 20}


def job(task: str, **changes) -> Job:
    recipe = {
        "iterations": 8,
        "batch_size": 4,
        "warmup_iterations": 2,
        "checkpoint_every": 3,
        "learning_rate": 1e-3,
        "drop_path_rate": 0.3,
        "label_smoothing": 0.1,
    }
    segmentation = task == "segmentation"
    if segmentation:
        recipe["augmentation"] = {
            "resize": [64, 64],
            "ratio_range": [0.5, 2.0],
            "flip": 0.5,
            "photometric_distortion": True,
        }
    else:
        recipe["augmentation"] = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "color_jitter": 0.4}
    settings = {
        "stage": "train",
        "task": task,
        "label": "test_hivit",
        "model": "test_hivit",
        "input_size": (32, 32),
        "num_classes": 11 if segmentation else 10,
        "head": "segformer" if segmentation else None,
        "data": f"digit_scenes_{task}",
        "data_version": 1,
        "data_options": DATA,
        "recipe": Recipe(**recipe),
    }
    return Job(**settings | changes)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


class Killed(BaseException):
    """Stands for a kill in the middle of a training: nothing catches it."""


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_an_interrupted_training_ends_in_the_same_bits(task, data_root, tmp_path):
    whole = measure(job(task), Context(tmp_path / "whole", data_root))

    def kill(state):
        if state["fraction"] > 0.8:  # after the checkpoints of iterations 3 and 6
            raise Killed

    with pytest.raises(Killed):
        measure(job(task), Context(tmp_path / "broken", data_root, progress=kill))
    torch.manual_seed(999)  # another process would have another state
    np.random.seed(999)  # noqa: NPY002
    resumed = measure(job(task), Context(tmp_path / "broken", data_root))
    assert resumed.details["resumed_from"] == "iter_6.pth"
    assert resumed.details["weights_sha256"] == whole.details["weights_sha256"]
    assert resumed.metrics == whole.metrics
    assert not list((tmp_path / "broken").rglob("iter_*.pth"))


def test_seeds_matter(data_root, tmp_path):
    first, second = (
        measure(job("classification", seed=seed), Context(tmp_path / str(seed), data_root)) for seed in (0, 1)
    )
    assert first.details["weights_sha256"] != second.details["weights_sha256"]


def test_every_draw_depends_on_its_number_alone():
    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return index, random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    dataset = SeededDataset(Noise(), seed=7)
    first = [dataset[number, number % 3] for number in range(6)]
    assert first == [dataset[number, number % 3] for number in range(6)]
    assert len({draw[1:] for draw in first}) == 6
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with seeded(1, 2):
        torch.rand(3)
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())


def test_numbered_sampler_skips_to_the_same_stream():
    def first(sampler, count):
        stream = iter(sampler)
        return [next(stream) for _ in range(count)]

    whole = first(NumberedSampler(range(5), seed=3), 20)
    assert [number for number, _ in whole] == list(range(20))
    assert [index for _, index in whole] == first(InfiniteSampler(range(5), seed=3), 20)
    skipped = NumberedSampler(range(5), seed=3)
    skipped.skip(12)
    assert first(skipped, 8) == whole[12:]


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    target = tmp_path / "folder" / "iter_1.pth"
    AtomicBackend().put(b"first", target)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicBackend().put(b"second", target)
    assert target.read_bytes() == b"first"
    assert sorted(path.name for path in target.parent.iterdir()) == ["iter_1.pth", "iter_1.sha256"]


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    install_engine()
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(str(tmp_path / "evil.pth"))  # as mmengine's Runner does
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "no digest"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, damage):
    for number in (3, 6, 12):
        AtomicBackend().put(bytes(range(200)) * number, tmp_path / f"iter_{number}.pth")
    newest = tmp_path / "iter_12.pth"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[1000] ^= 1
        newest.write_bytes(content)
    elif damage == "cut":
        newest.write_bytes(content[:-1])
    else:
        newest.with_suffix(".sha256").unlink()
    said = []
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "iter_6.pth"
    assert said == [f"the checkpoint {newest} is damaged: set aside as iter_12.damaged"]


def test_a_kill_between_the_last_checkpoint_and_the_weights(data_root, tmp_path, monkeypatch):
    nine = job("classification")
    nine = dataclasses.replace(nine, recipe=dataclasses.replace(nine.recipe, iterations=9))
    whole = measure(nine, Context(tmp_path / "whole", data_root))

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_weights", kill)
        with pytest.raises(Killed):
            measure(nine, Context(tmp_path / "broken", data_root))
    resumed = measure(nine, Context(tmp_path / "broken", data_root))
    assert resumed.details["resumed_from"] == "iter_9.pth"
    assert resumed.details["weights_sha256"] == whole.details["weights_sha256"]
    assert resumed.metrics == whole.metrics  # the mean of the last losses, too


def test_a_loss_that_is_not_a_number_ends_the_training_before_it_is_kept(data_root, tmp_path):
    wild = job("classification")
    wild = dataclasses.replace(wild, recipe=dataclasses.replace(wild.recipe, learning_rate=1e30, checkpoint_every=1))
    with pytest.raises(FloatingPointError, match="the loss became nan at iteration"):
        measure(wild, Context(tmp_path, data_root))
    for path in tmp_path.rglob("iter_*.pth"):
        assert np.isfinite(torch.load(path, weights_only=True)["losses"]).all()


def test_scheduling_puts_longer_jobs_first():
    macs = {("classification", "test_hivit"): 1e9}
    longer = job("classification", recipe=Recipe(iterations=1000))
    shorter = job("classification", recipe=Recipe(iterations=10))
    assert scheduling(longer, macs)["seconds"] > scheduling(shorter, macs)["seconds"]
    speed = job("classification", stage="speed", recipe=None, speed=SpeedSettings())
    assert scheduling(speed, macs)["alone"]
