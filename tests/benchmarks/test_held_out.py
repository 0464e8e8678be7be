"""A trial of a search: what it trains on, what scores it, and that scoring changes nothing."""

from __future__ import annotations

import dataclasses

import psutil
import pytest
from training_support import SENSITIVE, job, with_engine

from benchmarks.errors import InputError
from benchmarks.held_out import scored_at, split
from benchmarks.job import SEARCH, Engine, Scoring
from runners.execute import Workplace, run_job


def trial(task: str, times: int = 4, held_out: float = 0.1, **changes):
    return job(task, stage=SEARCH, scoring=Scoring(held_out=held_out, times=times), **changes)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def workplace(tmp_path, data_root, name: str = "output") -> Workplace:
    return Workplace(tmp_path / name, data_root, "test")


def test_no_image_trains_and_scores():
    seen, held_out = split(trial("classification"), 40)
    assert sorted(seen + held_out) == list(range(40))
    assert len(held_out) == 4
    assert split(trial("classification", seed=3), 40) == (seen, held_out)  # the same for all trials and seeds
    for count in (4, 0):
        with pytest.raises(InputError, match="held_out"):
            split(trial("classification"), count)


def test_scores_are_evenly_over_a_training_and_at_its_end():
    assert scored_at(100, 9) == [12, 23, 34, 45, 56, 67, 78, 89, 100]
    assert scored_at(12, 3) == [4, 8, 12]
    assert scored_at(2, 9) == [1, 2]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_scoring_changes_no_weight(task, tmp_path, data_root):
    often = run_job(trial(task), workplace(tmp_path, data_root, "often"))[0]
    once = run_job(trial(task, times=1), workplace(tmp_path, data_root, "once"))[0]
    name = "held_out_top1" if task == "classification" else "held_out_mIoU"
    assert often.done, often.reason
    assert often.key != once.key
    assert often.samples["iteration"] == [2.0, 4.0, 6.0, 8.0]
    assert once.samples == {name: [often.metrics[name]], "iteration": [8.0]}
    assert often.details["weights_sha256"] == once.details["weights_sha256"]
    assert often.details["held_out_images"] == 4
    assert 0 <= often.metrics[name] <= 100


def test_two_processes_score_as_one_and_end_with_the_trial(tmp_path, data_root):
    """Eleven images, which two cannot share evenly. A scheduler ends a trial while it reports a score."""
    one = with_engine(trial("classification", held_out=0.275), **SENSITIVE)
    expected = run_job(one, workplace(tmp_path, data_root, "one"))[0]
    assert expected.details["held_out_images"] == 11
    assert len(set(expected.samples["held_out_top1"])) > 1
    before, scores = set(psutil.Process().children(recursive=True)), []

    def watch(state):
        scores[:] = state.get("scores", scores)
        if len(scores) == 3:
            assert len(set(psutil.Process().children(recursive=True)) - before) >= 2
            raise SystemExit

    two = with_engine(one, Engine(processes=2))
    with pytest.raises(SystemExit):
        run_job(two, workplace(tmp_path, data_root, "two"), watch)
    assert [score for _, score in scores] == pytest.approx(expected.samples["held_out_top1"][:3])
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [each for each in left if "spawn_main" in str(each.cmdline())]


def test_a_loss_that_is_not_a_number_is_an_outcome_of_the_trial(tmp_path, data_root):
    broken = trial("classification")
    recipe = dataclasses.replace(broken.recipe, learning_rate=1e30, clip_gradient_norm=None)
    record, _ = run_job(dataclasses.replace(broken, recipe=recipe), workplace(tmp_path, data_root))
    assert (record.status, record.details) == ("stopped", {"diverged": True})
    assert "the loss became" in record.reason
