"""What a container leaves to its processes."""

from __future__ import annotations

import pytest

from benchmarks import cpus
from benchmarks.job import is_gpu_type
from runners import machine


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    for module in (machine, cpus):
        monkeypatch.setattr(module, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_container(cgroup):
    assert machine.free_gib() > 0.1
    assert cpus.usable_cpus() >= 1


def test_a_limit_counts_and_cached_files_do_not(cgroup):
    (cgroup / "memory.max").write_text(f"{2**30}\n")
    (cgroup / "memory.current").write_text(f"{2**30 - 1000}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {2**29 - 1000}\n")
    assert machine.free_gib() == pytest.approx(0.5)
    (cgroup / "memory.max").write_text("max\n")
    assert machine.free_gib() > 0.5


def test_a_quota_of_cpus(cgroup):
    (cgroup / "cpu.max").write_text("100000 100000\n")
    assert cpus.usable_cpus() == cpus.usable_cores() == 1
    (cgroup / "cpu.max").write_text("max 100000\n")
    assert cpus.usable_cpus() >= 1


@pytest.mark.parametrize(
    ("driver", "ray"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000"),
        ("NVIDIA GeForce RTX 4090", "GeForce-RTX-4090"),
    ],
)
def test_a_gpu_has_the_type_that_ray_gives_it(driver, ray, monkeypatch):
    """This machine is planned with the type that its Ray will have, and measurements know it by the same name."""
    monkeypatch.setattr(machine, "DRIVERS", [""])  # of /dev itself, which is there
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: driver)
    node = machine.this_machine(4, typed=True)
    assert (node.gpus, node.gpu_type) == (2, ray)
    assert is_gpu_type(ray, driver)


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "DRIVERS", ["no such device"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: pytest.fail("PyTorch was asked"))
    assert machine.this_machine(4, typed=True) == machine.Node("this machine", 4)
