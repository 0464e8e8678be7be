"""What is to be measured: recipes, jobs and their content-addressed keys. Pure data: importing this is cheap."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

STAGES = ("cost", "speed", "pretrain", "train", "evaluate")
SEARCH = "search"  # a stage that no suite has: one trial of a search (runners.search)
TRAININGS = ("pretrain", "train", SEARCH)  # the stages that leave weights behind
TASKS = ("classification", "segmentation")
BARE = "bare"  # no head: the maps of the backbone, for cost and speed alone
HEADS = ("segformer", "upernet", "ocr", BARE)
SCHEDULES = ("poly", "cosine")
SEGMENTATION_SETTINGS = {  # what a segmentation's recipe may hold; benchmarks/segmentation.py tells what each is
    "augmentation": ("resize", "ratio_range", "crop", "maximum_class_share", "flip", "photometric_distortion"),
    "evaluation": ("resize", "mode", "stride", "size_divisor", "scales", "flip"),
}
PRECISIONS = ("float32", "bfloat16", "float16")  # the latter two by automatic mixed precision

# Raised when a stage begins to measure something else than it did, so that old records are not taken for new ones.
METHOD_VERSION = {"cost": 4, "speed": 1, "pretrain": 2, "train": 3, "evaluate": 1, SEARCH: 1}


@dataclass
class Engine:
    """How trainings and evaluations run on a machine: what the machine has, not what is compared.

    Not part of a job's key, since a job that was begun on one machine may end on another: processes, checkpointing,
    channels_last and compile leave the batch, the draws and the formulas as they are. They change the order of
    floating-point sums, and processes the stream of random numbers that drop path and dropout take, as another seed
    would. `accumulate` is part of it if it is not 1: a batch norm sees a part of the batch then. The record tells all.
    """

    processes: int = 1  # a GPU each, or `threads` CPU threads each; `batch_size` is shared among them
    accumulate: int = 1  # forwards of a process per step of the optimizer: less memory
    gradient_checkpointing: bool = False  # less memory for a second forward; the same numbers
    channels_last: bool = False
    compile: bool = False  # the network by torch.compile
    gpu_fraction: float = 1.0  # of one device; below 1, in one process: several small jobs share a GPU
    gpu_type: str | None = None  # on a cluster: only on such GPUs, as Ray names them (H100, A100, ...)
    wandb: str | None = None  # a project at Weights & Biases that gets the curves; null: never contacted


@dataclass
class Recipe:
    """How a model is trained. Learning rates are those at `batch_size` images per step over all devices, unless said.

    Evaluated are the last weights unless `evaluate_best` is set: the best of many looks at the validation images is
    chosen by these images, higher than the last by chance alone, and comparable only to a best of as many looks.

    A field that stands at its default is no part of a job's key, so that a field added later changes no key. Whoever
    changes a default raises `METHOD_VERSION`.
    """

    iterations: int = 160_000
    batch_size: int = 16
    optimizer: str = "adamw"  # a name that timm.optim.create_optimizer_v2 knows
    optimizer_options: dict[str, Any] = field(default_factory=dict)  # more of its arguments (betas, momentum, ...)
    learning_rate: float = 6e-5
    learning_rate_images: int | None = None  # the learning rate is that for so many images per step, scaled linearly
    weight_decay: float = 0.01  # not applied to norms, biases and what the model's no_weight_decay() names
    warmup_iterations: int = 1500  # linear, from a thousandth of the learning rate
    schedule: str = "poly"  # "poly" or "cosine", both to `minimum_learning_rate`
    poly_power: float = 1.0  # 1: a straight line
    minimum_learning_rate: float = 0.0
    head_learning_rate_multiplier: float = 1.0  # segmentation: the decode head learns so much faster
    layer_decay: float | None = None  # each layer of the backbone learns so much more slowly than the one after it
    clip_gradient_norm: float | None = None
    clip_gradient_value: float | None = None
    label_smoothing: float = 0.0  # classification
    mixup: dict[str, Any] = field(default_factory=dict)  # arguments of timm.data.Mixup; empty: no Mixup, no CutMix
    ema: dict[str, Any] = field(default_factory=dict)  # of timm.utils.ModelEmaV3, evaluated then; empty: no averaging
    distillation_alpha: float | None = None  # weight of the label beside what the average of the weights predicts
    linear_probe: bool = False  # classification: all but the classifier stays as it is
    drop_path_rate: float | None = None  # None: the model's own default
    augmentation: dict[str, Any] = field(default_factory=dict)  # see benchmarks.classification and .segmentation
    evaluation: dict[str, Any] = field(default_factory=dict)  # likewise
    checkpoint_every: int = 2000  # iterations
    validate_every: int = 0  # iterations between looks at the validation images; 0: a training never sees them
    evaluate_best: bool = (
        False  # the score: of the look that scored highest, a chosen maximum; else of the last weights
    )
    threads: int = 1  # CPU threads; they decide the order of floating-point sums, and with it the last digits
    workers: int = 0  # data-loading processes, of each training process
    engine: Engine = field(default_factory=Engine)

    @property
    def images_per_forward(self) -> int:
        """How many images a process takes at once; an evaluation no more than the training."""
        return self.batch_size // (self.engine.processes * self.engine.accumulate)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at `batch_size` images per step, after warm-up."""
        return self.learning_rate * (self.batch_size / self.learning_rate_images if self.learning_rate_images else 1.0)


def is_gpu_type(asked: str, name: str) -> bool:
    """Whether the GPU called `name`, by Ray or by its driver, is of the type that a user asks for.

    All words of the type are in the name, in a row: `A100` is `NVIDIA A100-SXM4-80GB`, and `A10` is not. Hyphens,
    spaces and capitals make no difference. That GPU is an `A100-80G` as well, the form in which Ray's users tell sizes.
    """
    short = re.sub(r"-(?:SXM\d|PCIE)-(\d+G)B\b", r"-\1", name, flags=re.IGNORECASE)
    words, *names = (" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in (asked, name, short))
    return any(f" {words} " in f" {each} " for each in names)


@dataclass
class SpeedSettings:
    """How latency is measured (benchmarks.speed)."""

    batch_size: int = 1
    repeats: int = 20
    warmup: int = 3
    max_seconds: float = 20.0  # for the forward, and again for the training step; at least five repeats are kept
    train_step: bool = True
    device: str = "cpu"
    gpu_type: str | None = None  # with device=cuda: on no other GPU than this, as Ray names it (H100, A100, ...)
    threads: int | None = None  # on a CPU; null: all cores


@dataclass(frozen=True)
class Scoring:
    """How a trial of a search is scored: on a part of the training images, which the trial does not train on.

    The validation images are what tables report: a recipe chosen by them would have seen them.
    """

    held_out: float = 0.1  # share of the training images; the same images for every trial and seed
    times: int = 9  # evenly over the training, the last at its end


@dataclass(frozen=True)
class Job:
    """One measurement. Its `key` is a digest of all that decides the outcome, and of nothing else."""

    stage: str
    task: str
    label: str  # the model's name in the suite, shown in tables
    model: str  # the name that zoo.create_model knows
    input_size: tuple[int, int]  # height, width in pixels
    num_classes: int
    model_config: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    head_config: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    seed: int = 0
    data: str | None = None
    data_version: int = 0
    data_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    speed: SpeedSettings | None = None
    scoring: Scoring | None = None  # of a search
    depends_on: tuple[str, ...] = ()  # keys of the jobs that must be done before
    starts_from: Mapping[str, Any] | None = None  # `description` of the training whose weights this one starts from

    def content(self) -> dict[str, Any]:
        """All that decides the outcome, as plain JSON data (what a stage does not use is left out)."""
        content: dict[str, Any] = {
            "method": METHOD_VERSION[self.stage],
            "stage": self.stage,
            "task": self.task,
            "label": self.label,
            "model": self.model,
            "model_config": dict(self.model_config),
            "head": self.head,
            "head_config": dict(self.head_config),
            "input_size": list(self.input_size),
            "num_classes": self.num_classes,
        }
        if self.stage == "speed":
            content["speed"] = asdict(self.speed)
            if self.speed.gpu_type is None:  # added later: it changes no key where it is not used
                del content["speed"]["gpu_type"]
        if self.stage in (*TRAININGS, "evaluate"):
            content |= {
                "precision": self.precision,
                "seed": self.seed,
                "data": self.data,
                "data_version": self.data_version,
                "data_options": dict(self.data_options),
                "recipe": self._recipe(),
                "depends_on": list(self.depends_on),
            }
            if self.recipe.engine.accumulate != 1:
                content["recipe"]["accumulate"] = self.recipe.engine.accumulate
            if self.stage == SEARCH:
                content["scoring"] = asdict(self.scoring)
            if self.starts_from is not None:
                content["starts_from"] = dict(self.starts_from)
        return json.loads(json.dumps(content, sort_keys=True))

    def description(self) -> dict[str, Any]:
        """The content less the seed and the keys that follow from it: the same for all repetitions."""
        return {name: value for name, value in self.content().items() if name not in ("seed", "depends_on")}

    def _recipe(self) -> dict[str, Any]:
        """What of the recipe decides the outcome of this stage, less what stands at its default."""
        unused = {"checkpoint_every", "workers", "engine"}
        if self.stage in TRAININGS:
            unused.add("evaluate_best")
            if self.stage != SEARCH and not self.recipe.validate_every:  # else it decides scores, or the best weights
                unused.add("evaluation")
        default = asdict(type(self.recipe)())
        return {
            name: value for name, value in asdict(self.recipe).items() if name not in unused and value != default[name]
        }

    @cached_property
    def key(self) -> str:
        """File name of the job's record: readable in front, 16 hexadecimal digits of its content's SHA-256 behind."""
        digest = hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]
        parts = [self.stage, self.task[:3], self.label, *([self.head] if self.head else []), digest]
        return "-".join(re.sub(r"[^A-Za-z0-9_.]", "_", part)[:60] for part in parts)

    @cached_property
    def counted_as(self) -> str:
        """The key of the job that counts this one's model; of a pretraining, which none counts, of its seed 0."""
        return replace(self, **({"seed": 0} if self.stage == "pretrain" else {"stage": "cost"})).key

    @property
    def title(self) -> str:
        """A line for people: what is done to which model."""
        head = f" + {self.head}" if self.head else ""
        return f"{self.stage} {self.label}{head} ({self.task})"
