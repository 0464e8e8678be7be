"""The papers' ablations: the accuracy that a paper reports for each row against the multiply-accumulates counted here.

An ablation is a table of which a row says so (`ablation` under `other`, see `results/papers.py`); arrows lead to each
row from the one that it changes.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .labels import Label, place, shorten
from .paper_figures import HOLLOW
from .rebuilt import RebuiltRow, RebuiltTable
from .style import (
    Look,
    Sketch,
    add_footer,
    add_titles,
    blank,
    diameter,
    handle,
    lay_out,
    listed,
    looks_of,
    set_log_ticks,
    slug,
    themed,
)

NOUNS = {"top1": "Top-1 accuracy", "miou": "Mean IoU"}
ARROW = "0.65"
CROWD = 8  # With more points than this in a panel the figure is higher.
LETTERS = 30  # of a line of a label
WIDE = 5.0  # A panel whose largest cost is so many times its smallest one has a logarithmic axis.


@dataclass(frozen=True)
class Point:
    """A row in a panel: cost in 1e9 multiply-accumulates, accuracies in percent."""

    row: int
    label: str
    macs: float
    reported: float
    trained: float | None  # the accuracy of a training here
    changes: int | None  # the row that this one changes
    family: str
    params: float  # in millions


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the rows with one kind of accuracy on one data set."""

    score: str  # column of the accuracy
    subtitle: str  # what all points have in common
    points: list[Point]


@dataclass(frozen=True)
class Ablation:
    """The content of a figure before anything is drawn."""

    name: str
    title: str
    panels: list[Panel]
    caption: str


def ablations(tables: Sequence[RebuiltTable]) -> list[Ablation]:
    """The ablations with two rows or more that have a reported accuracy and a counted cost."""
    made = []
    for table in tables:
        topic = next((line.row.other["ablation"] for line in table.rows if "ablation" in line.row.other), "")
        if not topic:
            continue
        panels, left_out = [], []
        for (score, dataset), lines in _groups(table).items():
            counted = [line for line in lines if _counted(line)]
            if len(counted) > 1:
                panels.append(_panel(score, counted))
                left_out.append((score, [line.row.label for line in lines if line not in counted]))
            else:
                left_out.append(("", [" on ".join(filter(None, (NOUNS[score], dataset)))]))
        if panels:
            trained = any(point.trained is not None for panel in panels for point in panel.points)
            title = f"{table.title or table.paper}, Table {table.table}: {topic}"
            title += "" if trained else " (none trained here)"
            name = f"papers_{slug(f'{table.paper} table {table.table}')}"
            made.append(Ablation(name, title, panels, _caption(panels, left_out, trained)))
    return made


def sketches(tables: Sequence[RebuiltTable], families: Sequence[str]) -> Iterator[Sketch]:
    """A figure of each ablation. `families` are those of all records."""
    for ablation in ablations(tables):
        yield Sketch(ablation.name, ablation.title, "papers", _describe(ablation), _draw(ablation, families))


def _groups(table: RebuiltTable) -> dict[tuple[str, str], list[RebuiltRow]]:
    """The rows by accuracy and data set."""
    groups: dict[tuple[str, str], list[RebuiltRow]] = {}
    for line in table.rows:
        for score in NOUNS:
            if not line.row.derived and line.row.number(score) is not None:
                groups.setdefault((score, line.row.texts.get("dataset", "")), []).append(line)
    return groups


def _counted(line: RebuiltRow) -> bool:
    found = line.cost.metrics if line.cost is not None and line.cost.done else {}
    return all(found.get(metric, 0) > 0 for metric in ("macs", "params"))


def _panel(score: str, lines: Sequence[RebuiltRow]) -> Panel:
    points = [
        Point(
            row=line.row.row,
            label=label,
            macs=line.cost.metrics["macs"] / 1e9,
            reported=line.row.number(score),
            trained=line.cells[score].measured.value,
            changes=line.row.changes,
            family=line.cost.family,
            params=line.cost.metrics["params"] / 1e6,
        )
        for line, label in zip(lines, _labels(lines), strict=True)
    ]
    first = lines[0].row
    sizes = {line.row.size_of_cost for line in lines}
    height, width = first.size_of_cost
    size = f"MACs at {height}x{width}" if len(sizes) == 1 else "MACs at each row's size"
    heads = {line.row.texts.get("framework") or line.row.head for line in lines}
    head = heads.pop() if len(heads) == 1 else ""
    return Panel(score, ", ".join(filter(None, (first.texts.get("dataset"), head, size))), points)


def _labels(lines: Sequence[RebuiltRow]) -> list[str]:
    """The rows' own labels; where several are alike, with what is different in their settings."""
    labels = [line.row.label for line in lines]
    parts = [[part.strip() for part in line.row.texts.get("setting", "").split(",")] for line in lines]
    named = []
    for label, own in zip(labels, parts, strict=True):
        alike = [other for name, other in zip(labels, parts, strict=True) if name == label]
        different = ", ".join(part for part in own if not all(part in other for other in alike))
        alone = len(alike) == len(lines)  # All have this label: it tells nothing.
        named.append(different if alone and different else "\n".join(filter(None, (label, different))))
    return named


def _caption(panels: Sequence[Panel], left_out: Sequence[tuple[str, list[str]]], trained: bool) -> str:
    """The sentences below a figure. `left_out` are the score of a panel (or none) and what is missing there."""

    def which(score: str) -> str:
        return f" ({NOUNS[score][0].lower() + NOUNS[score][1:]})" if score and len(panels) > 1 else ""

    params = []
    for panel in panels:
        low, high = (f"{end(point.params for point in panel.points):.1f}" for end in (min, max))
        params.append((f"{low} million" if low == high else f"{low} to {high} million") + which(panel.score))
    parts = [] if trained else ["None of these networks was trained here."]
    parts.append(f"Parameters: {', '.join(params)}.")
    if missing := [listed(names) + which(score) for score, names in left_out if names]:
        parts.append(f"Not drawn, because the cost was not counted: {', '.join(missing)}.")
    return " ".join(parts)


def _describe(ablation: Ablation) -> str:
    """A figure in words, for those who do not see it."""
    parts = []
    for panel in ablation.panels:
        points = [f"{p.label} {p.reported:g} % at {p.macs:.4g} GMACs".replace("\n", ", ") for p in panel.points]
        parts.append(f"{NOUNS[panel.score]} as reported, {panel.subtitle}: {'; '.join(points)}.")
    return f"{ablation.title}. {' '.join(parts)} {ablation.caption}"


def _draw(ablation: Ablation, families: Sequence[str]) -> Figure:
    with themed():
        drawn, unlabelled = _compose(ablation, families, [])
        if unlabelled:  # Their names need room in the caption, which moves everything.
            drawn, _ = _compose(ablation, families, unlabelled)
    return drawn


def _compose(ablation: Ablation, families: Sequence[str], unlabelled: Sequence[str]) -> tuple[Figure, list[str]]:
    """The figure, and the names that found no place for a label."""
    size, single = 8.5, len(ablation.panels) == 1
    looks = looks_of(families, [point.family for panel in ablation.panels for point in panel.points])
    figure = blank(5.2 if max(len(panel.points) for panel in ablation.panels) > CROWD else 4.4)
    caption = ablation.caption
    caption += f" Without a label for lack of room: {listed(unlabelled)}." if unlabelled else ""
    grid = figure.subplots(1, len(ablation.panels), squeeze=False).ravel()
    bottom = add_footer(figure, _handles(ablation.panels, size), caption, size - 1)
    for axes, panel in zip(grid, ablation.panels, strict=True):
        add_titles(axes, f"{NOUNS[panel.score]} as the paper reports it", panel.subtitle, size)
        _draw_panel(axes, panel, looks, size)
    figure.suptitle(ablation.title, x=0.015, ha="left", fontsize=size + 1.5, fontweight="bold")
    lay_out(figure, bottom)
    left_out = [
        name
        for axes, panel in zip(grid, ablation.panels, strict=True)
        for name in _draw_labels(axes, panel, looks, size - (0.5 if single else 1))
    ]
    return figure, list(dict.fromkeys(left_out))


def _handles(panels: Sequence[Panel], size: float) -> list[Line2D]:
    dot = {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markersize": size * 0.8}
    handles = [handle("accuracy as the paper reports it, at the cost counted here", **dot)]
    if any(_arrows(panel) for panel in panels):
        handles.append(handle("from a row to the one that changes it", ARROW, marker=">", markersize=size * 0.5))
    if any(point.trained is not None for panel in panels for point in panel.points):
        handles.append(handle("trained here", "0.1", marker="*", linestyle="", markersize=size))
    return handles


def _arrows(panel: Panel) -> list[tuple[Point, Point]]:
    """Each row with the one that it changes, that one first."""
    by_row = {point.row: point for point in panel.points}
    return [(by_row[point.changes], point) for point in panel.points if point.changes in by_row]


def _draw_panel(axes: Axes, panel: Panel, looks: Mapping[str, Look], size: float) -> None:
    for point in panel.points:
        colour, marker = looks[point.family]
        style = {"marker": marker if marker in HOLLOW else "o", "markersize": diameter(size)}
        axes.plot(point.macs, point.reported, color=colour, linestyle="", markerfacecolor="white", zorder=3, **style)
        if point.trained is not None:
            axes.plot(point.macs, point.trained, color="0.1", marker="*", linestyle="", markersize=size, zorder=3)
    shrink = diameter(size) / 2 + 1
    for start, end in _arrows(panel):
        line = {"arrowstyle": "-|>", "color": ARROW, "linewidth": 0.8, "shrinkA": shrink, "shrinkB": shrink}
        ends = {"xy": (end.macs, end.reported), "xytext": (start.macs, start.reported)}
        axes.annotate("", **ends, arrowprops=line | {"mutation_scale": 7}, zorder=2)
    costs = [point.macs for point in panel.points]
    if max(costs) / min(costs) > WIDE:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis, max(costs) / min(costs))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.margins(x=0.2, y=0.14)
    axes.set_xlabel("MACs of one image, counted here (billions)", fontsize=size)
    axes.set_ylabel(f"{NOUNS[panel.score]} (%)", fontsize=size)
    axes.tick_params(labelsize=size - 1, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_labels(axes: Axes, panel: Panel, looks: Mapping[str, Look], size: float) -> list[str]:
    """Name the points; returns the names that found no place."""
    labels = [Label(_wrapped(p.label), p.macs, p.reported, looks[p.family][0]) for p in panel.points]
    trained = [(point.macs, point.trained) for point in panel.points if point.trained is not None]
    pixels = axes.transData.transform(trained) if trained else np.empty((0, 2))
    half = diameter(size) * axes.figure.dpi / 72 / 2
    lines = [axes.transData.transform([(p.macs, p.reported) for p in pair]) for pair in _arrows(panel)]
    obstacles = [np.concatenate([pixel - half, pixel + half]) for pixel in pixels]
    sizes = (size, size - 0.75, size - 1.5)
    told = {"obstacles": obstacles, "lines": lines, "marker_size": diameter(size + 1), "sizes": sizes, "own": True}
    return [name.replace("\n", " ") for name in place(axes, labels, **told)[1]]


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.fill(shorten(line, 2 * LETTERS), LETTERS) for line in label.split("\n"))
