"""The trials of a search: recipes drawn from a space, each a job with a key of its own. Nothing here needs Ray.

The values of trial n depend on the search's seed, n and the field's name alone. So a search that is started again, with
more trials too, draws the same ones, and finds those that have run in the ledger.
"""

from __future__ import annotations

import dataclasses
import math
import typing
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from benchmarks.errors import InputError, choose
from benchmarks.job import SEARCH, Job, Recipe, Scoring
from results.record import Record
from runners.config import Distribution, Range, Scheduler, Search
from runners.plan import check_recipe

# What trials are compared at, or what changes nothing in the outcome.
NOT_SEARCHED = ("iterations", "evaluation", "checkpoint_every", "threads", "workers", "engine")
NOT_SEARCHED += ("validate_every", "evaluate_best")
DRAWS_PER_TRIAL = 50  # after so many draws of what was drawn before, a space counts as used up


@dataclasses.dataclass(frozen=True)
class Trial:
    """One recipe of a search; 0 is the recipe as it stands."""

    number: int
    values: Mapping[str, Any]  # the searched fields
    job: Job

    @property
    def key(self) -> str:
        return self.job.key

    @property
    def title(self) -> str:
        return f"trial {self.number} of {self.job.label} ({self.job.task})"


def draw_trials(search: Search, training: Job) -> list[Trial]:
    """The trials of a search for the recipe of `training`; fewer than asked for where the space has no more.

    A batch of another size sees as many images: its iterations, and those of its warm-up, are scaled. A drawn batch is
    rounded to what the engine's processes and forwards can share (pairs, with Mixup), and so depends on them, too.

    Raises:
        InputError: the search or its space is impossible, or a drawn recipe is.
    """
    space = _checked(search, training)
    found: dict[str, Trial] = {}
    drawn: list[dict[str, Any]] = []
    for draw in range(search.trials * DRAWS_PER_TRIAL):
        if len(found) == search.trials:
            break
        values = _values(space, search.seed, training.recipe, draw)
        if values in drawn:
            continue
        drawn.append(values)
        recipe = _with(training.recipe, values)
        check_recipe(recipe, f"search, trial {len(found)} of {training.label}: recipe")
        scoring = Scoring(held_out=search.held_out, times=search.scores)
        job = dataclasses.replace(training, stage=SEARCH, recipe=recipe, scoring=scoring)
        found.setdefault(job.key, Trial(len(found), values, job))  # 1 and 1.0 are one recipe
    return list(found.values())


def stopped_by(search: Search) -> dict[str, Any]:
    """What decides which trials are stopped; a stopped trial's record says it."""
    settings: dict[str, Any] = {"scheduler": search.scheduler.value, "grace_period": search.grace_period}
    if search.scheduler is Scheduler.asha:
        settings["reduction_factor"] = search.reduction_factor
    return settings


def is_finished(record: Record | None, search: Search) -> bool:
    """Whether a trial with this record is not to be run again: it is done, has diverged, or was stopped by this search.

    What another scheduler stopped, or failed or was blocked, is run again.
    """
    if record is None or record.status != "stopped":
        return record is not None and record.done
    return record.details.get("diverged", False) or record.details.get("stopped_by") == stopped_by(search)


def _checked(search: Search, training: Job) -> dict[str, Range]:
    """The search's space. Raises InputError for a search, or a field of its space, that is impossible."""
    if not search.space:
        raise InputError("search.space is empty; name a field of the recipe, as runners/conf/search/asha.yaml does")
    for name in ("trials", "scores", "grace_period", "concurrent"):
        value = getattr(search, name)
        if value is not None and value < 1:
            raise InputError(f"search.{name} is {value}; it must be at least 1")
    if search.grace_period > search.scores:
        raise InputError(f"search.grace_period is {search.grace_period}, more than the {search.scores} scores")
    if not 0 < search.held_out < 1:
        raise InputError(f"search.held_out is {search.held_out}; it must be a share, above 0 and below 1")
    if search.reduction_factor <= 1:
        raise InputError(f"search.reduction_factor is {search.reduction_factor}; it must be above 1")
    known = [field.name for field in dataclasses.fields(Recipe)]
    space = {}
    for name, given in search.space.items():
        choose("field of the recipe", name, known, "search.space")
        if name in NOT_SEARCHED:
            raise InputError(f"search.space.{name}: trials with another {name} could not be compared; leave it out")
        if name in training.model_config:
            raise InputError(
                f"search.space.{name}: the model {training.label} sets its own {name} in config; leave one of them out"
            )
        try:
            space[name] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Range), given))
            _check_range(space[name], getattr(training.recipe, name), f"search.space.{name}")
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise InputError(
                f"search.space.{name}: {str(error).splitlines()[0]}; write {{distribution: uniform, low: 0, high: 1}} "
                "or {distribution: choice, values: [1, 2]}"
            ) from error
    return space


def _check_range(spread: Range, default: Any, where: str) -> None:
    if spread.relative and not _is_number(default):
        raise InputError(f"{where}: relative to {default}, which is no number; give the values themselves")
    if spread.distribution is Distribution.choice:
        if not spread.values:
            raise InputError(f"{where}: values is empty; name at least one value to choose")
        if spread.relative and not all(map(_is_number, spread.values)):
            raise InputError(f"{where}: values are {list(spread.values)}; multiples of {default} must be numbers")
        return
    if spread.low is None or spread.high is None:
        raise InputError(f"{where}: {spread.distribution.value} needs low and high")
    if spread.low >= spread.high:
        raise InputError(f"{where}: low is {spread.low:g} and high {spread.high:g}; low must be below high")
    if spread.distribution is Distribution.loguniform and spread.low <= 0:
        raise InputError(f"{where}: low is {spread.low:g}; loguniform needs it above 0")


def _values(space: Mapping[str, Range], seed: int, recipe: Recipe, draw: int) -> dict[str, Any]:
    defaults = {name: getattr(recipe, name) for name in space}
    if draw == 0:
        return defaults
    kinds = typing.get_type_hints(Recipe)
    values = {}
    for name, spread in space.items():
        dice = np.random.default_rng([seed, draw, zlib.crc32(name.encode())])
        value = _draw(spread, dice)
        if spread.relative:
            value *= defaults[name]
        if _is_number(value) and kinds[name] in (int, int | None):
            unit = 1
            if name == "batch_size":
                pairs = recipe.mixup or "mixup" in space
                unit = recipe.engine.processes * recipe.engine.accumulate * (2 if pairs else 1)
            value = unit * max(1, round(value / unit))
        elif isinstance(value, float):
            value = float(f"{value:.3g}")  # more digits would only be hard to read
        values[name] = value
    return values


def _draw(spread: Range, dice: np.random.Generator) -> Any:
    if spread.distribution is Distribution.choice:
        return spread.values[dice.integers(len(spread.values))]
    if spread.distribution is Distribution.loguniform:
        return math.exp(dice.uniform(math.log(spread.low), math.log(spread.high)))
    return float(dice.uniform(spread.low, spread.high))


def _with(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`recipe` with `values`, of the types that its fields have, and as many images seen; it validates nothing."""
    recipe = dataclasses.replace(recipe, validate_every=0, evaluate_best=False)
    changed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(recipe), dict(values)))
    ratio = recipe.batch_size / changed.batch_size
    if ratio != 1:
        changed.iterations = max(1, round(recipe.iterations * ratio))
        if "warmup_iterations" not in values:
            changed.warmup_iterations = round(recipe.warmup_iterations * ratio)
    return changed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
