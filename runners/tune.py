"""The trials of a search as Ray Tune's: its schedulers decide which go on. What they measure goes to the ledger.

Tune keeps nothing: its own experiment state cannot grow by more trials once it is finished, and the ledger can. A
search that is started again tells its scheduler first what the ledger has.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from benchmarks import checkpoints
from benchmarks.errors import InputError
from benchmarks.job import is_gpu_type
from results.ledger import Ledger
from results.record import Record
from results.rows import METRIC
from runners.config import Scheduler, Search
from runners.execute import Workplace, make_record, run_job
from runners.executors import RETRIES, Tell, Tries, tell_nobody
from runners.placement import Needs, Node, Schedule, Share, problem
from runners.provenance import provenance
from runners.ray_executor import SECONDS_FOR_NODES, alive_nodes
from runners.trials import Trial, is_finished, stopped_by

_KIND = "accelerator_type:"  # before a GPU's type in the names of Ray's resources
SCORE, TIMES = "score", "times"  # of what a trial reports: its latest score, percent, and how many it has

Finished = Callable[[Trial, Record, Sequence[str]], None]


class _FromTheLedger:
    """What is added to Tune's schedulers: they learn what earlier runs measured, and never stop trial 0."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.seen: dict[str, int] = {}  # trial -> how many of its scores

    def learn(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Takes a result into account, without deciding anything."""

    def learn_record(self, record: Record) -> None:
        """Takes all scores of a trial into account that is not run again."""
        known = _Known(record.key)
        self.on_trial_add(None, known)
        for times, score in enumerate(scores_of(record), start=1):
            self.learn(None, known, {SCORE: score[1], TIMES: times})

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # A worker that was started again reports anew what its checkpoint says.
        if SCORE not in result or result[TIMES] <= self.seen.get(trial.trial_id, 0):
            return TrialScheduler.CONTINUE
        self.seen[trial.trial_id] = result[TIMES]
        if result["number"] == 0:
            self.learn(controller, trial, result)
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial's last result was a result like the others."""


class _Known:
    """A trial of an earlier run, as a scheduler tells it from others."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


class Asha(_FromTheLedger, ASHAScheduler):
    def learn(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        ASHAScheduler.on_trial_result(self, controller, trial, result)


class Median(_FromTheLedger, MedianStoppingRule):
    def learn(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        MedianStoppingRule.on_trial_complete(self, controller, trial, result)


class NoStop(_FromTheLedger, FIFOScheduler):
    pass


def scheduler(search: Search) -> Asha | Median | NoStop:
    """Tune's scheduler; its time is the number of scores, which is the same share of every trial's training."""
    if search.scheduler is Scheduler.none:
        return NoStop()
    common = {"time_attr": TIMES, "metric": SCORE, "mode": "max", "grace_period": search.grace_period}
    if search.scheduler is Scheduler.median:
        return Median(**common)
    return Asha(max_t=search.scores, reduction_factor=search.reduction_factor, **common)


def run(
    trials: Sequence[Trial],
    known: Sequence[Record],
    search: Search,
    workplace: Workplace,
    needs: Needs,
    finished: Finished,
    tell: Tell = tell_nobody,
) -> None:
    """Runs `trials` on the Ray that this process is connected to; calls `finished` as each ends, however it ends.

    A trial whose worker died is started again, and goes on from its last checkpoint. Errors of a job are in its record.

    Args:
        trials: Those without a record.
        known: The records of the search's other trials, in their order.
        search: The search.
        workplace: Where to read and write.
        needs: What a trial takes of the cluster.
        finished: Gets the trial, its record and lines for the user.
        tell: Gets a line for the user.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the other trials end too.
        InputError: no node has what a trial takes, or all that had it were lost.
    """
    resources, room = _request(trials, needs, alive_nodes())
    learned = scheduler(search)
    by_number = {trial.number: trial for trial in trials}
    for record in known:
        learned.learn_record(record)
    folder = _folder(workplace.output / "search" / ".tune")
    keeper = _Keeper(by_number, search, workplace, finished, tell)

    def lost() -> str | None:
        nodes = alive_nodes()
        if any(_has(node, resources) for node in nodes):
            return None
        return f"{trials[0].title} {problem(needs, nodes) or 'finds no machine with all that'}"

    work = tune.with_parameters(_work, trials=by_number, workplace=workplace, search=search)
    tuner = tune.Tuner(
        tune.with_resources(work, resources),
        param_space={"number": tune.grid_search(sorted(by_number))},
        tune_config=tune.TuneConfig(
            scheduler=learned,
            max_concurrent_trials=search.concurrent or room,
            reuse_actors=not needs.gpus,  # a process keeps memory of a GPU for itself
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            verbose=0,
            callbacks=[keeper],
            stop=_Stop(keeper.errors, lost),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    try:
        with _silent():
            tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another search of this output folder may have one there
            folder.parent.rmdir()
    for error in keeper.errors:
        raise error


def _request(trials: Sequence[Trial], needs: Needs, nodes: Sequence[Node]) -> tuple[dict[str, float], int]:
    """What each trial asks Ray for, on one node, and how many of them have room at once, as a suite's jobs would.

    All ask for the same: with GPUs for the CPUs that go with them where there are fewest, so that no GPU is idle for
    want of CPUs.

    Raises:
        InputError: no node has what a trial takes.
    """
    places = [(node, shares) for node in nodes if (shares := _shares(needs, node, len(trials)))]
    resources: dict[str, float] = {"GPU": needs.gpus * needs.processes}
    if needs.gpu_type:  # Ray wants a name that it has itself, and one for all trials: where most have room
        room: Counter[str] = Counter()
        for node, shares in places:
            room.update({kind: len(shares) for kind in _kinds(node) if is_gpu_type(needs.gpu_type, kind)})
        kind = max(room, key=room.__getitem__, default="")
        places = [(node, shares) for node, shares in places if kind in _kinds(node)]
        resources[f"{_KIND}{kind}"] = 0.001  # so little that no trial waits for it
    if not places:  # Tune would wait for ever
        raise InputError(f"{trials[0].title} {problem(needs, nodes) or 'finds no machine with all that'}")
    cpus = [shares[0].cpus for _, shares in places]
    resources["CPU"] = min(cpus) if needs.gpus else max(cpus)
    return resources, sum(len(shares) for _, shares in places if shares[0].cpus >= resources["CPU"])


def _shares(needs: Needs, node: Node, most: int) -> list[Share]:
    """What each of up to so many trials gets side by side on a node."""
    keys = [str(number) for number in range(most)]
    started = Schedule(dict.fromkeys(keys, needs), dict.fromkeys(keys, ()), [node]).start(keys)
    return [share for _, (share,) in started]


def _kinds(node: Node) -> list[str]:
    return node.gpu_type.split(", ") if node.gpu_type else []


def _has(node: Node, resources: Mapping[str, float]) -> bool:
    """Whether an empty node has what a trial asks for."""
    kinds = {name.removeprefix(_KIND) for name in resources if name.startswith(_KIND)}
    return node.cpus >= resources["CPU"] and node.gpus >= resources["GPU"] and kinds <= {*_kinds(node)}


def _folder(place: Path) -> Path:
    """Where Tune may write while it runs, all nodes alike; what killed searches of this machine left is removed."""
    here = platform.node()
    for old in place.glob(f"{here}-*"):
        if not psutil.pid_exists(int(old.name.rpartition("-")[2])):
            shutil.rmtree(old, ignore_errors=True)
    return place / f"{here}-{os.getpid()}"


def _work(config: dict[str, Any], trials: Mapping[int, Trial], workplace: Workplace, search: Search) -> None:
    """A trial in its worker: reports each score to Tune, which may end the process then."""
    trial = trials[config["number"]]
    started, clock = datetime.now(UTC), time.monotonic()
    reported = 0

    def report(scores: Sequence[Sequence[float]], **more: Any) -> None:
        nonlocal reported
        for times in range(reported + 1, len(scores) + 1):
            reported = times
            origin = provenance(workplace.command, started.isoformat(timespec="seconds"), time.monotonic() - clock)
            result = {SCORE: scores[times - 1][1], TIMES: times, "scores": scores[:times], "provenance": origin}
            tune.report({"number": trial.number} | result | more)

    def watch(state: dict[str, Any]) -> None:
        # The last score is for below: Tune may end the process with any, and there has to be a record before.
        report([score for score in state.get("scores", ()) if score[0] < trial.job.recipe.iterations])

    try:
        tries = Tries(workplace, tell_nobody)
        ended = functools.partial(is_finished, search=search)  # another search may have stopped it meanwhile
        record, messages = tries.run(trial.job, lambda: run_job(trial.job, workplace, watch, finished=ended))
    except OSError as error:  # of the output folder; Tune would try again
        tune.report({"number": trial.number, "error": error})
        return
    if len(scores := scores_of(record)) > reported:
        report(scores, record=record, messages=messages)
    else:
        tune.report({"number": trial.number, "record": record, "messages": messages})


def scores_of(record: Record) -> list[list[float]]:
    """The scores of a trial, as [iteration, percent]."""
    samples = record.samples
    scores = samples.get(f"held_out_{METRIC[record.task]}", ())
    return [list(pair) for pair in zip(samples.get("iteration", ()), scores, strict=True)]


class _Stop(tune.Stopper):
    """Ends a search once there is an error, or for long no node that a trial could run on: Tune would wait for ever."""

    def __init__(self, errors: list[Exception], problem: Callable[[], str | None]):
        """`problem` says why no node of the cluster could run a trial; None where one could."""
        self.errors = errors
        self.problem = problem
        self.looked = self.fine = time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        now = time.monotonic()
        if not self.errors and now - self.looked >= 1.0:
            self.looked = now
            if (why := self.problem()) is None:
                self.fine = now
            elif now - self.fine > SECONDS_FOR_NODES:
                self.errors.append(
                    InputError(
                        f"{why}: nodes were lost; finished trials are kept, and the same command continues once there "
                        "are nodes again"
                    )
                )
        return bool(self.errors)


@contextmanager
def _silent() -> Iterator[None]:
    """Tune prints a traceback for each trial whose worker or node died, into the live view; trials go on by then."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Keeper(tune.Callback):
    """Takes what Tune says of trials to the ledger and to the user."""

    def __init__(
        self,
        trials: Mapping[int, Trial],
        search: Search,
        workplace: Workplace,
        finished: Finished,
        tell: Tell = tell_nobody,
    ):
        self.trials = trials
        self.search = search
        self.workplace = workplace
        self.finished = finished
        self.tell = tell
        self.ledger = Ledger(workplace.ledger)
        self.errors: list[Exception] = []

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes down what it could go on from; nothing of this is part of it."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        result = trial.last_result
        if "error" in result:
            self.errors.append(result["error"])
            return
        try:
            self._keep(self.trials[trial.config["number"]], result)
        except Exception as error:  # Tune would try the trial again, and tell nobody
            self.errors.append(error)

    def _keep(self, ours: Trial, result: dict[str, Any]) -> None:
        if "record" in result:  # the ledger may have a better one, of who took the trial over
            record = self.ledger.get(ours.key) or result["record"]
        else:  # its scheduler stopped it
            record = self.ledger.put(self._stopped(ours, result))
            for file in (self.workplace.progress(ours.key), self.workplace.claim(ours.key)):
                file.unlink(missing_ok=True)
            checkpoints.discard(self.workplace.output / "jobs" / ours.key)
        self.finished(ours, record, result.get("messages", ()))

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Its worker died: it does not run until Tune starts it again."""
        ours = self.trials[trial.config["number"]]
        self.workplace.progress(ours.key).unlink(missing_ok=True)
        self.tell(f"{ours.title}: its worker died; it goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours, error = self.trials[trial.config["number"]], trial.get_pickled_error()
        if isinstance(cause := getattr(error, "cause", error), OSError):
            self.errors.append(cause)
            return
        reason = f"its worker died {RETRIES + 1} times ({type(cause).__name__}): killed, or out of memory"
        self.finished(ours, self.ledger.put(make_record(ours.job, "failed", reason)), ())

    def _stopped(self, trial: Trial, result: dict[str, Any]) -> Record:
        iterations, scores = zip(*result["scores"], strict=True)
        at, name = int(iterations[-1]), f"held_out_{METRIC[trial.job.task]}"
        settings = stopped_by(self.search)
        return make_record(
            trial.job,
            "stopped",
            f"stopped early by {settings['scheduler']} at iteration {at} of {trial.job.recipe.iterations}",
            metrics={name: scores[-1], "iterations": at},
            samples={name: list(scores), "iteration": list(map(float, iterations))},
            details={"stopped_by": settings},
            artifacts={"log": f"jobs/{trial.key}/log.txt"},
            provenance=result["provenance"],
        )
