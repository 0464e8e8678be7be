"""The rebuilt tables of the papers on disk and on the page: CSV, Markdown, LaTeX, and what came of all of them."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .display import Display, latex, markdown, plain
from .files import csv_text, write_atomic
from .papers import NUMBERS, WORDS, Papers
from .rebuilt import (
    ABSENT,
    COSTS,
    REPORTED_ONLY,
    SCORES,
    Comparison,
    Measured,
    RebuiltRow,
    RebuiltTable,
    Summary,
    summarize,
)
from .rows import NOT_RUN

FOLDER = "papers"  # below the tables' folder
TITLES = {"params_m": "Params", "gflops": "FLOPs", "top1": "Top-1", "miou": "mIoU", "miou_ms": "mIoU, several scales"}
UNITS = {"params_m": "M", "gflops": "G", "top1": "%", "miou": "%", "miou_ms": "%"}
_PRINTED = {  # what is carried as reported data, by column
    "throughput": "Throughput reported (images/s)",
    "memory": "Memory reported",
    "top5": "Top-5 reported (%)",
    "v2_top1": "ImageNet-V2 top-1 reported (%)",
    "real_top1": "ReaL top-1 reported (%)",
    **{
        f"{ap}_{kind}": f"{ap.upper()} {kind} reported (%)" for kind in ("box", "mask") for ap in ("ap", "ap50", "ap75")
    },
    **{f"{ap}_kp": f"{ap.upper()} key points reported (%)" for ap in ("ap", "ap50", "ap75", "apm", "apl", "ar")},
}
_WHAT = ("paper", "table", "row", "label", "group", "model", "config", "head", "setting", "dataset")
_NOTHING = {"", REPORTED_ONLY}
Mark = Callable[[str, str], str]  # a text and a note -> the text with the number of its footnote
_PARTS = ("reported", "recomputed", "measured", "status", "difference", "verdict", "evidence", "note", "record")

# Columns of every rebuilt table's CSV. A number that was not measured is empty, and its status says why. `measured` is
# in the reported number's unit, FLOPs as the paper counts; `difference` is in percent of the reported number for
# parameters and FLOPs, in points for accuracies; `recomputed` is what a derived row's printed rows give.
SCHEMA = (
    *_WHAT,
    *("num_classes", "input_size", "cost_input_size", "reported_by", "convention"),
    *(f"{column}_{part}" for column in (*COSTS, *SCORES) for part in _PARTS),
    *("gmacs_measured", "gmacs_status", "gmacs_difference"),  # the common convention against the printed FLOPs
    *(f"{column}_reported" for column in NUMBERS if column not in (*COSTS, *SCORES)),  # carried as printed
    "source_note",
)


@dataclass(frozen=True)
class Written:
    """What `write` made: files, and displays for the page (none where no table has a measured number)."""

    files: list[Path]
    displays: dict[str, Display]  # by the section's name
    links: dict[str, list[Path]]


def write(tables: Sequence[RebuiltTable], papers: Papers, folder: Path) -> Written:
    """Write all tables into `folder`/papers, each as CSV, Markdown and LaTeX; as CSV and Markdown `index`, `verdicts`
    and `conventions`.

    Without any measured number nothing is written. Raises `OSError` with the path when a file cannot be written.
    """
    if not any(table.measured for table in tables):
        return Written([], {}, {})
    contents: dict[str, str] = {}
    for table in tables:
        view, name = display(table), stem(table)
        contents |= {f"{name}.csv": to_csv(table), f"{name}.md": markdown(view), f"{name}.tex": latex(view, name)}
    touched = {table.paper for table in tables if table.measured}  # a run on one paper need not explain the others
    verdicts = verdict_display([table for table in tables if table.paper in touched])
    displays = {"papers": index_display(tables), "verdicts": verdicts}
    displays["conventions"] = conventions_display(papers)
    displays = {name: view for name, view in displays.items() if view.cells}
    links = {}
    for name, view in displays.items():
        own = "index" if name == "papers" else name
        contents |= {f"{own}.csv": _plain_csv(view), f"{own}.md": markdown(view)}
        links[name] = [folder / FOLDER / f"{own}.{suffix}" for suffix in ("csv", "md")]
    contents["index.csv"] = csv_text(_INDEX, [_index_line(table) for table in tables])
    if "verdicts.md" in contents:
        contents["verdicts.md"] += "\n" + "".join(f"- **{word}**: {meaning}.\n" for word, meaning in WORDS.items())
    for name, content in contents.items():
        write_atomic(folder / FOLDER / name, content)
    return Written([folder / FOLDER / name for name in contents], displays, links)


def stem(table: RebuiltTable) -> str:
    """The name of a table's files."""
    return "".join(c if c.isalnum() else "_" for c in f"{table.paper}_table_{table.table}").lower()


def to_csv(table: RebuiltTable) -> str:
    """A rebuilt table with the columns of `SCHEMA`; numbers in full precision, reported ones as printed."""
    return csv_text(SCHEMA, [_line(table, line) for line in table.rows])


def display(table: RebuiltTable) -> Display:
    """A rebuilt table for people: what was printed, what was counted or run here, the difference, and a verdict."""
    columns = [c for c in (*COSTS, *SCORES) if any(c in line.cells or c in line.unprinted for line in table.rows)]
    unprinted = [c for c in COSTS if c in columns and not any(c in line.cells for line in table.rows)]
    headings = ["Row", "Model", "Data", "Size", "Setting"]
    described = len(headings)
    for column in columns:
        title, unit = TITLES[column], UNITS[column]
        headings.append(f"{title} reported ({unit})")
        if column == "gflops":
            headings += ["MACs counted, common (G)", "Difference (%)", "FLOPs counted, the paper's way (G)"]
        else:
            headings.append(f"{title} {'counted' if column in COSTS else 'run here'} ({unit})")
        headings.append("Difference (%)" if column in COSTS else "Difference (points)")
        headings += ["Verdict"] if column in COSTS else []
    extra = [column for column in _PRINTED if any(column in line.row.cells for line in table.rows)]
    headings += [_PRINTED[column] for column in extra]
    footnotes: dict[str, int] = {}
    costs = (line.cells[column].measured for line in table.rows for column in COSTS if column in line.cells)
    absent = ", ".join(dict.fromkeys(m.reason.removeprefix(ABSENT) for m in costs if m.reason.startswith(ABSENT)))

    def mark(text: str, note: str) -> str:
        note = ABSENT + absent if note.startswith(ABSENT) else note  # one footnote for all of them
        return f"{text} [{footnotes.setdefault(note, len(footnotes) + 1)}]" if note else text

    cells, values, measured = [], [], []
    for line in table.rows:
        texts: list[tuple[str, float | None, bool]] = [(text, None, True) for text in _described(line)]
        for column in columns:
            cell = line.cells.get(column) or line.unprinted.get(column)
            texts += _cells(column, cell, line.row.derived, mark)
            if column in unprinted:
                texts[-1] = ("", None, True)  # the caption says it
        texts += [(line.row.cells.get(column, ""), line.row.number(column), True) for column in extra]
        cells.append([text for text, _, _ in texts])
        values.append([value for _, value, _ in texts])
        measured.append([known for _, _, known in texts])
    numeric = [False] * described + ["Verdict" not in heading for heading in headings[described:]]
    # A column of what nobody can measure or has measured says nothing.
    empty = [{row[n] for row in cells} <= _NOTHING for n in range(len(headings))]
    counted = any(not empty[n] for n, heading in enumerate(headings) if re.search("counted|run here", heading))
    # What is only reported has room for the rows' settings.
    kept = [n for n in range(len(headings)) if not empty[n]]
    kept = [n for n in kept if not (counted and headings[n] == "Setting")]

    def narrowed(rows: list[list]) -> list[list]:
        return [[row[n] for n in kept] for row in rows]

    cells, values, measured = narrowed(cells), narrowed(values), narrowed(measured)
    headings, numeric = narrowed([headings, numeric])
    told = "as reported" + (", and as counted and run here" if table.measured else "; nothing was measured here")
    titles = " and ".join("parameters" if c == "params_m" else TITLES[c] for c in unprinted)
    told += f"; its {titles} are counted here alone, the paper prints none" if unprinted else ""
    told += f"; a copy of Table {table.repeats}, left out of totals" if table.repeats else ""
    told += "; how the paper counts FLOPs: see the conventions" if any("paper's way" in h for h in headings) else ""
    return Display(
        caption=f"{table.title or table.paper}, Table {table.table}: {told}",
        headings=headings,
        numeric=numeric,
        cells=cells,
        values=values,
        best=[[False] * len(headings) for _ in cells],
        measured=measured,
        footnotes=list(footnotes),
    )


def index_display(tables: Sequence[RebuiltTable]) -> Display:
    """What came of each table, of all `tables`, and of the rows that the authors measured ("own"): numbers of cells."""
    headings = ["Paper", "Table", "Column", *(field.name.capitalize() for field in fields(Summary))]
    lines: list[tuple[str, str, str, Summary]] = []
    for table in tables:
        name = table.title or table.paper
        lines += [(name, table.table, TITLES[c], s) for c, s in summarize([table]).items() if s.reported]
    for rows, which in (("", "all papers"), ("own", "all papers, own rows")):
        lines += [(which, "all", TITLES[c], s) for c, s in summarize(tables, rows).items() if s.reported]
    values = [[None] * 3 + [getattr(s, field.name) for field in fields(Summary)] for *_, s in lines]
    cells = [[*known, *(str(value) for value in row[3:])] for (*known, _), row in zip(lines, values, strict=True)]
    caption = "Cells of the papers' tables: reported, measured here, reproduced to the printed precision, explained"
    caption += " by a verdict, still differing, and open (neither measured nor explained)"
    return plain(caption, headings, cells, values)


def verdict_display(tables: Sequence[RebuiltTable]) -> Display:
    """Every cell that does not come out, with what is known of it; and those that differ without an explanation."""
    cells: dict[tuple, list[str]] = {}  # a printed row that is split by data set is shown once
    for table in tables:
        for line in table.rows:
            for column, cell in line.cells.items():
                if cell.reproduced or not (cell.verdict or (column in COSTS and cell.known)):
                    continue
                printed, best = cell.printed, cell.measured if cell.measured.value is not None else cell.common
                counted = number(best.value, column) if best and best.value is not None else cell.measured.status
                where = [table.title or table.paper, table.table, line.row.label, TITLES[column], printed, counted]
                key = (table.paper, table.table, line.row.printed, *where[2:])
                cells.setdefault(key, [*where, cell.verdict or "differs", cell.evidence])
    headings = ["Paper", "Table", "Row", "Column", "Reported", "Measured", "Verdict", "Evidence"]
    return plain("Printed numbers that are not reproduced, and derived rows recomputed", headings, [*cells.values()])


def conventions_display(papers: Papers) -> Display:
    """How each paper counted its FLOPs."""
    cells = [[c.title or c.paper, ", ".join(c.tables), c.text, c.name] for c in papers.conventions]
    headings = ["Paper", "Tables", "What counts", "Name in records"]
    return plain("How the papers counted what they call FLOPs", headings, cells)


_INDEX = ("paper", "table", "convention", "rows", "file")
_INDEX += tuple(f"{column}_{field.name}" for column in (*COSTS, *SCORES) for field in fields(Summary))


def _index_line(table: RebuiltTable) -> dict[str, object]:
    line: dict[str, object] = {"paper": table.paper, "table": table.table, "convention": table.convention}
    line |= {"rows": len(table.rows), "file": f"{stem(table)}.csv"}
    for column, summary in summarize([table]).items():
        line |= {f"{column}_{field.name}": getattr(summary, field.name) for field in fields(Summary)}
    return line


def _described(line: RebuiltRow) -> list[str]:
    """Label, model with configuration and head or other framework, data, the size (that of the cost behind a stroke, if
    another), and the setting."""
    row = line.row
    config = ", ".join(f"{name}={_value(value)}" for name, value in (row.config or {}).items())
    framework = row.texts.get("framework", "")
    model = " + ".join(filter(None, [f"{row.model} ({config})" if config else row.model, row.head or framework]))
    sizes = dict.fromkeys(f"{h}x{w}" for h, w in filter(None, (row.input_size, row.cost_input_size)))
    return [row.label, model, row.texts.get("dataset", ""), " / cost ".join(sizes), row.texts.get("setting", "")]


def _value(value: Any) -> str:
    """A field of a configuration as JSON; names without quotes, the same name several times as ``4 x name``."""
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if names and len(value) > 1 and len({*value}) == 1:
        return f"{len(value)} x {value[0]}"
    return json.dumps(value).replace('"', "")


def _cells(column: str, cell: Comparison | None, derived: bool, mark: Mark) -> list[tuple[str, float | None, bool]]:
    """The texts of one number under its headings, the values behind them, and whether they are numbers at all."""
    width = {"params_m": 4, "gflops": 6}.get(column, 3)
    if cell is None:
        return [("", None, True)] * width
    note = ": ".join(filter(None, (cell.verdict, cell.evidence))) if derived and column in SCORES else ""
    reported = None if derived or not cell.printed else float(cell.printed)
    texts = [(mark(cell.printed, note) if cell.printed else "", reported, True)]
    for measured in filter(None, (cell.common, cell.measured) if column == "gflops" else (cell.measured,)):
        texts.append(_measured(measured, column, derived, mark))
        difference = None if reported is None else _difference(column, cell.printed, measured)
        rounded = "" if difference is None else f"{difference:+.{1 if column in COSTS else 2}f}"
        texts.append((rounded if rounded.strip("+-0.") else rounded.lstrip("+-"), difference, True))
    if column == "gflops" and cell.common is None:  # a derived row
        texts[1:1] = [("", None, True)] * 2
    if column in COSTS:
        verdict = cell.verdict or ("differs" if cell.known else "")
        texts.append((mark(verdict, cell.evidence if not cell.reproduced else ""), None, True))
    return texts


def _measured(measured: Measured, column: str, derived: bool, mark: Mark) -> tuple[str, float | None, bool]:
    if measured.value is None:
        silent = measured.status in ("", REPORTED_ONLY) or (
            measured.status == NOT_RUN and (derived or column in SCORES)
        )
        note = "" if silent else measured.reason
        return mark(measured.status, note), None, False
    if derived:
        text = f"{measured.value:+.1f}%" if column in COSTS else f"{measured.value:+.2f}"
        return mark(text, measured.reason), measured.value, True
    return mark(number(measured.value, column), measured.reason), measured.value, True


def number(value: float, column: str) -> str:
    """A measured number as it is shown."""
    return f"{value:,.3f}" if column in COSTS else f"{value:.2f}"


def _difference(column: str, printed: str, measured: Measured) -> float | None:
    if measured.value is None:
        return None
    reported = float(printed)
    return (measured.value / reported - 1) * 100 if column in COSTS else measured.value - reported


def _line(table: RebuiltTable, line: RebuiltRow) -> dict[str, object]:
    row = line.row
    sizes = {"input_size": row.input_size, "cost_input_size": row.cost_input_size}
    out: dict[str, object] = {name: getattr(row, name, "") or row.texts.get(name, "") for name in _WHAT}
    out |= {name: f"{size[0]}x{size[1]}" if size else "" for name, size in sizes.items()}
    out |= {"config": json.dumps(row.config) if row.config != {} else "", "num_classes": row.num_classes}
    out |= {"reported_by": row.texts.get("reported_by", ""), "convention": table.convention}
    out["source_note"] = row.texts.get("note", "")
    out |= {f"{column}_reported": text for column, text in row.cells.items()}
    for column, cell in {**line.cells, **line.unprinted}.items():
        known = not row.derived and cell.printed
        out |= {
            f"{column}_reported": cell.printed,
            f"{column}_recomputed": cell.recomputed,
            f"{column}_measured": cell.measured.value,
            f"{column}_status": cell.measured.status,
            f"{column}_difference": _difference(column, cell.printed, cell.measured) if known else None,
            f"{column}_verdict": cell.verdict,
            f"{column}_evidence": cell.evidence,
            f"{column}_note": cell.measured.reason,
            f"{column}_record": cell.measured.key,
        }
        if column == "gflops" and cell.common is not None:
            out |= {"gmacs_measured": cell.common.value, "gmacs_status": cell.common.status}
            out["gmacs_difference"] = _difference(column, cell.printed, cell.common) if known else None
    return out


def _plain_csv(table: Display) -> str:
    columns = [heading.lower().replace(" ", "_") for heading in table.headings]
    return csv_text(columns, [dict(zip(columns, cells, strict=True)) for cells in table.cells])
