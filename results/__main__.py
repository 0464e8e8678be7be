"""`python -m results COMMAND ...`: everything that is made from ledgers, apart from running jobs.

Exit status: 0 complete; 2 something was left out (one line says what); 1 wrong input.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

COMPLETE, WRONG_INPUT, INCOMPLETE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """The input is wrong; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        messages = options.run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("\nInterrupted; the same command makes the rest.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: cannot use {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return WRONG_INPUT
    for message in dict.fromkeys(messages):
        print(f"! {message}")
    return INCOMPLETE if messages else COMPLETE


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are wrong input: one line and status 1, not argparse's 2."""

    def error(self, message: str):
        self.exit(WRONG_INPUT, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m results",
        description="Make tables, plots and a report of what suites have measured, and publish them. OUTPUT is the "
        "output folder of a suite (runs/<suite>): its ledger is read, and what is made lies beside it.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        added.add_argument("output", metavar="OUTPUT", type=Path, help="output folder, which holds ledger/")
        return added

    def with_papers(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument(
            "--papers", nargs="+", default=[], metavar="CSV", help="papers' rows of your own, beside results/papers"
        )
        return added

    collect = command("collect", _collect, "copy the records of several output folders into one")
    collect.add_argument("sources", nargs="+", metavar="FROM", type=Path, help="output folders to copy records from")
    with_papers(command("tables", _tables, "write leaderboards, tables and the papers' tables rebuilt"))
    with_papers(command("plots", _plots, "draw all plots"))
    report = with_papers(command("report", _report, "write all of it, and report.html"))
    report.add_argument("--title", help="heading of the page (default: that of its last report)")
    publish = with_papers(command("publish", _publish, "copy leaderboards, tables and plots to their published place"))
    publish.add_argument("--name", help="folder below the published results (default: the name of OUTPUT)")
    publish.add_argument(
        "--to", type=Path, default=Path(__file__).parent / "published", help="default: results/published"
    )
    return parser


def _ledger(output: Path):
    from .ledger import Ledger

    folder = output / "ledger"
    if not folder.is_dir():
        raise UsageError(f"{output} has no ledger; name the output folder of a suite, such as runs/demo")
    return Ledger(folder)


def _read(output: Path):
    """The records of an output folder, and a line for each thing that is wrong with them."""
    ledger = _ledger(output)
    records = ledger.records()
    messages = list(ledger.reports)
    if not records:
        messages.append(f"{output} has no records: nothing has been measured yet.")
    return records, messages


def _collect(options: argparse.Namespace) -> list[str]:
    from .ledger import Ledger
    from .rows import started

    into = Ledger(options.output / "ledger")
    messages: list[str] = []
    for source in options.sources:
        records, problems = _read(source)
        messages += problems
        copied = 0
        for record in records:
            standing = into.get(record.key)
            if standing is not None and (standing.done, started(standing)) >= (record.done, started(record)):
                continue  # The ledger has this job already, done or from a later day.
            into.put(record)
            copied += 1
        print(f"{source}: {len(records)} records, {copied} of them new or later.")
    return [*messages, *into.reports]


def _tables(options: argparse.Namespace) -> list[str]:
    from . import findings, findings_page, growth, leaderboard, paper_tables, tables
    from .papers import load
    from .rebuilt import rebuild

    records, messages = _read(options.output)
    papers = load(options.papers)
    written = [*leaderboard.write(records, options.output, papers), *tables.write(records, options.output / "tables")]
    written += growth.write(records, options.output / "tables")
    rebuilt = rebuild(papers, records)
    written += paper_tables.write(rebuilt, papers, options.output / "tables").files
    written += findings_page.write(findings.find(rebuilt, papers), options.output / "tables")
    _say(written, options.output)
    return [*messages, *papers.problems]


def _plots(options: argparse.Namespace) -> list[str]:
    from . import plots
    from .papers import load
    from .rebuilt import rebuild

    records, messages = _read(options.output)
    papers = load(options.papers)
    drawn = plots.draw(records, options.output / "plots", rebuild(papers, records))
    _say([path for plot in drawn.plots for path in plot.files], options.output)
    return [*messages, *papers.problems, *drawn.notes]


def _report(options: argparse.Namespace) -> list[str]:
    from . import report

    _, messages = _read(options.output)
    built = report.build(options.output, **_heading(options), papers=options.papers)
    print(f"{built.report}: {built.done} jobs done, {built.blocked} blocked, {built.failed} failed.")
    return [*messages, *built.messages]


def _publish(options: argparse.Namespace) -> list[str]:
    from . import publish, report

    records, messages = _read(options.output)
    if not records:
        raise UsageError(f"{options.output} has no records: there is nothing to publish")
    try:
        target = publish.place(options.output, options.to, options.name or options.output.resolve().name)
    except publish.PublishError as error:
        raise UsageError(str(error)) from error
    built = report.build(options.output, **_heading(options), papers=options.papers)
    folder = publish.publish(options.output, records, built.files, target, **_heading(options))
    print(f"Published in {folder}.")
    return [*messages, *built.messages]


def _heading(options: argparse.Namespace) -> dict[str, str]:
    """Title and description of the last report; a folder that never had one is called by its name."""
    from .report import STAMP

    try:
        last = json.loads((options.output / STAMP).read_bytes())
    except (OSError, ValueError):
        last = {}
    last = last if isinstance(last, dict) else {}
    title = getattr(options, "title", None) or last.get("title") or options.output.resolve().name
    return {"title": title, "description": last.get("description") or ""}


def _say(written: Sequence[Path], output: Path) -> None:
    for path in written:
        print(path.relative_to(output))


if __name__ == "__main__":
    sys.exit(main())
