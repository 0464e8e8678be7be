"""Records of several jobs joined into one row per measured setting: what tables, leaderboards and plots show.

A row is a model with its head, data, input size, precision and recipe. Its cells come from the cost, speed and
evaluation records of that setting; a cell without a measured value carries a status and a reason instead of a value.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .record import METRICS, TASKS, Record

NOT_RUN = "not run"
BARE = "bare"  # the head of a backbone without one: it has a cost and a speed, and never a score
METRIC = {"classification": "top1", "segmentation": "mIoU"}  # what a task is ranked by, percent, higher is better
BASELINE = {task: f"baseline_{metric}" for task, metric in METRIC.items()}
INTERVALS = ("latency_ms", "train_step_ms")  # each comes with NAME_low and NAME_high
STAGE_NOUN = {"cost": "cost", "speed": "speed", "train": "training", "evaluate": "evaluation"}
# Why a job that is done has no such number, where that is no fault.
UNMEASURED = {"mIoU_ms": "evaluated at one scale: the recipe lists no several scales"}


@dataclass(frozen=True)
class Cell:
    """One number of one row, over all its seeds. `value` is None unless `status` is "done"."""

    status: str  # "done", "failed", "blocked" or NOT_RUN
    value: float | None = None  # mean over seeds
    low: float | None = None  # interval of a timing
    high: float | None = None
    std: float | None = None  # sample standard deviation over seeds, from two seeds on
    count: int = 0  # seeds with a value
    reason: str = ""  # why there is no value


@dataclass
class Row:
    """One measured setting. `cells` are named as in `record.METRICS`."""

    task: str
    model: str
    family: str
    head: str | None
    data: str | None
    input_size: tuple[int, int]  # height, width
    precision: str
    cells: dict[str, Cell] = field(default_factory=dict)
    stages: dict[str, Cell] = field(default_factory=dict)  # cost, speed, evaluate: status and reason, no value
    seeds: tuple[int, ...] = ()  # of the evaluations that are done
    hardware: str = ""  # where the speed was measured, else where the rest ran
    revision: str = ""
    date: str = ""  # of the latest record, YYYY-MM-DD
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)  # that the cells come from, in the order of the stages

    @property
    def metric(self) -> Cell:
        """What the row is ranked by."""
        return self.cells[METRIC[self.task]]

    @property
    def baseline(self) -> Cell:
        """The same metric of a trivial prediction."""
        return self.cells[BASELINE[self.task]]

    @property
    def num_classes(self) -> int | None:
        return self.records[0].job.get("num_classes")

    @property
    def classes(self) -> str:
        return f"{self.num_classes} classes" if self.num_classes else ""

    @property
    def config(self) -> str:
        """As JSON, what is configured in the model and in its head; empty where nothing is."""
        return variant(self.records[0]).partition(" ")[2]

    @property
    def size(self) -> str:
        return f"{self.input_size[0]}x{self.input_size[1]}"

    def reasons(self, stages: Sequence[str] = ("cost", "speed", "evaluate")) -> list[str]:
        """One line for each stage that is not done."""
        return [self.stages[stage].reason for stage in stages if self.stages[stage].status != "done"]


def join(records: Iterable[Record], task: str) -> list[Row]:
    """The rows of one task, best metric first within each data set, rows without a metric last.

    Without bare backbones and pretrainings, which never have a score, and a search's trials, which have another one.
    """
    scored = [record for record in records if record.head != BARE and record.stage not in ("pretrain", "search")]
    return _join([record for record in scored if record.task == task])


def join_cost(records: Iterable[Record]) -> list[Row]:
    """One row per model, head and size of both tasks from the cost and speed records alone, fewest MACs first."""
    records = [record for record in records if record.stage in ("cost", "speed")]
    rows = [row for task in TASKS for row in _join([record for record in records if record.task == task])]
    return sorted(rows, key=lambda row: (TASKS.index(row.task), *rank_key(row.cells["macs"]), row.model))


def _join(records: Sequence[Record]) -> list[Row]:
    networks: dict[tuple, list[tuple[Record, tuple]]] = {}
    for record in records:
        setting = _setting(record)
        networks.setdefault(setting[:4], []).append((record, setting))
    rows: list[Row] = []
    settings: list[tuple] = []
    for members in networks.values():  # settings of two networks never fit each other
        for setting in _settings(dict.fromkeys(own for _, own in members)):
            settings.append(setting)
            rows += _rows(setting, [record for record, own in members if _fits(own, setting)])
    _note_recipes(rows, settings)
    # What has no score goes last, whatever its data set is called.
    return sorted(
        rows,
        key=lambda row: (
            row.metric.value is None,
            row.data or "",
            *rank_key(row.metric, highest_first=True),
            row.model,
        ),
    )


def alike(row: Row) -> tuple:
    """What rows must have in common for their costs to be compared: task, head, size and classes."""
    return row.task, row.head, row.input_size, row.num_classes


def rank_key(cell: Cell, highest_first: bool = False) -> tuple[bool, float]:
    """A sort key: best first, unmeasured last."""
    if cell.value is None:
        return True, 0.0
    return False, -cell.value if highest_first else cell.value


def labels(rows: Sequence[Row], size_apart: bool = False) -> list[str]:
    """A short name for each row that tells it from the others: the model, and what differs among the rows.

    With `size_apart` the size is shown elsewhere: it tells rows apart, and is not part of a name.
    """
    sizes = [row.size if size_apart else "" for row in rows]
    names = list(zip((row.model for row in rows), sizes, strict=True))
    for part in ("head", "size", "classes", "precision", "hardware", "config"):
        values = [getattr(row, part) for row in rows]
        if len(set(values)) > 1:
            counts = Counter(names)
            names = [
                (f"{n} {v}", s) if v and counts[n, s] > 1 else (n, s) for (n, s), v in zip(names, values, strict=True)
            ]
    counts, seen = Counter(names), Counter()
    for index, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[index] = f"{name[0]} #{seen[name]}", name[1]
    return [name for name, _ in names]


def hardware_label(record: Record) -> str:
    """The short name of the hardware in a record's provenance, and the CPU threads of a speed; empty when unknown."""
    name, threads = _hardware_name(record), record.details.get("threads")
    if not name or not threads or (record.job.get("speed") or {}).get("device") != "cpu":
        return name
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _hardware_name(record: Record) -> str:
    hardware = record.provenance.get("hardware", "")
    if isinstance(hardware, dict):
        on_cpu = (record.job.get("speed") or {}).get("device") == "cpu"
        if on_cpu and hardware.get("gpus") and hardware.get("cpu"):
            return str(hardware["cpu"])  # The machine is named after a GPU that this measurement did not use.
        hardware = next((hardware[name] for name in ("name", "gpu", "device", "cpu") if hardware.get(name)), "")
    return hardware if isinstance(hardware, str) else json.dumps(hardware, sort_keys=True)


def variant(record: Record) -> str:
    """What builds the record's network: the registered name, and as JSON what is configured in it and in its head."""
    parts = [str(record.job.get("model") or record.model)]
    for name in ("model_config", "head_config"):
        if config := record.job.get(name):
            parts.append(json.dumps(config, sort_keys=True))
    return " ".join(parts)


def started(record: Record) -> str:
    """When the job started, as its provenance says (ISO 8601); empty when it says nothing."""
    return str(record.provenance.get("started") or "")


# A setting is (model, head, size, variant, data, precision, recipe, evaluation). None in the last four stands for any:
# a cost does not depend on data, precision or recipe, a speed not on data or recipe, a training not on its evaluation.
def _setting(record: Record) -> tuple:
    trained = record.stage in ("train", "evaluate")
    outcome = {"seed", "depends_on", "method", "stage"}  # Jobs that differ in these alone are one setting.
    base = (record.model, record.head, tuple(record.input_size), (record.job.get("num_classes"), variant(record)))
    if not trained:  # Its job may carry the name of a data set, but its number does not depend on it.
        return (*base, None, None, None, None)
    job = {name: value for name, value in record.job.items() if name not in outcome}
    recipe = dict(job.pop("recipe", None) or {})
    asked = [recipe.pop("evaluation", {}), recipe.pop("evaluate_best", False)]
    evaluation = json.dumps(asked, sort_keys=True) if record.stage == "evaluate" else None
    return (*base, record.data, record.precision, json.dumps([job, recipe], sort_keys=True), evaluation)


def _fits(specific: tuple, general: tuple) -> bool:
    """Whether two settings agree wherever both say something (the head always counts)."""
    pairs = list(zip(specific, general, strict=True))
    return pairs[1][0] == pairs[1][1] and all(a == b or a is None or b is None for a, b in pairs)


def _settings(unique: Iterable[tuple]) -> list[tuple]:
    """The settings of all records, less those that a more specific one covers."""
    kept: list[tuple] = []
    for setting in sorted(unique, key=lambda setting: setting.count(None)):
        if not any(_fits(setting, other) and _says_more(other, setting) for other in kept):
            kept.append(setting)
    return kept


def _says_more(setting: tuple, other: tuple) -> bool:
    return all(a is not None or b is None for a, b in zip(setting, other, strict=True))


def _rows(setting: tuple, records: Sequence[Record]) -> list[Row]:
    """One row, or several where the speed was measured in several ways (hardware, precision, batch size)."""
    precision = setting[5]
    ways: dict[str, list[Record]] = {}
    speeds = [record for record in records if record.stage == "speed"]
    speeds = [record for record in speeds if record.precision == precision] or speeds
    for record in speeds:
        way = [hardware_label(record), record.precision, record.job.get("speed")]
        ways.setdefault(json.dumps(way, sort_keys=True), []).append(record)
    # A way that never worked is no row of its own beside one that did.
    worked = [members for members in ways.values() if any(record.done for record in members)]
    shown = worked or list(ways.values())[:1] or [[]]
    others = [record for record in records if record.stage != "speed"]
    return [_row(setting, others + members) for members in shown]


def _row(setting: tuple, records: Sequence[Record]) -> Row:
    first = records[0]
    by_stage = {stage: _latest([r for r in records if r.stage == stage]) for stage in STAGE_NOUN}
    measured = by_stage["speed"] or by_stage["evaluate"] or by_stage["train"] or by_stage["cost"]
    latest = max(records, key=started)
    row = Row(
        task=first.task,
        model=first.model,
        family=first.family,
        head=first.head,
        data=setting[4],
        input_size=(first.input_size[0], first.input_size[1]),
        precision=setting[5] or measured[0].precision,
        seeds=tuple(sorted(record.seed for record in by_stage["evaluate"] if record.done)),
        hardware=hardware_label(measured[0]),
        revision=str(latest.provenance.get("revision") or ""),
        date=started(latest)[:10],
        records=[record for stage in by_stage.values() for record in stage],
    )
    for stage in ("cost", "speed", "evaluate"):
        row.stages[stage] = _stage_cell(stage, by_stage)
        for name in METRICS.get(stage) or METRICS[f"{stage}/{row.task}"]:
            if not name.endswith(("_low", "_high")):
                row.cells[name] = _cell(name, by_stage[stage], row.stages[stage])
        done = [record for record in by_stage[stage] if record.done]
        if done and len(done) < len(by_stage[stage]):
            row.notes += [f"seed {r.seed} {r.status}: {r.reason}" for r in by_stage[stage] if not r.done]
    if speed := [record for record in by_stage["speed"] if record.done and record.precision != row.precision]:
        row.notes.append(f"speed measured in {speed[0].precision}")
    row.notes += dict.fromkeys(note for stage in by_stage.values() for record in stage for note in record.notes)
    return row


def _latest(records: Sequence[Record]) -> list[Record]:
    """One record per seed: a done one before any other, then the latest."""
    best: dict[int, Record] = {}
    for record in sorted(records, key=lambda record: (record.done, started(record))):
        best[record.seed] = record
    return [best[seed] for seed in sorted(best)]


def _stage_cell(stage: str, by_stage: dict[str, list[Record]]) -> Cell:
    own = by_stage[stage]
    if any(record.done for record in own):
        return Cell("done")
    cause = own or ([r for r in by_stage["train"] if not r.done] if stage == "evaluate" else [])
    if not cause:
        return Cell(NOT_RUN, reason=f"{STAGE_NOUN[stage]} not run: no record of it yet")
    worst = next((record for record in cause if record.status == "failed"), cause[0])
    return Cell(worst.status, reason=f"{STAGE_NOUN[worst.stage]} {worst.status}: {worst.reason}")


def _cell(name: str, records: Sequence[Record], stage: Cell) -> Cell:
    if stage.status != "done":
        return stage
    done = [record.metrics for record in records if record.done and name in record.metrics]
    if not done:
        plain = f"{name} was not measured by the {STAGE_NOUN[records[0].stage]} job"
        return Cell(NOT_RUN, reason=UNMEASURED.get(name, plain))
    values = [metrics[name] for metrics in done]
    bounds: dict[str, Any] = {}
    if name in INTERVALS and all(f"{name}_low" in m and f"{name}_high" in m for m in done):
        bounds = {"low": min(m[f"{name}_low"] for m in done), "high": max(m[f"{name}_high"] for m in done)}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Cell("done", value=statistics.fmean(values), std=deviation, count=len(values), **bounds)


def _note_recipes(rows: Sequence[Row], settings: Sequence[tuple]) -> None:
    """Say so where rows that look alike were trained differently: never an average over different recipes."""
    recipes: dict[tuple, set] = {}
    for setting in settings:
        recipes.setdefault(setting[:3] + setting[4:6], set()).add(setting[6:])
    for row in rows:
        alike = recipes.get((row.model, row.head, row.input_size, row.data, row.precision), set())
        if len(alike) > 1:
            row.notes.append("one of several recipes of this model; the report's job details tell them apart")
