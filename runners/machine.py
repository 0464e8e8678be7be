"""What this process may still take of the machine, or of the container where that has limits below it."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from benchmarks.cpus import CGROUP
from runners.placement import Node

DRIVERS = ("nvidiactl", "nvmap", "dxg", "kfd")  # in /dev, of NVIDIA's GPUs, its boards, Windows' Linux, AMD's GPUs


def free_gib() -> float:
    """Free memory in GiB; what the system only caches of files counts as free."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            cached = _statistic(CGROUP / Path(limit).with_name("memory.stat"), "inactive_file")
            taken = int((CGROUP / used).read_text()) - cached
            free = min(free, int((CGROUP / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
    return free / 2**30


def this_machine(cpus: int, typed: bool = False) -> Node:
    """This machine as a node of `cpus` CPUs and its GPUs; `typed`: with their type, for which CUDA must start."""
    if sys.platform == "linux" and not any(Path("/dev", name).exists() for name in DRIVERS):
        return Node("this machine", cpus)  # without PyTorch, which takes seconds to load
    import torch

    gpus = torch.cuda.device_count()
    return Node("this machine", cpus, gpus, gpu_type(torch.cuda.get_device_name(0)) if gpus and typed else None)


def gpu_type(name: str) -> str:
    """The type of a GPU as Ray names it on its nodes, of the name that its driver has for it.

    `A100` for `NVIDIA A100-SXM4-80GB`, `GeForce-RTX-4090` for `NVIDIA GeForce RTX 4090`; without Ray the name itself.
    """
    try:
        from ray._private.accelerators import NvidiaGPUAcceleratorManager
    except ImportError:  # it is not installed, or names GPUs elsewhere by now
        return name
    return NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name) or name


def _statistic(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
