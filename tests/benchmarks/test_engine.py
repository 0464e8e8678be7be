"""Training is exactly resumable, its data depend on seed and step alone, and nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import pickle
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.runner.checkpoint import CheckpointLoader
from training_support import SENSITIVE, assert_the_same, job, kill_in_training, trained, with_engine

import zoo
from benchmarks import checkpoints, classification, engine, loop_overhead
from benchmarks.checkpoints import AtomicBackend, install, newest_checkpoint
from benchmarks.draws import SeededDataset, StepSampler, seeded
from benchmarks.engine import Context
from benchmarks.errors import Blocked, InputError
from benchmarks.job import Engine
from benchmarks.measure import measure
from results.ledger import Ledger
from runners.execute import Workplace, explain, run_job


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
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert first[2:5] == dataset.__getitems__([(number, number % 3) for number in range(2, 5)])  # as loaders ask
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())
    assert len({draw[1:] for draw in first}) == 6
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with seeded(1, 2):
        torch.rand(3)
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())


def first(sampler, count: int) -> list:
    stream = iter(sampler)
    return [next(stream) for _ in range(count)]


def test_the_sampler_skips_to_the_same_stream():
    whole = first(StepSampler(range(5), 3, 4, 1), 20)
    assert [number for number, _ in whole] == list(range(20))
    assert [index for _, index in whole] == first(InfiniteSampler(range(5), seed=3), 20)
    skipped = StepSampler(range(5), 3, 4, 1)
    skipped.skip(12)
    assert first(skipped, 8) == whole[12:]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("size", [12, 6])
def test_a_step_is_dealt_out_in_pairs(processes, accumulate, size, monkeypatch):
    """Each image once; number i beside number i from the end, where the images of a forward are even in number."""
    shared = []
    for rank in range(processes):
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", partial(tuple, (rank, processes)))
        draws = first(StepSampler(range(7), 3, size, accumulate), 2 * size // processes)
        shared.append([number for number, _ in draws])
    each = size // (processes * accumulate)
    for step in range(2):
        mine = slice(step * accumulate * each, (step + 1) * accumulate * each)
        numbers = [number - step * size for share in shared for number in share[mine]]
        assert sorted(numbers) == list(range(size))
        if each % 2 == 0:
            for start in range(0, size, each):
                forward = numbers[start : start + each]
                assert all(a + b == size - 1 for a, b in zip(forward, forward[::-1], strict=True))


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
    install()
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(str(tmp_path / "evil.pth"))  # as mmengine's Runner does
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "no digest", "empty digest"])
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
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "no digest":
        newest.with_suffix(".sha256").unlink()
    else:
        newest.with_suffix(".sha256").write_text("")
    said = []
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "iter_6.pth"
    assert said == [f"the checkpoint {newest} is damaged: set aside as iter_12.damaged"]
    for number in (3, 6):
        (tmp_path / f"iter_{number}.pth").write_bytes(b"")
    assert newest_checkpoint(tmp_path, said.append) is None  # from the start, then
    assert len(said) == 3


def test_a_kill_between_the_last_checkpoint_and_the_weights(data_root, tmp_path, monkeypatch):
    nine = job("classification")
    nine = dataclasses.replace(nine, recipe=dataclasses.replace(nine.recipe, iterations=9))
    whole = measure(nine, Context(tmp_path / "whole", data_root))

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_weights", kill)
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
        kept = torch.load(path, weights_only=True)
        assert np.isfinite(kept["losses"]).all()
        assert all(value.isfinite().all() for value in kept["state_dict"].values())


@pytest.mark.parametrize("step", [5, 7])
def test_weights_that_are_no_numbers_are_never_kept(step, data_root, tmp_path, monkeypatch):
    """A gradient overflows, the loss does not: before a checkpoint, and in the last of eight steps."""
    plain = engine.JobHook.before_train_iter

    def overflow(hook, runner, batch_idx, data_batch=None):
        plain(hook, runner, batch_idx, data_batch)
        if batch_idx == step:
            parameter = next(parameter for parameter in runner.model.parameters() if parameter.requires_grad)
            once = parameter.register_hook(lambda gradient: (once.remove(), gradient * float("inf"))[1])

    wild = with_engine(job("classification"), clip_gradient_norm=5.0)
    with monkeypatch.context() as patch:
        patch.setattr(engine.JobHook, "before_train_iter", overflow)
        with pytest.raises(FloatingPointError, match="became infinite or NaN"):
            measure(wild, Context(tmp_path, data_root))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert measure(wild, Context(tmp_path, data_root)).details["resumed_from"] == f"iter_{3 * (step // 3)}.pth"


def test_checkpoints_stay_until_the_ledger_has_the_record(data_root, tmp_path, monkeypatch):
    def kill(*arguments, **named):
        raise Killed

    workplace = Workplace(tmp_path, data_root, "test")
    with monkeypatch.context() as patch:
        patch.setattr("runners.execute.make_record", kill)
        with pytest.raises(Killed):
            run_job(job("classification"), workplace)
    record, _ = run_job(job("classification"), workplace)
    assert record.details["resumed_from"] == "iter_6.pth"
    assert not list(tmp_path.rglob("iter_*"))


@pytest.fixture(scope="module")
def plain(data_root, tmp_path_factory):
    """A sensitive training as it is without any option."""
    return trained(with_engine(job("classification"), **SENSITIVE), tmp_path_factory.mktemp("plain"), data_root)


@pytest.mark.parametrize(
    "option", [{"accumulate": 2}, {"accumulate": 4}, {"gradient_checkpointing": True}, {"channels_last": True}], ids=str
)
def test_options_change_no_number(option, plain, data_root, tmp_path):
    """Least of all the batch: the mean of its parts' gradients is the gradient of its mean."""
    found = trained(with_engine(job("classification"), Engine(**option), **SENSITIVE), tmp_path, data_root)
    assert_the_same(found, plain)
    assert found[2].details["engine"]["images_per_forward"] == 4 // option.get("accumulate", 1)


def test_options_reach_the_network(monkeypatch):
    asked = []
    monkeypatch.setattr(zoo.hivit.HiViT, "set_grad_checkpointing", lambda self, enable: asked.append("checkpointing"))
    monkeypatch.setattr(zoo.hivit.HiViT, "compile", lambda self: asked.append("compile"))
    options = Engine(gradient_checkpointing=True, compile=True, channels_last=True)
    asked_for = with_engine(job("classification"), options)
    model = engine._with_options(
        asked_for, classification.Classifier(classification.build_model(asked_for), asked_for.recipe)
    )
    assert asked == ["checkpointing", "compile"]
    assert model.network.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_without_gradient_checkpointing_says_so():
    asked = with_engine(job("classification"), Engine(gradient_checkpointing=True))
    with pytest.raises(InputError, match="test_hivit cannot do gradient_checkpointing"):
        engine._with_options(asked, torch.nn.Linear(1, 1))


def test_bfloat16_trains_and_is_another_job(plain, data_root, tmp_path):
    half = with_engine(job("classification", precision="bfloat16"), **SENSITIVE)
    losses, weights, _ = trained(half, tmp_path, data_root)
    assert losses == pytest.approx(plain[0], rel=0.05)  # bfloat16 has three digits
    assert losses != pytest.approx(plain[0], rel=1e-6)
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert half.key != with_engine(job("classification"), **SENSITIVE).key


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_without_a_gpu_says_so(data_root, tmp_path):
    with pytest.raises(Blocked, match="float16 needs a GPU"):
        measure(job("classification", precision="float16"), Context(tmp_path, data_root))


def test_curves_are_tensorboards_and_the_record_names_them(data_root, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses, _, outcome = trained(job("classification"), tmp_path, data_root)
    (events,) = (tmp_path / outcome.artifacts["curves"]).rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload().Scalars("loss")
    assert [event.value for event in found] == pytest.approx(losses)
    assert [event.step for event in found] == list(range(1, 9))


def test_weights_and_biases_is_never_contacted_unless_asked(data_root, tmp_path, monkeypatch):
    assert not any(backend["type"] == "WandbVisBackend" for backend in engine._curves(job("classification")))
    asked = with_engine(job("classification"), Engine(wandb="project"))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb is not installed; pip install .*\[wandb\]"):
        measure(asked, Context(tmp_path, data_root))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    (backend,) = (backend for backend in engine._curves(asked) if backend["type"] == "WandbVisBackend")
    assert backend["init_kwargs"] == {"project": "project", "name": asked.key}


def test_two_checkpoints_are_kept_and_no_digest_without_one(data_root, tmp_path):
    seen = []

    def look(state):
        names = sorted(path.name for path in tmp_path.rglob("iter_*"))
        seen.append(names)

    measure(with_engine(job("classification"), checkpoint_every=1), Context(tmp_path, data_root, progress=look))
    assert seen[-1] == ["iter_6.pth", "iter_6.sha256", "iter_7.pth", "iter_7.sha256"]
    look(None)
    assert seen[-1] == ["iter_7.pth", "iter_7.sha256", "iter_8.pth", "iter_8.sha256"]  # until the ledger has the record


def test_killed_at_any_moment_with_any_number_of_loading_processes(data_root, tmp_path):
    """SIGKILL of a real process that loads with two more, and accumulates: the same bits, and nothing left running."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown by pytest when the test fails
    asked = with_engine(job("classification"), Engine(accumulate=2), iterations=30, checkpoint_every=1)
    whole = measure(asked, Context(tmp_path / "whole", data_root))
    workplace = Workplace(tmp_path / "broken", data_root, "test")
    kill_in_training(with_engine(asked, workers=2), workplace, random.Random(seed))
    record, _ = run_job(with_engine(asked, workers=2), workplace)
    assert record.status == "done"
    assert record.details["weights_sha256"] == whole.details["weights_sha256"]
    assert record.metrics == whole.metrics
    assert record.artifacts["log"] == f"jobs/{asked.key}/log.txt"


def test_too_little_memory_is_a_record_with_the_size_that_failed(data_root, tmp_path, monkeypatch):
    """A forward that asks for four petabytes."""
    monkeypatch.setattr(classification.Classifier, "forward", lambda *arguments, **keywords: torch.empty(10**15))
    record, _ = run_job(job("classification"), Workplace(tmp_path, data_root, "test"))
    assert record.status == "failed"
    assert record.reason == (
        "out of memory for 4 images of 32x32: 4000000000000000 bytes could not be had; "
        "raise recipe.engine.accumulate, lower the input size, or free memory"
    )
    assert record.details["out_of_memory"] == {"images": 4, "input_size": [32, 32]}
    assert Ledger(tmp_path / "ledger").get(record.key) == record


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), "2.00 GiB could not"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 12 bytes. E"),
            "12 bytes could",
        ),
        (RuntimeError("CUDA error: out of memory"), "CUDA error"),
        (MemoryError(), "MemoryError"),
    ],
    ids=["GPU", "CPU", "driver", "Python"],
)
def test_every_kind_of_too_little_memory_is_known(error, said):
    line = explain(error, job("segmentation"))
    assert line.startswith(f"out of memory for 4 images of 32x32: {said}")
    assert "\n" not in line
    assert not explain(ValueError("bad value")).startswith("out of memory")


def test_the_loops_overhead_is_measured(data_root, monkeypatch):
    """The three loops train on the same images, and a step that waits costs what it waits."""
    short = with_engine(job("classification"), iterations=100, clip_gradient_norm=5.0)
    seconds = loop_overhead.compare(short, data_root, steps=4)
    assert {name: len(steps) for name, steps in seconds.items()} == {"engine": 4, "loader": 4, "memory": 4}
    slow = engine.JobHook.after_train_iter
    monkeypatch.setattr(engine.JobHook, "after_train_iter", lambda *a, **k: (time.sleep(0.2), slow(*a, **k)))
    slowed = loop_overhead.compare(short, data_root, steps=4)
    assert min(slowed["engine"]) > 0.2
    assert loop_overhead.overhead(slowed["engine"], slowed["loader"]) > 50
    assert loop_overhead.overhead([2.0, 2.1, 9.0], [2.0, 2.0, 3.0]) == pytest.approx(5.0)
