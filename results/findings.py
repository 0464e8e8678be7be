"""What does not come out of the papers' numbers, why, and what becomes of their average improvements.

Everything comes from the rebuilt tables and the verdicts. `findings_page` puts it on a page and into files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .papers import PaperRow, Papers, Verdict
from .rebuilt import (
    COSTS,
    FOLLOWS,
    REPORTED_ONLY,
    Comparison,
    Measured,
    RebuiltRow,
    RebuiltTable,
    Summary,
    reproduced,
    summarize,
)

DIFFERS, SIZE = "differs", "input_size"
OTHER_SIZE, LOST = "other size", ("reconstruction", "cannot be known")  # words of verdicts


@dataclass(frozen=True)
class Finding:
    """A printed number that does not come out; the same one in several tables or rows is one finding."""

    kind: str  # the word of a verdict, or DIFFERS
    paper: str  # as people spell it
    column: str  # of `papers.NUMBERS`, or SIZE
    size: str  # of the images, "512x512"
    printed: str
    evidence: str
    places: list[tuple[RebuiltTable, str]]  # table and row
    cells: list[Comparison]  # of each place; none of a SIZE

    @property
    def counted(self) -> Measured:
        """What is nearest to the print: FLOPs may be counted as the paper counts or as all are here."""
        known = [m for c in self.cells for m in (c.measured, c.common) if m is not None and m.value is not None]
        if known:
            return min(known, key=lambda measured: abs(measured.value - float(self.printed)))
        return self.cells[0].measured if self.cells else Measured("")

    @property
    def difference(self) -> float | None:
        """In percent of the printed number."""
        return None if self.counted.value is None else (self.counted.value / float(self.printed) - 1) * 100


@dataclass(frozen=True)
class Average:
    """One number of a line in which a paper compares its networks with others in the mean."""

    paper: str
    name: str  # the line's, with its head and data
    column: str  # of `papers.NUMBERS`
    cell: Comparison
    made_of: str  # what is wrong with the numbers that it compares
    tables: list[RebuiltTable]

    @property
    def alike(self) -> Measured:
        """The same difference with all networks counted, or trained, alike."""
        return self.cell.common or self.cell.measured

    @property
    def stands(self) -> bool | None:
        """Whether it has the printed sign with all networks counted alike; None where that is not known."""
        return None if self.alike.value is None else self.alike.value * _number(self.cell.printed) > 0

    @property
    def gap(self) -> float | None:
        """By how many points it is larger than printed (smaller if negative), counted alike or else as printed rows
        give it; None where neither is known.
        """
        if self.alike.value is not None:
            return abs(self.alike.value) - abs(_number(self.cell.printed))
        return abs(_number(self.cell.recomputed)) - abs(_number(self.cell.printed)) if self.cell.recomputed else None

    @property
    def as_printed(self) -> bool:
        return self.alike.value is not None and bool(reproduced(self.cell.printed.strip("+%"), self.alike.value))

    @property
    def claim(self) -> str:
        """Whether the paper's claim stands, in one sentence."""
        if self.gap is None:
            return f"Cannot be checked: {self.cell.measured.reason}"
        gap = f"{abs(self.gap):.{1 if self.column in COSTS else 2}f} points {'more' if self.gap > 0 else 'less'}"
        if self.stands is None:
            follows = self.cell.verdict.startswith(FOLLOWS)
            text = "Follows from the printed rows" if follows else f"The printed rows give {gap} than printed"
            unknown = "not all of its rows are counted" if self.column in COSTS else "no training has repeated it"
            return f"{text}; {unknown} here"
        if not self.stands:
            return "Does not stand"
        if self.as_printed:
            return "Stands as printed"
        return f"Stands{', with' if self.gap > 0 else ', but with'} {gap} than printed"


@dataclass(frozen=True)
class Row:
    """A row of which nothing that is published gives the printed parameters and FLOPs."""

    paper: str
    name: str
    cells: dict[str, Comparison]  # by column
    kinds: list[str]  # verdicts
    tables: list[RebuiltTable]


@dataclass(frozen=True)
class Findings:
    """What is to be told of all papers of which anything was measured; empty where nothing was."""

    findings: list[Finding] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    lost: list[Row] = field(default_factory=list)
    carried: list[tuple[RebuiltTable, list[str], str]] = field(default_factory=list)  # rows that are not built; why
    summaries: dict[str, dict[str, Summary]] = field(default_factory=dict)  # by paper, of "own" and of "other" rows

    def of(self, kind: str) -> list[Finding]:
        """The findings of a kind, the largest differences first."""
        found = [finding for finding in self.findings if finding.kind == kind]
        return sorted(found, key=lambda finding: -abs(finding.difference or 0))


def find(tables: Iterable[RebuiltTable], papers: Papers) -> Findings:
    """All that is to be told of the rebuilt `tables`."""
    tables = list(tables)
    touched = {table.paper for table in tables if table.measured}
    tables = [table for table in tables if table.paper in touched]
    findings: dict[tuple, Finding] = {}
    averages: dict[tuple, Average] = {}
    lost: dict[tuple, Row] = {}
    for table in tables:
        for line in table.rows:
            for average in _averages(table, line):
                key = (average.paper, average.name, average.column, average.cell.printed, average.cell.recomputed)
                if (known := averages.setdefault(key, average)) is not average:
                    known.tables.append(table)
            for finding in _findings(table, line, papers):
                # Where no reason is known, only the same network with the same numbers is the same finding.
                same = finding.evidence or (finding.places[0][1], finding.counted.value)
                key = (finding.paper, finding.kind, finding.column, finding.printed, same)
                if (known := findings.setdefault(key, finding)) is not finding:
                    known.places.extend(finding.places)
                    known.cells.extend(finding.cells)
            costs = {column: cell for column, cell in line.cells.items() if column in COSTS}
            if costs and all(cell.verdict in LOST for cell in costs.values()):
                kinds = list(dict.fromkeys(cell.verdict for cell in costs.values()))
                row = Row(_paper(table), _name(line.row), costs, kinds, [table])
                key = (row.paper, row.name, *(cell.printed for cell in costs.values()))
                known = lost.setdefault(key, row)
                known.tables.extend([table] if table not in known.tables else [])
    carried = [entry for table in tables if not table.repeats for entry in _carried(table)]
    summaries = {_paper(table): summarize([t for t in tables if t.paper == table.paper]) for table in tables}
    summaries |= {rows: summarize(tables, rows) for rows in ("own", "other") if tables}
    return Findings([*findings.values()], [*averages.values()], [*lost.values()], carried, summaries)


def total(summaries: Iterable[dict[str, Summary]], columns: Sequence[str]) -> Summary:
    """The cells of some columns together."""
    chosen = [summary[column] for summary in summaries for column in columns]
    return Summary(*(sum(getattr(summary, name) for summary in chosen) for name in vars(Summary())))


def _findings(table: RebuiltTable, line: RebuiltRow, papers: Papers) -> list[Finding]:
    row = line.row
    if row.derived:
        return []
    found = []

    def known(column: str) -> Verdict:
        return papers.verdicts.get((row.paper, row.table, row.row, column), Verdict("", ""))

    def add(kind: str, column: str, printed: str, evidence: str, cells: list[Comparison]) -> None:
        height, width = (row.input_size if column == SIZE else row.size_of_cost) or (0, 0)
        size = f"{height}x{width}" if height else ""
        found.append(Finding(kind, _paper(table), column, size, printed, evidence, [(table, _name(row))], cells))

    if (verdict := known(SIZE)).verdict and row.input_size:
        add(verdict.verdict, SIZE, f"{row.input_size[0]}x{row.input_size[1]}", verdict.evidence, [])
    for column, cell in line.cells.items():
        if known(column).verdict == OTHER_SIZE:  # it comes out, but not for what is printed
            add(OTHER_SIZE, column, cell.printed, known(column).evidence, [cell])
        elif not cell.reproduced and (cell.verdict or (column in COSTS and cell.known)):
            add(cell.verdict or DIFFERS, column, cell.printed, cell.evidence, [cell])
    return found


def _averages(table: RebuiltTable, line: RebuiltRow) -> list[Average]:
    if not line.row.derived:
        return []
    lines = {other.row.row: other for other in table.rows}
    own, others = ([lines[n] for n in numbers if n in lines] for numbers in (line.row.own, line.row.others))
    name = ", ".join(filter(None, (line.row.label, line.row.texts.get("framework"), line.row.texts.get("dataset"))))
    found = []
    for column, cell in line.cells.items():
        wrong: dict[str, list[str]] = {}
        for other in (*own, *others):
            part = other.cells.get(column)
            if part and column in COSTS and not part.reproduced and (part.verdict or part.known):
                wrong.setdefault(part.verdict or DIFFERS, []).append(other.row.label)
        told = [f"{kind}: {', '.join(labels)}" for kind, labels in wrong.items()]
        classes = [{str(other.row.num_classes) for other in group if other.row.num_classes} for group in (own, others)]
        if column in COSTS and all(classes) and classes[0] != classes[1]:
            own_classes, other_classes = (" or ".join(sorted(group)) for group in classes)
            told.append(f"its own networks are printed with {own_classes} classes, the others with {other_classes}")
        found.append(Average(_paper(table), name, column, cell, "; ".join(told), [table]))
    return found


def _carried(table: RebuiltTable) -> list[tuple[RebuiltTable, list[str], str]]:
    """The rows that nothing here builds or trains and of which nothing is known, by reason."""
    tried = {
        line.row.printed
        for line in table.rows
        if any(cell.measured.status != REPORTED_ONLY or cell.verdict for cell in line.cells.values())
    }
    reasons: dict[str, list[str]] = {}
    for line in table.rows:
        if not line.row.derived and line.row.printed not in tried:
            reason = "nothing here builds or trains it" if line.row.task else "its task is not measured here"
            reasons.setdefault(reason, []).append(line.row.label)
    return [(table, list(dict.fromkeys(names)), reason) for reason, names in reasons.items()]


def _paper(table: RebuiltTable) -> str:
    return table.title or table.paper


def _name(row: PaperRow) -> str:
    """The row's name, with the detector, head or method that tells it from others of that name."""
    framework = row.texts.get("framework", "")
    return row.label if framework.lower() in row.label.lower() else f"{row.label}, {framework}"


def _number(text: str) -> float:
    return float(text.strip("%"))
