"""Comparison tables from records alone: CSV for machines, Markdown and LaTeX for papers, rich for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .display import Display, latex, markdown
from .files import write_atomic
from .record import METRICS, TASKS, Record
from .rows import INTERVALS, STAGE_NOUN, Cell, Row, alike, join, join_cost, labels

if TYPE_CHECKING:
    import pandas
    import rich.table

KINDS = (*TASKS, "cost")


@dataclass(frozen=True)
class Column:
    """A measured column: its name in a record, its heading, its unit, and how its numbers are scaled and compared."""

    name: str
    title: str
    unit: str
    scale: float = 1.0
    best: str = ""  # "min", "max", or "" where no value is better than another
    percent: bool = False

    @property
    def deviates(self) -> bool:
        """Whether the spread over seeds says something: for scores, not for what a trivial prediction scores."""
        return self.percent and not self.name.startswith("baseline")

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})"


_COST = (
    Column("params", "Params", "M", 1e-6, "min"),
    Column("macs", "MACs", "G", 1e-9, "min"),
    Column("activations", "Activations", "M", 1e-6, "min"),
)
_SPEED = (
    Column("latency_ms", "Latency", "ms", best="min"),
    Column("throughput", "Throughput", "images/s", best="max"),
    Column("peak_memory_mb", "Peak memory", "MB", best="min"),
)
_TRAIN_SPEED = (
    Column("train_step_ms", "Training step", "ms", best="min"),
    Column("train_peak_memory_mb", "Training memory", "MB", best="min"),
)
_SCORES = {
    "classification": (
        Column("top1", "Top-1", "%", best="max", percent=True),
        Column("top5", "Top-5", "%", best="max", percent=True),
        Column("baseline_top1", "Trivial top-1", "%", percent=True),
    ),
    "segmentation": (
        Column("mIoU", "mIoU", "%", best="max", percent=True),
        Column("mIoU_ms", "mIoU, several scales", "%", best="max", percent=True),
        Column("mAcc", "mAcc", "%", best="max", percent=True),
        Column("baseline_mIoU", "Trivial mIoU", "%", percent=True),
    ),
}
COLUMNS = {task: (*_SCORES[task], *_COST, *_SPEED) for task in TASKS} | {"cost": (*_COST, *_SPEED, *_TRAIN_SPEED)}
_COLUMNS_OF = {
    "cost": _COST,
    "speed": (*_SPEED, *_TRAIN_SPEED),
    "evaluate": (*_SCORES["classification"], *_SCORES["segmentation"]),
}
_STAGES = dict.fromkeys(TASKS, ("cost", "speed", "evaluate")) | {"cost": ("cost", "speed")}
CAPTIONS = {
    "classification": "Image classification: cost, speed and accuracy",
    "segmentation": "Semantic segmentation: cost, speed and mean intersection over union",
    "cost": "Cost and speed of every model",
}


def rows_of(records: Sequence[Record], kind: str) -> list[Row]:
    """The joined rows of "classification", "segmentation" or "cost" (both tasks, without metrics)."""
    return join_cost(records) if kind == "cost" else join(records, kind)


def format_number(column: Column, value: float) -> str:
    """A number for people, in the column's unit: three significant digits, percentages with one decimal."""
    value *= column.scale
    if column.percent:
        return f"{value:.1f}"
    magnitude = abs(value)
    return f"{value:,.0f}" if magnitude >= 1000 else f"{value:.{1 if magnitude >= 10 else 2 if magnitude >= 1 else 3}f}"


def format_cell(column: Column, cell: Cell, interval: bool = True) -> str:
    """A cell for people: the number with its interval or deviation, or its status where nothing was measured."""
    if cell.value is None:
        return cell.status
    text = format_number(column, cell.value)
    if column.deviates and cell.std is not None:
        text += f" ± {format_number(column, cell.std)}"
    elif interval and cell.low is not None and cell.high is not None:
        text += f" [{format_number(column, cell.low)}, {format_number(column, cell.high)}]"
    return text


def best_rows(column: Column, rows: Sequence[Row]) -> set[int]:
    """The rows with the best value among those that are `alike`; none where all are the same."""
    best: set[int] = set()
    groups = [(row.data, *alike(row)) for row in rows]
    for group in set(groups):
        members = [i for i, own in enumerate(groups) if own == group]
        values = {i: value for i in members if (value := rows[i].cells[column.name].value) is not None}
        if column.best and len(set(values.values())) > 1:
            winner = (min if column.best == "min" else max)(values.values())
            best |= {i for i, value in values.items() if value == winner}
    return best


def frame(records: Sequence[Record], kind: str) -> "pandas.DataFrame":
    """Full-precision numbers in base units (elements, ms, MB, percent); an unmeasured cell is empty, never zero.

    `cost_status`, `speed_status`, `status` (of the evaluation) and `reason` say what an empty cell means.
    """
    import pandas

    rows = rows_of(records, kind)
    stages = _STAGES[kind]
    data: dict[str, list] = {
        "task": [row.task for row in rows],
        "model": [row.model for row in rows],
        "family": [row.family for row in rows],
        "head": [row.head for row in rows],
        "data": [row.data for row in rows],
        "input_height": [row.input_size[0] for row in rows],
        "input_width": [row.input_size[1] for row in rows],
        "precision": [row.precision for row in rows],
        "hardware": [row.hardware for row in rows],
    }
    if "evaluate" in stages:
        data["seeds"] = [" ".join(map(str, row.seeds)) for row in rows]
    for column in COLUMNS[kind]:
        cells = [row.cells[column.name] for row in rows]
        data[column.name] = [cell.value for cell in cells]
        if column.name in INTERVALS:
            data[f"{column.name}_low"] = [cell.low for cell in cells]
            data[f"{column.name}_high"] = [cell.high for cell in cells]
        if column.deviates:
            data[f"{column.name}_std"] = [cell.std for cell in cells]
    for stage in stages:
        data["status" if stage == "evaluate" else f"{stage}_status"] = [row.stages[stage].status for row in rows]
    data["reason"] = ["; ".join(row.reasons(stages)) for row in rows]
    data["notes"] = ["; ".join(row.notes) for row in rows]
    data["num_classes"] = [row.num_classes for row in rows]
    for name in ("mIoU_ms", "mIoU_ms_std"):  # columns are only ever added at the end
        if name in data:
            data[name] = data.pop(name)
    # Whole numbers stay whole beside empty cells.
    whole = {name: "Int64" for name in (*METRICS["cost"], "num_classes") if name in data and _whole(data[name])}
    return pandas.DataFrame(data).astype(whole)


def display(rows: Sequence[Row], kind: str) -> Display:
    """The table for people. What is the same in all rows (precision, hardware, data) goes to the caption."""
    columns, without = _with_numbers(rows, kind)
    texts: dict[str, list[str]] = {"Model": [row.model for row in rows], "Family": [row.family for row in rows]}
    common: list[str] = []
    seeds = {row.metric.count for row in rows} - {0} if kind != "cost" else set()
    attributes = {
        "Task": [row.task for row in rows],
        "Head": [row.head or "" for row in rows],
        "Data": [row.data or "" for row in rows],
        "Size": [row.size for row in rows],
        "Classes": [str(row.num_classes or "") for row in rows],
        "Precision": [row.precision for row in rows],
        # What was only counted is the same on any machine.
        "Hardware": [row.hardware if _timed(row) else "" for row in rows],
        # An unmeasured row has no seeds, and is no reason for a column of them.
        "Seeds": [str(row.metric.count if len(seeds) > 1 else max(seeds, default="")) for row in rows],
    }
    for name, values in attributes.items():
        named = set(values) - {""} if name == "Hardware" else set(values)
        if len(named) > 1:
            texts[name] = values
        elif any(named) and name != "Task":
            common.append(f"{name.lower()} {named.pop()}")
    footnotes: dict[str, int] = {}
    cells, values, best, measured = [], [], [], []
    winners = {column.name: best_rows(column, rows) for column in columns}
    for index, row in enumerate(rows):
        line = [column[index] for column in texts.values()]
        known = len(line)
        for column in columns:
            cell = row.cells[column.name]
            text = format_cell(column, cell)
            if cell.value is None:
                text += f" [{footnotes.setdefault(cell.reason, len(footnotes) + 1)}]"
            line.append(text)
        marks = [footnotes.setdefault(note, len(footnotes) + 1) for note in row.notes]
        line[0] += "".join(f" [{mark}]" for mark in marks)
        cells.append(line)
        values.append([None] * known + [row.cells[column.name].value for column in columns])
        best.append([False] * known + [index in winners[column.name] for column in columns])
        measured.append([True] * known + [row.cells[column.name].value is not None for column in columns])
    return Display(
        caption=CAPTIONS[kind] + (f" ({', '.join(common + without)})" if common or without else ""),
        headings=[*texts, *(column.heading for column in columns)],
        numeric=[False] * len(texts) + [True] * len(columns),
        cells=cells,
        values=values,
        best=best,
        measured=measured,
        footnotes=list(footnotes),
    )


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write `<kind>.csv`, `.md` and `.tex` of every kind that has rows into `folder`. Returns the paths."""
    written = []
    for kind in KINDS:
        rows = rows_of(records, kind)
        if not rows:
            continue
        table = display(rows, kind)
        contents = {
            "csv": frame(records, kind).to_csv(index=False, lineterminator="\n"),
            "md": markdown(table),
            "tex": latex(table, kind),
        }
        for suffix, content in contents.items():
            write_atomic(folder / f"{kind}.{suffix}", content)
            written.append(folder / f"{kind}.{suffix}")
    return written


def closing_table(records: Sequence[Record]) -> "rich.table.Table":
    """What a run ends with: every model of every task on one screen, 100 columns wide, best values marked.

    Without any training there are no columns of scores, and backbones without a head are rows as well.
    """
    params, macs, _ = _COST
    latency, _, memory = _SPEED
    trained = any(record.stage in ("train", "evaluate") for record in records)
    shown = [row for task in TASKS for row in join(records, task)] if trained else join_cost(records)
    rows = {task: [row for row in shown if row.task == task] for task in TASKS}
    headings = ["Params\nM", "MACs\nG", "Latency\nms", "Memory\nMB", *(["Score\n%", "Trivial\n%"] if trained else [])]
    table = _terminal_table("Results", headings, [*rows["classification"], *rows["segmentation"]])
    footnotes: dict[str, None] = {}
    for task, (score, *_, trivial) in _SCORES.items():
        for data in dict.fromkeys(row.data for row in rows[task]):
            group = [row for row in rows[task] if row.data == data]
            subtitle = task.capitalize() + (f" ({score.title})" if trained else "") + (f"\n{data}" if data else "")
            columns = (params, macs, latency, memory, *((score, trivial) if trained else ()))
            _add_section(table, subtitle, group, columns, footnotes)
    _add_footnotes(table, footnotes)
    return table


def cost_table(records: Sequence[Record]) -> "rich.table.Table":
    """What a run begins with: parameters, multiply-accumulates and activations of every model, 100 columns wide."""
    rows = join_cost([record for record in records if record.stage == "cost"])
    table = _terminal_table("Cost of one image", ["Params\nM", "MACs\nG", "Activations\nM"], rows)
    footnotes: dict[str, None] = {}
    for task in TASKS:
        if group := [row for row in rows if row.task == task]:
            _add_section(table, task.capitalize(), group, _COST, footnotes)
    _add_footnotes(table, footnotes)
    return table


def _terminal_table(title: str, headings: Sequence[str], rows: Sequence[Row]) -> "rich.table.Table":
    """An empty table; a size that all rows share is in the title, else in a column of its own."""
    import rich.box
    import rich.table

    sizes = {row.size for row in rows}
    title += f" at {sizes.pop()}" if len(sizes) == 1 else ""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("Model", overflow="fold", max_width=34)
    if sizes:
        table.add_column("Size", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add_section(
    table: "rich.table.Table", title: str, rows: Sequence[Row], columns: Sequence[Column], footnotes: dict[str, None]
) -> None:
    from rich.text import Text

    heads = {row.head for row in rows}
    if len(heads) == 1 and (head := heads.pop()):
        title += f"\n{head} head"
    table.add_row(Text(title, style="bold"))
    sized = len(table.columns) > len(columns) + 1
    winners = {column.name: best_rows(column, rows) for column in columns}
    for index, (row, label) in enumerate(zip(rows, labels(rows, size_apart=sized), strict=True)):
        cells = [Text(label), Text(row.size)] if sized else [Text(label)]
        for column in columns:
            cell = row.cells[column.name]
            if cell.value is None:
                footnotes.setdefault(f"{label} ({row.task}): {cell.reason}")
                cells.append(Text(cell.status + " ", style="red" if cell.status == "failed" else "yellow"))
                continue
            # A mark as well as a style: colours are gone in a log file. The others keep its place free.
            won = index in winners[column.name]
            text = format_cell(column, cell, interval=False) + ("*" if won else " ")
            cells.append(Text(text, style="bold green" if won else ""))
        table.add_row(*cells)
    table.add_section()


def _add_footnotes(table: "rich.table.Table", footnotes: dict[str, None], limit: int = 8) -> None:
    from rich.text import Text

    lines = ["* best of its group", *list(footnotes)[:limit]]
    if len(footnotes) > limit:
        lines.append(f"and {len(footnotes) - limit} more cells without a value; the report names them all")
    table.caption = Text("\n".join(lines), style="dim")


def _with_numbers(rows: Sequence[Row], kind: str) -> tuple[list[Column], list[str]]:
    """The columns in which some row has a number, and what to say of stages that gave none ("speed not run")."""
    columns = [column for column in COLUMNS[kind] if any(row.cells[column.name].value is not None for row in rows)]
    without = []
    for stage in _STAGES[kind]:
        if not any(column in _COLUMNS_OF[stage] for column in columns):
            states = dict.fromkeys(row.stages[stage].status for row in rows)
            without.append(f"{STAGE_NOUN[stage]} {' or '.join(states)}")
    return (columns, without) if columns else (list(COLUMNS[kind]), [])


def _timed(row: Row) -> bool:
    return any(row.stages[stage].status == "done" for stage in ("speed", "evaluate"))


def _whole(values: Sequence[float | None]) -> bool:
    return all(value is None or float(value).is_integer() for value in values)
