"""What is published is what this code gives."""

from __future__ import annotations

import csv

import pytest
from tests_support import ROOT, configuration

from results.leaderboard import columns, leaderboard, to_csv
from runners.execute import Workplace
from runners.executors import Processes
from runners.plan import make_jobs
from runners.run import CONF

PUBLISHED = ROOT / "results" / "published"
BOARDS = sorted(PUBLISHED.glob("*/leaderboard_*.csv"))
NETWORK = ("task", "model", "variant", "head", "num_classes", "input_height", "input_width")
COUNTED = ("params", "params_auxiliary", "macs", "macs_paper", "paper_convention", "activations", "cost_status")


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("board", BOARDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_leaderboards_have_the_columns_and_a_clean_origin(board):
    rows = read(board.read_text())
    names = list(rows[0])
    assert names == list(columns())[: len(names)]  # a column that is added later stands behind them
    for row in rows:
        assert row["records"]
        assert row["revision"] not in ("", "unknown")
        assert row["revision"].isalnum()  # measured by code that is in the history, not by something in between


def test_the_published_costs_are_counted_again(tmp_path):
    """Every cost job of every suite but the demo, as a user would run it: none more, none fewer, the same numbers."""
    suites = [path.stem for path in (CONF / "suite").glob("*.yaml") if path.stem != "demo"]
    jobs = {job.key: job for suite in suites for job in make_jobs(configuration(f"suite={suite}", "stages=[cost]"))}
    records = []
    workplace = Workplace(tmp_path, tmp_path, "test")
    Processes(workplace, 2).run(list(jobs.values()), lambda record, messages: records.append(record))

    def counted(text: str) -> dict[tuple, tuple]:
        return {tuple(row[n] for n in NETWORK): tuple(row[n] for n in COUNTED) for row in read(text)}

    fresh = counted(to_csv(leaderboard(records, "cost")))
    assert fresh == counted((PUBLISHED / "cost" / "leaderboard_cost.csv").read_text())
