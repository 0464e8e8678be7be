"""One run of a suite: plan, look into the ledger, run what is missing, report, say how it ended."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks import data
from benchmarks.errors import Blocked, InputError
from benchmarks.job import TRAININGS, Job
from results.ledger import Ledger
from results.record import Record
from results.rows import METRIC
from runners.config import Cluster, Config
from runners.config import Executor as ExecutorName
from runners.estimate import count_macs, known_macs, needs
from runners.execute import Workplace, discard_checkpoints, make_record, weights_are_there
from runners.executors import Executor, Inline, Processes, outline, workers
from runners.machine import free_gib, this_machine
from runners.placement import Needs, Node, problem
from runners.plan import check_models, make_jobs, stages_of
from runners.plan_table import plan_summary, plan_table
from runners.ray_executor import Ray, alive_nodes, connected

COMPLETE, INCOMPLETE = 0, 2
LEAST_COUNTS = 15  # jobs that are worth the start of another process
LEAST_GIB = 1.0  # a process with torch and its libraries, and nothing in it yet


class Session:
    """One run of one suite, from its configuration to its exit status."""

    def __init__(self, config: Config, command: str, console: Console, started: float):
        self.config = config
        self.console = console
        self.started = started
        output, data_root = Path(config.output).absolute(), Path(config.data_root).absolute()
        self.workplace = Workplace(output=output, data_root=data_root, command=command)
        self.messages: list[str] = []
        self.jobs: list[Job] = []
        self.records: dict[str, Record] = {}
        self.nodes: list[Node] = []

    def run(self) -> int:
        """Runs the suite; returns 0 (complete) or 2 (incomplete).

        Raises:
            InputError: the configuration asks for something that is not there or cannot be.
            OSError: the output folder cannot be written.
        """
        stages = stages_of(self.config)
        self.jobs = make_jobs(self.config)
        ledger = Ledger(self.workplace.ledger, self._tell)
        # What was blocked or failed in an earlier run is tried again in this one.
        known = ledger.records([job.key for job in self.jobs])
        self.records = {record.key: record for record in known if record.status == "done"}
        lost = self._without_weights()
        for job in lost:
            del self.records[job.key]  # `run_job` looks again, and sets the ledger's record aside
        self.records = {key: outline(record) for key, record in self.records.items()}
        missing = [job for job in self.jobs if job.key not in self.records]
        self.console.print(
            f"[bold]{escape(self.config.suite.title)}[/bold] ({self.config.suite.name}, version "
            f"{self.config.suite.version}): {len(self.jobs)} jobs, {len(self.jobs) - len(missing)} of them in "
            f"{escape(str(self.workplace.ledger))} already.",
            soft_wrap=True,
        )
        free = free_gib()
        self.nodes = self._nodes(missing, free) if missing else []
        if self.config.plan:
            macs = count_macs(self.jobs, self._macs())
            check_models(missing, macs)
            self._print_plan(missing, macs)
            self._check_places(missing)
            return COMPLETE
        self._check_places(missing)
        for record in self.records.values():
            discard_checkpoints(record, self.workplace.output)
        if missing:
            if free < LEAST_GIB:
                raise InputError(f"only {free:.1f} GiB of memory are free; close other programs (a job needs 1.5 GiB)")
            counter = self._counter(missing, free)
            check_models(missing, self._macs())
            self._run(missing, counter, free)
        if "report" in stages:
            self._report()
        return self._close(computed=len(missing))

    def _tell(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)
            self.console.print(f"[yellow]![/yellow] {escape(message)}", soft_wrap=True)

    def _say(self, message: str) -> None:
        self.console.print(f"[dim]{escape(message)}[/dim]", soft_wrap=True)

    def _counter(self, missing: list[Job], free: float) -> Executor:
        """What does the counting. It needs no device and less time than the start of a Ray worker: this machine."""
        count = min(workers(free), sum(job.stage == "cost" for job in missing) // LEAST_COUNTS)
        if count < 2 or self.config.executor is ExecutorName.inline:
            return Inline(self.workplace, self.records)
        return Processes(self.workplace, count)

    def _run(self, missing: list[Job], counter: Executor, free: float) -> None:
        from results.tables import cost_table

        cost = [job for job in missing if job.stage == "cost"]
        rest = [job for job in missing if job.stage != "cost"]
        self.workplace = self.workplace.marked()
        self._execute(counter, cost)  # first, so that the plan below knows what each job will take
        counted = [record for record in self._whole_records() if record.stage == "cost" and record.done]
        if counted:
            self.console.print(cost_table(counted))
        rest = self._without_blocked(rest)
        if not rest:
            return
        if self.config.executor is ExecutorName.inline:
            self._execute(Inline(self.workplace, self.records), rest)
        else:
            slots = self._slots(free)
            self._execute(Ray(self.workplace, self.records, self.config.cluster, self._macs(), slots), rest)

    def _execute(self, executor: Executor, jobs: list[Job]) -> None:
        from runners.view import View

        if not jobs:
            return
        seconds = {key: each.seconds for key, each in self._needs(jobs).items()}
        slots = executor.slots
        progress = self.workplace.output / "progress"
        for job in jobs:  # what a killed run left; a living one writes its files again within a second
            (progress / f"{job.key}.json").unlink(missing_ok=True)
        view = View(self.console, jobs, len(self.records), len(self.jobs), seconds, slots, progress)

        def done(record: Record, messages: Sequence[str]) -> None:
            view.finished(record.key)
            self.records[record.key] = outline(record)
            for message in messages:
                self._tell(message)
            if record.status == "failed":
                self._tell(f"{record.stage} {record.model} ({record.task}) failed: {record.reason}")
            elif record.status == "done" and record.stage != "cost":
                self.console.print(f"[green]✓[/green] {escape(_line(record))}", soft_wrap=True)

        with view:
            executor.run(jobs, done, self._tell)

    def _nodes(self, missing: list[Job], free: float) -> list[Node]:
        """The machines that this run may use."""
        if self.config.executor is ExecutorName.ray and self.config.cluster is Cluster.auto and _to_place(missing):
            with connected(Cluster.auto, 0):
                return alive_nodes()
        settings = [job.speed or job.recipe.engine for job in missing if job.speed or job.recipe]
        return [this_machine(workers(free), any(each.gpu_type for each in settings))]

    def _check_places(self, missing: list[Job]) -> None:
        """Raises InputError for a job that the cluster could never run: Ray would wait for ever."""
        if self.config.executor is ExecutorName.inline:
            return  # the job itself finds out, and its record says so
        for job, needed in zip(missing, self._needs(missing).values(), strict=True):
            if why := problem(needed, self.nodes):
                if self.config.cluster is Cluster.local:
                    why = why.replace("the cluster", "this machine")
                advice = f"change {' and '.join(asked)}, or " if (asked := _asked(job)) else ""
                more = "add nodes" if self.config.cluster is Cluster.auto else "run on a cluster with cluster=auto"
                raise InputError(f"{job.title} {why}; {advice}{more} (plan=true shows all needs)")

    def _slots(self, free: float) -> int:
        """Jobs side by side: of a cluster of several nodes a guess, by which the view foretells the end."""
        if self.config.cluster is Cluster.local:
            return workers(free)
        return sum(node.gpus for node in self.nodes) or sum(node.cpus for node in self.nodes)

    def _macs(self) -> dict[str, float]:
        ledger = Ledger(self.workplace.ledger, self._tell)
        return known_macs(ledger.records({job.counted_as for job in self.jobs}))

    def _needs(self, jobs: Sequence[Job], macs: Mapping[str, float] | None = None) -> dict[str, Needs]:
        macs = self._macs() if macs is None else macs
        return {job.key: needs(job, macs, self.nodes) for job in jobs}

    def _without_blocked(self, jobs: list[Job]) -> list[Job]:
        """Has the datasets ready that `jobs` need. Jobs whose data are not there become blocked records at once."""
        ledger = Ledger(self.workplace.ledger, self._tell)
        possible, ready = [], {}
        for job in jobs:
            wanted = (job.data, str(sorted(job.data_options.items()))) if job.stage in TRAININGS else None
            if wanted is not None and wanted not in ready:
                try:
                    data.prepare(job.data, self.workplace.data_root, job.data_options, self._say)
                    ready[wanted] = None
                except Blocked as error:
                    ready[wanted] = error
            error = ready.get(wanted)
            if error is not None:
                details = {"looked_in": error.looked_in, "how_to_get": error.how_to_get}
                record = ledger.put(make_record(job, "blocked", str(error), details=details))
            elif any(self.records[key].status == "blocked" for key in job.depends_on if key in self.records):
                before = self.records[job.depends_on[0]]
                record = ledger.put(make_record(job, "blocked", before.reason, details=before.details))
            else:
                possible.append(job)
                continue
            self.records[job.key] = record
        return possible

    def _without_weights(self) -> list[Job]:
        """Finished trainings whose weights are gone or damaged, though another job still needs them."""
        needed = {key for job in self.jobs if job.key not in self.records for key in job.depends_on}
        lost = []
        for job in reversed(self.jobs):  # what depends on others comes after them
            record = self.records.get(job.key) if job.key in needed else None
            if record is not None and not weights_are_there(record, self.workplace.output):
                path = self.workplace.output / record.artifacts["weights"]
                self._tell(f"the weights {path} are missing or damaged: {job.label} is trained again")
                lost.append(job)
                needed |= set(job.depends_on)
        return lost

    def _whole_records(self) -> list[Record]:
        """What is known of this run's jobs: finished ones as the ledger has them, others as they were met."""
        finished = Ledger(self.workplace.ledger, self._tell).records(
            key for key, record in self.records.items() if record.done
        )
        whole = self.records | {record.key: record for record in finished}
        return [whole[job.key] for job in self.jobs if job.key in whole]

    def _print_plan(self, missing: list[Job], macs: Mapping[str, float]) -> None:
        if self.config.suite.expected.cost:
            self.console.print(f"Expected: {escape(self.config.suite.expected.cost)}")
        shown = self.jobs, {job.key for job in missing}, macs, self.nodes
        self.console.print(plan_table(*shown))
        for line in plan_summary(*shown):
            self.console.print(line, soft_wrap=True, highlight=False)

    def _report(self) -> None:
        """The report on everything in the output folder's ledger, whichever stages and models this run was about."""
        from results.report import build

        suite = self.config.suite
        built = build(
            self.workplace.output, title=suite.title, description=suite.description, papers=self.config.papers
        )
        for message in built.messages:
            self._tell(message)

    def _close(self, computed: int) -> int:
        from results.tables import closing_table

        records = self._whole_records()
        if any(record.stage in ("speed", "evaluate") for record in records):
            self.console.print(closing_table(records))
        self._say_who_learnt(records)
        blocked, failed = (
            [record for record in records if record.status == status] for status in ("blocked", "failed")
        )
        for (reason, looked_in, how), names in _grouped(blocked).items():
            self.console.print(f"[yellow]Not run:[/yellow] {len(names)} jobs ({escape(', '.join(sorted(set(names))))})")
            self.console.print(f"  why: {escape(reason)}", soft_wrap=True)
            if looked_in:
                self.console.print(
                    f"  looked in: {escape(looked_in)} (data_root=FOLDER looks elsewhere)", soft_wrap=True
                )
            if how:
                self.console.print(f"  how to get it: {escape(how)}", soft_wrap=True)
            self.console.print("  The same command continues once it is there.")
        for record in failed:
            log = record.artifacts.get("log")
            where = "" if log is None else f"; its log: {self.workplace.output / log}"
            self.console.print(
                f"[red]Failed:[/red] {record.stage} {record.model} ({record.task}): {escape(record.reason + where)}",
                soft_wrap=True,
            )
        report = self.workplace.output / "report.html"
        if "report" in stages_of(self.config) and report.exists():
            self.console.print(
                f"Report: {escape(str(report))} (tables, plots and leaderboards beside it)", soft_wrap=True
            )
        elapsed = time.monotonic() - self.started
        done = sum(record.done for record in records)
        if not computed:
            self.console.print(f"Nothing was left to compute: all {len(self.jobs)} jobs were done. {elapsed:.0f} s.")
        elif done == len(self.jobs):
            self.console.print(
                f"Complete: {computed} jobs run, {len(self.jobs) - computed} were done before. {elapsed:.0f} s."
            )
        else:
            self.console.print(
                f"Incomplete: {len(self.jobs) - done} of {len(self.jobs)} jobs have no result. {elapsed:.0f} s."
            )
        return COMPLETE if done == len(self.jobs) else INCOMPLETE

    def _say_who_learnt(self, records: Sequence[Record]) -> None:
        """Whether each trained model clearly beats the trivial baseline, both numbers printed."""
        for task, metric in METRIC.items():
            results = [record for record in records if record.task == task and record.stage == "evaluate"]
            results = [record for record in results if record.status == "done"]
            if not results:
                continue
            scores = [(record, record.metrics[metric], record.metrics[f"baseline_{metric}"]) for record in results]
            weak = [score for score in scores if score[1] < score[2] + self.config.suite.must_gain]
            if not weak:
                _, lowest, baseline = min(scores, key=lambda score: score[1] - score[2])
                self.console.print(
                    f"[green]✓[/green] {task}: all {len(results)} trained models clearly beat the trivial baseline; "
                    f"the weakest has {metric} {lowest:.1f} % against {baseline:.1f} %.",
                    soft_wrap=True,
                )
            for record, score, baseline in weak:
                self._tell(
                    f"{record.model} ({task}) has not learnt: {metric} {score:.1f} %, trivial baseline {baseline:.1f} %"
                )


def _to_place(jobs: Sequence[Job]) -> bool:
    return any(job.stage != "cost" for job in jobs)


def _asked(job: Job) -> list[str]:
    """The settings by which a job asks for machines of a kind."""
    if job.stage == "speed":
        settings, place, names = job.speed, "suite.speed", ("device", "gpu_type")
    elif job.recipe is not None:
        settings, place, names = job.recipe.engine, "recipe.engine", ("processes", "gpu_type")
    else:
        return []
    default = type(settings)()
    asked = {name: getattr(settings, name) for name in names}
    return [f"{place}.{name}={value}" for name, value in asked.items() if value != getattr(default, name)]


def _line(record: Record) -> str:
    """A finished job in one line."""
    head = f" + {record.head}" if record.head else ""
    name = f"{record.stage} {record.model}{head} ({record.task})"
    metrics = record.metrics
    if record.stage == "speed":
        return f"{name}: {metrics['latency_ms']:.1f} ms"
    if record.stage in TRAININGS:
        return f"{name}: loss {metrics['final_loss']:.3f}"
    metric = METRIC[record.task]
    return f"{name}: {metric} {metrics[metric]:.1f} % (trivial baseline {metrics[f'baseline_{metric}']:.1f} %)"


def _grouped(blocked: Sequence[Record]) -> dict[tuple[str, str, str], list[str]]:
    groups = defaultdict(list)
    for record in blocked:
        key = (record.reason, record.details.get("looked_in", ""), record.details.get("how_to_get", ""))
        groups[key].append(f"{record.stage} {record.model}")
    return groups
