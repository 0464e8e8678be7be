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


def register() -> None:
    """Makes the schemas known to Hydra under the names that the files in runners/conf use."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="suite", name="schema", node=Suite)
    store.store(group="recipe", name="schema", node=Recipe)
