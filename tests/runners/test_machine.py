"""What a container leaves to its processes."""

from __future__ import annotations

import pytest

from runners import machine


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_container(cgroup):
    assert machine.free_gib() > 0.1
    assert machine.usable_cpus() >= 1


def test_a_limit_counts_and_cached_files_do_not(cgroup):
    (cgroup / "memory.max").write_text(f"{2**30}\n")
    (cgroup / "memory.current").write_text(f"{2**30 - 1000}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {2**29 - 1000}\n")
    assert machine.free_gib() == pytest.approx(0.5)
    (cgroup / "memory.max").write_text("max\n")
    assert machine.free_gib() > 0.5


def test_a_quota_of_cpus(cgroup):
    (cgroup / "cpu.max").write_text("100000 100000\n")
    assert machine.usable_cpus() == 1
    (cgroup / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cpus() >= 1
