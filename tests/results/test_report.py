"""The report: what lies in the output folder, what the page says, and when it is made again."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from results import report
from results.ledger import Ledger

AXES = ("macs", "params", "latency", "memory")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks the nesting of the tags, and collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def fill(output, records):
    ledger = Ledger(output / "ledger")
    for record in records:
        ledger.put(record)
    return ledger


def small(suite):
    return suite([("hivit_tiny", "HiViT", 18.7, 4.6, 61.0, 93.4, 58.1), ("deit", "DeiT", 5.7, 1.3, 22.0, 84.2, 41.3)])


def test_the_page(output, ragged_suite):
    fill(output, ragged_suite)
    keys = [*(record.key for record in ragged_suite), "speed-seg-mit_b0-0"]
    built = report.build(output, title="Demo & more", description="Digits <small>", keys=keys, messages=["1 < 2"])
    assert built.rebuilt
    assert (built.done, built.failed, built.blocked, built.missing) == (57, 2, 4, 1)
    assert built.messages == []
    names = {path.relative_to(output).as_posix() for path in built.files}
    assert names == {
        *(f"leaderboard_{kind}.csv" for kind in ("classification", "segmentation", "cost")),
        *(f"tables/{k}.{s}" for k in ("classification", "segmentation", "cost") for s in ("csv", "md", "tex")),
        *(f"plots/classification_top1_vs_{axis}.{s}" for axis in AXES for s in ("png", "svg")),
        *(f"plots/segmentation_miou_vs_{axis}.{s}" for axis in AXES for s in ("png", "svg")),
        *("plots/overview.png", "plots/overview.svg", "report.html"),
    }
    assert all(path.is_file() for path in built.files)
    text = built.report.read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.ids) == len(set(page.ids))
    assert "Demo & more" in words
    assert "Digits <small>" in words
    assert "1 < 2" in words
    assert [len(page.all(heading)) > 0 for heading in ("h1", "h2", "h3")] == [True, True, True]
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    images = page.all("img")
    assert len(images) == 8
    assert all(image["alt"] and image["src"].startswith("data:image/svg+xml,%3C") for image in images)
    # Every link leads to a part of the page or to a file that exists: the page opens without a network.
    for link in page.all("a"):
        target = link["href"]
        assert target[1:] in page.ids if target.startswith("#") else (output / unquote(target)).exists(), target
    # Every row of the measured tables names the records that it was made from.
    rows = [row for row in page.all("tr") if "data-records" in row]
    assert {key for row in rows for key in row["data-records"].split()} == {record.key for record in ragged_suite}
    assert {f"record-{key}" for row in rows for key in row["data-records"].split()} <= set(page.ids)
    assert {row["data-group"] for row in rows} == {*(record.family for record in ragged_suite), "blocked", "failed"}
    assert not re.search(r"(src|href)=\"?(https?:)?//", text)
    for expected in (
        "Multiply-accumulates of every convolution",
        "Operators that ran and were not counted: gelu",
        "out of memory: needs 9.1 GB, 8 GB free",
        "1 job has not run yet",
        "e767ae7",
        "torch 2.15.0",
        "AMD EPYC 7763, 2 cores",
        "python runners/run.py suite=demo",
        "10 values, lowest",
    ):
        assert expected in words, expected


def test_nothing_is_made_again_without_a_reason(output, suite):
    records = [record for record in small(suite) if record.stage == "cost"]  # No plots: this test makes many reports.
    fill(output, records)

    def build(**changes):
        return report.build(output, **({"title": "A"} | changes))

    assert build().rebuilt
    times = {path: path.stat().st_mtime_ns for path in build().files}
    again = build()
    assert not again.rebuilt
    assert again.report.exists()
    assert {path: path.stat().st_mtime_ns for path in again.files} == times
    assert build(title="B").rebuilt
    assert build(title="B", messages=["new"]).rebuilt
    assert not build(title="B", messages=["new"]).rebuilt
    (output / "tables" / "cost.tex").unlink()
    assert build(title="B", messages=["new"]).rebuilt
    (output / "leaderboard_cost.csv").write_text("edited")
    assert build(title="B", messages=["new"]).rebuilt
    (output / ".report.json").write_text("{")
    assert build(title="B", messages=["new"]).rebuilt
    fill(output, [replace(records[0], metrics={"params": 1})])
    assert build(title="B", messages=["new"]).rebuilt


def test_a_quick_answer_needs_no_plotting_library(output, suite):
    fill(output, small(suite))
    report.build(output, title="A")
    code = f"""
import sys
from results.report import build
assert not build({str(output)!r}, title="A").rebuilt
assert not {{"matplotlib", "pandas", "jinja2"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_no_longer_true_is_removed(output, suite):
    records = small(suite)
    fill(output, records)
    (output / "mine.txt").write_text("a user's own file")
    report.build(output, title="A")
    keys = [record.key for record in records if record.task == "classification"]
    report.build(output, title="A", keys=keys)
    assert not list(output.rglob("*segmentation*.csv"))
    assert not list(output.glob("plots/segmentation*"))
    assert (output / "mine.txt").exists()


def test_a_stamp_that_names_files_outside_removes_nothing(output, suite, tmp_path):
    outside = tmp_path / "precious.txt"
    outside.write_text("keep")
    fill(output, small(suite)[:1])
    (output / ".report.json").write_text('{"stamp": "x", "files": {"../precious.txt": "y"}, "notes": []}')
    assert report.build(output, title="A").rebuilt
    assert outside.exists()


def test_an_empty_ledger(output):
    built = report.build(output, title="Nothing", keys=["a", "b"])
    assert (built.done, built.missing) == (0, 2)
    assert [path.name for path in built.files] == ["report.html"]
    assert built.messages == ["No plots: there is no record of a model yet."]
    words = " ".join(Page(built.report.read_text()).text)
    assert "Nothing has been measured yet." in words
    assert "2 jobs have not run yet" in words


def test_a_record_takes_little_room(output, record):
    modules = {f"stage.{i}": i for i in range(3000)}
    details = {"by_module": modules, "convention": "as all"} | {f"detail {i}": 0 for i in range(100)}
    samples = {"latency_ms": [0.1 * i for i in range(5000)]}
    fill(output, [record("cost", metrics={"macs": 1}, details=details, samples=samples)])
    empty = len(report.build(output.with_name("empty"), title="A").report.read_text())
    text = report.build(output, title="A").report.read_text()
    assert len(text) - empty < 10_000
    assert "stage.5&#34;: 5" in text
    assert "stage.300&#34;" not in text
    assert re.search(r"\d\d,\d{3} more characters in the ledger", text)
    assert "62 more in the ledger" in text
    assert "5000 values, lowest 0, median 249.9, highest 499.9" in text


def test_files_that_are_not_there_are_no_links(output, record):
    (output / "jobs").mkdir(parents=True)
    (output / "jobs" / "log.txt").write_text("done")
    artifacts = {"log": "jobs/log.txt", "weights": "jobs/weights.pth", "odd": "x" * 5000}
    fill(output, [record("cost", metrics={"macs": 1}, artifacts=artifacts)])
    text = report.build(output, title="A").report.read_text()
    assert '<a href="jobs/log.txt">log</a>, weights (not here), odd (not here)' in text


def test_the_papers_tables_are_on_the_page(output, suite, tmp_path):
    fill(output, [record for record in small(suite) if record.stage == "cost"])
    rows = "mine,1,1,Mine <S>,hivit_tiny,11,96x96,18.7,4.0\nmine,1,2,Nobody's,,11,96x96,9.0,\n"
    (tmp_path / "mine.csv").write_text(f"paper,table,row,label,model,num_classes,input_size,params_m,gflops\n{rows}")
    text = report.build(output, title="A", papers=[tmp_path / "mine.csv"]).report.read_text()
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    assert {"papers", "verdicts", "conventions-caption", "mine_table_1"} <= set(page.ids)
    assert "Table 1: 3 numbers reported, 2 measured here, 1 reproduced" in words
    assert "Mine <S>" in words
    assert {"data-group": "mine", "data-records": "cost-cla-hivit_tiny-0"} in page.all("tr")
    assert {"data-group": "mine"} in page.all("tr")  # nobody's
    assert re.search(r"Nothing was measured of [^.]*HRViT Table 3 , HRViT Table 4", words)
    links = {link["href"] for link in page.all("a")}
    assert {"#mine_table_1", "tables/papers/mine_table_1.csv", "tables/papers/index.csv"} <= links
    assert {f"tables/papers/{name}" for name in ("hrvit_table_3.md", "verdicts.md", "conventions.csv")} <= links
    assert all((output / link).is_file() for link in links if link.startswith("tables/"))
    assert "Cannot be known What is published does not tell" in words
    assert "HIRI-ViT" in words
    assert "hiri_vit, Table" not in words


def test_names_from_records_cannot_break_the_page(output, record):
    evil = "</pre><script>alert('x')</script>\"&"
    metrics = {"top1": 50.0, "baseline_top1": 10.0}
    common = {"model": evil, "family": evil, "notes": [evil], "provenance": {"revision": evil, "hardware": evil}}
    records = [
        record("evaluate", key="a", metrics=metrics, details={evil: evil}, data=evil, **common),
        record("cost", key="b", metrics={"macs": 1e9}, **common),
        record("speed", key="c", status="failed", reason=evil, **common),
    ]
    fill(output, records)
    built = report.build(output, title=evil, description=evil, messages=[evil])
    page = Page(built.report.read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1
    assert all(path.resolve().is_relative_to(output.resolve()) for path in built.files)


def test_damage_is_told_now_and_shown_later(output, suite):
    records = small(suite)
    ledger = fill(output, records)
    ledger.path(records[0].key).write_text("{")
    built = report.build(output, title="A")
    assert len(built.messages) == 1
    assert records[0].key in built.messages[0]
    again = report.build(output, title="A")
    assert (again.rebuilt, again.messages) == (False, [])
    assert "A damaged record was set aside" in built.report.read_text()


def test_an_output_that_cannot_be_written_names_the_path(tmp_path, suite):
    fill(tmp_path / "out", small(suite))
    (tmp_path / "out" / "tables").write_text("a file in the way")
    with pytest.raises(OSError, match="tables"):
        report.build(tmp_path / "out", title="A")


def test_two_runs_may_report_at_the_same_time(output, suite):
    fill(output, small(suite))
    code = f"from results.report import build\nbuild({str(output)!r}, title='A')"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert not report.build(output, title="A").rebuilt
