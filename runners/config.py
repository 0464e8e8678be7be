"""The command line's configuration, typed: Hydra checks every override against these."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from benchmarks.job import Recipe, SpeedSettings


class Executor(StrEnum):
    """Where jobs run: in this process, one after the other, or as Ray tasks."""

    inline = "inline"
    ray = "ray"


class Cluster(StrEnum):
    """Which Ray: one of this run's own on this machine, or the running one that this machine is part of."""

    local = "local"
    auto = "auto"


@dataclass
class ModelEntry:
    """One row of a suite's matrix; its key in the suite is the label that the tables show."""

    name: str | None = None  # the name that zoo.create_model knows; null: the label itself
    config: dict[str, Any] = field(default_factory=dict)  # fields of the family's configuration
    head: dict[str, Any] = field(default_factory=dict)  # settings of the decode head that differ from the default
    input_size: list[int] | None = None  # null: the benchmark's
    drop_path_rate: float | None = None  # in training; null: the recipe's
    recipe: str | None = None  # one of the benchmark's `recipes`; null: its `recipe`
    # The training to start from: the label of one in `models` or `pretraining` (of a classification), or
    # BENCHMARK/LABEL of one in another benchmark, which is a classification.
    initialize_from: str | None = None


@dataclass
class Benchmark:
    """One task on one dataset for several models."""

    task: str = MISSING  # classification or segmentation
    data: str = MISSING
    data_options: dict[str, Any] = field(default_factory=dict)
    head: str | None = None  # segmentation: the decode head, or "bare" for the backbone alone
    input_size: list[int] = MISSING  # height, width in pixels
    models: dict[str, ModelEntry] = MISSING
    recipe: Recipe = field(default_factory=Recipe)
    recipes: dict[str, Recipe] = field(default_factory=dict)  # for the models that name one
    pretraining: dict[str, ModelEntry] = field(default_factory=dict)  # autoencoders that `models` start from
    stages: list[str] | None = None  # null: all of the suite's; else no other than these


@dataclass
class Expected:
    """What a suite is expected to take and to give, for its readers; tables never show these as measured."""

    cost: str = ""  # time and hardware
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # benchmark -> model -> percent
    source: str = ""  # where the scores are from


@dataclass
class Suite:
    """What is compared with what: models x tasks x seeds x stages."""

    name: str = MISSING
    version: int = 1
    title: str = MISSING
    description: str = ""
    stages: list[str] = field(default_factory=lambda: ["cost", "speed", "train", "evaluate", "report"])
    seeds: list[int] = field(default_factory=lambda: [0])
    precision: str = "float32"
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    benchmarks: dict[str, Benchmark] = MISSING
    must_gain: float = 10.0  # points over the trivial baseline that a trained model must show to count as having learnt
    expected: Expected = field(default_factory=Expected)


class Distribution(StrEnum):
    """How a search draws a value: evenly, evenly in its logarithm, or one of some."""

    uniform = "uniform"
    loguniform = "loguniform"
    choice = "choice"


@dataclass
class Range:
    """What a search draws a field of the recipe from."""

    distribution: Distribution = MISSING
    low: float | None = None  # both are in the range
    high: float | None = None
    values: list[Any] = field(default_factory=list)  # of a choice
    relative: bool = False  # low, high and values are multiples of what the recipe has


class Scheduler(StrEnum):
    """Who stops a trial early: Ray Tune's ASHA, its median stopping rule, or nobody."""

    asha = "asha"
    median = "median"
    none = "none"


@dataclass
class Search:
    """How recipes are searched (`runners.search`). Trial 0 is the recipe as it stands; it is never stopped."""

    scheduler: Scheduler = MISSING
    space: dict[str, Any] = MISSING  # field of the recipe -> `Range`; untyped, so that a command line can add one
    trials: int = 16
    seed: int = 0  # of the draws; a trial's values depend on it and on the trial's number alone
    concurrent: int | None = None  # trials side by side; null: as many as the machine or cluster has room for
    held_out: float = 0.1  # share of the training images that trials are scored on and do not train on
    scores: int = 9  # times that a trial is scored, evenly over its training; grace_period counts them
    grace_period: int = 1  # a trial is not stopped before it has so many scores
    reduction_factor: float = 3.0  # asha: about 1 in so many trials passes each rung


@dataclass
class Config:
    """`python runners/run.py suite=NAME ...`"""

    suite: Suite = MISSING
    stages: list[str] | None = None  # null: the suite's
    models: list[str] | None = None  # null: the suite's; other registered names are added to its benchmarks
    seeds: list[int] | None = None  # null: the suite's
    executor: Executor = Executor.ray
    cluster: Cluster = Cluster.local
    output: str = "runs/${suite.name}"
    data_root: str = "data"
    papers: list[str] = field(default_factory=list)  # CSV files of papers' rows, beside those of results/papers
    plan: bool = False  # print the jobs and run none
    search: Search | None = None  # instead of the suite's stages: look for a better recipe of each chosen model


def register() -> None:
    """Makes the schemas known to Hydra under the names that the files in runners/conf use."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="suite", name="schema", node=Suite)
    store.store(group="recipe", name="schema", node=Recipe)
    store.store(group="search", name="schema", node=Search)
