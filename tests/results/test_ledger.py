"""The ledger: atomic, checked, safe for concurrent writers, and never silent about what it cannot read."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from results.files import write_atomic
from results.ledger import Ledger

# A process that puts records for ever: argv is the ledger, and the JSON text of a record on standard input.
WRITER = """
import sys
from dataclasses import replace
from results.ledger import Ledger
from results.record import Record
ledger, count = Ledger(sys.argv[1]), int(sys.argv[2])
record = Record.from_json(sys.stdin.read())
print("ready", flush=True)
for i in range(count):
    ledger.put(replace(record, key=f"{record.key}-{i % 5}", metrics={"macs": i}, details={"filler": "x" * 20000}))
"""


def start_writer(ledger, record, count):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(ledger.folder), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(record.to_json())
    process.stdin.close()
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger")


def test_put_get_and_records(ledger, record):
    assert ledger.get("a") is None
    assert ledger.records() == []
    a, b = record("cost", key="a"), record("cost", key="b")
    assert ledger.put(b) is b
    ledger.put(a)
    assert ledger.get("a") == a
    assert ledger.records() == [a, b]
    assert ledger.records(["b", "missing", "a", "b"]) == [b, a]
    assert ledger.reports == []
    assert sorted(os.listdir(ledger.folder)) == [".lock", "a.json", "b.json"]


def test_the_file_is_readable_json(ledger, record):
    made = ledger.put(record("cost", key="a"))
    content = json.loads(ledger.path("a").read_text())
    assert content["record"] == made.to_dict()


def test_a_done_record_is_never_replaced_by_less(ledger, record):
    failed = record("cost", key="a", status="failed", reason="out of memory")
    blocked = record("cost", key="a", status="blocked", reason="no data")
    done = record("cost", key="a", metrics={"macs": 1})
    assert ledger.put(failed) == failed
    assert ledger.put(blocked) == blocked
    assert ledger.put(done) == done
    for worse in (failed, blocked):
        assert ledger.put(worse) == done
        assert ledger.get("a") == done
    better = replace(done, metrics={"macs": 2})
    assert ledger.put(better) == better


def flip_a_digit(text):
    return text.replace('"macs": 12345', '"macs": 12346')


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        flip_a_digit,
        lambda text: text.replace('"schema": 1', '"schema": 3'),
        lambda text: text.replace('"key": "a"', '"key": "b"'),
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text)["record"]),
        lambda text: "\x00" * len(text),
    ],
)
def test_damage_is_set_aside_and_reported(ledger, record, damage):
    heard = []
    ledger = Ledger(ledger.folder, on_report=heard.append)
    good = ledger.put(record("cost", key="good"))
    original = ledger.put(record("cost", key="a", metrics={"macs": 12345}))
    damaged = damage(ledger.path("a").read_text())
    ledger.path("a").write_text(damaged)
    assert ledger.records() == [good]
    assert len(ledger.reports) == 1
    assert heard == ledger.reports
    assert str(ledger.path("a")) in heard[0]
    assert "\n" not in heard[0]
    assert not ledger.path("a").exists()
    assert [path.read_text() for path in ledger.set_aside()] == [damaged]
    ledger.put(original)
    assert ledger.get("a") == original
    # A second damage of the same record does not overwrite the first.
    ledger.path("a").write_text("again")
    assert ledger.get("a") is None
    assert sorted(path.read_text() for path in ledger.set_aside()) == sorted([damaged, "again"])


def test_a_record_under_another_name_is_damaged(ledger, record):
    ledger.put(record("cost", key="a"))
    os.rename(ledger.path("a"), ledger.path("b"))
    assert ledger.records() == []
    assert "it holds the record of another key, a" in ledger.reports[0]


def test_a_newer_schema_is_reported_and_kept(ledger, record):
    from results.ledger import _checksum

    made = ledger.put(record("cost", key="a"))
    newer = made.to_dict() | {"schema": 3, "colour": "red"}
    text = json.dumps({"checksum": _checksum(newer), "record": newer})
    ledger.path("a").write_text(text)
    assert ledger.records() == ledger.records() == []
    assert len(ledger.reports) == 1
    assert "schema 3 is newer" in ledger.reports[0]
    assert ledger.path("a").read_text() == text
    assert ledger.set_aside() == []
    ledger.put(made)
    assert ledger.get("a") == made
    assert [path.read_text() for path in (ledger.folder / "newer").iterdir()] == [text]


def test_putting_over_damage_keeps_the_damaged_file(ledger, record):
    made = ledger.put(record("cost", key="a"))
    ledger.path("a").write_text("{")
    ledger.put(made)
    assert ledger.get("a") == made
    assert [path.read_text() for path in ledger.set_aside()] == ["{"]


def test_temporary_files_of_killed_writers_are_ignored_and_removed_when_old(ledger, record):
    made = ledger.put(record("cost", key="a"))
    old, young = ledger.folder / ".a.json.1.beef.tmp", ledger.folder / ".a.json.2.beef.tmp"
    for path in (old, young):
        path.write_text("{half")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    assert ledger.records() == [made]
    assert ledger.reports == []
    assert not old.exists()
    assert young.exists()


def test_a_thousand_records_are_listed_quickly(ledger, record):
    made = record("cost", samples={"latency_ms": [0.5] * 100}, details={"operators": {f"op{i}": i for i in range(50)}})
    ledger.put(replace(made, key="k"))
    text = ledger.path("k").read_text()
    from results.ledger import _seal

    for i in range(1000):
        ledger.path(f"k{i}").write_text(_seal(replace(made, key=f"k{i}")))
    assert len(text) > 1000
    started = time.process_time()
    assert len(ledger.records()) == 1001
    assert time.process_time() - started < 1.0


def test_a_file_in_place_of_the_folder(tmp_path, record):
    (tmp_path / "ledger").write_text("")
    with pytest.raises(OSError, match="ledger"):
        Ledger(tmp_path / "ledger").put(record("cost"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(ledger, record):
    ledger.put(record("cost", key="a"))
    ledger.path("a").write_text("{")
    ledger.folder.chmod(0o500)
    try:
        with pytest.raises(OSError, match="ledger"):
            ledger.put(record("cost", key="b"))
        assert ledger.get("a") is None
        assert ledger.reports
    finally:
        ledger.folder.chmod(0o700)


def test_damage_that_cannot_be_set_aside_is_reported(ledger, record, monkeypatch):
    ledger.put(record("cost", key="a"))
    ledger.path("a").write_text("{")

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    assert ledger.get("a") is None
    assert "could not be set aside (Read-only file system)" in ledger.reports[0]
    assert ledger.path("a").exists()


def test_a_folder_that_looks_like_a_record_costs_one_line(ledger, record):
    ledger.put(record("cost"))
    (ledger.folder / "folder.json").mkdir()
    assert len(ledger.records()) == 1
    (line,) = ledger.reports
    assert "folder.json cannot be read and is not used" in line


def test_a_full_disk_names_the_file_and_leaves_the_old_record(ledger, record):
    """A real refusal of the kernel: the process may write files of at most 4 kB."""
    old = ledger.put(record("cost", key="k-0"))
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n" + WRITER
    command = [sys.executable, "-c", code, str(ledger.folder), "1"]
    made = subprocess.run(command, input=record("cost", key="k").to_json(), text=True, capture_output=True)
    assert made.returncode == 1
    assert made.stderr.splitlines()[-1].startswith("OSError: [Errno 27]")
    assert str(ledger.path("k-0")) in made.stderr.splitlines()[-1]
    assert ledger.records() == [old]
    assert sorted(os.listdir(ledger.folder)) == [".lock", "k-0.json"]


def test_a_lock_that_is_never_freed(ledger, record, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("results.ledger.LOCK_SECONDS", 0.2)
    ledger.put(record("cost", key="a"))
    with FileLock(ledger.folder / ".lock"), pytest.raises(OSError, match="another process has held the ledger's lock"):
        ledger.put(record("cost", key="b"))


def test_write_atomic_cleans_up_when_interrupted(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_concurrent_writers_and_readers(ledger, record):
    """Three processes write the same five records; a reader never sees a part of one."""
    writers = [start_writer(ledger, record("cost", key="k"), 40) for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        assert all(made.details["filler"] == "x" * 20000 for made in ledger.records())
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(ledger.records()) == 5
    assert ledger.reports == []
    assert not list(ledger.folder.glob("*.tmp"))


def test_a_done_record_survives_concurrent_failures(ledger, record):
    """One writer's success among another's failures, as when two runs share a ledger."""
    failures = start_writer(ledger, record("cost", key="k", status="failed", reason="out of memory"), 60)
    done = ledger.put(record("cost", key="k-3", metrics={"macs": 7}))
    assert failures.wait() == 0
    assert ledger.get("k-3") == done


def test_kill_9_of_writers(ledger, record):
    """Whatever the moment, each record is whole, the lock is free again, and nothing is reported as damaged."""
    seed = int(time.time())
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(8):
        writer = start_writer(ledger, record("cost", key="k"), 1_000_000)
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        assert all(made.details["filler"] == "x" * 20000 for made in ledger.records() if made.key != "survivor")
        ledger.put(record("cost", key="survivor"))
    assert ledger.reports == []
    assert ledger.get("survivor") is not None


def test_readers_racing_for_a_damaged_file_set_it_aside_once(ledger, record):
    ledger.put(record("cost", key="a"))
    ledger.path("a").write_text("{")
    readers = [Ledger(ledger.folder) for _ in range(8)]
    threads = [threading.Thread(target=reader.get, args=("a",)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.set_aside()) == 1
    assert sum(len(reader.reports) for reader in readers) == 1
