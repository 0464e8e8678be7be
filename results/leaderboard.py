"""Leaderboards as CSV with a stable schema: one file per task and one for cost, best first, unmeasured rows last.

The columns are those of `SCHEMA`, in that order, in each file. A column is only ever added at the end. A number that
was not measured is an empty cell; `status`, `cost_status`, `speed_status` and `reason` say why.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomic
from .record import Record
from .rows import METRIC, Row
from .tables import KINDS, rows_of

# Column -> what it holds.
SCHEMA = {
    "rank": "1 is best; empty for a row without the value that it is ranked by; ranked per task and data",
    "task": "classification or segmentation",
    "model": "name of the model in the suite",
    "family": "name of the model family",
    "head": "decode head of a segmentation model; empty for classification",
    "data": "data set and version; empty where none is involved",
    "input_height": "pixels",
    "input_width": "pixels",
    "precision": "numeric precision of the training and evaluation; of the speed in the cost leaderboard",
    "seeds": "number of seeds that the metric is the mean of; empty without a metric",
    "params": "number of parameters",
    "macs": "multiply-accumulates of one image",
    "activations": "elements that convolutions, linear layers and matrix products write for one image",
    "latency_ms": "median milliseconds of a forward pass",
    "latency_ms_low": "lower end of the latency's interval",
    "latency_ms_high": "upper end of the latency's interval",
    "throughput": "images per second",
    "peak_memory_mb": "peak memory of a forward pass in MB",
    "metric": "name of the metric: top1 or mIoU; empty in the cost leaderboard, which is ranked by macs",
    "value": "the metric in percent, mean over seeds",
    "value_std": "its sample standard deviation over seeds; empty for a single seed",
    "baseline": "the same metric of a trivial prediction (majority class; all background), percent",
    "direction": "higher or lower: which is better in the column that the rows are ranked by",
    "hardware": "where the speed was measured; where the rest ran if it was not",
    "revision": "revision of the code",
    "date": "day of the latest measurement of the row, YYYY-MM-DD",
    "status": "of what the rows are ranked by: done, failed, blocked or not run",
    "cost_status": "of parameters, multiply-accumulates and activations",
    "speed_status": "of latency, throughput and memory",
    "reason": "why cells are empty, one sentence per stage, separated by semicolons",
}


def leaderboard(records: Sequence[Record], kind: str) -> list[dict[str, object]]:
    """The leaderboard of "classification", "segmentation" or "cost" as rows by column of `SCHEMA`; None is empty."""
    lines: list[dict[str, object]] = []
    ranks: dict[tuple, int] = {}
    for row in rows_of(records, kind):
        line = _line(row, kind)
        group = (row.task, row.data)
        if _ranked_by(row, kind).value is not None:
            ranks[group] = ranks.get(group, 0) + 1
            line["rank"] = ranks[group]
        lines.append(line)
    # Whatever has no value goes to the very end, behind the last row of another data set or task too.
    return sorted(lines, key=lambda line: line["rank"] is None)


def to_csv(lines: Sequence[dict[str, object]]) -> str:
    """CSV text with the columns of `SCHEMA`; numbers in full precision."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(SCHEMA), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def write(records: Sequence[Record], output: Path) -> list[Path]:
    """Write `leaderboard_<kind>.csv` of every kind that has rows into `output`. Returns the paths."""
    written = []
    for kind in KINDS:
        if lines := leaderboard(records, kind):
            path = output / f"leaderboard_{kind}.csv"
            write_atomic(path, to_csv(lines))
            written.append(path)
    return written


def _ranked_by(row: Row, kind: str):
    return row.cells["macs"] if kind == "cost" else row.metric


def _line(row: Row, kind: str) -> dict[str, object]:
    scored = kind != "cost"
    shown = ("params", "macs", "activations", "latency_ms", "throughput", "peak_memory_mb")
    latency = row.cells["latency_ms"]
    line: dict[str, object] = {name: row.cells[name].value for name in shown}
    line |= {name: int(line[name]) for name in shown[:3] if line[name] is not None and float(line[name]).is_integer()}
    line |= {
        "rank": None,
        "task": row.task,
        "model": row.model,
        "family": row.family,
        "head": row.head,
        "data": row.data,
        "input_height": row.input_size[0],
        "input_width": row.input_size[1],
        "precision": row.precision,
        "seeds": row.metric.count or None if scored else None,
        "latency_ms_low": latency.low,
        "latency_ms_high": latency.high,
        "metric": METRIC[row.task] if scored else None,
        "value": row.metric.value if scored else None,
        "value_std": row.metric.std if scored else None,
        "baseline": row.baseline.value if scored else None,
        "direction": "higher" if scored else "lower",
        "hardware": row.hardware,
        "revision": row.revision,
        "date": row.date,
        "status": _ranked_by(row, kind).status,
        "cost_status": row.stages["cost"].status,
        "speed_status": row.stages["speed"].status,
        "reason": "; ".join(row.reasons(("cost", "speed", "evaluate") if scored else ("cost", "speed"))),
    }
    return line
