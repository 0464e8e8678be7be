"""A cluster of `ray start`, a checkout submitted to it, and no way in without the token."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests_support import ROOT, CommandLine

from results.ledger import Ledger

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[str]:
    """The address of the dashboard of a `ray start`, as README has it, on this machine alone.

    Several nodes of one machine share the folder that a submitted checkout is unpacked to, and take it away from under
    each other.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: the names of sockets are limited
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    token.write_text("0123456789abcdef" * 4)
    # Ports of its own: another cluster of this machine may have the default ones.
    port, dashboard, agent = (free_port() for _ in range(3))
    ports = f"--port={port} --dashboard-port={dashboard} --dashboard-agent-listen-port={agent}"
    with open(tmp_path / "ray.log", "w") as log:
        command = [RAY, "start", "--head", "--block", *ports.split(), "--num-cpus=2", f"--temp-dir={folder}"]
        started = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for(lambda: answers(port) and answers(dashboard))
    yield f"http://127.0.0.1:{dashboard}"
    left = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    started.wait()
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
def test_a_checkout_is_submitted_to_a_cluster(cluster, tmp_path):
    checkout = tmp_path / "checkout"
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, kept.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    line = CommandLine(tmp_path)
    entry = [sys.executable, "runners/run.py", *line.command("cluster=auto", "models=[test_mit]")[2:]]
    submit = [RAY, "job", "submit", "--address", cluster, "--working-dir", "."]

    stranger = dict(os.environ)
    del stranger["RAY_AUTH_TOKEN_PATH"], stranger["RAY_AUTH_MODE"]
    refused = subprocess.run([*submit, "--", "true"], cwd=checkout, env=stranger, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()

    revision = '{"env_vars": {"HIRES_VIT_REVISION": "submitted"}}'
    submit += ["--runtime-env-json", revision, "--"]
    for _ in range(30):
        done = subprocess.run([*submit, *entry], cwd=checkout, capture_output=True, text=True)
        if "No available agent" not in done.stderr:  # the head takes a moment before it takes jobs
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Complete: 8 jobs run" in done.stdout
    records = Ledger(line.output / "ledger").records()
    assert [record.status for record in records] == ["done"] * 8
    assert {record.provenance["revision"] for record in records} == {"submitted"}
