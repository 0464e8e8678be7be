"""The record of one job: what ran, what came out, and where it came from. All of `results/` is built from these."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SCHEMA_VERSION = 2  # 2: the stage "search" and the status "stopped"; records without them are still written as 1
# A stopped job was ended before its time on purpose: what it measured until then stands, and is no finished result.
STATUSES = ("done", "stopped", "blocked", "failed")
STAGES = ("cost", "speed", "pretrain", "train", "evaluate", "search")
TASKS = ("classification", "segmentation")

# The names of metrics, by stage and (for an evaluation) by task. A job may leave some out; the tables know only these.
METRICS = {
    # Numbers of elements; MACs at batch 1, counted alike for all models and as the model's own paper counts.
    "cost": ("params", "macs", "activations", "params_auxiliary", "macs_paper"),
    "speed": (
        *("latency_ms", "latency_ms_low", "latency_ms_high", "throughput"),  # throughput: images per second
        *("train_step_ms", "train_step_ms_low", "train_step_ms_high"),
        *("peak_memory_mb", "train_peak_memory_mb", "saved_mb", "yardstick_ms", "ratio_to_yardstick"),
    ),
    # A pretraining learns without labels; its weights are what another training starts from.
    "pretrain": ("final_loss", "iterations", "seconds"),
    "train": ("final_loss", "iterations", "seconds"),
    # A trial of a search: its latest score, percent, on training images that it does not train on. `samples` has all
    # of its scores, and `iteration` beside them.
    "search/classification": ("held_out_top1", "final_loss", "iterations"),
    "search/segmentation": ("held_out_mIoU", "final_loss", "iterations"),
    "evaluate/classification": ("top1", "top5", "baseline_top1"),  # percent; the baseline is the majority class
    "evaluate/segmentation": ("mIoU", "mAcc", "aAcc", "baseline_mIoU", "mIoU_ms"),  # percent; ms: several scales
}

# Parts of a record that the tables look into: of this kind, or absent.
PARTS = {
    ("job", "speed"): dict,
    ("job", "recipe"): dict,
    ("job", "model_config"): dict,
    ("job", "head_config"): dict,
    ("job", "num_classes"): int,
    ("details", "paper_convention"): dict,
    ("details", "macs_by_convention"): dict,
    ("provenance", "versions"): dict,
}

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+=-]{0,199}")


class RecordError(ValueError):
    """A record has a missing, unknown or wrong field; the message is one line that names it."""


class NewerSchemaError(RecordError):
    """A record was written by a later version of this code."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One job's outcome. Raises `RecordError` when a field is wrong; tuples become lists, so that JSON changes nothing.

    `provenance` holds whatever can be had of: `revision` (code revision), `command`, `started` (ISO 8601), `seconds`,
    `versions` (package -> version), `hardware` (a short label, or a mapping whose `name` is one).
    """

    key: str  # content-addressed job key: the file name in the ledger
    status: str  # one of STATUSES
    stage: str  # one of STAGES
    task: str  # one of TASKS
    model: str  # display label, e.g. "hivit_tiny"
    family: str  # e.g. "HiViT"
    input_size: list[int]  # [height, width] in pixels
    reason: str | None = None  # why it is not done; required unless status is "done"
    head: str | None = None  # e.g. "segformer"
    data: str | None = None  # name@version, e.g. "digit_scenes_segmentation@1"
    precision: str = "float32"
    seed: int = 0
    job: dict[str, Any] = field(default_factory=dict)  # the full content that the key hashes
    metrics: dict[str, float] = field(default_factory=dict)  # names as in METRICS
    samples: dict[str, list[float]] = field(default_factory=dict)  # raw measurements, e.g. every latency
    details: dict[str, Any] = field(default_factory=dict)  # free JSON: operators, notes on convention
    artifacts: dict[str, str] = field(default_factory=dict)  # name -> path relative to the output folder
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("job", "metrics", "samples", "details", "artifacts", "notes", "provenance", "input_size"):
            object.__setattr__(self, name, _plain(getattr(self, name), name))
        _check(self)

    @property
    def done(self) -> bool:
        return self.status == "done"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON data, `schema` included."""
        schema = SCHEMA_VERSION if self.stage == "search" else 1  # the oldest that knows what is in it
        return {"schema": schema} | {item.name: getattr(self, item.name) for item in fields(self)}

    def to_json(self) -> str:
        """The record as JSON text, one field per line; mappings keep their order (largest operator first)."""
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in self.to_dict().items())
        return "{\n" + ",\n".join(lines) + "\n}"

    @classmethod
    def from_dict(cls, data: Any) -> "Record":
        """Check plain JSON data and make a record of it. Raises `RecordError`, or `NewerSchemaError`."""
        if not isinstance(data, Mapping):
            raise RecordError(f"a record must be a JSON object, not {type(data).__name__}")
        schema = data.get("schema")
        if type(schema) is not int or schema < 1:
            raise RecordError(f"schema: must be a positive whole number, not {schema!r}")
        if schema > SCHEMA_VERSION:
            raise NewerSchemaError(f"schema {schema} is newer than {SCHEMA_VERSION}, the one that this code reads")
        names = {item.name for item in fields(cls)}
        if missing := sorted(names - data.keys()):
            raise RecordError(f"{missing[0]}: missing field")
        if unknown := sorted(data.keys() - names - {"schema"}):
            raise RecordError(f"{unknown[0]}: unknown field")
        return cls(**{name: data[name] for name in names})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Record":
        """Read what `to_json` wrote. Raises `RecordError` with one line that names the wrong field."""
        return cls.from_dict(parse_json(text))


def parse_json(text: str | bytes) -> Any:
    """Strict JSON: no NaN and no Infinity. Raises `RecordError`."""

    def refuse(constant: str) -> None:
        raise RecordError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"not valid JSON: {error}") from error


def _plain(value: Any, where: str) -> Any:
    """A copy of `value` in JSON's own types, or a `RecordError` that says where it is not JSON."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        if not math.isfinite(value):
            raise RecordError(f"{where}: {value} is not a finite number")
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise RecordError(f"{where}: the name {name!r} must be text")
        return {str(name): _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    for base in (str, bool, int, float):  # subclasses: enumerations of text, numpy's float64
        if isinstance(value, base):
            return _plain(base(value), where)
    raise RecordError(f"{where}: {kind.__name__} is not JSON (use numbers, text, lists and mappings)")


def _number(value: Any) -> bool:
    return type(value) is int or type(value) is float


def _check(record: Record) -> None:
    def require(holds: bool, name: str, expected: str) -> None:
        if not holds:
            value = repr(getattr(record, name.split(".")[0]))
            raise RecordError(f"{name}: must be {expected}, not {value if len(value) < 80 else value[:77] + '...'}")

    require(isinstance(record.key, str) and bool(_KEY.fullmatch(record.key)), "key", "a name fit for a file")
    for name, known in (("status", STATUSES), ("stage", STAGES), ("task", TASKS)):
        value = getattr(record, name)
        require(isinstance(value, str) and value in known, name, "one of " + ", ".join(known))
    for name in ("model", "family", "precision"):
        value = getattr(record, name)
        require(isinstance(value, str) and bool(value.strip()), name, "text")
    for name in ("head", "data", "reason"):
        value = getattr(record, name)
        require(value is None or (isinstance(value, str) and bool(value.strip())), name, "text or null")
    if record.status != "done" and not record.reason:
        raise RecordError(f"reason: a {record.status} record must say why")
    size = record.input_size
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    require(whole, "input_size", "[height, width] in pixels")
    require(type(record.seed) is int, "seed", "a whole number")
    for name in ("job", "metrics", "samples", "details", "artifacts", "provenance"):
        require(isinstance(getattr(record, name), dict), name, "a mapping")
    for (name, part), kind in PARTS.items():
        value = getattr(record, name).get(part)
        if value is not None and type(value) is not kind:
            raise RecordError(
                f"{name}.{part}: must be a {'mapping' if kind is dict else 'whole number'}, not {value!r:.60}"
            )
    for name, value in record.metrics.items():
        require(_number(value), f"metrics.{name}", "a number")
    for name, values in record.samples.items():
        require(isinstance(values, list) and all(map(_number, values)), f"samples.{name}", "a list of numbers")
    for name, path in record.artifacts.items():
        inside = isinstance(path, str) and path != "" and not path.startswith("/") and ".." not in path.split("/")
        require(inside, f"artifacts.{name}", "a path relative to the output folder")
    require(isinstance(record.notes, list) and all(isinstance(n, str) for n in record.notes), "notes", "a list of text")
