"""The outcome of a search for a better recipe: its trials as a table (CSV) and as a plot of score against setting."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .files import write_atomic
from .record import Record
from .rows import METRIC
from .style import Plot, Sketch, add_footer, add_titles, blank, handle, lay_out, set_log_ticks, themed, write

FINISHED, STOPPED, REFERENCE, BEST = "#0060a8", "0.55", "#c44e00", "#00795a"
LOOKS = {
    "finished": {"marker": "o", "color": FINISHED, "s": 36, "zorder": 3},
    "stopped": {"marker": "o", "facecolors": "none", "edgecolors": STOPPED, "s": 36, "zorder": 2},
    "reference": {"marker": "D", "color": REFERENCE, "s": 42, "zorder": 4},
    "best": {"marker": "*", "color": BEST, "s": 130, "zorder": 5},
}
SIZE = 9.0  # points


@dataclass(frozen=True)
class Finding:
    """One trial. `values` are those of the searched fields; trial 0 is the recipe as it stood."""

    number: int
    values: Mapping[str, Any]
    iterations: int  # of its whole training
    record: Record | None  # None: it has not run

    @property
    def score(self) -> float | None:
        """The latest score on held-out training images, percent."""
        if self.record is None:
            return None
        return self.record.metrics.get(f"held_out_{METRIC[self.record.task]}")

    @property
    def scored_at(self) -> int | None:
        """The iteration of that score."""
        return None if self.score is None else int(self.record.metrics["iterations"])

    @property
    def finished(self) -> bool:
        """Whether it trained to its end: only then can its score be compared with that of another."""
        return self.record is not None and self.record.done

    @property
    def state(self) -> str:
        """In a word or two; never "finished" for a trial that was stopped."""
        if self.record is None:
            return "not run"
        if self.record.status == "stopped":
            return "diverged" if self.record.details.get("diverged") else "stopped early"
        return "finished" if self.record.done else self.record.status


def best(findings: Sequence[Finding]) -> Finding | None:
    """The finished trial with the highest score, the first of equals; None where no trial has finished."""
    finished = [finding for finding in findings if finding.finished and finding.score is not None]
    return max(finished, key=lambda finding: (finding.score, -finding.number), default=None)


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Finished trials, best first; then the stopped ones, the longest first; then those without a score."""
    return sorted(
        findings,
        key=lambda finding: (
            not finding.finished,
            finding.score is None,
            0.0 if finding.score is None or finding.finished else -finding.scored_at / finding.iterations,
            -(finding.score or 0.0),
            finding.number,
        ),
    )


def shown(value: Any) -> str:
    """A value of a recipe, for people."""
    return f"{value:g}" if isinstance(value, float) else "default" if value is None else str(value)


def write_csv(findings: Sequence[Finding], path: Path) -> None:
    """Writes the trials, `ranked`. What was not measured is empty; `state` and `reason` say why."""
    fields = list(findings[0].values)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "state", *fields, "score", "scored_at_iteration", "iterations", "reason", "job"])
    for finding in ranked(findings):
        record = finding.record
        values = ["" if value is None else value for value in finding.values.values()]
        score = "" if finding.score is None else round(finding.score, 4)
        reason = (record.reason or "") if record is not None else ""
        key = "" if record is None else record.key
        table.writerow(
            [finding.number, finding.state, *values, score, finding.scored_at, finding.iterations, reason, key]
        )
    write_atomic(path, text.getvalue())


def draw(findings: Sequence[Finding], folder: Path, title: str, subtitle: str) -> Plot | None:
    """The score against each searched field, as `search.png` and `search.svg` in `folder`; None without a score."""
    scored = [finding for finding in findings if finding.score is not None]
    if not scored:
        return None
    fields = list(scored[0].values)
    metric = METRIC[scored[0].record.task]
    columns = min(3, len(fields))
    lines = -(-len(fields) // columns)
    with themed():
        figure = blank(1.1 + 2.7 * lines)
        handles = _legend(scored)
        without = len(findings) - len(scored)
        caption = f"{without} of {len(findings)} trials have no score." if without else ""
        bottom = add_footer(figure, handles, caption, SIZE - 1)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes in grid[len(fields) :]:
            axes.remove()
        for number, (axes, name) in enumerate(zip(grid, fields, strict=False)):
            _draw_field(axes, scored, name)
            if number % columns == 0:
                axes.yaxis.set_major_formatter(
                    FuncFormatter(lambda value, _: f"{value:g}" if 0 <= value <= 100 else "")
                )
                axes.set_ylabel(f"held-out {metric} (%)", fontsize=SIZE)
        add_titles(grid[0], title, subtitle, SIZE, single=True)
        lay_out(figure, bottom)
    alt = f"{title}: the held-out {metric} of {len(scored)} trials against {', '.join(fields)}."
    return write(Sketch("search", title, "", alt, figure), folder)


def _legend(scored: Sequence[Finding]) -> list[Line2D]:
    """What there is in the plot."""
    winner = best(scored)
    reference = "the recipe as it stands" + (", the best" if winner is not None and winner.number == 0 else "")
    entries = {
        "finished": ("finished", FINISHED, {"marker": "o"}),
        "stopped": ("stopped early: its last score", STOPPED, {"marker": "o", "fillstyle": "none"}),
        "reference": (reference, REFERENCE, {"marker": "D"}),
        "best": ("best", BEST, {"marker": "*", "markersize": 10}),
    }
    kinds = {_kind(finding, winner) for finding in scored}
    return [
        handle(label, colour, **{"linestyle": "", "markersize": 6} | style)
        for kind, (label, colour, style) in entries.items()
        if kind in kinds
    ]


def _kind(finding: Finding, winner: Finding | None) -> str:
    """Which of `LOOKS` a trial has."""
    if finding.number == 0:
        return "reference"
    if finding is winner:
        return "best"
    return "finished" if finding.finished else "stopped"


def _percent(value: float, position: int) -> str:
    return f"{value:g}" if 0 <= value <= 100 else ""


def _draw_field(axes: Axes, scored: Sequence[Finding], name: str) -> None:
    values = [finding.values[name] for finding in scored]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    ticks = list(dict.fromkeys(sorted(values) if numbers else map(shown, values)))
    few = not numbers or (len(ticks) <= 4 and all(isinstance(value, int) for value in values))
    places = [ticks.index(value if numbers else shown(value)) for value in values] if few else values
    winner = best(scored)
    for finding, x in zip(scored, places, strict=True):
        axes.scatter([x], [finding.score], **LOOKS[_kind(finding, winner)])
    if few:
        axes.set_xticks(range(len(ticks)), [shown(tick) for tick in ticks])
        axes.set_xlim(-0.6, len(ticks) - 0.4)
    elif min(values) > 0 and max(values) / min(values) > 8:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis, float(np.max(values) / np.min(values)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(name.replace("_", " "), fontsize=SIZE)
    axes.tick_params(labelsize=SIZE - 1, length=0)
    seaborn.despine(ax=axes)
