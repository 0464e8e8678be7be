"""What `plan=true` shows: the jobs, what each waits for and takes, and how long all of them will."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from benchmarks.job import Job
from runners.estimate import ASSUMED, gpu_hours, needs
from runners.placement import Needs, Node, simulate


def plan_table(jobs: Sequence[Job], missing: set[str], macs: Mapping[str, float], nodes: Sequence[Node]) -> Table:
    """The plan of `jobs`, of which `missing` (keys) are still to do, on `nodes`. `macs` as `count_macs` has them."""
    asked = {job.key: needs(job, macs, nodes) for job in jobs}
    several_seeds = len({job.seed for job in jobs if job.recipe}) > 1
    numbers = {job.key: number for number, job in enumerate(jobs, start=1)}
    table = Table(box=None, pad_edge=False)
    for heading, right in (
        *(("#", True), ("job", False), ("size", False), ("data", False), ("needs", False)),
        *(("after", True), ("GPU hours", True), ("state", False)),
    ):
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "job")
    for job in jobs:
        table.add_row(
            str(numbers[job.key]),
            Text(_name(job, several_seeds)),
            "x".join(map(str, job.input_size)),
            job.data or "",
            "" if job.stage == "cost" else takes(asked[job.key]),
            ", ".join(str(numbers[key]) for key in job.depends_on),
            _hours(job, macs),
            "to do" if job.key in missing else "done",
        )
    return table


def _name(job: Job, several_seeds: bool) -> str:
    """The job's title without the task, which the head tells, or that there is none."""
    seed = f", seed {job.seed}" if several_seeds and job.recipe else ""
    return job.title.removesuffix(f" ({job.task})") + seed


def takes(asked: Needs) -> str:
    """What a job takes, for people."""
    kind = f" {asked.gpu_type}" if asked.gpu_type else ""
    if asked.alone:
        return "a machine"
    if not asked.gpus:
        cpus = asked.cpus * asked.processes
        return f"{cpus} CPU{'s' * (cpus > 1)}"
    if asked.gpus < 1:
        return f"{asked.gpus:g} GPU{kind}"
    return f"{asked.processes} GPU{'s' * (asked.processes > 1)}{kind}" + (" together" if asked.processes > 1 else "")


def _hours(job: Job, macs: Mapping[str, float]) -> str:
    if job.recipe is None:
        return ""
    if job.counted_as not in macs:
        return "?"
    hours = gpu_hours(job, macs)
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.1 else "< 0.1"


def plan_summary(
    jobs: Sequence[Job],
    missing: set[str],
    macs: Mapping[str, float],
    nodes: Sequence[Node],
    turns: Sequence[Sequence[Job]] | None = None,
) -> list[str]:
    """What the jobs of `missing` take together, and what that is based on, as lines for people.

    `turns`: the jobs of `missing` in parts, each of which begins when the one before has ended; None: all in one.
    """
    left = [job for job in jobs if job.key in missing]
    if not left:
        return ["Nothing is left to do."]
    hours = sum(gpu_hours(job, macs) for job in left)
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    lines = [
        f"To do: {len(left)} of {len(jobs)} jobs, about {hours:,.1f} GPU hours, on {len(nodes)} "
        f"machine{'s' * (len(nodes) > 1)} with {gpus or 'no'} GPU{'s' * (gpus != 1)} and {cpus} CPUs."
    ]
    parts = [
        simulate({job.key: needs(job, macs, nodes) for job in turn}, {job.key: job.depends_on for job in turn}, nodes)
        for turn in ([left] if turns is None else turns)
    ]
    if sum(len(part.spans) for part in parts) == len(left):
        makespan, bound = sum(part.makespan for part in parts), sum(part.lower_bound for part in parts)
        lines.append(
            f"From start to end about {duration(makespan)}; no order of the jobs takes less than "
            f"{duration(bound)}{'' if gpus else ' (one CPU core taken for 0.02 TMAC/s)'}."
        )
    if any(job.recipe for job in left):
        lines.append(ASSUMED)
    if any(job.recipe and job.counted_as not in macs for job in left):
        lines.append("?: the model could not be counted; taken for 1 GMAC.")
    return lines


def duration(seconds: float) -> str:
    """A rounded time for people: '40 s', '3 min', '5.0 h', '12 days'."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"
