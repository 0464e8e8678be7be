"""The report of a suite: leaderboards, tables, plots and one static page, made from the ledger alone."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from .files import write_atomic
from .ledger import Ledger
from .papers import Papers
from .papers import load as load_papers
from .rebuilt import rebuild
from .record import STATUSES, Record

STAMP = ".report.json"
REPORT = "report.html"
LOCK_SECONDS = 300.0


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
        report=output / REPORT,
        files=[output / name for name in last["files"]],
        rebuilt=rebuilt,
        missing=content["missing"],
        messages=[*ledger.reports, *printed.problems, *last["notes"]],
        **counts,
    )


def _write(
    output: Path, records: Sequence[Record], printed: Papers, content: dict[str, Any], last: dict[str, Any]
) -> dict[str, Any]:
    from . import (  # pandas, matplotlib: not before they are needed
        findings,
        findings_page,
        growth,
        leaderboard,
        page,
        paper_tables,
        plots,
        tables,
    )

    files = [*leaderboard.write(records, output, printed), *tables.write(records, output / "tables")]
    files += growth.write(records, output / "tables")
    rebuilt = rebuild(printed, records)
    drawn = plots.draw(records, output / "plots", rebuilt)
    written = paper_tables.write(rebuilt, printed, output / "tables")
    found = findings.find(rebuilt, printed)
    told = [*findings_page.write(found, output / "tables")]
    if told:
        told.append(output / findings_page.PAGE)
        write_atomic(told[-1], findings_page.render(found, title=content["title"], report=REPORT))
    content = content | {"findings": findings_page.PAGE if told else ""}
    parts = {"drawn": drawn, "rebuilt": rebuilt, "written": written, "files": files, "output": output}
    write_atomic(output / REPORT, page.render(records, **parts, **content))
    files += [path for plot in drawn.plots for path in plot.files]
    files += [*written.files, *told, output / REPORT]
    names = {path.relative_to(output).as_posix(): _digest(path.read_bytes()) for path in files}
    for name in last.get("files", {}):
        if name not in names:  # A file of an earlier report that is no longer true, e.g. the plot of a removed task.
            (output / name).unlink(missing_ok=True)
    return {"files": names, "notes": drawn.notes}


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
