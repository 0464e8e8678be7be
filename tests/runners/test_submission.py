"""A cluster of separate `ray start` processes, a checkout submitted to it, and no way in without the token."""

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
    """The address of the dashboard of a head that runs no jobs, and a node of two CPUs; README's commands."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: the names of sockets are limited
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    token.write_text("0123456789abcdef" * 4)
    # Ports of their own, also for the agents that take jobs: another cluster of this machine may have the default ones.
    port, dashboard, *agents = (free_port() for _ in range(4))
    both = "--block --dashboard-agent-listen-port={}"
    head = f"--head --port={port} --num-cpus=0 --dashboard-port={dashboard} --temp-dir={folder} {both}"
    node = f"--address=127.0.0.1:{port} --num-cpus=2 {both}"
    started = []
    with open(tmp_path / "ray.log", "w") as log:
        for options, agent in zip((head, node), agents, strict=True):
            started.append(subprocess.Popen([RAY, "start", *options.format(agent).split()], stdout=log, stderr=log))
            wait_for(lambda: answers(port) and answers(dashboard))
        wait_for(lambda: has_two_cpus(f"127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{dashboard}"
    left = [child for each in started for child in psutil.Process(each.pid).children(recursive=True)]
    for each in started:
        each.kill()
        each.wait()
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def has_two_cpus(address: str) -> bool:
    told = subprocess.run([RAY, "status", "--address", address], capture_output=True, text=True)
    return "/2.0 CPU" in told.stdout


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
    for _ in range(30):
        done = subprocess.run(
            [*submit, "--runtime-env-json", revision, "--", *entry], cwd=checkout, capture_output=True, text=True
        )
        if "No available agent" not in done.stderr:  # the head takes a moment before it takes jobs
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Complete: 8 jobs run" in done.stdout
    records = Ledger(line.output / "ledger").records()
    assert [record.status for record in records] == ["done"] * 8
    assert {record.provenance["revision"] for record in records} == {"submitted"}
