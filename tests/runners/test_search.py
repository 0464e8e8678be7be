"""Searches: trials drawn alike each time, stopped by Tune's schedulers, kept in the ledger."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
from tests_support import MINIATURE, configuration
from training_support import with_engine

from benchmarks.errors import InputError
from benchmarks.job import SEARCH, Engine, Job
from results.ledger import Ledger
from runners import execute, plan_table, run
from runners.config import Cluster, Distribution, Range, Scheduler, Search
from runners.execute import Workplace, make_record
from runners.placement import Needs, Node
from runners.plan import trainings
from runners.ray_executor import connected
from runners.search import SearchSession
from runners.trials import draw_trials, is_finished, stopped_by

LEARNING_RATE = Range(Distribution.loguniform, low=0.1, high=10, relative=True)
BATCH_SIZE = Range(Distribution.choice, values=[0.5, 1, 2], relative=True)


@pytest.fixture(scope="module")
def base() -> Job:
    """What is searched: the demo's training of HiViT."""
    return trainings(configuration("suite=demo", "models=[hivit_tiny]"))[0][2][-1]


def search(**changes) -> Search:
    space = {
        "learning_rate": LEARNING_RATE,
        "drop_path_rate": Range(Distribution.uniform, low=0, high=0.5),
        "batch_size": BATCH_SIZE,
    }
    return Search(**{"scheduler": Scheduler.asha, "space": space, "trials": 12} | changes)


def test_trials_are_the_same_however_many_and_whatever_else_is_searched(base):
    trials = draw_trials(search(), base)
    assert [trial.number for trial in trials] == list(range(12))
    assert draw_trials(search(trials=5), base) == trials[:5]
    assert draw_trials(search(seed=1), base)[1:] != trials[1:]
    alone = draw_trials(search(space={"learning_rate": LEARNING_RATE}), base)
    assert [trial.values["learning_rate"] for trial in alone] == [trial.values["learning_rate"] for trial in trials]


def test_trials_stay_in_their_space_and_see_as_many_images(base):
    trials = draw_trials(search(trials=40), base)
    first, others = trials[0], trials[1:]
    assert first.job.recipe == base.recipe
    assert first.values == {"learning_rate": base.recipe.learning_rate, "drop_path_rate": 0.0, "batch_size": 16}
    assert len({trial.key for trial in trials}) == 40
    assert {trial.values["batch_size"] for trial in others} == {8, 16, 32}
    factors = [trial.values["learning_rate"] / base.recipe.learning_rate for trial in others]
    assert 0.1 <= min(factors) < 0.4
    assert 2 < max(factors) <= 10
    for trial in trials:
        recipe = trial.job.recipe
        assert trial.job.stage == SEARCH
        assert trial.job.content()["scoring"] == {"held_out": 0.1, "times": 9}
        assert {name: getattr(recipe, name) for name in trial.values} == trial.values
        assert recipe.iterations * recipe.batch_size == base.recipe.iterations * base.recipe.batch_size
        assert 0 <= recipe.drop_path_rate <= 0.5


def test_a_space_that_is_used_up_gives_each_recipe_once(base):
    trials = draw_trials(search(space={"batch_size": BATCH_SIZE}), base)
    assert sorted(trial.values["batch_size"] for trial in trials) == [8, 16, 32]


@pytest.mark.parametrize(("mixup", "unit"), [({}, 6), ({"mixup_alpha": 0.2}, 12)])
def test_a_drawn_batch_can_be_shared_by_the_processes(base, mixup, unit):
    engine = Engine(processes=3, accumulate=2)
    shared = with_engine(base, engine, batch_size=24, mixup=mixup)
    space = {"batch_size": Range(Distribution.uniform, low=0.01, high=4, relative=True)}
    sizes = {trial.values["batch_size"] for trial in draw_trials(search(space=space), shared)}
    assert len(sizes) > 4
    assert min(sizes) >= unit
    assert not any(size % unit for size in sizes)


def test_suites_of_the_papers_can_be_searched():
    for suite in ("ade20k_upernet", "cityscapes_ocr"):
        config = configuration(f"suite={suite}", "search=asha", "search.trials=3")
        for _, _, chain in trainings(config):
            assert len(draw_trials(config.search, chain[-1])) == 3


def uniform(**changes) -> dict:
    return {"distribution": "uniform", "low": 0, "high": 1} | changes


def choice(*values, **changes) -> dict:
    return {"distribution": "choice", "values": list(values)} | changes


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"space": {}}, ["search.space is empty", "name a field"]),
        ({"space": {"learning_rat": uniform()}}, ["unknown field of the recipe 'learning_rat'", "learning_rate"]),
        ({"space": {"drop_path_rate": uniform(low=2)}}, ["search.space.drop_path_rate", "low is 2 and high 1"]),
        ({"space": {"drop_path_rate": uniform(high=None)}}, ["uniform needs low and high"]),
        ({"space": {"drop_path_rate": uniform(distribution="loguniform")}}, ["needs it above 0"]),
        ({"space": {"drop_path_rate": uniform(hihg=2)}}, ["search.space.drop_path_rate", "hihg", "write {"]),
        ({"space": {"drop_path_rate": 3}}, ["search.space.drop_path_rate", "write {"]),
        ({"space": {"batch_size": choice()}}, ["search.space.batch_size: values is empty"]),
        ({"space": {"batch_size": choice("many", relative=True)}}, ["multiples of 16 must be numbers"]),
        ({"space": {"layer_decay": uniform(relative=True)}}, ["relative to None"]),
        ({"space": {"iterations": choice(1, 2)}}, ["another iterations could not be compared"]),
        ({"space": {"schedule": choice("steps")}}, ["unknown schedule 'steps'"]),
        ({"trials": 0}, ["search.trials is 0"]),
        ({"grace_period": 10}, ["search.grace_period is 10, more than the 9 scores"]),
        ({"held_out": 1.0}, ["search.held_out is 1"]),
        ({"reduction_factor": 1.0}, ["search.reduction_factor is 1"]),
    ],
    ids=str,
)
def test_an_impossible_search_is_wrong_input(base, changes, parts):
    with pytest.raises(InputError) as error:
        draw_trials(search(**changes), base)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["search=asah"], ["unknown search 'asah'", "did you mean asha?"]),
        (["+search.space.learning_rat={distribution:uniform,low:0,high:1}"], ["'learning_rat'", "learning_rate"]),
        (["executor=inline"], ["a search needs Ray", "executor=ray"]),
        (["stages=[train]"], ["leave stages=[...] out"]),
        (["seeds=[0,1]"], ["one seed"]),
        (["models=[hivit_tny]"], ["hivit_tny", "hivit_tiny"]),
        (
            ["~search.space.learning_rate", "~search.space.drop_path_rate", "~search.space.batch_size"],
            ["search.space is empty", "name a field"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line(overrides, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    given = ["search=asha", "models=[hivit_tiny]", "plan=true", f"output={tmp_path}", *overrides]
    assert run.main(given) == 1
    printed, written = capsys.readouterr()
    assert not printed
    assert written.startswith("error: ")
    assert len(written.strip().splitlines()) == 1
    for part in parts:
        assert part in written


def test_a_local_cluster_is_on_the_loopback_though_ray_was_imported_before(monkeypatch):
    import ray
    from ray._private import ray_constants, services

    addresses = []
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)  # as Ray has it by default
    monkeypatch.setattr(ray, "init", lambda **settings: addresses.append(services.get_node_ip_address()))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")  # both are undone afterwards
    with connected(Cluster.local, 1):
        pass
    assert addresses == ["127.0.0.1"]


def test_without_ray_it_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not there
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main(["search=asha", "models=[hivit_tiny]", f"output={tmp_path}"]) == 1
    assert "error: a search needs Ray Tune, and Ray is not installed" in capsys.readouterr().err


def trial_record(trial, scores, status="done", **details):
    reason = None if status == "done" else "stopped early"
    samples = {"held_out_top1": scores, "iteration": [float(i + 1) for i in range(len(scores))]}
    return make_record(trial.job, status, reason, samples=samples, details=details)


def test_what_counts_as_finished(base):
    asked = search()
    trial = draw_trials(asked, base)[1]
    other = dataclasses.replace(asked, reduction_factor=2.0)
    more = dataclasses.replace(asked, trials=99)
    assert not is_finished(None, asked)
    assert is_finished(trial_record(trial, [50.0]), other)
    assert not is_finished(make_record(trial.job, "failed", "no luck"), asked)
    stopped = trial_record(trial, [5.0], "stopped", stopped_by=stopped_by(asked))
    assert is_finished(stopped, asked)
    assert is_finished(stopped, more)
    assert not is_finished(stopped, other)  # another scheduler might have let it go on
    assert is_finished(trial_record(trial, [5.0], "stopped", diverged=True), other)


@pytest.mark.parametrize("name", [Scheduler.asha, Scheduler.median, Scheduler.none])
def test_schedulers_know_what_the_ledger_has_and_never_stop_the_first_trial(base, name):
    from runners import tune

    class Running:
        def __init__(self, trial_id: str):
            self.trial_id = trial_id

    asked = search(scheduler=name, scores=3)
    others = draw_trials(asked, base)[1:]
    scheduler = tune.scheduler(asked)
    for trial, score in zip(others[:4], (50.0, 51.0, 52.0, 53.0), strict=True):
        scheduler.learn_record(trial_record(trial, [score, score + 10, score + 20]))

    def decide(number: int, score: float) -> str:
        running = Running(f"new {number} {score}")
        scheduler.on_trial_add(None, running)
        result = {"number": number, "score": score, "times": 1}
        decisions = [scheduler.on_trial_result(None, running, result) for _ in range(2)]
        assert decisions[1] == "CONTINUE"  # a worker that was started again says it twice
        assert scheduler.on_trial_result(None, running, {"number": number, "messages": []}) == "CONTINUE"
        return decisions[0]

    stop = "CONTINUE" if name is Scheduler.none else "STOP"
    assert decide(9, 60.0) == "CONTINUE"
    assert decide(10, 10.0) == stop
    assert decide(0, 10.0) == "CONTINUE"


@pytest.mark.parametrize(
    ("gpus", "status", "parts"),
    [
        ((2, 2), 1, ["needs 4 GPUs H100 together on one machine, and none has so many", "recipe.engine.processes"]),
        ((2, 4), 0, ["each trial takes 4 GPUs H100 together", "To do: 2 of 2 jobs, about", "GPU hours, on 2 machines"]),
    ],
)
def test_a_plan_says_what_trials_take_and_a_trial_is_on_one_node(gpus, status, parts, capsys, monkeypatch, tmp_path):
    nodes = [Node(str(number), 8, count, "H100") for number, count in enumerate(gpus)]
    monkeypatch.setattr(SearchSession, "_nodes", lambda *_: nodes)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    engine = "suite.benchmarks.classification.recipe.engine"
    given = [*MINIATURE, "search=asha", "search.trials=2", "models=[test_hivit]", "plan=true", f"output={tmp_path}"]
    given += ["suite.benchmarks.segmentation.stages=[cost]", "~search.space.batch_size"]
    given += [f"{engine}.processes=4", f"{engine}.gpu_type=H100", f"{engine}.gpu_fraction=1.0"]
    assert run.main(given) == status
    written = capsys.readouterr()
    for part in parts:
        assert part in " ".join((written.err if status else written.out).split())


def test_a_plan_of_several_models_has_them_one_after_the_other(capsys, monkeypatch, tmp_path):
    """Though all trials of both would have room at once."""
    monkeypatch.setattr(SearchSession, "_nodes", lambda *_: [Node("a", 64)])
    monkeypatch.setattr(plan_table, "needs", lambda *_: Needs(seconds=600.0))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    models = "models=[hivit_tiny,mit_b0]"
    given = ["search=asha", "search.trials=2", models, "plan=true", f"output={tmp_path}"]
    assert run.main([*given, "suite.benchmarks.segmentation.stages=[cost]"]) == 0
    assert "From start to end about 20 min; no order of the jobs takes less than 20 min" in capsys.readouterr().out


def test_tune_is_asked_for_the_type_of_gpu_of_a_node_that_has_all(base, monkeypatch, tmp_path):
    from runners import tune

    class Asked(Exception):
        pass

    def asked_for(work, resources):
        raise Asked(resources)

    nodes = [Node("a", 64, 4, "A100"), Node("b", 6, 2, "H100, H100-80G")]
    monkeypatch.setattr(tune, "alive_nodes", lambda: nodes)
    monkeypatch.setattr(tune.tune, "with_parameters", lambda work, **_: work)
    monkeypatch.setattr(tune.tune, "with_resources", asked_for)
    place = Workplace(tmp_path, tmp_path, "test")
    trials = draw_trials(search(), base)
    with pytest.raises(Asked) as asked:
        tune.run(trials, [], search(), place, Needs(4, 1.0, 2, "h100"), print)
    assert asked.value.args[0] == {"CPU": 6, "GPU": 2, "accelerator_type:H100": 0.001}
    with pytest.raises(InputError, match="needs 2 GPUs of the type H200"):
        tune.run(trials, [], search(), place, Needs(4, 1.0, 2, "H200"), print)


@pytest.mark.parametrize(
    ("nodes", "needs", "resources", "room"),
    [
        ([(16, 8, None)], Needs(8, 1.0), {"CPU": 2.0, "GPU": 1.0}, 8),  # no GPU is idle for want of CPUs
        ([(64, 4, None), (16, 8, None)], Needs(8, 1.0), {"CPU": 2.0, "GPU": 1.0}, 12),
        ([(8, 2, None)], Needs(4, 0.3), {"CPU": 1.2, "GPU": 0.3}, 6),
        ([(16, 0, None), (2, 0, None)], Needs(4), {"CPU": 4, "GPU": 0.0}, 4),
        ([(2, 0, None), (1, 0, None)], Needs(4), {"CPU": 2, "GPU": 0.0}, 1),
        (
            [(8, 0, None), (8, 1, "A100"), (8, 1, "H100, H100-80G"), (8, 2, "H100-NVL")],
            Needs(2, 1.0, 1, "H100"),
            {"CPU": 2, "GPU": 1.0, "accelerator_type:H100-NVL": 0.001},
            2,
        ),
    ],
)
def test_trials_take_what_jobs_of_a_suite_would(base, nodes, needs, resources, room):
    from runners import tune

    nodes = [Node(str(number), *each) for number, each in enumerate(nodes)]
    found = tune._request(draw_trials(search(trials=30), base), needs, nodes)
    assert found == (resources, room)
    assert any(tune._has(node, resources) for node in nodes)
    assert not tune._has(Node("other", 1, 8), resources | {"accelerator_type:T4": 0.001})


def test_a_search_whose_nodes_are_lost_ends(monkeypatch):
    from runners import tune

    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    errors, problems = [], [None, "a", None, "b", "c", "d", "e"]
    stop = tune._Stop(errors, lambda: problems.pop(0))
    assert [stop.stop_all() for _ in range(6)] == [False] * 6  # it waits for a node as long as a suite does
    assert stop.stop_all()
    assert isinstance(errors[0], InputError)
    assert str(errors[0]).startswith("e: nodes were lost")


def test_a_folder_that_cannot_be_written_ends_a_search_without_a_record(base, monkeypatch, tmp_path):
    """One whose disk is full for a moment does not."""
    from runners import executors, tune

    errors = [OSError(28, "No space left on device", "jobs"), NotADirectoryError(20, "Not a directory", "jobs")]

    def run_job(*_, **__):
        raise errors.pop(0)

    reported = []
    monkeypatch.setattr(executors, "PAUSE", 0.0)
    monkeypatch.setattr(tune, "run_job", run_job)
    monkeypatch.setattr(tune.tune, "report", reported.append)
    trials = {trial.number: trial for trial in draw_trials(search(), base)}
    place = Workplace(tmp_path, tmp_path, "test")
    tune._work({"number": 1}, trials, place, search())
    assert not errors
    assert isinstance(reported[0]["error"], NotADirectoryError)
    keeper = tune._Keeper(trials, search(), place, lambda *_: pytest.fail("a record"))
    stop = tune._Stop(keeper.errors, lambda: None)
    assert not stop.stop_all()
    keeper.on_trial_complete(1, [], SimpleNamespace(config={"number": 1}, last_result=reported[0]))
    assert stop.stop_all()
    assert [error.filename for error in keeper.errors] == ["jobs"]
    assert not list(Ledger(place.ledger).records())


def worked(trial, asked, place, monkeypatch) -> list[dict]:
    """What the worker of a trial reports to Tune."""
    from runners import tune

    reported = []
    monkeypatch.setattr(tune.tune, "report", reported.append)
    tune._work({"number": trial.number}, {trial.number: trial}, place, asked)
    return reported


def kept(trial, asked, place, result):
    """The record of a trial that Tune ends after this result."""
    from runners import tune

    found = []
    keeper = tune._Keeper({trial.number: trial}, asked, place, lambda trial, record, messages: found.append(record))
    ended = SimpleNamespace(config={"number": trial.number}, last_result=result)
    keeper.on_trial_complete(1, [], ended)
    if keeper.errors:
        raise keeper.errors[0]
    return found[0]


def test_a_trial_that_another_search_of_the_folder_stopped_meanwhile_is_not_run_again(base, monkeypatch, tmp_path):
    asked = search()
    trial = draw_trials(asked, base)[1]
    place = Workplace(tmp_path, tmp_path, "test")
    standing = Ledger(place.ledger).put(trial_record(trial, [5.0, 6.0], "stopped", stopped_by=stopped_by(asked)))
    measured = []

    def measure(*arguments):
        measured.append(arguments)
        return trial_record(trial, [7.0])

    monkeypatch.setattr(execute, "_measure", measure)
    monkeypatch.setattr(execute, "discard_checkpoints", lambda *_: None)
    results = worked(trial, asked, place, monkeypatch)
    assert not measured
    assert [result["score"] for result in results] == [5.0, 6.0]
    for result in results:  # the scheduler of this search may stop it at any
        assert kept(trial, asked, place, result) == standing
    monkeypatch.setattr(execute, "weights_are_there", lambda *_: True)
    other = dataclasses.replace(asked, reduction_factor=2.0)  # it might let it go on
    assert kept(trial, other, place, worked(trial, other, place, monkeypatch)[-1]).done
    assert len(measured) == 1


def test_a_trial_that_was_taken_over_and_has_no_record_yet_is_told(base, monkeypatch, tmp_path):
    trial = draw_trials(search(), base)[1]
    place = Workplace(tmp_path, tmp_path, "test")

    def measure(*_):
        raise execute.Superseded("another worker has taken it over (node 1)")

    monkeypatch.setattr(execute, "_measure", measure)
    (result,) = worked(trial, search(), place, monkeypatch)
    record = kept(trial, search(), place, result)
    assert (record.status, record.reason) == ("failed", "another worker has taken it over (node 1)")
    assert not list(Ledger(place.ledger).records())
