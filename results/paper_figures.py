"""Figures of the papers, drawn again from their printed numbers, beside what was counted and trained here.

Only what a table or a sentence prints is drawn: a point that is known from the picture alone is left out, and the
caption says so. A reported point is hollow. The filled one that is tied to it has the reported accuracy too, but the
cost that was counted here, alike for all models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .labels import Label, place
from .papers import PaperRow
from .rebuilt import RebuiltRow, RebuiltTable
from .style import (
    FAMILIES,
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
    themed,
)

QUIET = "0.45"  # the colour of series that are there for comparison
HOLLOW = "os^Dvph<>"  # markers with room for a filled one in them
LEAST = 3  # rows of a series that is no family of the suite


@dataclass(frozen=True)
class Axis:
    """A cost as a paper prints it."""

    name: str
    label: str
    unit: str
    spoken: str  # the unit behind a number


FLOPS = Axis("gflops", "FLOPs as printed, MACs as counted", "billions", "GFLOPs")
PARAMS = Axis("params_m", "Parameters", "millions", "million parameters")
TIME = Axis("time", "Inference time of an image, as reported", "milliseconds", "ms")


@dataclass(frozen=True)
class Point:
    """A row on one axis: costs in the axis' unit, accuracies in percent. One of `printed` and `counted` is there."""

    label: str
    printed: float | None
    counted: float | None
    reported: float
    trained: float | None = None  # the accuracy of a training here

    @property
    def cost(self) -> float | None:
        """Where it is drawn and named."""
        return self.printed if self.printed is not None else self.counted


@dataclass(frozen=True)
class Series:
    """Rows that belong together: one line of the figure."""

    name: str
    family: str
    rows: list[RebuiltRow]
    names: list[str] | None = None  # of the points; None names the line alone
    tag: str = ""  # a shorter name of the line, which the one beside it makes clear


@dataclass(frozen=True)
class PaperFigure:
    """The content of a figure before anything is drawn."""

    name: str
    title: str
    subtitle: str
    score: str  # column of the accuracy
    axes: tuple[Axis, ...]
    series: list[Series]
    caption: str
    notes: list[str] = field(default_factory=list)  # rows that could not be used, one line each


def figures(tables: Sequence[RebuiltTable]) -> list[PaperFigure]:
    """The figures for which the ledger has a cost of at least one of their rows."""
    by_name = {(table.paper, table.table): table.rows for table in tables}
    made = []
    for make, paper, numbers in (
        (_hrvit_5, "hrvit", ("9",)),
        (_hiri_vit_1, "hiri_vit", ("2", "3")),
        (_hiri_vit_6, "hiri_vit", ("2",)),
    ):
        lines = [line for number in numbers for line in by_name.get((paper, number), []) if not line.row.derived]
        if not any(cell.known for line in lines for cell in line.cells.values()):
            continue
        figure = make(lines)
        if any(cell.known for series in figure.series for line in series.rows for cell in line.cells.values()):
            made.append(figure)
    return made


def sketch(figure: PaperFigure, families: Sequence[str]) -> Sketch:
    """The figure, drawn."""
    return Sketch(figure.name, figure.title, "papers", _describe(figure), _draw(figure, families))


def _hrvit_5(lines: Sequence[RebuiltRow]) -> PaperFigure:
    lines = [line for line in lines if line.row.head == "segformer" and line.row.number("miou") is not None]
    series: dict[str, list[RebuiltRow]] = {}
    for line in lines:
        series.setdefault(_stem(line.row.label), []).append(line)
    return PaperFigure(
        name="papers_hrvit_figure_5",
        title="HRViT, Figure 5: ADE20K with the SegFormer head",
        subtitle="mean IoU (validation) of Table 9",
        score="miou",
        axes=(PARAMS, FLOPS),
        series=[Series(name, name, rows, [row.row.label for row in rows]) for name, rows in series.items()],
        caption="What the paper shows in its picture alone is left out.",
    )


def _hiri_vit_1(lines: Sequence[RebuiltRow]) -> PaperFigure:
    sizes = {(side, side): str(side) for side in (224, 384, 448)}
    series, notes = [], []
    for name, family in (("Swin-B", "Swin"), ("HIRI-ViT-B", "HIRI-ViT")):
        own = [line for line in lines if line.row.label == name and line.row.number("top1") is not None]
        notes += [_sizeless(line.row) for line in own if line.row.input_size is None]
        rows = sorted((line for line in own if line.row.input_size in sizes), key=lambda line: line.row.input_size)
        series.append(Series(name, family, rows, [f"{name} at {sizes[line.row.input_size]}" for line in rows]))
    return PaperFigure(
        name="papers_hiri_vit_figure_1",
        title="HIRI-ViT, Figure 1: what a larger image costs",
        subtitle="ImageNet-1K top-1 of Tables 2 and 3",
        score="top1",
        axes=(FLOPS, TIME),
        series=[line for line in series if line.rows],
        caption="Inference time: 3.95 ms is the introduction's, the others are one second / the throughput of Table 2; "
        "that of Swin-B at 448 is in the paper's picture alone and left out.",
        notes=notes,
    )


def _hiri_vit_6(lines: Sequence[RebuiltRow]) -> PaperFigure:
    lines = [line for line in lines if line.row.number("top1") is not None]
    notes = [_sizeless(line.row) for line in lines if line.row.input_size is None]
    lines = [line for line in lines if line.row.input_size is not None]
    labels = [line.row.label for line in lines]
    groups: dict[tuple[str, int | None], list[RebuiltRow]] = {}
    for line in lines:
        several = labels.count(line.row.label) > 1  # One network at several sizes: a line for each size.
        size = line.row.input_size[1] if several else None
        groups.setdefault((_stem(line.row.label), size), []).append(line)
    series, single = [], 0
    for (family, size), rows in groups.items():
        if len(rows) < LEAST and family not in FAMILIES:
            single += len(rows)
            continue
        largest = max((s for f, s in groups if f == family and s), default=None)
        name = f"{family} at {size}" if size else family
        series.append(Series(name, family, rows, tag="" if size == largest else str(size)))
    return PaperFigure(
        name="papers_hiri_vit_figure_6",
        title="HIRI-ViT, Figure 6: accuracy against cost",
        subtitle="ImageNet-1K top-1 of Table 2",
        score="top1",
        axes=(FLOPS, PARAMS, TIME),
        series=series,
        caption="Inference time: one second / the throughput of Table 2, on the paper's hardware. Baselines at 224. "
        f"{single} of {len(lines)} rows are not drawn: their families have fewer than {LEAST} rows. "
        "Points without a printed cost are missing.",
        notes=notes,
    )


def _stem(label: str) -> str:
    """The family in a row's label: HRViT of HRViT-b1."""
    return label.rpartition("-")[0] or label


def _sizeless(row: PaperRow) -> str:
    where = f"{row.paper}, Table {row.table}, row {row.row} ({row.label})"
    return f"{where}: no input_size, so the paper's figures leave it out; write it into the file."


def _points(series: Series, axis: Axis, score: str) -> list[Point]:
    """The rows of a series that have a cost on this axis, cheapest first."""
    points = []
    for line, name in zip(series.rows, series.names or [series.tag or series.name] * len(series.rows), strict=True):
        printed = _time(line.row) if axis is TIME else line.row.number(axis.name)
        cell = line.cells.get(axis.name)
        known = (cell.common or cell.measured) if cell else None
        counted = known.value if known else None
        trained = line.cells[score].measured.value if score in line.cells else None
        if printed is not None or counted is not None:
            points.append(Point(name, printed, counted, line.row.number(score), trained))
    return sorted(points, key=lambda point: point.cost)


def _time(row: PaperRow) -> float | None:
    """Milliseconds of one image: as a sentence prints them, else by the throughput."""
    try:
        return float(row.other["inference_ms"])
    except (KeyError, ValueError):
        throughput = row.number("throughput")
        return 1000 / throughput if throughput else None


def _draw(content: PaperFigure, families: Sequence[str]) -> Figure:
    with themed():
        drawn, unlabelled = _compose(content, families, [])
        if unlabelled:  # Their names need room in the caption, which moves everything.
            drawn, _ = _compose(content, families, unlabelled)
    return drawn


def _compose(content: PaperFigure, families: Sequence[str], unlabelled: Sequence[str]) -> tuple[Figure, list[str]]:
    """The figure, and the names that found no place for a label."""
    size = 8.5
    names = {s.family: next((f for f in families if f"({s.family})" in f), s.family) for s in content.series}
    everywhere = looks_of(families, list(names.values()))
    quiet = len(content.series) > 6  # Colours for so many would need to be looked up: the labels tell them.
    looks: dict[str, Look] = {}
    for series in content.series:
        colour, marker = everywhere[names[series.family]]
        marker = marker if marker in HOLLOW else "o"
        looks[series.name] = (QUIET, "o") if quiet and series.family not in FAMILIES else (colour, marker)
    columns = 1 if quiet else 2
    rows = -(-len(content.axes) // columns)
    figure = blank(1.0 + 3.3 * rows)
    points = {
        (series.name, axis.name): _points(series, axis, content.score)
        for series in content.series
        for axis in content.axes
    }
    trained = any(point.trained is not None for found in points.values() for point in found)
    caption = content.caption
    caption += f" Without a label for lack of room: {listed(unlabelled)}." if unlabelled else ""
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(content.axes) :]:
        axes.remove()
    bottom = add_footer(figure, _handles(size, trained), caption, size - 1)
    for axes, axis in zip(grid, content.axes, strict=False):
        found = {series.name: points[series.name, axis.name] for series in content.series}
        _draw_panel(axes, axis, found, looks, size)
        axes.set_ylabel("Mean IoU (%)" if content.score == "miou" else "Top-1 accuracy (%)", fontsize=size)
        title = axis.label.split(",")[0].removesuffix(" as printed").removesuffix(" of an image")
        add_titles(axes, title, content.subtitle, size)
    figure.suptitle(content.title, x=0.015, ha="left", fontsize=size + 1.5, fontweight="bold")
    lay_out(figure, bottom)
    left_out: list[str] = []
    for axes, axis in zip(grid, content.axes, strict=False):
        found = {series.name: points[series.name, axis.name] for series in content.series}
        left_out += _draw_labels(axes, found, looks, size - 1, [s.name for s in content.series if s.names is None])
    return figure, list(dict.fromkeys(left_out))


def _handles(size: float, trained: bool) -> list[Line2D]:
    dot = {"marker": "o", "linestyle": ""}
    handles = [
        handle("as the paper reports it", markerfacecolor="white", markersize=size * 0.8, **dot),
        handle("reported accuracy at the cost counted here", markersize=size * 0.45, **dot),
    ]
    if trained:
        handles.append(handle("trained here", "0.1", marker="*", linestyle="", markersize=size))
    return handles


def _draw_panel(axes: Axes, axis: Axis, found: dict[str, list[Point]], looks: dict[str, Look], size: float) -> None:
    for name, points in found.items():
        colour, marker = looks[name]
        over = 2 if colour != QUIET else 0  # Comparisons stay below, and smaller.
        width = diameter(size) * (1 if over else 0.75)
        reported = [(point.printed, point.reported) for point in points if point.printed is not None]
        axes.plot(*np.array(reported).reshape(-1, 2).T, color=colour, linewidth=1, alpha=0.6, zorder=2 + over / 10)
        for point in points:
            base = {"color": colour, "marker": marker, "linestyle": ""}
            if point.printed is not None:
                style = base | {"markerfacecolor": "white", "markersize": width}
                axes.plot(point.printed, point.reported, zorder=3 + over, **style)
            if point.printed is not None and point.counted is not None:
                ends = [point.printed, point.counted]
                axes.plot(ends, [point.reported] * 2, color=colour, linewidth=0.8, zorder=3.5 + over)
            if point.counted is not None:
                axes.plot(point.counted, point.reported, zorder=4 + over, markersize=width * 0.5, **base)
            if point.trained is not None:
                cost = point.counted if point.counted is not None else point.printed
                axes.plot(cost, point.trained, color="0.1", marker="*", linestyle="", markersize=size, zorder=7)
    axes.set_xlabel(f"{axis.label} ({axis.unit})", fontsize=size)
    axes.tick_params(labelsize=size - 1, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12, y=0.1)
    low, high = axes.get_xlim()
    axes.set_xlim(max(0.0, low), high)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_labels(
    axes: Axes, found: dict[str, list[Point]], looks: dict[str, Look], size: float, lines: Sequence[str]
) -> list[str]:
    """Name the points, or the series in `lines` at their best point; returns the names that found no place."""
    wanted, obstacles, paths = [], [], []
    half = diameter(size + 1) * axes.figure.dpi / 72 / 2
    for name, points in found.items():
        if not points:
            continue
        spots = [(point.cost, point.reported) for point in points]
        pixels = axes.transData.transform(spots)
        obstacles += [np.concatenate([pixel - half, pixel + half]) for pixel in pixels]
        paths.append(pixels)
        for point, (x, y) in zip(points, spots, strict=True):
            if name not in lines or point is max(points, key=lambda p: p.reported):
                rank = int(looks[name][0] == QUIET)
                wanted.append(Label(point.label, x, y, looks[name][0] if not rank else "0.3", rank))
            if point.counted is not None:
                pixel = axes.transData.transform((point.counted, point.reported))
                obstacles.append(np.concatenate([pixel - half * 0.8, pixel + half * 0.8]))
    sizes = (size, size - 0.75, size - 1.5)
    return place(axes, _joined(wanted), obstacles=obstacles, lines=paths, marker_size=diameter(size + 1), sizes=sizes)[
        1
    ]


def _joined(labels: Sequence[Label]) -> list[Label]:
    """Sizes of one network that cost the same are named together, the best first."""
    kept: list[Label] = []
    for label in sorted(labels, key=lambda label: -label.y):
        above = [i for i, other in enumerate(kept) if (other.colour, other.x) == (label.colour, label.x)]
        if label.text.isdecimal() and above:
            kept[above[0]] = replace(kept[above[0]], text=f"{kept[above[0]].text}, {label.text}")
        else:
            kept.append(label)
    return kept


def _describe(figure: PaperFigure) -> str:
    """A figure in words, for those who do not see it."""
    parts = []
    for axis in figure.axes:
        for series in figure.series:
            points = _points(series, axis, figure.score)
            if points and (series.names or series.family in FAMILIES):
                best = max(points, key=lambda point: point.reported)
                parts.append(f"{series.name} up to {best.reported:g} % at {best.cost:.3g} {axis.spoken}")
    counted = sum(p.counted is not None for s in figure.series for p in _points(s, figure.axes[0], figure.score))
    return f"{figure.title}, as reported, with {counted} models as counted here. {'; '.join(parts)}."
