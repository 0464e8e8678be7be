"""Leaderboards as CSV with a stable schema: one file per task and one for cost, best first, unmeasured rows last.

`leaderboard_schema.json` beside this file names the columns, their types and what they hold. A number that was not
measured is an empty cell; `status`, `cost_status`, `speed_status` and `reason` say why.
"""

import csv
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .files import write_atomic
from .papers import Papers
from .rebuilt import reported
from .record import Record
from .rows import METRIC, Row, alike, started, variant
from .tables import KINDS, rows_of

SCHEMA_FILE = Path(__file__).with_name("leaderboard_schema.json")


@cache
def columns() -> dict[str, str]:
    """The columns of every leaderboard, in order, with their types: integer, number, string or date."""
    return {field["name"]: field["type"] for field in json.loads(SCHEMA_FILE.read_text())["fields"]}


def leaderboard(records: Sequence[Record], kind: str, papers: Papers | None = None) -> list[dict[str, object]]:
    """The leaderboard of "classification", "segmentation" or "cost" as rows by column; None is an empty cell.

    `papers` are what the reported accuracies are looked up in; without them those cells stay empty.
    """
    lines: list[dict[str, object]] = []
    ranks: dict[tuple, int] = {}
    for row in rows_of(records, kind):
        line = _line(row, kind, papers or Papers())
        group = alike(row) if kind == "cost" else (row.task, row.data)
        if _ranked_by(row, kind).value is not None:
            ranks[group] = ranks.get(group, 0) + 1
            line["rank"] = ranks[group]
        lines.append(line)
    # Whatever has no value goes to the very end, behind the last row of another data set or task too.
    return sorted(lines, key=lambda line: line["rank"] is None)


def to_csv(lines: Sequence[dict[str, object]]) -> str:
    """CSV text with the columns of the schema; numbers in full precision."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(columns()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def write(records: Sequence[Record], output: Path, papers: Papers | None = None) -> list[Path]:
    """Write `leaderboard_<kind>.csv` of every kind that has rows into `output`. Returns the paths."""
    written = []
    for kind in KINDS:
        if lines := leaderboard(records, kind, papers):
            path = output / f"leaderboard_{kind}.csv"
            write_atomic(path, to_csv(lines))
            written.append(path)
    return written


def _ranked_by(row: Row, kind: str):
    return row.cells["macs"] if kind == "cost" else row.metric


def _line(row: Row, kind: str, papers: Papers) -> dict[str, object]:
    scored = kind != "cost"
    line: dict[str, object] = {}
    for name, cell in row.cells.items():
        line |= {name: cell.value, f"{name}_low": cell.low, f"{name}_high": cell.high}
    jobs = [record.job for record in row.records]
    latest = max(row.records, key=started)
    versions = latest.provenance.get("versions") or {}
    paper = next((r.details["paper_convention"] for r in row.records if "paper_convention" in r.details), {})
    value, source = reported(papers, row) if scored else (None, "")
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
        "variant": variant(row.records[0]),
        "num_classes": row.num_classes,
        "paper_convention": paper.get("name"),
        "batch_size": next((job["speed"].get("batch_size") for job in jobs if job.get("speed")), None),
        "reported_value": value,
        "reported_in": source,
        "software": ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions),
        "records": " ".join(record.key for record in row.records),
    }
    return {name: _typed(line.get(name), kind) for name, kind in columns().items()}


def _typed(value: Any, kind: str) -> Any:
    """Counts are means over seeds, so floating-point numbers: whole again where the schema says so."""
    return int(value) if kind == "integer" and value is not None else value
