"""The record: what it takes, what it refuses, and that importing it is light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import results
from results.record import NewerSchemaError, Record, RecordError

FOLDER = Path(results.__file__).parent


def test_a_record_survives_json(record):
    original = record("speed", samples={"latency_ms": [1.5, 2]}, notes=["warm"], artifacts={"log": "logs/a.txt"})
    assert Record.from_json(original.to_json()) == original
    assert Record.from_json(original.to_json()).to_json() == original.to_json()


def test_tuples_and_subclasses_of_numbers_become_plain_json(record):
    import numpy as np

    made = record("cost", input_size=(64, 96), metrics={"macs": np.float64(1.5)}, details={"shape": (1, 2)})
    assert made.input_size == [64, 96]
    assert type(made.metrics["macs"]) is float
    assert Record.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "../escape"}, "key: must be a name fit for a file"),
        ({"key": ""}, "key: must be"),
        ({"status": "finished"}, "status: must be one of done, stopped, blocked, failed, not 'finished'"),
        ({"status": "failed"}, "reason: a failed record must say why"),
        ({"status": "blocked", "reason": " "}, "reason: must be text or null"),
        ({"stage": "test"}, "stage: must be one of"),
        ({"task": ["segmentation"]}, "task: must be one of"),
        ({"model": ""}, "model: must be text"),
        ({"head": 3}, "head: must be text or null"),
        ({"input_size": [96]}, "input_size: must be [height, width]"),
        ({"input_size": [96, 0]}, "input_size: must be [height, width]"),
        ({"seed": True}, "seed: must be a whole number"),
        ({"job": ["a"]}, "job: must be a mapping"),
        ({"metrics": {"top1": "93"}}, "metrics.top1: must be a number"),
        ({"metrics": {"top1": float("nan")}}, "metrics.top1: nan is not a finite number"),
        ({"metrics": {"done": True}}, "metrics.done: must be a number"),
        ({"samples": {"ms": [1.0, float("inf")]}}, "samples.ms: inf is not a finite number"),
        ({"samples": {"ms": 1.0}}, "samples.ms: must be a list of numbers"),
        ({"details": {"path": Path("a")}}, "details.path: PosixPath is not JSON"),
        ({"details": {"classes": {1: "a"}}}, "details.classes: the name 1 must be text"),
        ({"artifacts": {"log": "/etc/passwd"}}, "artifacts.log: must be a path relative to the output folder"),
        ({"artifacts": {"log": "a/../../b"}}, "artifacts.log: must be a path relative to the output folder"),
        ({"job": {"num_classes": "many"}}, "job.num_classes: must be a whole number, not 'many'"),
        ({"details": {"paper_convention": "hrvit"}}, "details.paper_convention: must be a mapping, not 'hrvit'"),
        ({"notes": "a note"}, "notes: must be a list of text"),
    ],
)
def test_a_wrong_field_is_one_clear_line(record, changes, message):
    with pytest.raises(RecordError) as caught:
        Record.from_dict(record("cost").to_dict() | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_unknown_and_newer(record):
    data = record("cost").to_dict()
    with pytest.raises(RecordError, match="model: missing field"):
        Record.from_dict({name: value for name, value in data.items() if name != "model"})
    with pytest.raises(RecordError, match="colour: unknown field"):
        Record.from_dict(data | {"colour": "red"})
    with pytest.raises(NewerSchemaError, match="schema 3 is newer than 2"):
        Record.from_dict(data | {"schema": 3, "colour": "red"})
    with pytest.raises(RecordError, match="schema: must be a positive whole number"):
        Record.from_dict(data | {"schema": "1"})
    with pytest.raises(RecordError, match="a record must be a JSON object"):
        Record.from_json("[]")
    for text in ("", "{", b"\xff\xfe", json.dumps(data)[:-1], '{"schema": NaN}', "[" * 100_000):
        with pytest.raises(RecordError):
            Record.from_json(text)


def test_importing_is_light():
    code = """
import sys
import results.record, results.ledger, results.rows, results.tables, results.leaderboard, results.report
heavy = {"pandas", "numpy", "torch", "matplotlib", "seaborn", "jinja2", "rich"} & sys.modules.keys()
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_needs_nothing_of_the_other_folders():
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.split(".")[0] for name in names} & {"zoo", "benchmarks", "runners", "tests"}, path
