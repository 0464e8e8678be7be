"""A run that searches a better recipe for each chosen model: `search=asha`, in place of the suite's stages.

Every trial is a job of the stage "search", with its record in the ledger: a training with a changed recipe, scored on a
part of the training images that it does not train on. Nothing of a search looks at the validation images, which are
what tables report. The recipe found is a file that a suite can name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.markup import escape
from rich.table import Table

from benchmarks.errors import InputError
from benchmarks.job import Job, Recipe
from results.files import write_atomic
from results.ledger import Ledger
from results.record import Record
from results.rows import METRIC
from runners.config import Executor as ExecutorName
from runners.config import ModelEntry, Search
from runners.estimate import count_macs
from runners.execute import weights_are_there
from runners.machine import free_gib
from runners.placement import problem
from runners.plan import check_models, trainings
from runners.plan_table import plan_summary, takes
from runners.ray_executor import connected
from runners.session import COMPLETE, INCOMPLETE, LEAST_GIB, Session
from runners.trials import Trial, draw_trials, is_finished

MOST_LINES = 20  # of a printed table
# Of this process and, where Ray is started here, its workers; before Ray is imported.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the screen belongs to the live view
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a configuration are relative to where the user is
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a search as it ends all runs
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no score
}


@dataclasses.dataclass
class _One:
    """The search for one model on one benchmark."""

    benchmark: str
    entry: ModelEntry
    training: Job  # with the recipe as it stands
    before: list[Job]  # the trainings that it starts from
    trials: list[Trial]
    records: dict[int, Record] = dataclasses.field(default_factory=dict)  # by trial, of those that are not run again

    @property
    def missing(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.number not in self.records]


class SearchSession(Session):
    """One run of one search, from its configuration to its exit status."""

    def run(self) -> int:
        """Runs the search; returns 0 (complete) or 2 (some trials have no outcome).

        Raises:
            InputError: the configuration asks for something that is not there or cannot be.
            OSError: the output folder cannot be written.
        """
        search = self.config.search
        self._check()
        ledger = Ledger(self.workplace.ledger, self._tell)
        searches = []
        for name, entry, chain in trainings(self.config):
            one = _One(name, entry, chain[-1], chain[:-1], draw_trials(search, chain[-1]))
            records = {trial.number: ledger.get(trial.key) for trial in one.trials}
            one.records = {number: record for number, record in records.items() if is_finished(record, search)}
            searches.append(one)
        self.jobs = [trial.job for one in searches for trial in one.missing]
        macs = self._macs()
        check_models(self.jobs, macs)
        for one in searches:
            self._introduce(one)
        os.environ.update(ENVIRONMENT)
        free = free_gib()
        self.nodes = self._nodes(self.jobs, free) if self.jobs else []
        if self.config.plan:
            for one in searches:
                self._print_trials(one, one.trials)
            self._print_search_plan(searches, count_macs(self.jobs, macs))
        self._check_places(self.jobs)
        if self.config.plan:
            return COMPLETE
        missing = [one for one in searches if one.missing]
        if missing:
            for one in missing:
                self._check_what_it_starts_from(one, ledger)
            self._run_trials(missing, free)
        complete = [self._conclude(one) for one in searches]
        return COMPLETE if all(complete) else INCOMPLETE

    def _check(self) -> None:
        config = self.config
        if config.executor is ExecutorName.inline:
            raise InputError("a search needs Ray, and executor=inline does without; use executor=ray")
        if config.stages is not None:
            raise InputError("a search runs its trials instead of the suite's stages; leave stages=[...] out")
        if config.seeds is not None and len(config.seeds) > 1:
            raise InputError(f"a search trains with one seed, not with {config.seeds}; name one, as seeds=[0]")
        if not config.plan and importlib.util.find_spec("ray") is None:
            raise InputError("a search needs Ray Tune, and Ray is not installed; pip install 'ray[tune]'")

    def _check_what_it_starts_from(self, one: _One, ledger: Ledger) -> None:
        for job in one.before:
            record = ledger.get(job.key)
            if record is None or not record.done or not weights_are_there(record, self.workplace.output):
                raise InputError(
                    f"{one.training.label} starts from the {job.stage}ing of {job.label}, which is not done; run this "
                    "command once with stages=[train] in place of search, then again"
                )
            if job.stage == "train" and job.data == one.training.data:
                self._tell(f"{job.label} was trained on the held-out images too: scores that start from it are high")

    def _introduce(self, one: _One) -> None:
        search = self.config.search
        fields = ", ".join(search.space)
        self.console.print(
            f"[bold]Search[/bold] ({search.scheduler.value}) of {escape(fields)} for "
            f"{escape(one.training.label)} ({one.benchmark}): {len(one.trials)} trials, {len(one.records)} of them in "
            f"{escape(str(self.workplace.ledger))} already.",
            soft_wrap=True,
        )
        if len(one.trials) < search.trials:
            self._tell(f"the space has only {len(one.trials)} different recipes, not {search.trials}")

    def _print_search_plan(self, searches: Sequence[_One], macs: Mapping[str, float]) -> None:
        """What the trials take, if none is stopped early; the models are searched one after the other."""
        asked = self._needs(self.jobs, macs)
        for text in dict.fromkeys(f"{job.label}: each trial takes {takes(asked[job.key])}." for job in self.jobs):
            self.console.print(text, soft_wrap=True, highlight=False)
        turns = [[trial.job for trial in one.missing] for one in searches]
        for line in plan_summary(self.jobs, set(asked), macs, self.nodes, turns):
            self.console.print(line, soft_wrap=True, highlight=False)

    def _check_places(self, missing: list[Job]) -> None:
        """As for a suite; a trial is on one node, for Tune asks for all its GPUs together."""
        super()._check_places(missing)
        for job, needed in zip(missing, self._needs(missing).values(), strict=True):
            if all(problem(needed, [node]) for node in self.nodes):
                raise InputError(
                    f"{job.title} needs {takes(needed)} on one machine, and none has so many; "
                    "a trial cannot be spread over several: set fewer recipe.engine.processes"
                )

    def _run_trials(self, searches: Sequence[_One], free: float) -> None:
        from runners.view import View

        if free < LEAST_GIB:
            raise InputError(f"only {free:.1f} GiB of memory are free; close other programs (a trial needs 1.5 GiB)")
        self.workplace = self.workplace.marked()
        possible = {job.key for job in self._without_blocked([t.job for one in searches for t in one.missing])}
        for one in searches:
            one.records |= {t.number: self.records[t.key] for t in one.missing if t.key not in possible}
        left = [trial for one in searches for trial in one.missing]
        if not left:
            return
        progress = self.workplace.output / "progress"
        for trial in left:  # what a killed run left
            (progress / f"{trial.key}.json").unlink(missing_ok=True)
        jobs = [trial.job for trial in left]
        slots = self._slots(free)
        with connected(self.config.cluster, slots):
            total = sum(len(one.trials) for one in searches)
            seconds = {key: needs.seconds for key, needs in self._needs(jobs).items()}
            with View(self.console, left, total - len(left), total, seconds, slots, progress) as view:
                for one in searches:
                    if one.missing:
                        self._search(one, view)

    def _search(self, one: _One, view: Any) -> None:
        from runners import tune

        def finished(trial: Trial, record: Record, messages: Sequence[str]) -> None:
            view.finished(trial.key)
            one.records[trial.number] = record
            for message in messages:
                self._tell(message)
            if record.status in ("done", "stopped"):
                self.console.print(_line(trial, record), soft_wrap=True)
            else:
                self._tell(f"{trial.title} {record.status}: {record.reason}")

        known = [one.records[number] for number in sorted(one.records)]
        (needs,) = self._needs([one.training]).values()
        tune.run(one.missing, known, self.config.search, self.workplace, needs, finished, self._tell)

    def _conclude(self, one: _One) -> bool:
        """Prints and writes the outcome; whether every trial has one."""
        from results import search

        findings = self._findings(one)
        metric = f"held-out {METRIC[one.training.task]}"
        folder = self.workplace.output / "search" / _slug(f"{one.benchmark}_{one.training.label}")
        search.write_csv(findings, folder / "search.csv")
        title = f"Search for {one.training.label} ({one.benchmark})"
        names = {"asha": "ASHA", "median": "median stopping rule", "none": "no early stopping"}
        subtitle = f"{len(findings)} trials, {names[self.config.search.scheduler.value]}, {one.training.data}"
        search.draw(findings, folder, title, subtitle)
        self._print_trials(one, [one.trials[finding.number] for finding in search.ranked(findings)])
        best, reference = search.best(findings), findings[0]
        counts = {state: sum(finding.state == state for finding in findings) for state in ("failed", "blocked")}
        complete = not any(counts.values())
        if best is None:
            self.console.print("No trial has finished: there is no best recipe.")
        else:
            write_atomic(folder / "recipe" / "best.yaml", _recipe_file(one, best, metric, self.config.search))
            said = f"Best: trial {best.number} with {metric} {best.score:.1f} % ({_values(best.values)})"
            if best is reference:
                said = f"Best: the recipe as it stands, with {metric} {best.score:.1f} %; no trial beats it"
            elif reference.finished:
                said += f"; the recipe as it stands has {reference.score:.1f} %"
            images = best.record.details["held_out_images"]
            self.console.print(f"[green]✓[/green] {escape(said)}. One seed, {images:,} images.", soft_wrap=True)
            self.console.print(
                f"Train with it: {escape(self._command(one, best, folder))}", soft_wrap=True, highlight=False
            )
        self.console.print(f"Written: {escape(str(folder))} (search.csv, search.png, recipe/best.yaml)", soft_wrap=True)
        if not complete:
            worst = next(finding.record for finding in findings if finding.state in ("failed", "blocked"))
            told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
            self.console.print(
                f"Incomplete: {told} ({escape(str(worst.reason))}). The same command tries them again.", soft_wrap=True
            )
            for name, text in (("looked in", "looked_in"), ("how to get it", "how_to_get")):
                if worst.details.get(text):
                    self.console.print(f"  {name}: {escape(worst.details[text])}", soft_wrap=True)
        return complete

    def _findings(self, one: _One) -> list:
        from results.search import Finding

        return [
            Finding(trial.number, trial.values, trial.job.recipe.iterations, one.records.get(trial.number))
            for trial in one.trials
        ]

    def _print_trials(self, one: _One, trials: Sequence[Trial]) -> None:
        from results.search import shown

        findings = {finding.number: finding for finding in self._findings(one)}
        table = Table(box=None, pad_edge=False)
        fields = list(self.config.search.space)
        metric = METRIC[one.training.task]
        table.add_column("trial")
        for heading in (*(name.replace("_", " ") for name in fields), f"held-out {metric} %", "iteration"):
            table.add_column(heading, justify="right")
        table.add_column("state")
        for trial in trials[:MOST_LINES]:
            finding = findings[trial.number]
            score = "" if finding.score is None else f"{finding.score:.1f}"
            at = "" if finding.scored_at is None else f"{finding.scored_at} of {finding.iterations}"
            number = str(trial.number) if trial.number else "0 (as is)"
            table.add_row(number, *(shown(trial.values[name]) for name in fields), score, at, finding.state)
        self.console.print(table)
        if len(trials) > MOST_LINES:
            self.console.print(f"... and {len(trials) - MOST_LINES} more in search.csv")

    def _command(self, one: _One, best: Any, folder: Path) -> str:
        """The command that trains the model with the best recipe, as this one but for the search."""
        place = f"suite.benchmarks.{one.benchmark}"
        recipe = f"{place}.recipe" if one.entry.recipe is None else f"{place}.recipes.{one.entry.recipe}"
        told = [
            word
            for word in shlex.split(self.workplace.command)
            if not re.match(rf"[+~]*(search\b|plan=|models=|{re.escape(recipe)}\b)", word)
        ]
        here = os.path.relpath(folder)
        told += [f"models=[{one.training.label}]", f"recipe@{recipe}=best"]
        if "drop_path_rate" in best.values and one.entry.drop_path_rate is not None:
            # What a suite sets for a model goes before its recipe.
            told.append(f"{place}.models.{one.training.label}.drop_path_rate={best.values['drop_path_rate']}")
        return shlex.join([*told[:2], "--config-dir", here, *told[2:]])


def _line(trial: Trial, record: Record) -> str:
    """A trial that has ended in one line."""
    metric = METRIC[record.task]
    score = record.metrics.get(f"held_out_{metric}")
    values = escape(f"({_values(trial.values)})")
    told = "" if score is None else f"held-out {metric} {score:.1f} %"
    if record.done:
        return f"[green]✓[/green] {escape(trial.title)}: {told} {values}"
    return f"[dim]-[/dim] {escape(trial.title)}: {escape(str(record.reason))}{told and ', '}{told} {values}"


def _values(values: Any) -> str:
    from results.search import shown

    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def _recipe_file(one: _One, best: Any, metric: str, search: Search) -> str:
    recipe = one.trials[best.number].job.recipe
    default = dataclasses.asdict(Recipe())
    changed = {name: value for name, value in dataclasses.asdict(recipe).items() if value != default[name]}
    head = (
        f"# Trial {best.number} of {len(one.trials)} of a search for {one.training.label} on {one.training.data}\n"
        f"# ({search.scheduler.value}, seed {search.seed}): {metric} {best.score:.2f} %, of training images held out.\n"
        f"# Searched: {_values(best.values)}.\n"
    )
    return head + OmegaConf.to_yaml(OmegaConf.create({"defaults": ["schema", "_self_"], **changed}))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
