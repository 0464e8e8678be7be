"""How many CPUs there are for this process: of the machine, or of the container where that has limits below it."""

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or no quota ("max")
        pass
    return max(1, cpus)


def usable_cores() -> int:
    """The same in physical cores: more threads than these only make each other wait."""
    return min(psutil.cpu_count(logical=False) or usable_cpus(), usable_cpus())
