"""The page of a report: tables, plots, papers, verdicts, conventions and records in one HTML file without a server.

The templates lie in `templates/`; style and script are written into the page. What a reader can do with it (sorting,
choosing rows, opening what a row was made from) is done by `script.js`; without it everything is simply shown.
"""

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .origin import origin
from .papers import WORDS
from .record import SCHEMA_VERSION, STAGES, TASKS, Record
from .rows import hardware_label, started

if TYPE_CHECKING:
    import jinja2

    from .display import Display
    from .paper_tables import Written
    from .plots import Drawn
    from .rebuilt import RebuiltTable

TITLES = {"classification": "Classification", "segmentation": "Segmentation", "cost": "Cost and speed"}
ENTRIES, CHARACTERS = 40, 600  # of one part of a record, and of one entry of it: the ledger's file has the rest
_MARKS = re.compile(r"(?: \[\d+\])+$")
_INTERVAL = re.compile(r"(.+) \[(.+), (.+)\]")


@dataclass(frozen=True)
class Cell:
    """A cell of a table on the page; `kind` are its CSS classes."""

    text: str
    kind: str = ""
    value: float | None = None  # what a column of numbers is sorted by
    interval: str = ""
    marks: Sequence[int] = ()  # numbers of footnotes
    href: str = ""
    links: Sequence[tuple[str, str]] = ()  # parts of the text, each with where it leads


@dataclass(frozen=True)
class Line:
    """A row of a table on the page, its first cell being its name."""

    cells: list[Cell]
    group: str  # by which rows are chosen: a family, a paper, a status
    records: list[str] = field(default_factory=list)  # keys of what it was made from


@dataclass(frozen=True)
class Table:
    """A table on the page. `name` is unique there; `links` are paths relative to it; a `summary` folds it."""

    name: str
    caption: str
    headings: list[tuple[str, bool]]  # text, and whether the column holds numbers
    lines: list[Line]
    footnotes: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    summary: str = ""

    @property
    def starred(self) -> bool:
        return any("best" in cell.kind for line in self.lines for cell in line.cells)

    @property
    def opens(self) -> bool:
        """Whether any row tells which records it was made from."""
        return any(line.records for line in self.lines)


def render(
    records: Sequence[Record],
    *,
    drawn: "Drawn",
    rebuilt: "Sequence[RebuiltTable]",
    written: "Written",
    files: Sequence[Path],
    output: Path,
    **content: Any,
) -> str:
    """The HTML of the page. `files` are tables and leaderboards below `output`, `content` what `report.build` knows."""
    ordered = sorted(records, key=_order)
    return (
        environment()
        .get_template("report.html")
        .render(
            **content,
            counts=Counter(record.status for record in records),
            sections=_measured(records, [path.relative_to(output) for path in files]),
            papers=_papers(rebuilt, written, records, output),
            lists=_lists(rebuilt, written, output),
            plots=_plots(drawn, output),
            unmeasured=_unmeasured(rebuilt, written, output),
            words=WORDS,
            notes=drawn.notes,
            undone=_undone([record for record in ordered if record.status not in ("done", "stopped")]),
            uncounted=_uncounted(records),
            provenance=origin(records),
            records=[(r, _job(r), _origin(r), _parts(r), _links(r, output)) for r in ordered],
            stages=Counter(record.stage for record in sorted(records, key=lambda record: STAGES.index(record.stage))),
            schema=SCHEMA_VERSION,
            count=count,
        )
    )


def environment() -> "jinja2.Environment":
    """What renders the templates of this folder."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _measured(records: Sequence[Record], files: Iterable[Path]) -> list[tuple[str, str, Table]]:
    """Identifier, title and table of each kind of measurement that there is."""
    from . import tables

    sections = []
    for kind in tables.KINDS:
        if rows := tables.rows_of(records, kind):
            stems = ("cost", "growth") if kind == "cost" else kind
            links = [path.as_posix() for path in files if path.stem.removeprefix("leaderboard_").startswith(stems)]
            origins = [(row.family, [record.key for record in row.records]) for row in rows]
            sections.append((kind, TITLES[kind], as_table(kind, tables.display(rows, kind), origins, links)))
    return sections


def _papers(
    rebuilt: "Sequence[RebuiltTable]", written: "Written", records: Sequence[Record], output: Path
) -> dict[str, list[Table]]:
    """The rebuilt tables with a measured number, by paper."""
    from . import paper_tables
    from .rebuilt import summarize

    known = {record.key for record in records}
    papers: dict[str, list[Table]] = {}
    for table in (table for table in rebuilt if table.measured):
        paper = table.title or table.paper
        origins = []
        for row in table.rows:
            cells = (*row.cells.values(), *row.unprinted.values())
            keys = [found.key for cell in cells for found in (cell.measured, cell.common) if found]
            origins.append((paper, [key for key in dict.fromkeys(keys) if key in known]))
        stem = paper_tables.stem(table)
        links = [path.relative_to(output).as_posix() for path in written.files if path.stem == stem]
        totals = Counter()
        for summary in summarize([table]).values():
            totals.update(vars(summary))
        told = f"Table {table.table}: {totals['reported']} numbers reported, {totals['measured']} measured here, "
        told += f"{totals['reproduced']} reproduced"
        more = sum(len(row.unprinted) for row in table.rows)
        told += f"; {more} more counted that the paper does not print" if more else ""
        shown = as_table(stem, paper_tables.display(table), origins, links)
        papers.setdefault(paper, []).append(replace(shown, summary=told))
    return papers


def _unmeasured(rebuilt: "Sequence[RebuiltTable]", written: "Written", output: Path) -> list[tuple[str, str]]:
    """Name and file of each paper's table without a measured number; the file is empty where there is none."""
    from . import paper_tables

    files = {path.stem: path.relative_to(output).as_posix() for path in written.files if path.suffix == ".md"}
    return [
        (f"{table.title or table.paper} Table {table.table}", files.get(paper_tables.stem(table), ""))
        for table in rebuilt
        if not table.measured
    ]


def _lists(rebuilt: "Sequence[RebuiltTable]", written: "Written", output: Path) -> dict[str, Table]:
    """The index of the papers' tables, the verdicts and the conventions, those that there are."""
    from . import paper_tables

    stems = {(table.title or table.paper, table.table): paper_tables.stem(table) for table in rebuilt if table.measured}
    lists = {}
    for name, display in written.displays.items():
        links = [path.relative_to(output).as_posix() for path in written.links.get(name, ())]
        table = as_table(name, display, [(cells[0], []) for cells in display.cells], links)
        for line in table.lines:
            paper, number = line.cells[:2]
            if stem := stems.get((paper.text, number.text)):
                line.cells[1] = replace(number, href=f"#{stem}")
        lists[name] = table
    return lists


def as_table(
    name: str, display: "Display", origins: Sequence[tuple[str, list[str]]], links: Sequence[str] = ()
) -> Table:
    """A table for people as one of the page; `origins` are the group of each row and the keys of its records."""
    lines = []
    for index, (group, keys) in enumerate(origins):
        columns = (display.cells, display.values, display.measured, display.best)
        parts = zip(*(column[index] for column in columns), display.numeric, strict=True)
        lines.append(Line([_cell(*part, notes=len(display.footnotes)) for part in parts], group, keys))
    headings = list(zip(display.headings, display.numeric, strict=True))
    return Table(name, display.caption, headings, lines, display.footnotes, list(links))


def _cell(text: str, value: float | None, measured: bool, best: bool, numeric: bool, notes: int) -> Cell:
    """A cell's text taken apart: "61.0 [58.6, 65.3]" has an interval, "not run [2]" the mark of a footnote."""
    kinds = {"number": numeric, "best": best, "unmeasured": not measured}
    marks: list[int] = []
    if (found := _MARKS.search(text)) and all(0 < int(n) <= notes for n in re.findall(r"\d+", found[0])):
        text, marks = text[: found.start()], [int(n) for n in re.findall(r"\d+", found[0])]
    interval = ""
    if numeric and (parts := _INTERVAL.fullmatch(text)):
        text, interval = parts[1], f"{parts[2]} to {parts[3]}"
    return Cell(text, " ".join(kind for kind, holds in kinds.items() if holds), value, interval, marks)


def count(tables: Iterable[Table]) -> dict[str, int]:
    """How many rows each group has, by name."""
    counts = Counter(line.group for table in tables for line in table.lines)
    return {name: counts[name] for name in sorted(counts, key=str.casefold)}


def _plots(drawn: "Drawn", output: Path) -> dict[str, list[dict[str, str]]]:
    """The figures by section, each with its picture and the paths of its files."""
    sections: dict[str, list[dict[str, str]]] = {name: [] for name in (*TITLES, "papers")}
    for plot in drawn.plots:
        svg = plot.path.with_suffix(".svg")
        figure = {"alt": plot.alt, "title": plot.title} | _inline(svg.read_text(encoding="utf-8"))
        figure |= {path.suffix[1:]: path.relative_to(output).as_posix() for path in (plot.path, svg)}
        section = getattr(plot, "section", plot.name.partition("_")[0])
        if section in sections:
            sections[section].append(figure)
    return sections


def _inline(svg: str) -> dict[str, str]:
    """An SVG as the source of an image, with its size: in one file, and without its ids meeting those of others.

    Percent-encoded rather than base64, which would be a fifth longer.
    """
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    source = "data:image/svg+xml," + quote(svg, safe=" \n/:=,()?;@!$*+-._~[]{}|^")
    return {"source": source, "width": f"{float(width):.0f}", "height": f"{float(height):.0f}"}


def _undone(records: Sequence[Record]) -> Table:
    """The jobs that ended without a result, and why."""
    lines = []
    for record in records:
        texts = [_called(record), f"{record.task} on {record.data}" if record.data else record.task, _stage(record)]
        cells = [*map(Cell, texts), Cell(record.status, record.status), Cell(str(record.reason))]
        lines.append(Line(cells, record.status, [record.key]))
    headings = [(text, False) for text in ("Model", "Task", "Stage", "Status", "Reason")]
    return Table("undone", "Jobs that were blocked or failed", headings, lines)


def _order(record: Record) -> tuple:
    return TASKS.index(record.task), record.model, record.head or "", STAGES.index(record.stage), record.seed


def _called(record: Record) -> str:
    return f"{record.model} + {record.head}" if record.head else record.model


def _stage(record: Record) -> str:
    return f"{record.stage}, seed {record.seed}" if record.stage not in ("cost", "speed") else record.stage


def _job(record: Record) -> str:
    """What a job did, in words."""
    height, width = record.input_size
    where = f" on {record.data}" if record.data else ""
    classes = f", {count} classes" if (count := record.job.get("num_classes")) else ""
    return f"{_stage(record)}: {_called(record)}, {record.task}{where}, {height}x{width}{classes}, {record.precision}"


def _origin(record: Record) -> dict[str, str]:
    """Where a record comes from: what one must know to trust it or to measure it again."""
    known = record.provenance
    versions, seconds = known.get("versions"), known.get("seconds")
    took = f", {seconds:,.1f} s" if isinstance(seconds, int | float) else ""
    software = versions.items() if isinstance(versions, dict) else ()
    origin = {
        "Job": _job(record),
        "Outcome": f"{record.status}: {record.reason}" if record.reason else record.status,
        "Started": f"{started(record).replace('T', ' ')}{took}" if started(record) else "",
        "Revision": known.get("revision"),
        "Command": known.get("command"),
        "Hardware": hardware_label(record),
        "Software": ", ".join(f"{name} {version}" for name, version in software),
        "Job key": record.key,
    }
    return {name: str(text) for name, text in origin.items() if text}


def _links(record: Record, output: Path) -> dict[str, str]:
    """The files of a record, by name; the path is empty where the file is not in the output folder."""
    files = {"record in the ledger": f"ledger/{record.key}.json"} | record.artifacts
    return {name: quote(path) if os.path.exists(output / path) else "" for name, path in files.items()}


def _parts(record: Record) -> dict[str, str]:
    """What a record holds beside its origin, as one line of text for each entry; raw samples as a summary."""
    parts = {
        "Metrics": record.metrics,
        "Samples": {name: _summary(values) for name, values in record.samples.items() if values},
        "Details": record.details,
        "Configuration of the job": record.job,
    }
    return {heading: _listing(part) for heading, part in parts.items() if part}


def _listing(part: Mapping[str, Any]) -> str:
    lines = []
    for name, value in list(part.items())[:ENTRIES]:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        cut = len(text) - CHARACTERS
        lines.append(f"{name}: {text[:CHARACTERS]}" + (f" ... {cut:,} more characters in the ledger" * (cut > 0)))
    if (more := len(part) - ENTRIES) > 0:
        lines.append(f"{more:,} more in the ledger")
    return "\n".join(lines)


def _summary(values: Sequence[float]) -> str:
    low, middle, high = (f"{value:.4g}" for value in (min(values), statistics.median(values), max(values)))
    return f"{len(values)} values, lowest {low}, median {middle}, highest {high}"


def _uncounted(records: Sequence[Record]) -> list[str]:
    """The operators that a cost record says it did not count."""
    found: set[str] = set()
    for record in records:
        names = record.details.get("uncounted") if record.stage == "cost" else None
        found |= set(map(str, names)) if isinstance(names, list | dict) else set()
    return sorted(found)
