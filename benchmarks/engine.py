"""What both tasks share around mmengine's Runner: seeded data, safe checkpoints, exact resumption, progress.

An interrupted training that goes on from its last checkpoint ends with the same weights as one that was never
interrupted: the data of step n depend on the seed and n alone (`NumberedSampler`, `SeededDataset`), and the state of
the generator that dropout and drop path use travels in the checkpoint (`JobHook`).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.visualization import Visualizer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from benchmarks.job import TRAININGS, Job
from benchmarks.optimizer import build_optimizer

WEIGHTS = "weights.safetensors"
TEMPORARY = ".tmp"  # the lock of a job keeps two writers apart


@dataclass(frozen=True)
class Context:
    """Where a job may read and write, and whom it tells."""

    output: Path  # the suite's output folder
    data_root: Path  # the folder that holds the datasets
    progress: Callable[[dict[str, Any]], None] = lambda state: None  # {"fraction": 0..1, "text": "loss 1.2"}
    report: Callable[[str], None] = lambda message: None  # one line that the user should see

    def folder(self, key: str) -> Path:
        """The folder of one job's logs, checkpoints and weights; made if it is not there."""
        folder = self.output / "jobs" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass
class Outcome:
    """What a job measured; it becomes a record of the ledger."""

    metrics: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)  # name -> path relative to the output folder
    notes: list[str] = field(default_factory=list)


class NumberedSampler(InfiniteSampler):
    """mmengine's InfiniteSampler that yields `(number, index)`: the draw's number in the stream and what was drawn."""

    def _infinite_indices(self) -> Iterator[tuple[int, int]]:
        return enumerate(super()._infinite_indices())


class SeededDataset(Dataset):
    """Augments draw `(number, index)` of `dataset` with random generators that depend on `seed` and `number` alone.

    The generators of Python, NumPy and PyTorch are put back afterwards, so that data and model do not disturb each
    other: the model's drop path is the same whatever the augmentation draws.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.metainfo = getattr(dataset, "metainfo", {})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        number, index = draw
        with seeded(self.seed, number):
            return self.dataset[index]


def _training_loader(job: Job, dataset: Dataset, collate: Callable) -> DataLoader:
    """Batches of the recipe's size for a training, without end, in an order that depends on the seed alone."""
    seeded_dataset = SeededDataset(dataset, job.seed)
    sampler = NumberedSampler(seeded_dataset, seed=job.seed)
    return _loader(job, seeded_dataset, job.recipe.batch_size, collate, sampler=sampler, drop_last=True)


def _loader(job: Job, dataset: Dataset, batch_size: int, collate: Callable, **settings: Any) -> DataLoader:
    workers = job.recipe.workers
    return DataLoader(
        dataset, batch_size, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate, **settings
    )


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and PyTorch's (CPU) generators from `entropy` within the block only."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - mmsegmentation's transforms draw from this generator
    torch.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


class AtomicBackend(LocalBackend):
    """Local files that are there in full or not at all: a kill while writing leaves the file of before."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        # First the digest: a checkpoint without one counts as damaged, since torch.load does not notice flipped bits.
        write_atomically(_digest_file(Path(filepath)), hashlib.sha256(obj).hexdigest().encode())
        write_atomically(Path(filepath), obj)


def _digest_file(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".sha256")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that any reader, at any moment and after any crash, sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint_safely(filename: str, map_location: Any = None, logger: Any = None) -> dict[str, Any]:
    """torch.load that never unpickles: mmengine's own loader falls back to doing so."""
    return torch.load(filename, map_location=map_location, weights_only=True)


def install_engine() -> None:
    """Makes mmengine write checkpoints atomically and read them without unpickling (idempotent, per process)."""
    register_backend("atomic", AtomicBackend, force=True)
    CheckpointLoader.register_scheme(prefixes="", loader=load_checkpoint_safely, force=True)


class JobHook(Hook):
    """Says how far a job is, stops at a loss that is not a number, and makes checkpoints that resume exactly.

    A checkpoint also holds the generators' state, put back at the first step after a resumption, and the last losses.
    """

    def __init__(self, context: Context):
        self.context = context
        self.losses: deque[float] = deque(maxlen=20)
        self._generators: dict[str, Any] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["losses"] = list(self.losses)
        checkpoint["generators"] = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        # Of mmengine's message hub only what can be read back without unpickling: no histories, no NumPy scalars.
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {}
        hub["runtime_info"] = {
            key: value.item() if isinstance(value, np.generic) else value for key, value in hub["runtime_info"].items()
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.losses.extend(checkpoint["losses"])
        self._generators = checkpoint["generators"]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self._generators is not None:
            torch.set_rng_state(self._generators["cpu"].cpu())
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all([state.cpu() for state in self._generators["cuda"]])
            self._generators = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loss = float(outputs["loss"])
        if not np.isfinite(loss):  # found before CheckpointHook, which comes later, writes it down
            raise FloatingPointError(f"the loss became {loss} at iteration {batch_idx + 1}; lower the learning rate")
        self.losses.append(loss)
        self.context.progress({"fraction": (batch_idx + 1) / runner.max_iters, "text": f"loss {loss:.3f}"})

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.context.progress({"fraction": (batch_idx + 1) / len(runner.val_dataloader), "text": "evaluating"})


def build_runner(
    job: Job, context: Context, model: torch.nn.Module, hooks: Sequence[Hook] = (), **settings: Any
) -> Runner:
    """An mmengine Runner with the suite's hooks and `hooks`.

    `settings` are Runner's own: data loaders, loops, evaluators.
    """
    install_engine()
    recipe = job.recipe
    default_hooks: dict[str, Any] = {
        "timer": {"type": "IterTimerHook"},
        "logger": {
            "type": "LoggerHook",
            "interval": max(1, min(50, recipe.iterations // 20)),
            "log_metric_by_epoch": False,
        },
        "param_scheduler": {"type": "ParamSchedulerHook"},
        "sampler_seed": None,
        "runtime_info": {"type": "RuntimeInfoHook"},
        "checkpoint": None,
    }
    if job.stage in TRAININGS:
        default_hooks["checkpoint"] = {
            "type": "CheckpointHook",
            "interval": recipe.checkpoint_every,
            "by_epoch": False,
            "save_last": False,  # the finished weights are written by `train`
            "max_keep_ckpts": 2,  # mmengine removes the oldest before it writes the next
            "backend_args": {"backend": "atomic"},
        }
    return Runner(
        model=model,
        work_dir=str(context.folder(job.key)),
        default_hooks=default_hooks,
        custom_hooks=[JobHook(context), *hooks],
        default_scope="mmseg",
        randomness={"seed": job.seed},
        experiment_name=job.key,
        log_processor={"by_epoch": False},
        env_cfg={"cudnn_benchmark": False},
        **settings,
    )


def forget_runners() -> None:
    """Closes what mmengine keeps by name for the life of the process: a second job must not find that of the first."""
    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    for kept in (MMLogger, MessageHub, Visualizer):
        kept._instance_dict.clear()


def param_scheduler(job: Job) -> list[dict[str, Any]]:
    """mmengine's schedulers for the recipe: linear warm-up, then a polynomial or cosine decay, both per iteration."""
    recipe = job.recipe
    warmup, total = recipe.warmup_iterations, recipe.iterations
    decay: dict[str, Any] = {"eta_min": recipe.minimum_learning_rate, "begin": warmup, "end": total, "by_epoch": False}
    if recipe.schedule == "poly":
        decay |= {"type": "PolyLR", "power": recipe.poly_power}
    else:
        decay |= {"type": "CosineAnnealingLR", "T_max": total - warmup}
    if not warmup:
        return [decay]
    return [{"type": "LinearLR", "start_factor": 1e-3, "begin": 0, "end": warmup, "by_epoch": False}, decay]


def _optim_wrapper(job: Job, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """mmengine's optimizer wrapper: gradient clipping, and automatic mixed precision where the job asks for it."""
    norm, value = job.recipe.clip_gradient_norm, job.recipe.clip_gradient_value
    clip = {"max_norm": norm} if norm is not None else {"type": "value", "clip_value": value}
    return {
        "type": "AmpOptimWrapper" if job.precision == "amp" else "OptimWrapper",
        "optimizer": optimizer,
        "clip_grad": None if norm is None and value is None else clip,
    }


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; a damaged one is reported by name and set aside."""
    found = sorted(folder.glob("iter_*.pth"), key=lambda path: int(path.stem.removeprefix("iter_")), reverse=True)
    for path in found:
        digest = _digest_file(path)
        if digest.is_file() and digest.read_text() == sha256(path):
            return path
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        report(f"the checkpoint {path} is damaged: set aside as {aside.name}")
    return None


def train(
    job: Job,
    context: Context,
    build_model: Callable[[], torch.nn.Module],
    dataset: Dataset,
    collate: Callable,
    hooks: Sequence[Hook] = (),
) -> Outcome:
    """Trains from the newest checkpoint, or from fresh weights, and keeps the finished weights as safetensors."""
    folder = context.folder(job.key)
    for leftover in folder.glob(f"*{TEMPORARY}"):  # of a process that was killed while it wrote
        leftover.unlink()
    checkpoint = newest_checkpoint(folder, context.report)
    model = build_model()
    runner = build_runner(
        job,
        context,
        model,
        hooks,
        train_dataloader=_training_loader(job, dataset, collate),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": job.recipe.iterations},
        optim_wrapper=_optim_wrapper(job, build_optimizer(job, model)),
        param_scheduler=param_scheduler(job),
        load_from=None if checkpoint is None else str(checkpoint),
        resume=checkpoint is not None,
    )
    runner.train()
    losses = next(hook.losses for hook in runner.hooks if isinstance(hook, JobHook))
    digest = save_weights(runner.model, folder / WEIGHTS)
    for path in [*folder.glob("iter_*.pth"), *folder.glob("iter_*.sha256")]:  # hundreds of MB, and of no more use
        path.unlink()
    return Outcome(
        metrics={"final_loss": sum(losses) / len(losses), "iterations": job.recipe.iterations},
        details={
            "final_loss": f"mean of the last {len(losses)} iterations",
            "weights_sha256": digest,
            "resumed_from": None if checkpoint is None else checkpoint.name,
        },
        artifacts={"weights": f"jobs/{job.key}/{WEIGHTS}"},
    )


def evaluate(
    job: Job,
    context: Context,
    model: torch.nn.Module,
    weights: Path,
    dataset: Dataset,
    collate: Callable,
    batch_size: int,
    metric: BaseMetric,
) -> dict[str, float]:
    """The metrics of `model` with the finished `weights` on every image of `dataset`."""
    model.load_state_dict(load_file(weights))
    loader = _loader(job, dataset, batch_size, collate, sampler=DefaultSampler(dataset, shuffle=False))
    settings = {"val_dataloader": loader, "val_cfg": {"type": "ValLoop"}, "val_evaluator": [metric]}
    return {name: float(value) for name, value in build_runner(job, context, model, **settings).val().items()}


def save_weights(model: torch.nn.Module, path: Path) -> str:
    """Writes a model's state as safetensors, atomically; returns the file's SHA-256."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, temporary)
        digest = sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
