"""Looks at the validation images on the way: they change no training, and the best weights survive a kill."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_support import SENSITIVE, job, kill_in_training, with_engine

from benchmarks import distributed
from benchmarks.engine import Context, Outcome
from benchmarks.errors import InputError
from benchmarks.job import Engine, Job, Recipe
from benchmarks.measure import measure
from results.ledger import Ledger
from results.rows import join
from runners.config import Benchmark, Config, ModelEntry, Suite
from runners.execute import Workplace, run_job, weights_are_there
from runners.plan import make_jobs

SCORES = {"classification": "top1", "segmentation": "mIoU"}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


class Killed(BaseException):
    """Stands for a kill in the middle of a training: nothing catches it."""


def looking(task: str, **recipe) -> Job:
    return with_engine(job(task), validate_every=2, iterations=7, **recipe)


def evaluation(trained: Job, **recipe) -> Job:
    return with_engine(dataclasses.replace(trained, stage="evaluate", depends_on=(trained.key,)), **recipe)


def curve(output: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of TensorBoard's curve `name`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = output.rglob("events.out.tfevents.*")
    return [(event.step, event.value) for event in EventAccumulator(str(events)).Reload().Scalars(name)]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_looks_change_no_weight_and_are_what_an_evaluation_finds(task, data_root, tmp_path):
    averaged = {"ema": {"decay": 0.7}} if task == "classification" else {}
    asked = looking(task, **averaged)
    unseen = measure(with_engine(asked, validate_every=0), Context(tmp_path / "unseen", data_root))
    states: list[dict] = []
    context = Context(tmp_path / "looking", data_root, progress=states.append)
    trained = measure(asked, context)
    assert trained.details["weights_sha256"] == unseen.details["weights_sha256"]
    assert trained.metrics == unseen.metrics
    # One look every two iterations, and one at the end: the last is the score of the last weights.
    looks = curve(tmp_path / "looking", SCORES[task])
    assert [step for step, _ in looks] == [2, 4, 6, 7]
    best = trained.details["best"]
    assert best["looks"] == 4
    assert best["metric"] == SCORES[task]
    assert best["score"] == pytest.approx(max(score for _, score in looks))
    assert best["iteration"] == next(step for step, score in looks if score == max(score for _, score in looks))
    last = measure(evaluation(asked), context, trained.artifacts)
    assert last.metrics[SCORES[task]] == pytest.approx(looks[-1][1])
    assert last.notes == []
    chosen = measure(evaluation(asked, evaluate_best=True), context, trained.artifacts)
    assert chosen.metrics[SCORES[task]] == best["score"]
    assert chosen.notes == ["the score is the best of 4 looks at the validation images: a chosen maximum"]
    assert f"iteration {best['iteration']}, the best of 4 looks" in chosen.details["evaluated"]
    with safe_open(tmp_path / "looking" / trained.artifacts["best"], framework="pt") as file:
        assert json.loads(file.metadata()["best"]) == {name: best[name] for name in ("iteration", "metric", "score")}
    # Progress is the training's, and never goes back.
    fractions = [state["fraction"] for state in states if state["text"] != "evaluating"]
    assert fractions == sorted(fractions)
    assert any(state["text"].startswith("validating: ") for state in states)


def same(found: Outcome, expected: Outcome, outputs: tuple[Path, Path]) -> None:
    assert found.details["weights_sha256"] == expected.details["weights_sha256"]
    assert found.details["best"] == expected.details["best"]
    assert found.metrics == expected.metrics
    best = [
        load_file(output / outcome.artifacts["best"])
        for output, outcome in zip(outputs, (found, expected), strict=True)
    ]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])


@pytest.mark.parametrize("text", ["loss", "validating"])
def test_a_kill_between_a_checkpoint_and_its_look_costs_nothing(text, data_root, tmp_path):
    """Checkpoints are those of iterations 3 and 6; so is a look, and the file of the best may be one of later."""
    asked = with_engine(looking("classification"), validate_every=3)
    whole = measure(asked, Context(tmp_path / "whole", data_root))

    def kill(state):
        late = state["fraction"] > (0.8 if text == "validating" else 0.9)
        if state["text"].startswith(text) and late:
            raise Killed

    broken = Context(tmp_path / "broken", data_root, progress=kill)
    with pytest.raises(Killed):
        measure(asked, broken)
    if text == "loss":  # what another course, of which no checkpoint knows, would have left
        for file in (tmp_path / "broken").rglob("best.safetensors"):
            file.write_bytes(b"of later")
    resumed = measure(asked, Context(tmp_path / "broken", data_root))
    assert resumed.details["resumed_from"] == "iter_6.pth"
    same(resumed, whole, (tmp_path / "broken", tmp_path / "whole"))


def test_killed_at_any_moment_two_processes_keep_the_same_best(data_root, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(distributed.multiprocessing, "get_context", lambda kind: fork)
    # A model with batch norms, whose statistics differ between processes: the first's are those that are kept.
    two = job("classification", model="test_mit", label="test_mit")
    two = with_engine(
        two, Engine(processes=2), **SENSITIVE, iterations=12, checkpoint_every=1, validate_every=2, evaluate_best=True
    )
    whole = measure(two, Context(tmp_path / "whole", data_root))
    dice = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")  # shown by pytest when the test fails
    workplace = Workplace(tmp_path / "broken", data_root, "test")
    kill_in_training(two, workplace, dice)
    record, _ = run_job(two, workplace)
    same(record, whole, (tmp_path / "broken", tmp_path / "whole"))
    one = measure(with_engine(evaluation(two), Engine()), Context(tmp_path / "broken", data_root), record.artifacts)
    assert one.metrics["top1"] == pytest.approx(record.details["best"]["score"])
    # Without its best weights a training is not finished.
    assert weights_are_there(record, workplace.output)
    (workplace.output / record.artifacts["best"]).write_bytes(b"damaged")
    assert not weights_are_there(record, workplace.output)


def test_a_training_and_its_two_evaluations_are_rows(data_root, tmp_path):
    trained = looking("classification")
    workplace = Workplace(tmp_path, data_root, "test")
    jobs = [trained, evaluation(trained), evaluation(trained, evaluate_best=True)]
    assert len({asked.key for asked in jobs}) == 3
    assert all(run_job(asked, workplace)[0].done for asked in jobs)
    rows = join(Ledger(workplace.ledger).records(), "classification")
    assert [row.metric.status for row in rows] == ["done", "done"]
    assert sum(any("a chosen maximum" in note for note in row.notes) for row in rows) == 1


def test_keys():
    """Looks make another training, since they leave another file; which weights are evaluated is an evaluation's."""
    plain = job("classification")
    assert with_engine(plain, validate_every=2).key != plain.key
    assert with_engine(plain, evaluation={"crop_pct": 1.0}).key == plain.key
    seen = with_engine(plain, validate_every=2)
    assert with_engine(seen, evaluate_best=True).key == seen.key
    assert with_engine(seen, evaluation={"crop_pct": 1.0}).key != seen.key
    assert evaluation(seen).key != evaluation(seen, evaluate_best=True).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": Recipe(validate_every=-1)}, "recipe.validate_every is -1; it must be at least 1, or 0 for never"),
        ({"recipe": Recipe(evaluate_best=True)}, "recipe.evaluate_best needs validate_every"),
        (
            {"recipe": Recipe(validate_every=5), "pretraining": {"test_hivit_mae": ModelEntry()}},
            "pretraining test_hivit_mae: recipe.validate_every wants a score, which a pretraining has not; set it to 0",
        ),
    ],
)
def test_impossible_settings_are_one_line(changes, message):
    settings = {"task": "classification", "data": "digit_scenes_classification", "input_size": [64, 64]}
    benchmark = Benchmark(**settings, models={"test_hivit": ModelEntry()}, **changes)
    stages = ["pretrain", "train", "evaluate"]
    with pytest.raises(InputError, match=message):
        make_jobs(Config(suite=Suite("small", title="Small", stages=stages, benchmarks={"a": benchmark})))
