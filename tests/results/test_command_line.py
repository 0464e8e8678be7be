"""`python -m results`: collect, tables, plots, report, publish, and what they say of wrong or partial input."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from results.__main__ import main
from results.ledger import Ledger
from results.publish import publish

ROOT = Path(__file__).parents[2]
TWO = [("hivit_tiny", "HiViT", 18.7, 4.6, 61.0, 93.4, 58.1), ("deit", "DeiT", 5.7, 1.3, 22.0, 84.2, 41.3)]


def fill(output, records):
    for record in records:
        Ledger(output / "ledger").put(record)
    return output


def run(*arguments):
    command = [sys.executable, "-m", "results", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_explains_every_command():
    done = run("--help")
    assert done.returncode == 0
    for command in ("collect", "tables", "plots", "report", "publish"):
        assert f"\n    {command} " in done.stdout
    assert run("report", "--help").stdout.startswith("usage: python -m results report")


def test_the_road_from_ledgers_to_a_publication(tmp_path, suite):
    records = suite(TWO)
    one = fill(tmp_path / "one", [record for record in records if record.stage == "cost"])
    two = fill(tmp_path / "two", [record for record in records if record.stage != "cost"])
    everything = tmp_path / "all"
    assert run("collect", everything, one, two).returncode == 0
    assert len(Ledger(everything / "ledger").records()) == len(records)
    done = run("publish", everything, "--name", "first", "--to", tmp_path / "published")
    assert (done.returncode, done.stderr) == (0, "")
    published = tmp_path / "published" / "first"
    for name in ("leaderboard_classification.csv", "leaderboard_cost.csv", "tables/cost.md", "plots/overview.png"):
        assert (published / name).read_bytes() == (everything / name).read_bytes()
    assert not (published / "report.html").exists()
    page = (published / "README.md").read_text()
    assert "e767ae7" in page  # where the numbers come from
    assert "AMD EPYC 7763" in page
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (published / link).is_file(), link


def test_tables_and_plots_alone(tmp_path, suite, capsys):
    output = fill(tmp_path / "out", suite(TWO))
    assert main(["tables", str(output)]) == 0
    said = capsys.readouterr().out.split()
    assert {"leaderboard_cost.csv", "tables/cost.tex"} <= set(said)
    assert main(["plots", str(output)]) == 0
    assert "plots/overview.svg" in capsys.readouterr().out.split()
    assert not (output / "report.html").exists()


def test_of_two_records_for_one_job_the_done_one_and_then_the_later_one_is_kept(tmp_path, record):
    def at(day, **changes):
        return record("speed", key="k", provenance={"started": f"2026-11-{day}T00:00:00"}, **changes)

    folders = [
        fill(tmp_path / "late", [at(20, metrics={"latency_ms": 20})]),
        fill(tmp_path / "early", [at(10, metrics={"latency_ms": 10})]),
        fill(tmp_path / "failed", [at(30, status="failed", reason="out of memory")]),
    ]
    for order in (folders, folders[::-1]):
        into = tmp_path / f"into_{order[0].name}"
        assert main(["collect", str(into), *map(str, order)]) == 0
        (kept,) = Ledger(into / "ledger").records()
        assert kept.metrics == {"latency_ms": 20}


def test_a_damaged_record_and_a_wrong_paper_cost_one_line_each(tmp_path, suite, capsys):
    output = fill(tmp_path / "out", suite(TWO))
    (output / "ledger" / "old.json").write_text('{"checksum": "0", "record": {"schema": 0}}')
    mine = tmp_path / "mine.csv"
    mine.write_text("paper,table,row,label,gflops\nmine,1,1,Mine-S,4.6\n")
    assert main(["report", str(output), "--papers", str(mine)]) == 2
    said = capsys.readouterr().out.splitlines()
    complaints = [line for line in said if line.startswith("! ")]
    assert len(complaints) == 2
    assert "old.json was set aside" in complaints[0]
    assert "mine.csv, line 2: gflops is 4.6, but there is no input_size" in complaints[1]
    assert "hivit_tiny" in (output / "report.html").read_text()


def test_no_records_at_all(tmp_path, capsys):
    (tmp_path / "ledger").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert "has no records: nothing has been measured yet" in capsys.readouterr().out
    assert "Nothing has been measured yet" in (tmp_path / "report.html").read_text()
    assert main(["publish", str(tmp_path), "--to", str(tmp_path / "published")]) == 1
    assert "there is nothing to publish" in capsys.readouterr().err
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "nowhere"], "error: nowhere has no ledger; name the output folder of a suite, such as runs/demo"),
        (["report"], "error: the following arguments are required: OUTPUT; see python -m results report --help"),
        (["erase", "x"], "error: argument COMMAND: invalid choice: 'erase'"),
        (["collect", "into", "nowhere"], "error: nowhere has no ledger"),
    ],
)
def test_wrong_input_is_one_line_and_status_1(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith(says)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_publishing_never_replaces_anything_but_a_publication(tmp_path, suite, capsys):
    output = fill(tmp_path / "runs" / "demo", suite(TWO))
    theirs = tmp_path / "theirs" / "demo" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    for to, name, says in (
        ("runs", "demo", "would lie in one another"),
        (".", "runs", "would lie in one another"),
        ("runs/demo", "ledger", "would lie in one another"),
        ("theirs", "demo", "exists and is no publication"),
        ("theirs", ".", "is no name for a publication"),
        ("theirs", "..", "is no name for a publication"),
        ("theirs", "../escaped", "is no name for a publication"),
    ):
        assert main(["publish", str(output), "--to", str(tmp_path / to), "--name", name]) == 1
        assert says in capsys.readouterr().err
    assert theirs.read_text() == "years of work"
    assert len(Ledger(output / "ledger").records()) == len(suite(TWO))


def test_publishing_again_replaces_all_of_it(tmp_path, suite):
    output, target = fill(tmp_path / "out", suite(TWO)), tmp_path / "published" / "demo"
    main(["tables", str(output)])
    board, table = output / "leaderboard_cost.csv", output / "tables" / "cost.md"
    publish(output, suite(TWO), [board, table], target, title="One")
    publish(output, suite(TWO), [board], target, title="Two")
    assert (target / "README.md").read_text().startswith("# Two\n")
    assert not (target / "tables").exists()
    assert [path.name for path in target.parent.iterdir()] == ["demo"]
    with open(target / board.name) as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["deit", "hivit_tiny"] * 2
