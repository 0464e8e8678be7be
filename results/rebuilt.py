"""The papers' tables rebuilt: every printed number beside what the ledger has for the same network and setting."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from statistics import fmean
from typing import Any

from .papers import PaperRow, Papers, normalized
from .record import Record
from .rows import NOT_RUN, Row, join, rank_key, started

COUNTED, RUN_HERE, REPORTED_ONLY = "counted", "run here", "reported only"
REPRODUCED, CUT, COMMON = "reproduced", "reproduced (cut, not rounded)", "reproduced (common convention)"
FITTED = "reproduced (fitted to it)"  # what the paper leaves open was chosen so that this number comes out
UNPRINTED = "not printed"
FOLLOWS = "follows from the rows"
ABSENT = "no record of "
COSTS, SCORES = ("params_m", "gflops"), ("top1", "miou", "miou_ms")
_METRIC = {"top1": "top1", "miou": "mIoU", "miou_ms": "mIoU_ms"}  # of a record, by column
# Fields of a configuration that make no other network: its size, its training, its weights, which maps a head reads.
_NEUTRAL = {"img_size", "strict_img_size", "drop_path_rate", "dense_init", "checkpoint", "pretrained"}
_NEUTRAL |= {"out_indices", "feature_location", "published_taps"}


@dataclass(frozen=True)
class Measured:
    """What is known here of a printed number. `value` is in the printed unit, None unless COUNTED or RUN_HERE."""

    status: str = NOT_RUN  # COUNTED, RUN_HERE, NOT_RUN, REPORTED_ONLY, blocked, failed; empty where it does not apply
    value: float | None = None
    reason: str = ""  # why there is no value, or what to know of it
    key: str = ""  # of the record


@dataclass(frozen=True)
class Comparison:
    """One printed number and what was measured."""

    printed: str
    measured: Measured  # of FLOPs: counted as the paper counts
    # Of FLOPs: MACs in the convention common to all models. Of a derived row: the difference with all counted alike.
    common: Measured | None = None
    recomputed: str = ""  # of a derived row: what the printed rows give
    verdict: str = ""
    evidence: str = ""

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.measured.value is not None or (self.common is not None and self.common.value is not None)

    @property
    def reproduced(self) -> bool:
        return self.verdict in (REPRODUCED, CUT, COMMON, FITTED)


@dataclass(frozen=True)
class RebuiltRow:
    """A row of a paper's table with what was measured, by column."""

    row: PaperRow
    cells: Mapping[str, Comparison]
    cost: Record | None = None  # of its network, also where the paper prints no cost
    unprinted: Mapping[str, Comparison] = field(default_factory=dict)  # costs counted that the paper does not print


@dataclass(frozen=True)
class RebuiltTable:
    """A paper's table."""

    paper: str
    table: str
    convention: str  # that the paper counted in; empty where it is not known
    rows: list[RebuiltRow] = field(default_factory=list)
    title: str = ""  # the paper's name as people spell it
    repeats: str = ""  # the table of the same paper that this one is a copy of

    @property
    def measured(self) -> bool:
        """Whether any number of a row that is not derived was measured, also one that the paper does not print."""
        lines = [line for line in self.rows if not line.row.derived]
        return any(cell.known for line in lines for cell in (*line.cells.values(), *line.unprinted.values()))


@dataclass
class Summary:
    """Cells of one column; a printed row that covers several data sets is one cell."""

    reported: int = 0
    measured: int = 0
    reproduced: int = 0  # to the printed precision
    fitted: int = 0  # of these, by a network that was fitted to the number
    explained: int = 0  # with a verdict in place of that
    differing: int = 0  # measured, neither reproduced nor explained (parameters and FLOPs only)
    open: int = 0  # neither measured nor explained


def rebuild(papers: Papers, records: Iterable[Record]) -> list[RebuiltTable]:
    """All tables with any printed number, in the order of the papers' files."""
    ledger = _Ledger(records)
    tables = []
    for (paper, name), rows in papers.tables().items():
        names = {"title": papers.title(paper), "repeats": papers.repeats(paper, name)}
        table = RebuiltTable(paper, name, papers.convention(paper, name), **names)
        lines: dict[int, RebuiltRow] = {}
        for row in rows:
            if not row.derived:
                record = ledger.cost(row) if row.buildable else None
                told = _compare(row, record, papers, ledger), record, _unprinted(row, record, table.convention)
                lines[row.row] = RebuiltRow(row, *told)
        for row in rows:
            if row.derived:
                lines[row.row] = RebuiltRow(row, _derive(row, lines, ledger))
        table.rows.extend(lines[row.row] for row in rows)
        if any(row.cells or row.deltas for row in rows):
            tables.append(table)
    return tables


def summarize(tables: Iterable[RebuiltTable], reported_by: str = "") -> dict[str, Summary]:
    """The cells of `tables` by column, of all rows or of those that the paper's authors measured ("own").

    A table that repeats another of `tables` is left out.
    """
    tables = list(tables)
    names = {(table.paper, table.table) for table in tables}
    summaries = {column: Summary() for column in (*COSTS, *SCORES)}
    for table in (table for table in tables if (table.paper, table.repeats) not in names):
        seen = set()
        for line in table.rows:
            if line.row.derived or reported_by not in ("", line.row.texts.get("reported_by")):
                continue
            for column, cell in line.cells.items():
                if (mark := (column, line.row.printed, cell.printed, line.row.head)) in seen and column in COSTS:
                    continue
                seen.add(mark)
                summary = summaries[column]
                explained = bool(cell.verdict) and not cell.reproduced
                summary.reported += 1
                summary.measured += cell.known
                summary.reproduced += cell.reproduced
                summary.fitted += cell.verdict == FITTED
                summary.explained += explained
                summary.differing += column in COSTS and cell.known and not cell.verdict
                summary.open += not (cell.known or cell.verdict)
    return summaries


def reproduced(printed: str, value: float | Fraction) -> str:
    """REPRODUCED where `value` rounds to what is printed, CUT where its further digits were dropped, else empty."""
    exact, number = Fraction(str(value)), Fraction(printed)
    scale = 10 ** len(printed.partition(".")[2])
    if exact * number < 0:
        return ""
    scaled, target = abs(exact) * scale, abs(number) * scale
    if int(scaled + Fraction(1, 2)) == target:
        return REPRODUCED
    return CUT if int(scaled) == target else ""


def reported(papers: Papers, row: Row) -> tuple[float | None, str]:
    """What a paper prints for the accuracy of a measured row's network, data set and size, and where it does.

    A paper's own number goes before one that a paper quotes; quotes that contradict each other give no number. (None,
    "") where none prints one. A row without a training
    has no data set: there the number of classes tells which one is meant.
    """
    job = row.records[0].job
    name = str(job.get("model") or row.model)
    column = "top1" if row.task == "classification" else "miou"
    fitting = [
        printed
        for printed in papers.rows
        if (printed.task, printed.model, printed.head) == (row.task, name, row.head or "")
        and column in printed.cells
        and printed.trainable
        and printed.input_size in (None, row.input_size)
        and (_same_data(printed, row.data) if row.data else printed.num_classes == job.get("num_classes", 0))
        and _same_network(printed, job)
    ]
    if not fitting or any(_pretrained(record) for record in row.records):
        return None, ""
    own = [printed for printed in fitting if printed.texts.get("reported_by") == "own"]
    told: dict[str, str] = {}  # what is printed -> where first
    for printed in own or fitting:
        source = (
            f"{papers.title(printed.paper)}, Table {printed.table}: {printed.label}, {printed.texts.get('dataset', '')}"
        )
        told.setdefault(printed.cells[column], source.rstrip(", "))
    (value, source), *others = told.items()
    if not others:
        return float(value), source
    # Papers that quote a network differently may mean other trainings or evaluations: none of them is its number.
    listed = "; ".join(f"{value} in {source}" for value, source in told.items())
    return (float(value), f"{source}; all that is printed: {listed}") if own else (None, f"quoted as {listed}")


def _pretrained(record: Record) -> bool:
    """Whether the weights come from training without labels, which no row that is compared here did."""
    return (record.job.get("starts_from") or {}).get("stage") == "pretrain"


class _Ledger:
    """Records by what they measured."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.found: dict[tuple[str, str, str], list[Record]] = {}
        for record in records:
            name = str(record.job.get("model") or record.model)
            self.found.setdefault((record.task, name, record.head or ""), []).append(record)

    def cost(self, row: PaperRow) -> Record | None:
        """The latest cost record of the row's network, size and classes; a done one before any other."""
        fitting = [
            record
            for record in self._of(row)
            if record.stage == "cost"
            and tuple(record.input_size) == row.size_of_cost
            and row.num_classes in (None, record.job.get("num_classes", row.num_classes))
        ]
        return max(fitting, key=lambda record: (record.done, started(record)), default=None)

    def trained(self, row: PaperRow) -> list[Record]:
        """Trainings and evaluations of the row's network on its data and, where it says one, at its size."""
        return [
            record
            for record in self._of(row)
            if record.stage in ("train", "evaluate")
            and not _pretrained(record)
            and _same_data(row, record.data or "")
            and _same_training(row, record.job)
            and row.input_size in (None, tuple(record.input_size))
        ]

    def _of(self, row: PaperRow) -> list[Record]:
        records = self.found.get((row.task, row.model, row.head), [])
        return [record for record in records if _same_network(row, record.job)]


def _same_data(row: PaperRow, data: str) -> bool:
    """Whether a data set of ours (name@version) is the row's: coco_stuff10k is COCO-Stuff."""
    printed = re.escape(normalized(row.texts.get("dataset", "")))
    return bool(re.fullmatch(printed + r"\d*k?", normalized(data.partition("@")[0])))


def _same_training(row: PaperRow, job: Mapping[str, Any]) -> bool:
    """Whether a network was distilled or not as the row says (`distillation=yes` or `no` under `other`), if it does."""
    distilled = (job.get("recipe") or {}).get("distillation_alpha") is not None
    return row.other.get("distillation") in (None, "yes" if distilled else "no")


def _same_network(row: PaperRow, job: Mapping[str, Any]) -> bool:
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _collapsed(value) for name, value in config.items() if name not in _NEUTRAL}

    head = job.get("head_config") or {}
    fits = all(name in head and head[name] == value for name, value in row.head_config.items())
    return fits and plain(row.config or {}) == plain(job.get("model_config") or {})


def _collapsed(value: Any) -> Any:
    """One number for all branches is the same as that number for each."""
    alike = isinstance(value, list | tuple) and value and all(item == value[0] for item in value)
    return value[0] if alike else list(value) if isinstance(value, tuple) else value


def _compare(row: PaperRow, record: Record | None, papers: Papers, ledger: _Ledger) -> dict[str, Comparison]:
    cells: dict[str, Comparison] = {}
    for column in (*COSTS, *SCORES):
        if not (printed := row.cells.get(column)):
            continue
        common = None
        if column in SCORES:
            measured = _score(row, column, ledger)
        elif column == "params_m":
            measured = _params(row, record, printed)
        else:
            common = _cost(row, record, "macs", 1e9)
            measured = _in_the_papers_way(row, record, papers, printed) if common.value is not None else common
        known = papers.verdicts.get((row.paper, row.table, row.row, column))
        verdict, evidence = (known.verdict, known.evidence) if known else ("", "")
        own = reproduced(printed, measured.value) if column in COSTS and measured.value is not None else ""
        if own and _gives_way(verdict, own):
            verdict = own
        elif not known and common and common.value is not None and reproduced(printed, common.value):
            verdict = COMMON
        if "fitted" in row.other and verdict in (REPRODUCED, CUT, COMMON):
            verdict = FITTED
        cells[column] = Comparison(printed, measured, common, verdict=verdict, evidence=evidence)
    return cells


def _gives_way(known: str, own: str) -> bool:
    """Whether a known verdict gives way to what comes out: not to further digits that are dropped, for which it has a
    better reason unless it is rounding itself. Another network in place of the paper's stays another network.
    """
    return known != "reconstruction" and (own != CUT or known in ("", "rounding"))


def _unprinted(row: PaperRow, record: Record | None, convention: str) -> dict[str, Comparison]:
    """The counted costs of a row, auxiliary heads included, by column, where the paper prints none."""
    if record is None or not record.done:
        return {}
    told, way = record.metrics, (record.details.get("macs_by_convention") or {}).get(convention)
    params = told.get("params", 0) + told.get("params_auxiliary", 0)
    common, own = (
        Measured("" if value is None else COUNTED, value and value / 1e9, key=record.key)
        for value in (told.get("macs"), told.get("macs_paper", way))
    )
    found = {"params_m": Comparison("", Measured(COUNTED, params / 1e6, key=record.key), verdict=UNPRINTED)}
    found["gflops"] = Comparison("", own, common, verdict=UNPRINTED)
    return {column: cell for column, cell in found.items() if column not in row.cells and cell.known}


def _absent(row: PaperRow, possible: bool) -> Measured:
    if not row.task:
        return Measured(REPORTED_ONLY, reason="carried as reported data")
    if not possible:
        return Measured(REPORTED_ONLY, reason="nothing here builds or trains this row")
    return Measured(NOT_RUN, reason=ABSENT + " + ".join(filter(None, (row.model, row.head))))


def _cost(row: PaperRow, record: Record | None, metric: str, unit: float) -> Measured:
    if record is None:
        return _absent(row, row.buildable)
    if not record.done:
        return Measured(record.status, reason=str(record.reason), key=record.key)
    if metric not in record.metrics:
        return Measured("", reason="the model's family has no counting convention of its own", key=record.key)
    return Measured(COUNTED, record.metrics[metric] / unit, key=record.key)


def _in_the_papers_way(row: PaperRow, record: Record, papers: Papers, printed: str) -> Measured:
    """FLOPs as the model's own paper counts, or as the table's does where only that gives what is printed.

    A table that quotes a network of another paper has its own counter's number or the other paper's.
    """
    own = _cost(row, record, "macs_paper", 1e9)
    name = papers.convention(row.paper, row.table)
    value = (record.details.get("macs_by_convention") or {}).get(name)
    if value is None or (own.value is not None and reproduced(printed, own.value)):
        return own
    if own.value is None or reproduced(printed, value / 1e9):
        return Measured(COUNTED, value / 1e9, key=record.key)
    return own


def _params(row: PaperRow, record: Record | None, printed: str) -> Measured:
    """Parameters with the auxiliary head, as papers print them, or without it where only that is what is printed."""
    bare = _cost(row, record, "params", 1e6)
    extra = record.metrics.get("params_auxiliary", 0) / 1e6 if record is not None else 0
    if bare.value is None or not extra:
        return bare
    whole = Measured(COUNTED, bare.value + extra, "with the auxiliary head", bare.key)
    return bare if reproduced(printed, bare.value) and not reproduced(printed, whole.value) else whole


def _score(row: PaperRow, column: str, ledger: _Ledger) -> Measured:
    records = ledger.trained(row) if row.trainable else []
    metric = _METRIC[column]
    found = join(records, row.task) if records else []
    if not found:
        return _absent(row, row.trainable)
    best = min(found, key=lambda measured: rank_key(measured.cells[metric], highest_first=True))
    cell = best.cells[metric]
    if cell.value is None:
        return Measured(cell.status, reason=cell.reason)
    count = sum(measured.cells[metric].value is not None for measured in found)
    reason = f"the best of {count} recipes" if count > 1 else ""
    key = next(r.key for r in best.records if r.stage == "evaluate" and r.done and metric in r.metrics)
    return Measured(RUN_HERE, cell.value, reason, key)


def _derive(row: PaperRow, lines: Mapping[int, RebuiltRow], ledger: _Ledger) -> dict[str, Comparison]:
    """The row's differences: from the printed rows, from the measured ones (FLOPs as the paper counts if known), and
    with all rows counted alike.
    """
    cells = {}
    for column, printed in row.deltas.items():
        percent = column in COSTS
        own, others = ([lines[n].cells.get(column) for n in numbers if n in lines] for numbers in (row.own, row.others))
        if None in own or None in others or not own or not others:
            cells[column] = Comparison(printed, Measured("", reason="a row that it compares has no such number"))
            continue
        pairs = column in row.pairs
        given = _difference(*([Fraction(c.printed) for c in group] for group in (own, others)), percent, pairs)
        fits = reproduced(printed.strip("+%"), given)
        digits = len(printed.strip("%").partition(".")[2])
        recomputed = f"{float(given):+.{digits}f}" + ("%" if percent else "")
        values = [[_best(cell) for cell in cells_] for cells_ in (own, others)]
        if any(value is None for group in values for value in group):
            measured = Measured(NOT_RUN, reason="a row that it compares was not measured")
        else:
            status = COUNTED if percent else RUN_HERE
            measured = Measured(status, float(_difference(*values, percent, pairs)))
        verdict = {REPRODUCED: FOLLOWS, CUT: f"{FOLLOWS} (cut, not rounded)"}.get(fits, f"the rows give {recomputed}")
        note = "" if fits else row.texts.get("note", "")
        common = _alike(row, column, lines, ledger) if percent else None
        cells[column] = Comparison(printed, measured, common, recomputed, verdict, note)
    return cells


def _alike(row: PaperRow, column: str, lines: Mapping[int, RebuiltRow], ledger: _Ledger) -> Measured:
    """A derived row's difference of costs with all rows counted alike: MACs in the common convention, auxiliary heads
    included, and as many classes as the own networks have: a table may print others for the networks that it quotes.
    """
    classes = {lines[number].row.num_classes for number in row.own if number in lines}
    changes = {"num_classes": classes.pop()} if len(classes) == 1 and None not in classes else {}
    groups: list[list[float]] = []
    for numbers in (row.own, row.others):
        groups.append([])
        for number in (number for number in numbers if number in lines):
            printed = replace(lines[number].row, **changes)
            record = ledger.cost(printed) if printed.buildable else None
            metric, unit = ("params", 1e6) if column == "params_m" else ("macs", 1e9)
            cost = _cost(printed, record, metric, unit)
            if cost.value is None:
                classes_too = f" with {printed.num_classes} classes" if printed.num_classes else ""
                return Measured(NOT_RUN, reason=f"{printed.label} was not counted{classes_too}")
            extra = record.metrics.get("params_auxiliary", 0) / unit if column == "params_m" else 0
            groups[-1].append(cost.value + extra)
    printed_classes = {lines[number].row.num_classes for number in (*row.own, *row.others) if number in lines}
    note = f"all rows counted with {changes['num_classes']} classes" if changes and len(printed_classes) > 1 else ""
    return Measured(COUNTED, float(_difference(*groups, percent=True, pairs=column in row.pairs)), note)


def _best(cell: Comparison) -> float | None:
    return cell.measured.value if cell.measured.value is not None or cell.common is None else cell.common.value


def _difference(own: Sequence[Any], others: Sequence[Any], percent: bool, pairs: bool) -> Any:
    """Of the means, in percent of the others' or not; with `pairs` the mean of the changes from each of the others to
    its own row, of which each has as many others.
    """
    if pairs:
        share = len(others) // len(own)
        changes = [_difference([own[n // share]], [other], percent, False) for n, other in enumerate(others)]
        return sum(changes) / len(changes)
    mean = (lambda values: sum(values) / len(values)) if isinstance(own[0], Fraction) else fmean
    return (mean(own) / mean(others) - 1) * 100 if percent else mean(own) - mean(others)
