"""What a cluster is trusted with: many jobs, no open port, and no data in a submission; the files in deploy/."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
import yaml
from ray._private import ray_constants
from ray._private.runtime_env import packaging
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from tests_support import ROOT

from results.record import Record
from runners.executors import outline
from runners.many_jobs import LIMITS, OVERHEAD, TRIAL, broken

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def many_jobs(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "runners.many_jobs", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_many_jobs_and_no_port_that_others_reach():
    """A few of the thousand jobs of runners.many_jobs, as a real process; what listens meanwhile is looked at."""
    run = many_jobs("--jobs", "40", "--trials", "0")
    listening: dict[tuple[str, int], str] = {}
    while run.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            listening |= sockets(psutil.Process(run.pid))
        time.sleep(0.5)
    printed = run.stdout.read()
    assert run.returncode == 0, printed
    assert set(LIMITS) <= {line.rpartition(":")[0] for line in printed.splitlines()}
    assert {"gcs_server", "raylet"} <= set(listening.values())
    assert {address for address, _ in listening} <= LOOPBACK, listening


@pytest.mark.long
def test_a_thousand_jobs():
    """A job takes less beside its own work than a trial of Ray Tune; nothing grows with the jobs (see the script)."""
    run = many_jobs()
    printed, _ = run.communicate()
    print(printed)
    assert run.returncode == 0, printed
    assert TRIAL in printed


def test_what_takes_too_much_is_said():
    fine = {name: limit / 2 for name, limit in LIMITS.items()}
    assert broken(fine) == []
    for name, limit in LIMITS.items():
        assert broken(fine | {name: 2 * limit}) == [f"{name}: {2 * limit:.3f}, and it may be {limit:.3f}"]
    assert broken(fine | {TRIAL: LIMITS[OVERHEAD] / 4}) == [f"{OVERHEAD}: 0.500, and it may be 0.250"]
    assert broken(fine | {TRIAL: 9.0, OVERHEAD: 8.0}) == []


def sockets(process: psutil.Process) -> dict[tuple[str, int], str]:
    """Where a process and all below it listen, and the name of who does."""
    found = {}
    for each in [process, *process.children(recursive=True)]:
        try:
            listening = [c.laddr for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            found |= {(address.ip, address.port): each.name() for address in listening}
        except psutil.Error:
            continue
    return found


def test_a_run_keeps_little_of_what_its_jobs_measured():
    shared = {"key": "a", "stage": "train", "task": "classification", "model": "m", "family": "f"}
    bulk = {"metrics": {"params": 1.0}, "samples": {"s": [0.5] * 10_000}, "job": {"recipe": {}}, "notes": ["n"] * 100}
    details = {"by_module": {str(i): 1 for i in range(10_000)}, "looked_in": "here", "how_to_get": "there"}
    record = Record(**shared, input_size=[32, 32], status="blocked", reason="why", details=details, **bulk)
    kept = outline(record)
    assert len(pickle.dumps(kept)) < 1000
    assert (kept.key, kept.status, kept.reason) == ("a", "blocked", "why")
    assert kept.details == {"looked_in": "here", "how_to_get": "there"}


def test_a_submission_takes_the_code_and_nothing_else(tmp_path):
    """What `ray job submit --working-dir .` would upload, packed by Ray itself."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout)
    code = [
        "pyproject.toml",
        "runners/run.py",
        "runners/conf/suite/demo.yaml",
        "results/ledger.py",
        "results/published/cost/a.csv",
    ]
    others = [".git/config", ".ci/run", ".venv/bin/python", "data/ADEChallengeData2016/a.jpg", "runs/demo/report.html"]
    others += ["mine/ledger/a.json", "mine/jobs/train-a/iter_3.pth", "hivit_base.pth", "weights.safetensors", "a.tar"]
    others += [
        "datasets/imagenet/train/n01440764/a.JPEG",
        "mine/report.html",
        "mine/search/search.csv",
        ".env",
        "x.npz",
    ]
    others += ["zoo/hivit_base.pth", "tests/runners/test_plan.py"]
    for name in [*code, *others]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    packed = tmp_path / "packed.zip"
    excludes = ray_constants.get_runtime_env_default_excludes()
    packaging.create_package(str(checkout), packed, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(packed) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names == set(code)


@pytest.mark.parametrize("name", ["ray-cluster.yaml", "rayjob.yaml"])
def test_ray_takes_the_files_of_deploy(name):
    content = yaml.safe_load((ROOT / "deploy" / name).read_text())
    if name == "rayjob.yaml":
        cluster = content["spec"]["rayClusterSpec"]
        made = {"metadata": {"name": "a", "namespace": "b"}, "spec": cluster}
        content = _derive_autoscaling_config_from_ray_cr(made)
        kinds = content["available_node_types"]
        assert kinds["headgroup"]["resources"]["CPU"] == 0
        assert kinds["gpus"]["resources"] | {"GPU": 8} == kinds["gpus"]["resources"]
        assert cluster["authOptions"] == {"mode": "token"}
    else:
        starts = content["head_start_ray_commands"][1], content["worker_start_ray_commands"][1]
        assert all("RAY_AUTH_MODE=token" in start for start in starts)
        content = prepare_config(content)
    validate_config(content)
