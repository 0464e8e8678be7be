"""Every row of the papers' ablations, and of the baselines beside them, trains one step at its own size.

The whole model with its head, batch 1. `pytest -m long -s tests/runners/test_ablation_sizes.py` prints a line for each.
"""

from __future__ import annotations

import math

import pytest
from one_step import one_step
from tests_support import configuration

from benchmarks.job import Job
from runners.plan import make_jobs

LIMIT_GB = 11.5  # of a process; what needs more is done with gradient checkpointing
ABLATIONS = ("ablation_hrvit", "ablation_hrformer", "ablation_hivit", "ablation_hiri_vit")
BASELINES = ("cityscapes_segformer", "ade20k_segformer", "ade20k_upernet")  # HRViT, Tables 4 and 9
KINDS = ("hrvit", "mit", "cswin")


def rows() -> dict[str, Job]:
    """The job that counts each row, without those that are the same network at the same size."""
    found: dict[tuple, tuple[str, Job]] = {}
    for suite in (*ABLATIONS, *BASELINES):
        for job in make_jobs(configuration(f"suite={suite}", "stages=[cost]")):
            if suite in BASELINES and not job.model.startswith(KINDS):
                continue
            content = job.content() | {"label": ""}
            size = "x".join(map(str, job.input_size))
            found.setdefault(str(content), (f"{suite}-{job.label}-{job.head or job.task}-{size}", job))
    return dict(found.values())


def pytest_generate_tests(metafunc):
    # Seven suites need not be read where nothing of this runs: by default.
    found = {} if metafunc.config.option.markexpr == "not long" else rows()
    metafunc.parametrize(("row", "job"), found.items(), ids=list(found))


@pytest.mark.long
def test_row_trains_one_step_at_its_size(row, job):
    how = ""
    try:
        step = one_step(job, LIMIT_GB)
    except MemoryError:
        how = f", with gradient checkpointing (else more than {LIMIT_GB} GB)"
        step = one_step(job, LIMIT_GB, checkpointing=True)
    print(f"\n{row}: loss {step.loss:.2f}, {step.seconds:.1f} s, peak {step.peak_gb:.2f} GB{how}", flush=True)
    assert math.isfinite(step.loss)
    assert not step.not_finite
    assert not step.without_gradient
