"""The findings for people: `findings.html`, and `findings.md` and `findings.csv` beside the rebuilt tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import page
from .display import Display, markdown, plain
from .files import csv_text, write_atomic
from .findings import DIFFERS, SIZE, Average, Finding, Findings, total
from .paper_tables import FOLDER, TITLES, UNITS, number, stem
from .papers import WORDS
from .rebuilt import COSTS, REPORTED_ONLY, SCORES, Measured, RebuiltTable

PAGE = "findings.html"
# The words of verdicts as headings, the most telling first.
HEADINGS = {
    "misprint": "Misprints",
    "other size": "Printed at another size",
    "other parts": "Other parts of the network",
    "quoted": "Quoted from elsewhere",
    "rounding": "Rounding",
    "reconstruction": "Reconstructions",
    "cannot be known": "Cannot be known",
    DIFFERS: "Different, and no reason is known",
}
MEANINGS = WORDS | {DIFFERS: "what is counted here is another number, and nobody has found out why"}
KIND = "kind-"  # before the names of the parts that have findings of one kind
SHOWN = 3  # of the rows that share one finding
LEAD = (
    "Which numbers of the papers' tables come out when the same networks are counted here, which do not and why, and"
    " what becomes of the averages that the papers draw from them."
)
COLUMNS = ("kind", "paper", "tables", "rows", "number", "size", "printed", "from_printed_rows", "counted")
COLUMNS += ("counted_alike", "status", "difference_percent", "evidence")


@dataclass(frozen=True)
class Part:
    """A table of the findings under its heading; `places` are the papers' tables of each row, below "Tables"."""

    name: str
    heading: str
    table: Display
    places: list[list[RebuiltTable]]


def write(found: Findings, folder: Path) -> list[Path]:
    """Write `findings.md` and `findings.csv` into `folder`/papers, if there is anything to tell. Returns the paths."""
    if not found.summaries:
        return []
    parts = [f"# Findings\n\n{LEAD}\n\n" + "".join(f"- {line}\n" for line in told(found))]
    parts += [f"\n## {part.heading}\n\n{markdown(part.table)}" for part in all_parts(found)]
    paths = [folder / FOLDER / f"findings.{suffix}" for suffix in ("md", "csv")]
    for path, content in zip(paths, ("".join(parts), to_csv(found)), strict=True):
        write_atomic(path, content)
    return paths


def render(found: Findings, *, title: str, report: str) -> str:
    """The HTML of the page. `report` is the file name of the report beside it, which it is a part of."""
    parts = {part.name: (part, _on_page(part, report)) for part in all_parts(found)}
    kinds = [name for name in parts if name.startswith(KIND)]
    template = page.environment().get_template("findings.html")
    return template.render(
        title=f"Findings: {title}",
        lead=LEAD,
        report=report,
        told=told(found),
        parts=parts,
        kinds=kinds,
        groups=page.count(parts[name][1] for name in kinds),
        files=[f"tables/{FOLDER}/findings.{suffix}" for suffix in ("md", "csv")],
    )


def _on_page(part: Part, report: str) -> page.Table:
    """A part with room for its texts, and links from the numbers of the papers' tables to those tables."""
    headings = part.table.headings
    table = page.as_table(part.name, part.table, [(row[headings.index("Paper")], []) for row in part.table.cells])
    long = [any(len(row[n]) > 30 for row in part.table.cells) for n in range(len(headings))]
    for line in table.lines:
        line.cells[:] = [
            replace(c, kind=f"{c.kind} text".strip()) if wide else c for c, wide in zip(line.cells, long, strict=True)
        ]
    for line, places in zip(table.lines, part.places, strict=bool(part.places)):
        at = headings.index("Tables")
        links = [(p.table, f"{report}#{stem(p)}" if p.measured else f"tables/{FOLDER}/{stem(p)}.md") for p in places]
        line.cells[at] = replace(line.cells[at], links=links)
    return table


def told(found: Findings) -> list[str]:
    """What to know first, in whole sentences."""
    every = [summary for paper, summary in found.summaries.items() if paper not in ("own", "other")]
    costs, scores = total(every, COSTS), total(every, SCORES)
    known = costs.measured - costs.reproduced - costs.differing
    more = f" (and {costs.explained - known} more, known without a count)" if costs.explained > known else ""
    fitted = f" ({costs.fitted} of them by networks that were fitted to these very numbers)" if costs.fitted else ""
    lines = [
        f"Of the {costs.reported} parameters and FLOPs that the papers print, {costs.measured} were counted here with"
        " the same head, classes and size, for the same network or what comes nearest to its description. As printed:"
        f" {costs.reproduced}{fitted}. Different for a known reason: {known}{more}. Different, and nobody knows why:"
        f" {costs.differing}."
    ]
    if costs.fitted:
        lines.append(
            "Fitted is where a paper leaves a part of its network open, and that part was chosen so that parameters and"
            " FLOPs come out: that they do is no evidence for the network."
        )
    shares = (
        ("of the parameters", total(every, ["params_m"])),
        ("of the FLOPs", total(every, ["gflops"])),
        ("of the numbers of networks that the authors ran themselves", total([found.summaries["own"]], COSTS)),
        ("of those that they quote", total([found.summaries["other"]], COSTS)),
    )
    told = [f"{s.reproduced / s.measured:.0%} {of} ({s.reproduced} of {s.measured})" for of, s in shares if s.measured]
    lines += [f"Of what was counted comes out: {', '.join(told)}."] if told else []
    if found.averages:
        alike = [average for average in found.averages if average.stands is not None]
        kept = [average for average in alike if average.stands]
        less = sum(average.gap < 0 and not average.as_printed for average in kept)
        text = (
            f"Of {len(found.averages)} average improvements that the papers state, {len(alike)} could be checked with"
        )
        text += f" all networks counted alike: {len(kept)} stand, {less} of them with less than printed."
        rest = len(found.averages) - len(alike)
        lines.append(
            text + (f" The rest ({rest}) needs networks or trainings that nobody has repeated here." if rest else "")
        )
    if scores.measured:
        lines.append(f"{scores.measured} of {scores.reported} printed accuracies were repeated by trainings here.")
    elif scores.reported:
        lines.append(
            f"No training here has repeated any of the {scores.reported} accuracies: they are the papers' word."
        )
    return lines


def all_parts(found: Findings) -> list[Part]:
    """The tables of the page, in its order; those with no row are left out."""
    present = dict.fromkeys(finding.kind for finding in found.findings)
    kinds = [kind for kind in HEADINGS if kind in present] + [kind for kind in present if kind not in HEADINGS]
    parts = [_papers(found), _averages(found.averages), *(_kind(kind, found.of(kind)) for kind in kinds)]
    parts += [_lost(found), _carried(found)]
    return [part for part in parts if part.table.cells]


def to_csv(found: Findings) -> str:
    """All findings and averages with the columns of `COLUMNS`; measured numbers in full precision."""
    lines: list[dict[str, object]] = []
    for finding in found.findings:
        common = next((cell.common.value for cell in finding.cells if cell.common), None)
        line = {"kind": finding.kind, "rows": "; ".join(_rows(finding)), "size": finding.size}
        line |= {"counted": finding.counted.value, "counted_alike": common, "status": finding.counted.status}
        lines.append(line | {"difference_percent": finding.difference, "evidence": finding.evidence})
        lines[-1] |= _common(finding)
    for average in found.averages:
        line = {"kind": "average", "rows": average.name, "from_printed_rows": average.cell.recomputed}
        line |= {"counted": average.cell.measured.value, "counted_alike": average.alike.value}
        line |= {"status": average.alike.status, "evidence": average.claim}
        lines.append(line | _common(average) | {"printed": average.cell.printed})
    return csv_text(COLUMNS, lines)


def _common(entry: Finding | Average) -> dict[str, object]:
    printed = {"printed": entry.printed} if isinstance(entry, Finding) else {}
    return {"paper": entry.paper, "tables": _numbers(_tables(entry)), "number": entry.column} | printed


def _papers(found: Findings) -> Part:
    headings = ["Paper", "Parameters and FLOPs printed", "Counted here", "Come out", "Do not, reason known"]
    headings += ["Do not, reason unknown", "Neither counted nor explained", "Accuracies printed", "Repeated here"]
    cells, values = [], []
    named = {paper: [summary] for paper, summary in found.summaries.items() if paper not in ("own", "other")}
    if len(named) > 1:
        named["All"] = [summary for (summary,) in named.values()]
    for name, summaries in named.items():
        costs, scores = total(summaries, COSTS), total(summaries, SCORES)
        counts = [costs.reported, costs.measured, costs.reproduced, costs.explained, costs.differing, costs.open]
        counts += [scores.reported, scores.measured]
        cells.append([name, *map(str, counts)])
        values.append([None, *map(float, counts)])
    caption = "Numbers in the papers' tables, one that stands in a copied table counted once. A reason may be known"
    caption += " without a count of this run"
    return Part("papers", "What came of the printed numbers", plain(caption, headings, cells, values), [])


def _averages(averages: Sequence[Average]) -> Part:
    headings = ["Line", "Number", "Printed", "From the printed rows", "All counted alike", "Does the claim stand?"]
    headings += ["Counted as the paper counts", "What is wrong with its numbers", "Paper", "Tables"]
    cells, values, measured, footnotes = [], [], [], {}
    for average in averages:
        cell, unit = average.cell, "%" if average.column in COSTS else ""
        stated = [float(text.strip("%")) if text else None for text in (cell.printed, cell.recomputed)]
        alike, counted = (
            known.status if known.value is None else f"{known.value:+.{1 if unit else 2}f}{unit}"
            for known in (average.alike, cell.measured)
        )
        mark = f" [{footnotes.setdefault(cell.evidence, len(footnotes) + 1)}]" if cell.evidence else ""
        cells.append([average.name, TITLES[average.column], cell.printed, cell.recomputed, alike, average.claim + mark])
        cells[-1] += [counted, average.made_of, average.paper, _numbers(average.tables)]
        values.append([None, None, *stated, average.alike.value, None, cell.measured.value, None, None, None])
        measured.append(
            [True] * 4 + [average.alike.value is not None, True, cell.measured.value is not None] + [True] * 3
        )
    caption = "What the papers state; the same from the rows that they print; and from what was counted here, with all"
    caption += " networks alike (MACs in one convention, one number of classes) and as the paper counts. Less is better"
    caption += " for parameters and FLOPs, more for accuracies"
    table = replace(plain(caption, headings, cells, values), measured=measured, footnotes=list(footnotes))
    return Part("averages", "What becomes of the average improvements", table, [average.tables for average in averages])


def _kind(kind: str, findings: Sequence[Finding]) -> Part:
    headings = ["Row", "Number", "Printed", "Counted here", "Difference (%)", "Paper", "Tables", "Evidence"]
    cells, values, measured = [], [], []
    for finding in findings:
        rows, known = _rows(finding), finding.counted
        name = "; ".join(rows[:SHOWN]) + (f"; {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
        title = "Image size" if finding.column == SIZE else f"{TITLES[finding.column]} ({UNITS[finding.column]})"
        title += f" at {finding.size}" if finding.column == "gflops" else ""
        counted = _status(known) if known.value is None else number(known.value, finding.column)
        difference = "" if finding.difference is None else f"{finding.difference:+.1f}"
        cells.append([name, title, finding.printed, counted, difference, finding.paper, _numbers(_tables(finding))])
        cells[-1].append(finding.evidence)
        printed = None if finding.column == SIZE else float(finding.printed)
        values.append([None, None, printed, known.value, finding.difference, None, None, None])
        measured.append([n != 3 or known.value is not None for n in range(len(headings))])
    table = plain(MEANINGS.get(kind, kind).capitalize(), headings, cells, values)
    kept = [n for n, heading in enumerate(headings) if heading != "Evidence" or any(row[n] for row in cells)]
    table = replace(
        table,
        headings=[headings[n] for n in kept],
        numeric=[table.numeric[n] or headings[n] in ("Counted here", "Difference (%)") for n in kept],
        **{
            name: [[row[n] for n in kept] for row in rows]
            for name, rows in (("cells", cells), ("values", values), ("measured", measured), ("best", table.best))
        },
    )
    name = KIND + "".join(c if c.isalnum() else "-" for c in kind)
    return Part(name, HEADINGS.get(kind, kind.capitalize()), table, [_tables(finding) for finding in findings])


def _lost(found: Findings) -> Part:
    headings = ["Row", "Paper", "Tables", "Printed", "Counted here", "Verdict"]
    cells = []
    for row in found.lost:
        printed = [f"{cell.printed} {UNITS[column]} {TITLES[column]}" for column, cell in row.cells.items()]
        counted = [
            f"{number(cell.measured.value, column)} {UNITS[column]}"
            for column, cell in row.cells.items()
            if cell.measured.value is not None
        ]
        where = [row.name, row.paper, _numbers(row.tables)]
        cells.append([*where, ", ".join(printed), ", ".join(counted) or "not counted", ", ".join(row.kinds)])
    caption = "No network that fits what is published has the printed parameters and FLOPs; the evidence stands above,"
    caption += " at each number"
    table = plain(caption, headings, cells)
    measured = [[n != 4 or text != "not counted" for n, text in enumerate(row)] for row in cells]
    places = [row.tables for row in found.lost]
    return Part("lost", "Rows that cannot be reproduced", replace(table, measured=measured), places)


def _carried(found: Findings) -> Part:
    headings = ["Paper", "Tables", "Networks", "Which", "Why"]
    cells, values = [], []
    for table, names, reason in found.carried:
        cells.append([table.title or table.paper, table.table, str(len(names)), "; ".join(names), reason])
        values.append([None, None, float(len(names)), None, None])
    caption = "They stand in the report as the papers print them. That nothing was tried is this suite's limit: no code"
    caption += " for the network or its training, or a task that is not measured, such as detection"
    table = plain(caption, headings, cells, values)
    return Part("carried", "Rows that were not tried", table, [[table] for table, _, _ in found.carried])


def _tables(entry: Finding | Average) -> list[RebuiltTable]:
    tables = entry.tables if isinstance(entry, Average) else [table for table, _ in entry.places]
    return list({table.table: table for table in tables}.values())


def _status(measured: Measured) -> str:
    return "not counted" if measured.status == REPORTED_ONLY else measured.status


def _numbers(tables: Sequence[RebuiltTable]) -> str:
    return ", ".join(dict.fromkeys(table.table for table in tables))


def _rows(finding: Finding) -> list[str]:
    return list(dict.fromkeys(name for _, name in finding.places))
