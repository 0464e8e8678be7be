"""What papers print: the rows of their tables, how they counted, and what is known of cells that do not come out.

`results/papers/` holds one CSV per paper with the columns of `COLUMNS`: one row per printed row and data set, numbers
as printed. A paper of your own is one more such file, there or anywhere else. Beside them `conventions.csv` tells how
each paper counted FLOPs, and `verdicts.csv` why a printed number cannot be reproduced.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "papers"
CONVENTIONS, VERDICTS = "conventions.csv", "verdicts.csv"

# Printed numbers, as text: they say how precise they are.
NUMBERS = {
    "params_m": "parameters in millions",
    "gflops": "what the paper calls FLOPs, in 1e9; see conventions.csv",
    "throughput": "images per second, on the paper's hardware",
    "memory": "with the unit that is printed",
    "top1": "ImageNet top-1 accuracy in percent; likewise top5, and on ImageNet-V2 and ReaL labels",
    **dict.fromkeys(("top5", "v2_top1", "real_top1"), "see top1"),
    "miou": "mean intersection over union in percent, one scale",
    "miou_ms": "the same over several scales",
    "ap_box": "average precision in percent: boxes, masks and key points, with the usual thresholds and sizes",
    **dict.fromkeys(("ap50_box", "ap75_box", "ap_mask", "ap50_mask", "ap75_mask", "ap_kp"), "see ap_box"),
    **dict.fromkeys(("ap50_kp", "ap75_kp", "apm_kp", "apl_kp", "ar_kp"), "see ap_box"),
}
COLUMNS = {
    "paper": "short name, the same in the whole file",
    "table": "as the paper numbers it",
    "row": "1, 2, ... in each table; one printed row has several where it covers several data sets or heads",
    "label": "the row's name as printed",
    "group": "heading between the rows",
    "model": "the name that builds the row's model here; empty where nothing does",
    "config": "JSON: the fields of the model's configuration that differ; null where no configuration gives the row",
    "framework": "detector, decode head or pre-training method",
    "head": "segformer, upernet or ocr; empty for any other",
    "head_config": "JSON: settings of the head that the printed numbers need",
    "setting": "what else tells the row from the others",
    "dataset": "as the paper calls it",
    "split": "of the accuracy",
    "num_classes": "classes that the printed parameters and FLOPs are for",
    "input_size": "HEIGHTxWIDTH in pixels",
    "cost_input_size": "the size of the FLOPs, where the accuracy has another",
    **NUMBERS,
    "other": "NAME=VALUE;... of what has no column; of a derived row the names of DELTAS; of an ablation its subject "
    "(ablation, in one row of the table) and the number of the row that a row changes (changes); fitted=yes where what "
    "the paper leaves open of the network was chosen to give the row's costs; of a derived row pairs=COLUMN where the "
    "column is a mean of changes: each own row against as many others, in their order",
    "derived": 'JSON {"own": rows, "others": rows}: the row compares the means of these rows of its table',
    "reported_by": "own (the paper measured it) or other (quoted)",
    "note": "repaired and doubtful cells, and why",
}
# The words of verdicts.csv, and what each means.
WORDS = {
    "quoted": "the number is another paper's, counted in another way",
    "other parts": "the printed number has parts of the network that the other rows leave out, or lacks some",
    "other size": "the number belongs to another image size than the printed one",
    "reconstruction": "the network is not fully described; what is built here in its place comes close",
    "rounding": "cut, rounded twice or just beside the edge of rounding: the network is the same",
    "misprint": "the number belongs to another row or model",
    "cannot be known": "what is published does not tell which network or way of counting gives the number",
}
DELTAS = {"delta_params": "params_m", "delta_gflops": "gflops", "delta_top1": "top1", "delta_miou": "miou"}
_REQUIRED = ("paper", "table", "row", "label")
_TEXTS = ("group", "framework", "setting", "dataset", "split", "reported_by", "note")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_MEMORY = re.compile(r"\d+(\.\d+)?[KMG]?")
_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


class PaperError(ValueError):
    """A file of paper rows is wrong; the message is one line that names the file, the line and the cell."""


@dataclass(frozen=True)
class PaperRow:
    """One row of a paper's table. `cells` are the printed numbers by column of `NUMBERS`, empty ones left out."""

    paper: str
    table: str
    row: int
    label: str
    model: str = ""
    config: Mapping[str, Any] | None = field(default_factory=dict)  # None: no configuration gives the row
    head: str = ""
    head_config: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    input_size: tuple[int, int] | None = None  # height, width
    cost_input_size: tuple[int, int] | None = None
    cells: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    own: tuple[int, ...] = ()  # of a derived row: the rows whose means it compares with those of `others`
    others: tuple[int, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)  # the columns that nothing is computed from

    def number(self, column: str) -> float | None:
        """A printed number in the unit of its column; None where nothing is printed."""
        return float(self.cells[column].rstrip("KMG")) if column in self.cells else None

    @property
    def derived(self) -> bool:
        return bool(self.own)

    @property
    def deltas(self) -> dict[str, str]:
        """What a derived row prints, by the column that it compares."""
        return {column: self.other[name] for name, column in DELTAS.items() if self.derived and name in self.other}

    @property
    def pairs(self) -> tuple[str, ...]:
        """The columns in which a derived row compares pair by pair, not the means."""
        return tuple(filter(None, self.other.get("pairs", "").split(",")))

    @property
    def changes(self) -> int | None:
        """In an ablation, the row of the table that this one changes."""
        return int(self.other["changes"]) if "changes" in self.other else None

    @property
    def printed(self) -> str:
        """The printed row that this one is (a part of)."""
        return self.other.get("printed_row", f"#{self.row}")

    @property
    def size_of_cost(self) -> tuple[int, int] | None:
        return self.cost_input_size or self.input_size

    @cached_property
    def task(self) -> str:
        """classification, segmentation, or empty for what is not measured here (detection, poses, other heads)."""
        if self.head:
            return "segmentation"
        elsewhere = any(name.startswith(("miou", "ap", "ar")) for name in self.cells)
        return "" if elsewhere or normalized(self.texts.get("dataset", "")) == "coco" else "classification"

    @property
    def buildable(self) -> bool:
        """Whether the row's network can be built here, as far as the file says."""
        return bool(self.model and self.task) and self.config is not None

    @cached_property
    def trainable(self) -> bool:
        """Whether training the network here from scratch, or from supervised weights, is what the row did."""
        text = f"{self.texts.get('framework', '')} {self.texts.get('setting', '')}".lower()
        plain = not self.texts.get("framework") or bool(self.head)
        unsupervised = "pre-train" in text and "supervised pre-training" not in text
        return self.buildable and plain and not unsupervised


@dataclass(frozen=True)
class Convention:
    """How a paper counted the FLOPs of some of its tables."""

    paper: str
    tables: tuple[str, ...]
    name: str
    text: str
    title: str = ""  # the paper's name as people spell it
    repeats: Mapping[str, str] = field(default_factory=dict)  # tables that are copies of others, by name


@dataclass(frozen=True)
class Verdict:
    """What is known of a printed cell that does not come out."""

    verdict: str
    evidence: str


@dataclass
class Papers:
    """All that papers print. `problems` has one line per file that could not be used."""

    rows: list[PaperRow] = field(default_factory=list)
    conventions: list[Convention] = field(default_factory=list)
    verdicts: dict[tuple[str, str, int, str], Verdict] = field(default_factory=dict)  # paper, table, row, column
    problems: list[str] = field(default_factory=list)

    def tables(self) -> dict[tuple[str, str], list[PaperRow]]:
        """The rows by paper and table, in the order of the files."""
        found: dict[tuple[str, str], list[PaperRow]] = {}
        for row in self.rows:
            found.setdefault((row.paper, row.table), []).append(row)
        return found

    def convention(self, paper: str, table: str) -> str:
        """The name of the convention that a table was counted in; empty where it is not known."""
        return next((c.name for c in self.conventions if c.paper == paper and table in c.tables), "")

    def title(self, paper: str) -> str:
        """A paper's name as people spell it; `paper` itself where no convention tells it."""
        return next((c.title for c in self.conventions if c.paper == paper and c.title), paper)

    def repeats(self, paper: str, table: str) -> str:
        """The table of which another one is a copy; empty where it is none."""
        return next((c.repeats[table] for c in self.conventions if c.paper == paper and table in c.repeats), "")


def files(folder: Path = FOLDER) -> list[Path]:
    """The papers' files in a folder."""
    return sorted(path for path in folder.glob("*.csv") if path.name not in (CONVENTIONS, VERDICTS))


def load(extra: Iterable[str | Path] = (), folder: Path = FOLDER) -> Papers:
    """Everything in `folder`, and the files `extra`. One with a mistake is left out: `problems` says which and why."""
    papers = Papers()
    known: set[str] = set()
    for path in [*files(folder), *map(Path, extra)]:
        try:
            rows = read(path)
            if repeated := {row.paper for row in rows} & known:
                raise PaperError(f"{path}: the paper {min(repeated)} has a file already; choose another name")
        except PaperError as error:
            papers.problems.append(f"Paper left out: {error}")
            continue
        known |= {row.paper for row in rows}
        papers.rows += rows
    try:
        papers.conventions = _read_conventions(folder / CONVENTIONS)
        papers.verdicts = _read_verdicts(folder / VERDICTS, papers.rows)
    except PaperError as error:
        papers.problems.append(str(error))
    return papers


def read(path: str | Path) -> list[PaperRow]:
    """The rows of one file. Columns that it lacks are empty, except the first four of `COLUMNS`.

    Raises:
        PaperError: the file cannot be read; an unknown, repeated or missing column; a damaged number, size or JSON;
            parameters or FLOPs of 0; FLOPs without a size; a row that comes twice; one that is derived from or
            changes a row that is not there.
    """
    path = Path(path)
    rows: dict[tuple[str, str, int], PaperRow] = {}
    for where, cells in _lines(path, COLUMNS, _REQUIRED):
        row = _row(where, cells)
        if rows.setdefault(_key(row), row) is not row:
            raise PaperError(f"{where}: row {row.row} of Table {row.table} comes twice")
    for row in rows.values():
        for number in (*row.own, *row.others):
            if (row.paper, row.table, number) not in rows:
                raise PaperError(
                    f"{path}: row {row.row} of Table {row.table} is derived from row {number}: no such row"
                )
        if row.changes is not None and (row.changes == row.row or (row.paper, row.table, row.changes) not in rows):
            raise PaperError(f"{path}: row {row.row} of Table {row.table} changes row {row.changes}: no such other row")
    return list(rows.values())


def normalized(name: str) -> str:
    """A data set's name as it is compared: PASCAL-Context and pascal_context are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _key(row: PaperRow) -> tuple[str, str, int]:
    return row.paper, row.table, row.row


def _lines(path: Path, known: Iterable[str], required: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """(where, cells by column) of every line of a CSV file whose header is sound."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PaperError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    reader = csv.reader(text.splitlines(keepends=True))
    header = next(reader, [])
    for name in header:
        if name not in known:
            raise PaperError(f"{path}: unknown column '{name}'; the columns are {', '.join(known)}")
        if header.count(name) > 1:
            raise PaperError(f"{path}: the column {name} comes twice")
    if missing := [name for name in required if name not in header]:
        raise PaperError(f"{path}: the column {missing[0]} is missing")
    lines = []
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(header):
            raise PaperError(f"{where}: {len(cells)} cells under {len(header)} columns")
        line = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        if empty := [name for name in required if not line[name]]:
            raise PaperError(f"{where}: {empty[0]} is empty")
        lines.append((where, line))
    return lines


def _row(where: str, line: Mapping[str, str]) -> PaperRow:
    def wrong(column: str, expected: str) -> PaperError:
        return PaperError(f"{where}: {column} is '{line[column]}', which is no {expected}")

    def whole(column: str) -> int | None:
        if text := line.get(column):
            if not text.isdecimal() or int(text) < 1:
                raise wrong(column, "positive whole number")
            return int(text)
        return None

    def size(column: str) -> tuple[int, int] | None:
        if text := line.get(column):
            if not (match := _SIZE.fullmatch(text)):
                raise wrong(column, "size such as 224x224 (height x width)")
            return int(match[1]), int(match[2])
        return None

    def mapping(column: str) -> Mapping[str, Any] | None:
        try:
            value = json.loads(line.get(column) or "{}")
        except json.JSONDecodeError as error:
            raise wrong(column, "JSON object") from error
        if not (isinstance(value, dict) or (value is None and column == "config")):
            raise wrong(column, "JSON object")
        return value

    cells = {name: line[name] for name in NUMBERS if line.get(name)}
    for name, text in cells.items():
        if not (_MEMORY if name == "memory" else _NUMBER).fullmatch(text):
            raise wrong(name, "number")
        if name in ("params_m", "gflops") and float(text) <= 0:
            raise PaperError(f"{where}: {name} is '{text}'; it must be above 0, or empty where nothing is printed")
    other = dict(part.partition("=")[::2] for part in line.get("other", "").split(";") if part)
    for name in DELTAS.keys() & other:
        if not re.fullmatch(r"[+-]?\d+(\.\d+)?%?", other[name]):
            raise PaperError(f"{where}: {name} is '{other[name]}', which is no difference such as +2.16 or -30.7%")
    if not other.get("changes", "1").isdecimal():
        raise PaperError(f"{where}: changes is '{other['changes']}', which is no number of a row")
    derived = mapping("derived")
    if derived and not (
        derived.keys() == {"own", "others"}
        and all(isinstance(rows, list) and rows and all(type(n) is int for n in rows) for rows in derived.values())
    ):
        raise wrong("derived", 'object such as {"own": [1, 2], "others": [3]}')
    if "pairs" in other and not (
        derived
        and {*other["pairs"].split(",")} <= {*DELTAS.values()}
        and len(derived["others"]) % len(derived["own"]) == 0
    ):
        raise PaperError(
            f"{where}: pairs is '{other['pairs']}'; it names columns of {', '.join(DELTAS.values())} in a derived row "
            "that compares each own row with as many others"
        )
    row = PaperRow(
        **{name: line.get(name, "") for name in ("paper", "table", "label", "model", "head")},
        row=whole("row"),
        config=mapping("config"),
        head_config=mapping("head_config"),
        num_classes=whole("num_classes"),
        input_size=size("input_size"),
        cost_input_size=size("cost_input_size"),
        cells=cells,
        other=other,
        own=tuple(derived.get("own", ())),
        others=tuple(derived.get("others", ())),
        texts={
            n: line.get(n, "") for n in ("group", "framework", "setting", "dataset", "split", "reported_by", "note")
        },
    )
    if "gflops" in cells and row.size_of_cost is None:
        raise PaperError(f"{where}: gflops is {cells['gflops']}, but there is no input_size")
    return row


def _read_conventions(path: Path) -> list[Convention]:
    names = ("paper", "tables", "convention", "text")
    conventions = []
    for _, line in _lines(path, (*names, "title", "repeats"), names):
        repeats = dict(pair.partition("=")[::2] for pair in line.get("repeats", "").split())
        tables = tuple(line["tables"].split())
        conventions.append(
            Convention(line["paper"], tables, line["convention"], line["text"], line.get("title", ""), repeats)
        )
    return conventions


def _read_verdicts(path: Path, rows: Sequence[PaperRow]) -> dict[tuple[str, str, int, str], Verdict]:
    names = ("paper", "table", "row", "column", "verdict", "evidence")
    known = {_key(row): row for row in rows}
    present = {row.paper for row in rows}
    verdicts = {}
    for where, line in _lines(path, names, names):
        if line["paper"] not in present:  # its file was left out, with a line of its own
            continue
        key = line["paper"], line["table"], int(line["row"]) if line["row"].isdecimal() else 0
        if key not in known or line["column"] not in (*known[key].cells, "input_size"):
            raise PaperError(f"{where}: no such cell: {line['paper']}, Table {key[1]}, row {key[2]}, {line['column']}")
        verdicts[*key, line["column"]] = Verdict(line["verdict"], line["evidence"])
    return verdicts
