"""The outcome of a search: order, states, CSV, plot; its trials are in no other table."""

import csv

import pytest

from results import search
from results.ledger import Ledger
from results.record import RecordError
from results.rows import join
from results.search import Finding


@pytest.fixture
def findings(record):
    def finding(number, score=None, at=9, **changes):
        measured = {} if score is None else {"metrics": {"held_out_top1": score, "iterations": at}}
        values = {"learning_rate": 1e-4 * 4**number, "batch_size": 8 * 2 ** (number % 3), "schedule": "poly"}
        made = record("search", key=f"trial-{number}", **measured | changes)
        return Finding(number, values, 9, made)

    stopped = {"status": "stopped", "reason": "stopped early by asha at iteration 3 of 9"}
    return [
        finding(0, 60.0),
        finding(1, 99.0, at=3, **stopped),  # ahead of all, but for a third of the training only
        finding(2, 71.0),
        finding(3, 98.0, at=1, **stopped),
        finding(4, status="stopped", reason="the loss became nan at iteration 1", details={"diverged": True}),
        finding(5, status="failed", reason="out of memory"),
        Finding(6, {"learning_rate": None, "batch_size": 8, "schedule": "poly"}, 9, None),
    ]


def test_only_a_finished_trial_can_be_the_best(findings):
    assert search.best(findings).number == 2
    assert search.best(findings[3:]) is None
    assert [finding.number for finding in search.ranked(findings)] == [2, 0, 1, 3, 4, 5, 6]
    states = ["finished", "stopped early", "finished", "stopped early", "diverged", "failed", "not run"]
    assert [finding.state for finding in findings] == states


def test_csv(findings, tmp_path):
    search.write_csv(findings, tmp_path / "search.csv")
    rows = list(csv.DictReader((tmp_path / "search.csv").open()))
    assert [row["trial"] for row in rows] == ["2", "0", "1", "3", "4", "5", "6"]
    assert rows[2]["scored_at_iteration"] == "3"
    assert rows[2]["reason"] == "stopped early by asha at iteration 3 of 9"
    assert {row["score"] for row in rows[4:]} == {""}
    assert rows[6]["learning_rate"] == rows[6]["job"] == ""


def test_plot(findings, tmp_path):
    plot = search.draw(findings, tmp_path, "Search for hivit_tiny", "7 trials")
    assert [path.name for path in plot.files] == ["search.png", "search.svg"]
    assert all(path.stat().st_size > 1000 for path in plot.files)
    assert search.draw(findings[4:], tmp_path, "Search for hivit_tiny", "3 trials") is None


def test_trials_are_in_no_other_table(findings, record):
    evaluated = record("evaluate", metrics={"top1": 50.0, "baseline_top1": 10.0})
    trials = [finding.record for finding in findings if finding.record]
    assert [row.records for row in join([evaluated, *trials], "classification")] == [[evaluated]]


def test_what_a_stopped_trial_measured_is_worth_more_than_a_failure(findings, record, tmp_path):
    ledger = Ledger(tmp_path)
    stopped = findings[1].record
    ledger.put(stopped)
    assert ledger.put(record("search", key=stopped.key, status="failed", reason="no luck")) == stopped
    done = record("search", key=stopped.key)
    assert ledger.put(done) == done == ledger.get(stopped.key)
    assert ledger.put(stopped) == done
    assert stopped.to_dict()["schema"] == 2
    assert record("cost").to_dict()["schema"] == 1
    with pytest.raises(RecordError, match="a stopped record must say why"):
        record("search", status="stopped")
