"""The report of a suite: leaderboards, tables, plots and one static page, made from the ledger alone."""

import base64
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from .files import write_atomic
from .ledger import Ledger
from .origin import origin
from .papers import Papers
from .papers import load as load_papers
from .rebuilt import rebuild
from .record import SCHEMA_VERSION, STAGES, STATUSES, TASKS, Record

STAMP = ".report.json"
LOCK_SECONDS = 300.0
LONGEST = 40  # entries of one mapping in the details of a record


@dataclass(frozen=True)
class Built:
    """What `build` left in the output folder. The counts are of jobs; `missing` ones have no record yet."""

    report: Path
    files: list[Path]  # all that was written, the report included
    rebuilt: bool  # False when everything was up to date
    done: int
    blocked: int
    failed: int
    missing: int
    messages: list[str] = field(default_factory=list)  # damaged records, plots that could not be made: one line each


def build(
    output: Path,
    *,
    title: str,
    description: str = "",
    keys: Sequence[str] | None = None,
    messages: Sequence[str] = (),
    papers: Sequence[str | Path] = (),
) -> Built:
    """Write all that is shown of `output/ledger` into `output`; quick when nothing has changed since the last time.

    `keys` are the jobs that belong to the suite (default: every record of the ledger). `messages` are lines about the
    run that the page shows. `papers` are files of paper rows beside those of `results/papers`; what is wrong with one
    is a message. Raises `OSError` with the path when a file cannot be written.
    """
    output = Path(output)
    ledger = Ledger(output / "ledger")
    records = ledger.records(keys)
    printed = load_papers(papers)
    content = {
        "title": title,
        "description": description,
        "messages": [*messages, *printed.problems],
        "missing": len(set(keys) - {record.key for record in records}) if keys is not None else 0,
        "set_aside": [path.name for path in ledger.set_aside()],
    }
    own = [Path(path).read_bytes() for path in papers if Path(path).is_file()]
    stamp = _digest(json.dumps(content, sort_keys=True), *(record.to_json() for record in records), *own, _code())
    output.mkdir(parents=True, exist_ok=True)
    # Two runs of one suite may report at the same time: each file is whole in any case, but they must belong together.
    with FileLock(output / ".report.lock", timeout=LOCK_SECONDS):
        last = _last(output)
        rebuilt = last.get("stamp") != stamp or not _intact(output, last["files"])
        if rebuilt:
            last = _write(output, records, printed, content, last) | {"stamp": stamp}
            last |= {"title": title, "description": description}
            write_atomic(output / STAMP, json.dumps(last, indent=1) + "\n")
    counts = {status: sum(record.status == status for record in records) for status in STATUSES}
    return Built(
        report=output / "report.html",
        files=[output / name for name in last["files"]],
        rebuilt=rebuilt,
        missing=content["missing"],
        messages=[*ledger.reports, *printed.problems, *last["notes"]],
        **counts,
    )


def _write(
    output: Path, records: Sequence[Record], printed: Papers, content: dict[str, Any], last: dict[str, Any]
) -> dict[str, Any]:
    from . import growth, leaderboard, paper_tables, plots, tables  # pandas and matplotlib: not before they are needed

    files = [*leaderboard.write(records, output, printed), *tables.write(records, output / "tables")]
    files += growth.write(records, output / "tables")
    beside = rebuild(printed, records)
    drawn = plots.draw(records, output / "plots", beside)
    files += [path for plot in drawn.plots for path in plot.files]
    rebuilt = paper_tables.write(beside, printed, output / "tables")
    write_atomic(output / "report.html", _page(records, drawn, rebuilt, content, files, output))
    files += rebuilt.files
    files.append(output / "report.html")
    names = {path.relative_to(output).as_posix(): _digest(path.read_bytes()) for path in files}
    for name in last.get("files", {}):
        if name not in names:  # A file of an earlier report that is no longer true, e.g. the plot of a removed task.
            (output / name).unlink(missing_ok=True)
    return {"files": names, "notes": drawn.notes}


def _page(
    records: Sequence[Record], drawn: Any, rebuilt: Any, content: dict[str, Any], files: Sequence[Path], output: Path
) -> str:
    import jinja2

    from . import tables

    def figures(section: str) -> list[dict[str, str]]:
        shown = [plot for plot in drawn.plots if plot.section == section]
        return [{"alt": p.alt, "title": p.title, "svg": _inline(p.path.with_suffix(".svg"))} for p in shown]

    sections = []
    for kind in tables.KINDS:
        if rows := tables.rows_of(records, kind):
            own = [path for path in files if path.stem.removeprefix("leaderboard_").startswith(kind)]
            own += [path for path in files if kind == "cost" and path.name == "growth.csv"]
            links = [path.relative_to(output).as_posix() for path in own if path.suffix != ".svg"]
            sections.append({"id": kind, "table": tables.display(rows, kind), "plots": figures(kind), "links": links})
    for name, table in rebuilt.displays.items():
        links = [path.relative_to(output).as_posix() for path in rebuilt.links.get(name, [])]
        sections.append({"id": name, "table": table, "plots": figures(name), "links": links})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        **content,
        counts={status: sum(record.status == status for record in records) for status in STATUSES},
        sections=sections,
        notes=drawn.notes,
        undone=sorted((r for r in records if not r.done), key=_order),
        uncounted=_uncounted(records),
        provenance=origin(records),
        records=[(record, _details(record)) for record in sorted(records, key=_order)],
        schema=SCHEMA_VERSION,
    )


def _order(record: Record) -> tuple:
    return TASKS.index(record.task), record.model, record.head or "", STAGES.index(record.stage), record.seed


def _inline(path: Path) -> str:
    """An SVG as the source of an image: in one file, and without its ids meeting those of the other plots."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _details(record: Record) -> dict[str, str]:
    """What a record holds beside its name, as text by heading; raw samples as a summary."""
    parts = {
        "Metrics": record.metrics,
        "Samples": {name: _summary(values) for name, values in record.samples.items() if values},
        "Details": {name: _shortened(value) for name, value in record.details.items()},
        "Job": record.job,
        "Provenance": record.provenance,
    }
    return {name: json.dumps(part, indent=2, ensure_ascii=False) for name, part in parts.items() if part}


def _shortened(value: Any) -> Any:
    """A long mapping, such as the cost of every module, cut to what a page can hold; the ledger's file has it all."""
    if not isinstance(value, dict) or len(value) <= LONGEST:
        return value
    return dict(list(value.items())[:LONGEST]) | {"...": f"{len(value) - LONGEST} more in the ledger's file"}


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


def _last(output: Path) -> dict[str, Any]:
    """What the last report left; empty when there was none or its stamp cannot be read."""
    try:
        last = json.loads((output / STAMP).read_bytes())
        names = last["files"]
        # The names are used to remove files: nothing outside the output may be among them.
        inside = all(".." not in Path(name).parts and not Path(name).is_absolute() for name in names)
        return last if inside and isinstance(names, dict) and isinstance(last["notes"], list) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _intact(output: Path, files: dict[str, str]) -> bool:
    try:
        return all(_digest((output / name).read_bytes()) == digest for name, digest in files.items())
    except OSError:
        return False


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _code() -> str:
    """A digest of this folder's code and of the papers' rows: another version of them may write other reports."""
    folder = Path(__file__).parent
    sources = sorted(path for pattern in ("*.py", "*.json", "templates/*", "papers/*") for path in folder.glob(pattern))
    return _digest(*(path.read_bytes() for path in sources if path.is_file()))
