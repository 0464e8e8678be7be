"""A suite becomes a list of jobs. Nothing here needs torch: a plan is made in milliseconds."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

from benchmarks import data
from benchmarks.errors import InputError, choose
from benchmarks.job import BARE, HEADS, PRECISIONS, SCHEDULES, SEGMENTATION_SETTINGS, STAGES, TASKS, Job, Recipe
from runners.config import Benchmark, Config, ModelEntry, Suite

SMALLEST_SIDE = 32  # pixels; below, no backbone of the suite has a map left
COMMON_OPTIMIZERS = {"adamw", "sgd", "lars"}  # timm has these; to look up others it has to load, which takes seconds


def stages_of(config: Config) -> list[str]:
    """The stages of this run, in the order in which they happen."""
    asked = config.suite.stages if config.stages is None else config.stages
    _check_stages(asked, "stages")
    return [stage for stage in (*STAGES, "report") if stage in asked]


def make_jobs(config: Config) -> list[Job]:
    """All jobs of the run, those that others depend on first, without duplicates.

    Evaluating a model implies training it: without the stage `train` no evaluation is planned. A training that starts
    from another implies that one.

    Raises:
        InputError: an unknown stage, task, head, dataset or precision, or an impossible size or number.
    """
    suite = config.suite
    all_stages = stages_of(config)
    choose("precision", suite.precision, PRECISIONS, f"suite {suite.name}")
    if not re.fullmatch(r"cuda:\d+", suite.speed.device):
        choose("device", suite.speed.device, ("cpu", "cuda"), f"suite {suite.name}: speed")
    for name in ("models", "seeds"):
        if getattr(config, name) == []:
            raise InputError(f"{name}=[] leaves nothing to run; name at least one, or leave the setting out")
    jobs: dict[str, Job] = {}
    seeds = config.suite.seeds if config.seeds is None else config.seeds
    plans = _plans(suite, all_stages)
    for name, benchmark in suite.benchmarks.items():
        plan, stages = plans[name], _own_stages(all_stages, benchmark)
        for label, entry in _models(config, benchmark).items():
            chosen = []
            if "cost" in stages:
                chosen.append(Job(stage="cost", **plan.shared(label, entry)))
            if "speed" in stages:
                chosen.append(Job(stage="speed", speed=suite.speed, **plan.shared(label, entry)))
            for seed in seeds:
                if "train" in stages:
                    trainings = plan.trainings(label, entry, seed)
                    chosen += trainings
                    if "evaluate" in stages:
                        last = trainings[-1]
                        chosen.append(dataclasses.replace(last, stage="evaluate", depends_on=(last.key,)))
            jobs |= {job.key: job for job in chosen}
        if "pretrain" in stages:  # also those that no chosen model starts from
            alone = [plan.trainings(*item, seed) for item in benchmark.pretraining.items() for seed in seeds]
            jobs |= {job.key: job for chain in alone for job in chain}
    return sorted(jobs.values(), key=lambda job: STAGES.index(job.stage))


def trainings(config: Config) -> list[tuple[str, ModelEntry, list[Job]]]:
    """What a search varies: benchmark, model and training, behind those that it starts from, of the first seed.

    Raises:
        InputError: as `make_jobs`, or nothing is trained.
    """
    make_jobs(dataclasses.replace(config, stages=["train"]))
    suite, found = config.suite, []
    seed = (config.seeds or suite.seeds)[0]
    for name, plan in _plans(suite, ["train"]).items():
        if _own_stages(["train"], plan.benchmark):
            models = _models(config, plan.benchmark).items()
            found += [(name, entry, plan.trainings(label, entry, seed)) for label, entry in models]
    if not found:
        raise InputError(f"suite {suite.name} trains none of the chosen models: there is no recipe to search")
    return found


def _plans(suite: Suite, stages: Sequence[str]) -> dict[str, _Plan]:
    """The plan of each benchmark, by name; raises InputError for what is wrong in one."""
    plans: dict[str, _Plan] = {}
    for name, benchmark in suite.benchmarks.items():
        where = f"suite {suite.name}, benchmark {name}"
        _check(benchmark, where)
        if benchmark.head == BARE and "train" in _own_stages(stages, benchmark):
            raise InputError(f"{where}: head={BARE} has nothing to train; choose another head or stages=[cost,speed]")
        described = data.describe(benchmark.data)
        if described.task != benchmark.task:
            raise InputError(f"{where}: the dataset {benchmark.data} is for {described.task}, not {benchmark.task}")
        plans[name] = _Plan(suite, name, benchmark, described, where, plans)
    return plans


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the jobs of one benchmark have in common."""

    suite: Suite
    name: str
    benchmark: Benchmark
    described: data.Dataset
    where: str
    others: Mapping[str, _Plan]  # of all benchmarks of the suite, by name

    def shared(self, label: str, entry: ModelEntry) -> dict[str, Any]:
        """Of all jobs of one model."""
        return {
            "task": self.benchmark.task,
            "label": label,
            "model": entry.name or label,
            "model_config": entry.config,
            "head": self.benchmark.head,
            "head_config": entry.head,
            "input_size": tuple(entry.input_size or self.benchmark.input_size),
            "num_classes": self.described.num_classes,
        }

    def trainings(self, label: str, entry: ModelEntry, seed: int, after: tuple[str, ...] = ()) -> list[Job]:
        """The training of one model, behind those that it starts from."""
        before: list[Job] = []
        if entry.initialize_from is not None:
            chain = (*after, f"{self.name}/{label}")
            if chain[-1] in after:
                raise InputError(
                    f"suite {self.suite.name}: initialize_from goes round in a circle: {' -> '.join(chain)}"
                )
            before = self._source(label, entry, seed, chain)
        recipe, stage = self._recipe(label, entry), "pretrain" if label in self.benchmark.pretraining else "train"
        if stage == "pretrain" and recipe.validate_every:
            raise InputError(
                f"{self.where}, pretraining {label}: recipe.validate_every wants a score, which a pretraining has not; "
                "set it to 0, or give the pretraining a recipe of its own"
            )
        for name in ("mixup", "ema", "distillation_alpha", "linear_probe", "label_smoothing"):
            if stage == "pretrain" and getattr(recipe, name):
                raise InputError(
                    f"{self.where}, pretraining {label}: recipe.{name} is for what has labels; leave it out, "
                    "or give the pretraining a recipe of its own"
                )
        job = Job(
            stage=stage,
            seed=seed,
            precision=self.suite.precision,
            data=self.benchmark.data,
            data_version=self.described.version,
            data_options=self.benchmark.data_options,
            recipe=recipe,
            depends_on=tuple(job.key for job in before[-1:]),
            starts_from=before[-1].description() if before else None,
            **self.shared(label, entry),
        )
        return [*before, job]

    def _source(self, label: str, entry: ModelEntry, seed: int, after: tuple[str, ...]) -> list[Job]:
        """The training that a model starts from, behind those that this one starts from."""
        source, where = entry.initialize_from, f"{self.where}, model {label}"
        known: dict[str, tuple[_Plan, str]] = {}
        for name, plan in self.others.items():
            if plan.benchmark.task == "classification":
                labels = (*plan.benchmark.models, *plan.benchmark.pretraining)
                known |= {other if plan is self else f"{name}/{other}": (plan, other) for other in labels}
        choose("initialize_from", source, known, where)
        plan, other = known[source]
        started = plan.trainings(other, (plan.benchmark.models | plan.benchmark.pretraining)[other], seed, after)
        network = entry.name or label
        if self.benchmark.task == "segmentation" and started[-1].stage == "train" and started[-1].model != network:
            raise InputError(
                f"{where}: initialize_from={source} is a {started[-1].model}, not a {network}; name one of that"
            )
        if "checkpoint" in entry.config:
            raise InputError(f"{where}: it has both initialize_from and config.checkpoint; leave one of them out")
        return started

    def _recipe(self, label: str, entry: ModelEntry) -> Recipe:
        recipe = self.benchmark.recipe
        if entry.recipe is not None:
            choose("recipe", entry.recipe, tuple(self.benchmark.recipes), f"{self.where}, model {label}")
            recipe = self.benchmark.recipes[entry.recipe]
        rate = recipe.drop_path_rate if entry.drop_path_rate is None else entry.drop_path_rate
        return dataclasses.replace(recipe, drop_path_rate=rate)


def _models(config: Config, benchmark: Benchmark) -> dict[str, ModelEntry]:
    """The benchmark's models, or those of them that `models=[...]` names.

    A name that no benchmark of the suite has is one that the zoo or timm registers: it is added to every benchmark.
    """
    if config.models is None:
        return benchmark.models
    known = {label for other in config.suite.benchmarks.values() for label in other.models}
    chosen = [label for label in config.models if label in benchmark.models or label not in known]
    return {label: benchmark.models.get(label, ModelEntry()) for label in chosen}


def _own_stages(stages: Sequence[str], benchmark: Benchmark) -> list[str]:
    """Those of `stages` that the benchmark has."""
    return [stage for stage in stages if benchmark.stages is None or stage in benchmark.stages]


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
    entries = benchmark.models | benchmark.pretraining
    for size in (benchmark.input_size, *(entry.input_size for entry in entries.values() if entry.input_size)):
        if len(size) != 2 or min(size) < SMALLEST_SIDE:
            raise InputError(
                f"{where}: input_size {list(size)} must be [height, width], each at least {SMALLEST_SIDE} pixels"
            )
    if benchmark.task != "classification":
        _check_no_classification(benchmark, entries, where)
    if both := sorted(benchmark.models.keys() & benchmark.pretraining.keys()):
        raise InputError(f"{where}: {both[0]} is both in models and in pretraining; give one of them another label")
    others = {f"recipes.{name}": recipe for name, recipe in benchmark.recipes.items()}
    for name, recipe in ({"recipe": benchmark.recipe} | others).items():
        check_recipe(recipe, f"{where}: {name}")
        _check_settings(recipe, benchmark.task, f"{where}: {name}")


def _check_no_classification(benchmark: Benchmark, entries: Mapping[str, ModelEntry], where: str) -> None:
    """What only classifications have must not look as if it were done."""
    if benchmark.pretraining:
        raise InputError(f"{where}: only classifications can have pretraining")
    for recipe in (benchmark.recipe, *benchmark.recipes.values()):
        for name in ("mixup", "ema", "distillation_alpha", "linear_probe", "label_smoothing"):
            if getattr(recipe, name):
                raise InputError(f"{where}: recipe.{name} is for classifications only; leave it out")


def _check_settings(recipe: Recipe, task: str, where: str) -> None:
    """What is misspelt, or what nothing reads, must not look as if it were done."""
    if task == "segmentation":  # a classification's are timm's, which knows them itself
        for part, known in SEGMENTATION_SETTINGS.items():
            for name in getattr(recipe, part):
                choose("setting", str(name), known, f"{where}.{part}")
    elif recipe.head_learning_rate_multiplier != 1.0:
        raise InputError(f"{where}.head_learning_rate_multiplier is for segmentations only; leave it out")
    if recipe.clip_gradient_norm is not None and recipe.clip_gradient_value is not None:
        raise InputError(f"{where} has clip_gradient_norm and clip_gradient_value; set one of them to null")


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises InputError for what no training can be."""
    for name in ("iterations", "batch_size", "checkpoint_every", "threads"):
        if getattr(recipe, name) < 1:
            raise InputError(f"{where}.{name} is {getattr(recipe, name)}; it must be at least 1")
    for name in ("processes", "accumulate"):
        if getattr(recipe.engine, name) < 1:
            raise InputError(f"{where}.engine.{name} is {getattr(recipe.engine, name)}; it must be at least 1")
    fraction = recipe.engine.gpu_fraction
    if not 0 < fraction <= 1 or (fraction < 1 and recipe.engine.processes > 1):
        raise InputError(
            f"{where}.engine.gpu_fraction is {fraction:g} with processes={recipe.engine.processes}; it must be above 0 "
            "and at most 1, and 1 for several processes, which have a GPU each"
        )
    if recipe.validate_every < 0:
        raise InputError(f"{where}.validate_every is {recipe.validate_every}; it must be at least 1, or 0 for never")
    if recipe.evaluate_best and not recipe.validate_every:
        raise InputError(f"{where}.evaluate_best needs validate_every, so that there is a best to evaluate")
    parts = recipe.engine.processes * recipe.engine.accumulate
    if recipe.batch_size % parts:
        raise InputError(
            f"{where}.batch_size {recipe.batch_size} cannot be shared by {recipe.engine.processes} processes "
            f"with accumulate={recipe.engine.accumulate}; it must be a multiple of {parts}"
        )
    choose("schedule", recipe.schedule, SCHEDULES, where)
    if not 0 <= recipe.warmup_iterations < recipe.iterations:
        raise InputError(
            f"{where}: {recipe.warmup_iterations} warm-up iterations do not fit into {recipe.iterations} iterations"
        )
    if recipe.learning_rate <= 0:
        raise InputError(f"{where}.learning_rate is {recipe.learning_rate}; it must be above 0")
    if recipe.mixup and recipe.batch_size // parts % 2:
        raise InputError(
            f"{where}.batch_size is {recipe.batch_size}, {recipe.batch_size // parts} images per forward; "
            "Mixup pairs them, so the number must be even"
        )
    alpha = recipe.distillation_alpha
    if alpha is not None and not (0 <= alpha <= 1 and recipe.mixup and recipe.ema):
        raise InputError(f"{where}.distillation_alpha is {alpha}; it must be between 0 and 1, and needs mixup and ema")


def check_models(jobs: Sequence[Job], counted: Container[str] = ()) -> None:
    """Builds each model once without weights: finds what is unknown or impossible before anything runs.

    Those of `counted` (keys, see Job.counted_as) were built before.
    A size that a model cannot take is not looked for: it is a row of the tables with its reason, beside the others.

    Raises:
        InputError: names the model, the field or the optimizer, with the near matches.
    """
    if optimizers := {job.recipe.optimizer for job in jobs if job.recipe is not None} - COMMON_OPTIMIZERS:
        from timm.optim import list_optimizers

        for name in optimizers:
            choose("optimizer", name, list_optimizers(), "recipe")

    new = [job for job in jobs if job.counted_as not in counted]
    models = {(job.model, job.task, json.dumps(job.content()["model_config"], sort_keys=True)): job for job in new}
    if not models:
        return
    import zoo
    from benchmarks.trace import on_meta

    for job in models.values():
        try:
            with on_meta(), warnings.catch_warnings(action="ignore"):  # mmcv warns of operators not used
                features = job.task == "segmentation"
                zoo.create_model(job.model, features_only=features, **job.model_config)
        except zoo.ZooError as error:
            raise InputError(str(error)) from error
