"""A suite becomes a list of jobs. Nothing here needs torch: a plan is made in milliseconds."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence

from benchmarks import data
from benchmarks.errors import InputError, choose
from benchmarks.job import BARE, HEADS, PRECISIONS, SCHEDULES, STAGES, TASKS, Job
from runners.config import Benchmark, Config, ModelEntry

SMALLEST_SIDE = 32  # pixels; below, no backbone of the suite has a map left


def stages_of(config: Config) -> list[str]:
    """The stages of this run, in the order in which they happen."""
    asked = config.suite.stages if config.stages is None else config.stages
    _check_stages(asked, "stages")
    return [stage for stage in (*STAGES, "report") if stage in asked]


def make_jobs(config: Config) -> list[Job]:
    """All jobs of the run, those that others depend on first, without duplicates.

    Evaluating a model implies training it: without the stage `train` no evaluation is planned.

    Raises:
        InputError: an unknown stage, task, head, dataset or precision, or an impossible size or number.
    """
    suite = config.suite
    all_stages = stages_of(config)
    choose("precision", suite.precision, PRECISIONS, f"suite {suite.name}")
    for name in ("models", "seeds"):
        if getattr(config, name) == []:
            raise InputError(f"{name}=[] leaves nothing to run; name at least one, or leave the setting out")
    jobs: dict[str, Job] = {}
    for name, benchmark in suite.benchmarks.items():
        where = f"suite {suite.name}, benchmark {name}"
        _check(benchmark, where)
        stages = [stage for stage in all_stages if benchmark.stages is None or stage in benchmark.stages]
        if benchmark.head == BARE and "train" in stages:
            raise InputError(f"{where}: head={BARE} has nothing to train; choose another head or stages=[cost,speed]")
        described = data.describe(benchmark.data)
        if described.task != benchmark.task:
            raise InputError(f"{where}: the dataset {benchmark.data} is for {described.task}, not {benchmark.task}")
        for label, entry in _models(config, benchmark).items():
            shared = {
                "task": benchmark.task,
                "label": label,
                "model": entry.name or label,
                "model_config": entry.config,
                "head": benchmark.head,
                "head_config": entry.head,
                "input_size": tuple(entry.input_size or benchmark.input_size),
                "num_classes": described.num_classes,
            }
            rate = benchmark.recipe.drop_path_rate if entry.drop_path_rate is None else entry.drop_path_rate
            training = {
                "precision": suite.precision,
                "data": benchmark.data,
                "data_version": described.version,
                "data_options": benchmark.data_options,
                "recipe": dataclasses.replace(benchmark.recipe, drop_path_rate=rate),
            }
            chosen = []
            if "cost" in stages:
                chosen.append(Job(stage="cost", **shared))
            if "speed" in stages:
                chosen.append(Job(stage="speed", speed=suite.speed, **shared))
            for seed in config.suite.seeds if config.seeds is None else config.seeds:
                if "train" in stages:
                    trained = Job(stage="train", seed=seed, **shared, **training)
                    chosen.append(trained)
                    if "evaluate" in stages:
                        after = (trained.key,)
                        chosen.append(Job(stage="evaluate", seed=seed, depends_on=after, **shared, **training))
            jobs |= {job.key: job for job in chosen}
    return sorted(jobs.values(), key=lambda job: STAGES.index(job.stage))


def _models(config: Config, benchmark: Benchmark) -> dict[str, ModelEntry]:
    """The benchmark's models, or those of them that `models=[...]` names.

    A name that no benchmark of the suite has is one that the zoo or timm registers: it is added to every benchmark.
    """
    if config.models is None:
        return benchmark.models
    known = {label for other in config.suite.benchmarks.values() for label in other.models}
    chosen = [label for label in config.models if label in benchmark.models or label not in known]
    return {label: benchmark.models.get(label, ModelEntry()) for label in chosen}


def _check_stages(stages: Sequence[str], where: str) -> None:
    for stage in stages:
        choose("stage", stage, (*STAGES, "report"), where)
    if "evaluate" in stages and "train" not in stages:
        raise InputError(f"{where}: 'evaluate' needs 'train' (finished trainings are not repeated)")


def _check(benchmark: Benchmark, where: str) -> None:
    choose("task", benchmark.task, TASKS, where)
    if benchmark.task == "segmentation":
        choose("head", str(benchmark.head), HEADS, where)
    elif benchmark.head is not None:
        raise InputError(f"{where}: a classification has no head to choose, but head={benchmark.head}")
    if benchmark.stages is not None:
        _check_stages(benchmark.stages, f"{where}: stages")
    for size in (benchmark.input_size, *(entry.input_size for entry in benchmark.models.values() if entry.input_size)):
        if len(size) != 2 or min(size) < SMALLEST_SIDE:
            raise InputError(
                f"{where}: input_size {list(size)} must be [height, width], each at least {SMALLEST_SIDE} pixels"
            )
    recipe = benchmark.recipe
    for name in ("iterations", "batch_size", "checkpoint_every", "threads"):
        if getattr(recipe, name) < 1:
            raise InputError(f"{where}: recipe.{name} is {getattr(recipe, name)}; it must be at least 1")
    choose("schedule", recipe.schedule, SCHEDULES, f"{where}: recipe")
    if not 0 <= recipe.warmup_iterations < recipe.iterations:
        raise InputError(
            f"{where}: {recipe.warmup_iterations} warm-up iterations do not fit into {recipe.iterations} iterations"
        )
    if recipe.learning_rate <= 0:
        raise InputError(f"{where}: recipe.learning_rate is {recipe.learning_rate}; it must be above 0")


def check_models(jobs: Sequence[Job]) -> None:
    """Builds each model once without weights: finds what is unknown or impossible before anything runs.

    A size that a model cannot take is not looked for: it is a row of the tables with its reason, beside the others.

    Raises:
        InputError: names the model, the field or the optimizer, with the near matches.
    """
    from timm.optim import list_optimizers

    import zoo
    from benchmarks.trace import on_meta

    for name in {job.recipe.optimizer for job in jobs if job.recipe is not None}:
        choose("optimizer", name, list_optimizers(), "recipe")

    models = {(job.model, job.task, json.dumps(job.content()["model_config"], sort_keys=True)): job for job in jobs}
    for job in models.values():
        try:
            with on_meta(), warnings.catch_warnings(action="ignore"):  # mmcv warns of operators not used
                features = job.task == "segmentation"
                zoo.create_model(job.model, features_only=features, **job.model_config)
        except zoo.ZooError as error:
            raise InputError(str(error)) from error
