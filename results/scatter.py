"""Accuracy against cost: a panel per task, data set and cost, with its Pareto front and a name at every point."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .labels import Label, place, shorten
from .record import TASKS, Record
from .rows import METRIC, Row, join, labels
from .style import (
    FAMILIES,
    Look,
    Sketch,
    add_footer,
    add_titles,
    blank,
    diameter,
    family_handles,
    handle,
    lay_out,
    listed,
    looks_of,
    set_log_ticks,
    slug,
    themed,
)

RING = {"marker": "o", "markerfacecolor": "none", "markersize": 9}  # around each point of a Pareto front
NOUN = {"classification": "Top-1 accuracy", "segmentation": "Mean IoU"}
FAR = 4.0  # A trivial baseline so many times the range of the points below them is written, not drawn to scale.
CROWD = 10  # Small panels of the overview with more points than this name only those on the Pareto front.
MOST = 40  # With more points than this a single plot names those on the front, and the suite's own families.
TRIVIAL = {"classification": "trivial (most frequent class)", "segmentation": "trivial (all background)"}


@dataclass(frozen=True)
class Axis:
    """What lies on the horizontal axis."""

    name: str
    cell: str
    title: str
    label: str
    unit: str
    spoken: str  # the unit behind a number
    scale: float = 1.0
    timed: bool = False  # depends on the hardware

    @property
    def heading(self) -> str:
        return f"{self.label} ({self.unit})"


AXES = (
    Axis("macs", "macs", "compute", "Multiply-accumulates of one image", "billions", "billion", 1e-9),
    Axis("params", "params", "parameters", "Parameters", "millions", "million", 1e-6),
    Axis("latency", "latency_ms", "latency", "Latency of one forward pass", "milliseconds", "ms", timed=True),
    Axis("memory", "peak_memory_mb", "memory", "Peak memory of one forward pass", "MB", "MB", timed=True),
)
GLANCE = ("macs", "latency")  # what the overview shows


@dataclass(frozen=True)
class Panel:
    """The content of one pair of axes, before anything is drawn."""

    task: str
    data: str | None
    axis: Axis
    rows: list[Row]  # those with a point
    names: list[str]  # their labels
    omitted: list[str]  # the names of rows without one
    hardware: str = ""
    families: tuple[str, ...] = ()  # of all records, so that a family looks the same in every figure
    suffix: str = ""  # of the file's name, where there are several data sets

    @property
    def name(self) -> str:
        return f"{self.task}_{METRIC[self.task].lower()}_vs_{self.axis.name}{self.suffix}"

    @property
    def title(self) -> str:
        return f"{self.task.capitalize()}: {NOUN[self.task].lower()} against {self.axis.title}".replace("iou", "IoU")

    @property
    def subtitle(self) -> str:
        """What all points have in common."""
        sizes, precisions = {row.size for row in self.rows}, {row.precision for row in self.rows}
        parts = [self.data or "", sizes.pop() if len(sizes) == 1 else ""]
        parts += sorted(precisions) if len(precisions) == 1 else []
        return ", ".join(part for part in parts if part)

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(row.cells[self.axis.cell].value * self.axis.scale, row.metric.value) for row in self.rows]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other beats in cost (x, lower is better) and score (y, higher), by cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def panels(records: Sequence[Record]) -> tuple[list[Panel], list[str]]:
    """All panels that have a point, and one line for each task and data set that lacks some.

    Per task, and data set where there are several, the metric against each of `AXES`.
    """
    found: list[Panel] = []
    notes: list[str] = []
    families = tuple(sorted({record.family for record in records}))
    for task in TASKS:
        rows = join(records, task)
        # A cost at a size that nothing is trained at belongs to no data set: no accuracy can be beside it.
        datasets = list(dict.fromkeys(row.data for row in rows if row.data)) or list({row.data for row in rows})
        for data in datasets:
            group = [row for row in rows if row.data == data]
            suffix = f"_{slug(data or 'no data')}" if len(datasets) > 1 else ""
            made = [replace(_panel(task, data, axis, group), families=families, suffix=suffix) for axis in AXES]
            found += [panel for panel in made if panel.rows]
            if lacking := [panel.axis.title for panel in made if not panel.rows]:
                against, where = " or ".join(lacking), f" on {data}" if data else ""
                notes.append(f"No plot of {task} against {against}{where}: no model has both numbers yet.")
    return found, notes


def sketches(panels: Sequence[Panel]) -> Iterator[Sketch]:
    """Each panel as a figure of its own, and `overview` with compute and latency side by side."""
    for panel in panels:
        yield Sketch(panel.name, panel.title, panel.task, _describe(panel), figure([panel]))
    if glance := [panel for panel in panels if panel.axis.name in GLANCE]:
        alt = " ".join(map(_describe, glance))
        yield Sketch("overview", "Accuracy against cost at a glance", "", alt, figure(glance))


def figure(panels: Sequence[Panel]) -> Figure:
    """One panel as a figure of its own, or several in two columns; nothing is written."""
    with themed():
        drawn, unlabelled = _compose(panels, [])
        if unlabelled:  # Their names need room in the caption, which moves everything.
            drawn, _ = _compose(panels, unlabelled)
        return drawn


def _compose(panels: Sequence[Panel], unlabelled: Sequence[str]) -> tuple[Figure, list[str]]:
    """The figure, and the names of points that found no place for a label."""
    single = len(panels) == 1
    size = 9.5 if single else 8.5  # points; the figure is shown at about half its pixels
    lines = -(-len(panels) // 2)
    crowd = max(len(panel.rows) for panel in panels)
    height = 5.2 + 0.1 * max(0, min(crowd, MOST) - 10) if single else 0.7 + 3.1 * lines
    figure = blank(height)
    shown = {row.family for panel in panels for row in panel.rows}
    everywhere = looks_of(shown.union(*(panel.families for panel in panels)))
    looks = {family: look for family, look in everywhere.items() if family in shown}
    front = handle("Pareto front (best for its cost)", linewidth=1.2, **RING)
    handles = [*family_handles(looks, size - 1), front]
    bottom = add_footer(figure, handles, _caption(panels, unlabelled), size - 1)
    grid = figure.subplots(lines, 1 if single else 2, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_points(axes, panel, looks, size)
    lay_out(figure, bottom)
    left_out: list[str] = []
    for axes, panel in zip(grid, panels, strict=False):
        left_out += _draw_labels(axes, panel, looks, size - 1, _named(panel, single))
    return figure, list(dict.fromkeys(left_out))


def _panel(task: str, data: str | None, axis: Axis, rows: Sequence[Row]) -> Panel:
    named = list(zip(rows, labels(rows), strict=True))
    complete = [(r, n) for r, n in named if r.metric.value is not None and (r.cells[axis.cell].value or 0) > 0]
    hardware = ""
    if axis.timed and complete:
        # Timings of different machines do not belong in one comparison: the machine with most models is shown.
        machines = [row.hardware for row, _ in complete]
        hardware = max(dict.fromkeys(machines), key=machines.count)
        complete = [(row, name) for row, name in complete if row.hardware == hardware]
    shown = [name for _, name in complete]
    return Panel(
        task=task,
        data=data,
        axis=axis,
        rows=[row for row, _ in complete],
        names=shown,
        omitted=[name for _, name in named if name not in shown],
        hardware=hardware,
    )


def _draw_points(axes: Axes, panel: Panel, looks: Mapping[str, Look], size: float) -> None:
    points = np.array(panel.points)
    families = [row.family for row in panel.rows]
    for row, (x, y) in zip(panel.rows, points, strict=True):
        cell = row.cells[panel.axis.cell]
        if cell.low is not None and cell.high is not None:
            ends = np.array([cell.low, cell.high]) * panel.axis.scale
            axes.plot(ends, [y, y], color=looks[row.family][0], linewidth=1.2, alpha=0.45, zorder=2.5)
        if row.metric.std:
            ends = [y - row.metric.std, y + row.metric.std]
            axes.plot([x, x], ends, color=looks[row.family][0], linewidth=1.2, alpha=0.45, zorder=2.5)
    front = points[pareto_front(panel.points)]
    # The rings show a front of a single point, which has no line.
    axes.plot(*front.T, color="0.45", linewidth=1.1, zorder=2, **RING | {"markersize": 1.6 * diameter(size)})
    seaborn.scatterplot(
        x=points[:, 0],
        y=points[:, 1],
        hue=families,
        style=families,
        palette={family: colour for family, (colour, _) in looks.items()},
        markers={family: marker for family, (_, marker) in looks.items()},
        s=diameter(size) ** 2,
        edgecolor="white",
        linewidth=0.5,
        legend=False,
        zorder=3,
        ax=axes,
    )
    single = len(axes.figure.axes) == 1
    width = 92 if single else 46  # letters
    add_titles(axes, panel.title, panel.subtitle, size, single)
    place_of_measurement = f"\non {shorten(panel.hardware, width)}" if panel.hardware else ""
    axes.set_xlabel(panel.axis.heading + place_of_measurement, fontsize=size)
    axes.set_ylabel(f"{NOUN[panel.task]} (%)", fontsize=size)
    axes.tick_params(labelsize=size - 1, length=0)
    seaborn.despine(ax=axes)
    _set_limits(axes, panel, points)


def _set_limits(axes: Axes, panel: Panel, points: np.ndarray) -> None:
    cells = [row.cells[panel.axis.cell] for row in panel.rows]
    ends = [end * panel.axis.scale for cell in cells for end in (cell.low, cell.high) if end]
    x, y = np.concatenate([points[:, 0], ends]), points[:, 1]
    if x.max() / x.min() > 8:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis, x.max() / x.min())
        room = (x.max() / x.min()) ** 0.15
        axes.set_xlim(x.min() / room, x.max() * room)
    else:
        room = max(0.18 * (x.max() - x.min()), 0.2 * x.max())
        axes.set_xlim(max(0.0, x.min() - room), x.max() + room)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    low, high = y.min(), y.max()
    trivial = _trivial(panel)
    if trivial is not None and not _is_far(trivial, y):
        low, high = min(low, trivial), max(high, trivial)
    room = max(0.12 * (high - low), 2.5)
    axes.set_ylim(low - room, high + room)  # May pass 100: a label above the best point needs the room.
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 0 <= value <= 100 else ""))


def _named(panel: Panel, single: bool) -> list[int]:
    """The points that get a name."""
    everybody = range(len(panel.rows))
    if len(panel.rows) <= (MOST if single else CROWD):
        return list(everybody)
    front = pareto_front(panel.points)
    return [i for i in everybody if i in front or (single and panel.rows[i].family in FAMILIES)]


def _draw_labels(axes: Axes, panel: Panel, looks: Mapping[str, Look], size: float, named: Sequence[int]) -> list[str]:
    """Name these points; returns the names that found no place."""
    front = pareto_front(panel.points)
    wanted = [
        Label(
            shorten(panel.names[i], 34 if len(panel.names) <= 12 else 26),
            *panel.points[i],
            looks[panel.rows[i].family][0],
            rank=i not in front,
        )
        for i in named
    ]
    everywhere = axes.transData.transform(panel.points)
    half = diameter(size + 1) * axes.figure.dpi / 72 / 2
    obstacles = [np.concatenate([point - half, point + half]) for point in everywhere]
    obstacles += [_bar_box(axes, panel, row, y) for row, (_, y) in zip(panel.rows, panel.points, strict=True)]
    lines = [everywhere[front]]
    trivial = _trivial(panel)
    if trivial is not None:
        text = f"{TRIVIAL[panel.task]}: {trivial:.1f} %"
        if _is_far(trivial, np.array(panel.points)[:, 1]):
            text = f"{text}, far below" if trivial < min(y for _, y in panel.points) else text
            height = axes.get_ylim()[0]
        else:
            axes.axhline(trivial, color="0.35", linewidth=1, linestyle=(0, (5, 3)), zorder=1.5)
            height = trivial
            level = axes.transData.transform((axes.get_xlim()[0], trivial))[1]
            extent = axes.get_window_extent()
            lines.append(np.array([[extent.x0, level], [extent.x1, level]]))
        obstacles.append(_draw_trivial(axes, text, height, size, np.array(obstacles)))
    _, left_out = place(
        axes,
        wanted,
        obstacles=obstacles,
        lines=lines,
        marker_size=diameter(size + 1),
        sizes=(size, size - 0.75, size - 1.5),
    )
    return left_out


def _bar_box(axes: Axes, panel: Panel, row: Row, height: float) -> np.ndarray:
    """The interval bar of a row as a thin box in pixels; of no width where there is no interval."""
    cell = row.cells[panel.axis.cell]
    ends = (cell.value, cell.value) if cell.low is None or cell.high is None else (cell.low, cell.high)
    pixels = axes.transData.transform([(end * panel.axis.scale, height) for end in ends])
    return np.concatenate([pixels.min(0) - 1, pixels.max(0) + 1])


def _draw_trivial(axes: Axes, text: str, height: float, size: float, markers: np.ndarray) -> np.ndarray:
    """Write on the line of the trivial baseline where no point is; returns the text's box in pixels."""
    box = np.zeros(4)
    for x, side in ((0.99, "right"), (0.01, "left"), (0.5, "center")):
        written = axes.annotate(
            text,
            (x, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 2),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=size,
            fontstyle="italic",
            color="0.3",
            zorder=4,
        )
        extent = written.get_window_extent()
        box = np.array([extent.x0, extent.y0, extent.x1, extent.y1])
        apart = (markers[:, :2] >= box[2:]) | (markers[:, 2:] <= box[:2])
        if apart.any(1).all() or side == "center":
            break
        written.remove()
    return box


def _caption(panels: Sequence[Panel], unlabelled: Sequence[str]) -> str:
    """What the figure does not show, as sentences."""
    omitted = list(dict.fromkeys(name for panel in panels for name in panel.omitted))
    sentences = []
    if omitted:
        sentences.append(f"Left off, because a number is missing: {listed(omitted)}.")
    if unlabelled:
        sentences.append(f"Without a label for lack of room: {listed(unlabelled)}.")
    if len(panels) > 1 and any(len(panel.rows) > CROWD for panel in panels):
        sentences.append("Crowded panels name only the models on the Pareto front; the single plots name more.")
    if len(panels) == 1 and len(panels[0].rows) > MOST:
        sentences.append("Named are the models on the Pareto front and the suite's own families; the table has all.")
    return " ".join(sentences)


def _describe(panel: Panel) -> str:
    """A panel in words, for those who do not see it."""
    name, (cost, score) = max(zip(panel.names, panel.points, strict=True), key=lambda item: item[1][1])
    front = listed([panel.names[i] for i in pareto_front(panel.points)])
    return (
        f"{panel.title}, {len(panel.rows)} models. "
        f"Highest: {name} with {score:.1f} % at {cost:.3g} {panel.axis.spoken}. Best for their cost: {front}."
    )


def _trivial(panel: Panel) -> float | None:
    values = [row.baseline.value for row in panel.rows if row.baseline.value is not None]
    return max(values) if values else None


def _is_far(trivial: float, scores: np.ndarray) -> bool:
    return scores.min() - trivial > FAR * max(scores.max() - scores.min(), 5.0)
