"""What all tasks share around mmengine's Runner: the loop, its hooks, exact resumption, options, progress.

An interrupted training that goes on from its last checkpoint ends with the same weights as one that was never
interrupted: the data of step n, and the random numbers that its dropout, drop path or mixing draw, depend on the seed,
n and the process alone (`benchmarks.draws`, `JobHook`).
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, barrier, broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from mmengine.visualization import Visualizer
from safetensors.torch import load_file
from torch.utils.data import Dataset

from benchmarks import checkpoints
from benchmarks.checkpoints import BEST, WEIGHTS
from benchmarks.distributed import wrap
from benchmarks.draws import seed_generators, training_loader
from benchmarks.errors import Blocked, InputError
from benchmarks.job import TRAININGS, Job
from benchmarks.optimizer import build_optimizer
from benchmarks.validation import KeepBest, Validation


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


class StepLoop(IterBasedTrainLoop):
    """mmengine's loop, one iteration of which is one step of the optimizer, however many forwards the step takes.

    The losses that hooks see are those of the whole step: means over its forwards and over the processes.
    """

    def __init__(self, runner: Runner, dataloader: Any, max_iters: int, accumulate: int = 1, **settings: Any):
        super().__init__(runner, dataloader, max_iters, **settings)
        self.accumulate = accumulate
        self.dataloader_iterator = _Forwards(self.dataloader, accumulate)

    def run(self) -> torch.nn.Module:
        counts = self.iter * self.accumulate, self.max_iters * self.accumulate
        self.runner.optim_wrapper.initialize_count_status(self.runner.model, *counts)
        return super().run()

    def run_iter(self, data_batch: Any) -> None:
        runner = self.runner
        runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        others = (next(self.dataloader_iterator) for _ in range(self.accumulate - 1))
        losses = [
            runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper) for batch in chain([data_batch], others)
        ]
        outputs = losses[0]
        if self.accumulate > 1 or get_world_size() > 1:
            values = torch.stack([torch.stack([v.detach().float() for v in part.values()]) for part in losses]).mean(0)
            all_reduce(values, op="mean")
            outputs = dict(zip(outputs, values, strict=True))
        runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs)
        self._iter += 1


class _Forwards(_InfiniteDataloaderIterator):
    """mmengine's iterator over batches, of which a step takes `accumulate`."""

    def __init__(self, dataloader: Any, accumulate: int):
        super().__init__(dataloader)
        self.accumulate = accumulate

    def skip_iter(self, num_iters: int) -> None:
        super().skip_iter(num_iters * self.accumulate)


class BFloat16OptimWrapper(OptimWrapper):
    """Forwards in bfloat16 where PyTorch deems it safe, on any device. Its range is float32's: no loss is scaled.

    mmengine's AmpOptimWrapper, which float16 takes, wants a GPU and a scaler.
    """

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(get_device(), torch.bfloat16):
            yield


class JobHook(Hook):
    """Says how far a job is, stops at a loss that is not a number, and makes trainings that resume exactly.

    Each step seeds the generators anew from the job's seed, the step and the process, so that no generator's state
    has to be kept. A checkpoint also holds the last losses.
    """

    def __init__(self, context: Context, seed: int):
        self.context = context
        self.seed = seed
        self.losses: deque[float] = deque(maxlen=20)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoints.check_finite(checkpoint["state_dict"], f"at iteration {runner.iter}")
        checkpoint["losses"] = list(self.losses)
        # Of mmengine's message hub only what can be read back without unpickling: no histories, no NumPy scalars.
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {}
        hub["runtime_info"] = {
            key: value.item() if isinstance(value, np.generic) else value for key, value in hub["runtime_info"].items()
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.losses.extend(checkpoint["losses"])

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        # One more than the rank: NumPy takes (seed, step, 0) for (seed, step), which is the seed of a draw.
        seed_generators(self.seed, batch_idx, 1 + get_rank())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loss = float(outputs["loss"])
        if not np.isfinite(loss):  # found before CheckpointHook, which comes later, writes it down
            raise FloatingPointError(f"the loss became {loss} at iteration {batch_idx + 1}; lower the learning rate")
        self.losses.append(loss)
        self.context.progress({"fraction": (batch_idx + 1) / runner.max_iters, "text": f"loss {loss:.3f}"})

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        seen = (batch_idx + 1) / len(runner.val_dataloader)
        if runner.train_loop is None:
            self.context.progress({"fraction": seen, "text": "evaluating"})
        else:
            self.context.progress({"fraction": runner.iter / runner.max_iters, "text": f"validating: {seen:.0%}"})


def build_runner(
    job: Job, context: Context, model: torch.nn.Module, hooks: Sequence[Hook] = (), **settings: Any
) -> Runner:
    """An mmengine Runner with the suite's hooks and `hooks`, of this process or of its process group.

    `settings` are Runner's own: data loaders, loops, evaluators.
    """
    checkpoints.install()
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
    distributed = torch.distributed.is_initialized()
    return Runner(
        model=wrap(model) if distributed else model,
        work_dir=str(context.folder(job.key)),
        launcher="pytorch" if distributed else "none",  # the process group is there already
        default_hooks=default_hooks,
        custom_hooks=[JobHook(context, job.seed), *hooks],
        default_scope="mmseg",
        randomness={"seed": job.seed},
        experiment_name=job.key,
        log_processor={"by_epoch": False},
        env_cfg={"cudnn_benchmark": False},
        visualizer={"type": "Visualizer", "vis_backends": _curves(job)},
        **settings,
    )


def _curves(job: Job) -> list[dict[str, Any]]:
    """Where the curves of a training go: a JSON file and TensorBoard's; elsewhere only if the recipe says so."""
    backends: list[dict[str, Any]] = [{"type": "LocalVisBackend"}]
    if job.stage not in TRAININGS:
        return backends
    backends.append({"type": "TensorboardVisBackend"})
    if project := job.recipe.engine.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise InputError(
                f"recipe.engine.wandb is '{project}', but wandb is not installed; "
                "pip install 'hires-vit-benchmark[wandb]', or wandb=null"
            )
        backends.append({"type": "WandbVisBackend", "init_kwargs": {"project": project, "name": job.key}})
    return backends


def forget_runners() -> None:
    """Closes what mmengine keeps by name for the life of the process: a second job must not find that of the first."""
    for visualizer in Visualizer._instance_dict.values():
        visualizer.close()
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
    """mmengine's optimizer wrapper: accumulation, gradient clipping, and the job's precision."""
    recipe = job.recipe
    norm, value = recipe.clip_gradient_norm, recipe.clip_gradient_value
    clip = {"max_norm": norm} if norm is not None else {"type": "value", "clip_value": value}
    wrapper: dict[str, Any] = {
        "type": OptimWrapper,
        "optimizer": optimizer,
        "accumulative_counts": recipe.engine.accumulate,
        "clip_grad": None if norm is None and value is None else clip,
    }
    if job.precision == "bfloat16":
        wrapper["type"] = BFloat16OptimWrapper
    elif job.precision == "float16":
        if not torch.cuda.is_available():
            raise Blocked("precision float16 needs a GPU, and this machine has none; bfloat16 does without")
        wrapper |= {"type": "AmpOptimWrapper", "dtype": "float16"}
    return wrapper


def _with_options(job: Job, model: torch.nn.Module) -> torch.nn.Module:
    """`model` with the recipe's options: they change its speed and memory, not what it computes."""
    engine = job.recipe.engine
    # The heads are small, and mmsegmentation's take lists of objects: the options are for what is large.
    network = next(
        (part for name in ("backbone", "network") if (part := getattr(model, name, None)) is not None), model
    )
    if engine.gradient_checkpointing:
        able = next((part for part in network.modules() if hasattr(part, "set_grad_checkpointing")), None)
        try:
            if able is None:
                raise AssertionError("it has no such method")
            able.set_grad_checkpointing(True)
        except (AssertionError, NotImplementedError) as error:
            raise InputError(f"{job.model} cannot do gradient_checkpointing: {error}; leave it out") from error
    if engine.channels_last:
        network.to(memory_format=torch.channels_last)
    if engine.compile:
        network.compile()  # in place: the names of the weights stay
    return model


def training_runner(
    job: Job,
    context: Context,
    model: torch.nn.Module,
    dataset: Dataset,
    collate: Callable,
    hooks: Sequence[Hook] = (),
    checkpoint: Path | None = None,
    validation: Validation | None = None,
) -> Runner:
    """mmengine's Runner for a training, from `checkpoint` on or from the model's weights; `train` has the arguments."""
    loop: dict[str, Any] = {"type": StepLoop, "max_iters": job.recipe.iterations}
    loop["accumulate"] = job.recipe.engine.accumulate
    looks: dict[str, Any] = {}
    if validation is not None:
        looks = validation.settings(job, context)
        if job.recipe.validate_every:
            loop["val_interval"] = job.recipe.validate_every
            hooks = [*hooks, KeepBest(job.recipe, validation.score, context.folder(job.key) / BEST)]
        else:
            loop["val_begin"] = job.recipe.iterations + 1  # never: one of `hooks` knows when
    return build_runner(
        job,
        context,
        _with_options(job, model),
        hooks,
        train_dataloader=training_loader(job, dataset, collate),
        train_cfg=loop,
        optim_wrapper=_optim_wrapper(job, build_optimizer(job, model)),
        param_scheduler=param_scheduler(job),
        load_from=None if checkpoint is None else str(checkpoint),
        resume=checkpoint is not None,
        **looks,
    )


def train(
    job: Job,
    context: Context,
    build_model: Callable[[], torch.nn.Module],
    dataset: Dataset,
    collate: Callable,
    hooks: Sequence[Hook] = (),
    validation: Validation | None = None,
) -> Outcome:
    """Trains from the newest checkpoint, or from fresh weights, and keeps the finished weights as safetensors.

    The checkpoints stay until the ledger knows of the weights (`checkpoints.discard`).

    With `validation` it looks at its images every `recipe.validate_every` iterations and after the last, and keeps the
    weights that scored highest, too; where that is 0 it looks when one of `hooks` does (`runner.val_loop.run()`).

    Within a process group it trains on all processes of it; each returns the same outcome.

    Args:
        job: The training.
        context: Where to write, and whom to tell.
        build_model: Makes the model, in mmengine's terms (`train_step`).
        dataset: Maps an index to an augmented sample.
        collate: Makes a batch of samples.
        hooks: mmengine's, beside the suite's; what they need for an exact resumption they put into the checkpoint.
        validation: What to look at on the way; None: the training images alone are seen.

    Raises:
        FloatingPointError: the loss or a weight is no longer a number.
        Blocked: the machine lacks what the precision needs.
        InputError: the model cannot do what an option asks for.
    """
    folder = context.folder(job.key)
    found = [None]
    if is_main_process():
        checkpoints.remove_leftovers(folder)
        found = [checkpoints.newest_checkpoint(folder, context.report)]
    broadcast_object_list(found)
    checkpoint = found[0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # an earlier job of this process had its own
    runner = training_runner(job, context, build_model(), dataset, collate, hooks, checkpoint, validation)
    runner.train()
    losses = next(hook.losses for hook in runner.hooks if isinstance(hook, JobHook))
    best = next((hook for hook in runner.hooks if isinstance(hook, KeepBest)), None)
    trained = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if is_main_process():
        checkpoints.check_finite(trained.state_dict(), "with the last iteration")
        checkpoints.save_weights(trained.state_dict(), folder / WEIGHTS)
    barrier()
    return Outcome(
        metrics={"final_loss": sum(losses) / len(losses), "iterations": job.recipe.iterations},
        details={
            "final_loss": f"mean of the last {len(losses)} iterations",
            "weights_sha256": checkpoints.sha256(folder / WEIGHTS),
            "resumed_from": None if checkpoint is None else checkpoint.name,
            "engine": _how(job),
        }
        | ({} if best is None else {"best": best.details()}),
        artifacts={"weights": f"jobs/{job.key}/{WEIGHTS}", "curves": f"jobs/{job.key}/{Path(runner.log_dir).name}"}
        | ({} if best is None else {"best": f"jobs/{job.key}/{BEST}"}),
        notes=_notes(trained),
    )


def _how(job: Job) -> dict[str, Any]:
    """How a training ran, for its record: what the machine decided rather than the recipe."""
    gpu = torch.cuda.is_available()
    how = {
        "processes": get_world_size(),
        "accumulate": job.recipe.engine.accumulate,
        "images_per_forward": job.recipe.images_per_forward,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }
    return how | ({"peak_gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6} if gpu else {})


def _notes(model: torch.nn.Module) -> list[str]:
    apart = get_world_size() > 1 and not torch.cuda.is_available()
    if apart and any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return ["batch norms saw the images of one process only: PyTorch synchronises them on GPUs alone"]
    return []


def evaluate(
    job: Job, context: Context, model: torch.nn.Module, weights: Path, validation: Validation
) -> dict[str, float]:
    """The metrics of `model` with the finished `weights` on every validation image, in float32.

    Within a process group each process takes its part of the images, and returns the metrics over all of them.
    """
    model.load_state_dict(load_file(weights))
    runner = build_runner(job, context, model, **validation.settings(job, context))
    return {name: float(value) for name, value in runner.val().items()}
