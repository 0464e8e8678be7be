"""Publishing: leaderboards, tables and plots of an output folder, copied to where they are kept, with their origin."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomic
from .findings_page import PAGE as FINDINGS
from .leaderboard import SCHEMA_FILE
from .origin import origin
from .record import STATUSES, Record
from .report import REPORT

PAGE = "README.md"
MARK = SCHEMA_FILE.name  # every publication holds one: a folder without it is somebody else's, and is never replaced


class PublishError(ValueError):
    """The place to publish in is not fit for it; the message is one line."""


def place(output: Path, folder: Path, name: str) -> Path:
    """The folder `name` below `folder` that a publication of `output` may replace.

    Raises `PublishError` for what is no plain name, a place that touches `output`, and a folder of something else.
    """
    if not name or name.startswith(".") or Path(name).name != name:
        raise PublishError(f"'{name}' is no name for a publication; use letters, digits, - and _")
    target, own = (folder / name).resolve(), output.resolve()
    if target == own or target in own.parents or own in target.parents:
        raise PublishError(
            f"{target} and the results in {own} would lie in one another; publish elsewhere (--to, --name)"
        )
    if target.exists() and not (target / MARK).is_file():
        raise PublishError(f"{target} exists and is no publication; choose another --name, or move it away")
    return target


def publish(
    output: Path, records: Sequence[Record], files: Sequence[Path], target: Path, *, title: str, description: str = ""
) -> Path:
    """Replace `target` by copies of `files` (paths below `output`, of which `records` are the ledger) and a page.

    `target` comes from `place`. The page, README.md, shows the plots, links the files and says where the numbers come
    from. The report itself and the ledger are not copied. Returns `target`; raises `OSError` with the path when
    something cannot be written.
    """
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shown = [path.relative_to(output) for path in files if path.name != REPORT]
    for path in shown:
        content = (output / path).read_bytes()
        write_atomic(fresh / path, _without_report(content) if path.name == FINDINGS else content)
    write_atomic(fresh / MARK, SCHEMA_FILE.read_bytes())
    write_atomic(fresh / PAGE, page(records, shown, title=title, description=description))
    # Whoever reads meanwhile finds the old publication or the new one; a kill in between leaves the new one aside.
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def page(records: Sequence[Record], files: Sequence[Path], *, title: str, description: str = "") -> str:
    """The publication's README in Markdown; `files` are relative to it."""
    counts = {status: sum(record.status == status for record in records) for status in STATUSES}
    lines = [f"# {title}", ""]
    lines += [description, ""] if description else []
    lines += [", ".join(f"{count} jobs {status}" for status, count in counts.items() if count) + ".", ""]
    if any(path.name == FINDINGS for path in files):
        told = "which of the papers' printed numbers come out, which do not and why"
        lines += [f"[Findings](tables/papers/findings.md) ([as a page]({FINDINGS})): {told}.", ""]
    boards = [path for path in files if path.name.startswith("leaderboard_")]
    if boards:
        lines += ["## Leaderboards", ""]
        lines += [f"- [{path.name}]({path.as_posix()})" for path in boards]
        lines += ["", f"[{SCHEMA_FILE.name}]({SCHEMA_FILE.name}) tells what each column holds.", ""]
    for heading, suffix in (("Tables", ".md"), ("Plots", ".png")):
        if found := [path for path in files if path.suffix == suffix]:
            lines += [f"## {heading}", ""]
            if suffix == ".png":
                lines += [f"![{_words(path)}]({path.as_posix()})\n" for path in found]
            else:
                lines += [*(f"- [{_words(path)}]({path.as_posix()})" for path in found), ""]
    lines += ["## Where the numbers come from", ""]
    lines += [f"- {heading}: {'; '.join(values)}" for heading, values in origin(records).items()]
    return "\n".join(lines) + "\n"


def _without_report(findings: bytes) -> bytes:
    """The findings' page with links to the papers' tables and the publication's page in place of the report's parts."""
    page = re.sub(rf'href="{re.escape(REPORT)}#(\w+_table_\w+)"', r'href="tables/papers/\1.md"', findings.decode())
    page = page.replace(f'href="{REPORT}#conventions"', 'href="tables/papers/conventions.md"')
    return page.replace(f'href="{REPORT}"', f'href="{PAGE}"').encode()


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")
