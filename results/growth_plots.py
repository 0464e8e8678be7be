"""Cost against resolution on logarithmic axes, and the exponents of growth: figures of `growth.Curve`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from .growth import QUANTITIES, Curve
from .labels import Label, place_ends, shorten, widen
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
    set_log_ticks,
    slug,
    themed,
)

DOTTED = (0, (1, 1.5))
TICK_GAP = 0.08  # of the width of the axis, at least, between the sizes that are written below it
READING = (
    "Behind each name: the exponent k of cost ~ pixels^k (1: in proportion to the pixels), fitted to all sizes"
    " → between the two largest sizes, where that differs."
)


@dataclass(frozen=True)
class Quantity:
    """What lies on the vertical axis."""

    title: str
    unit: str
    scale: float = 1.0
    timed: bool = False


SHOWN = {
    "macs": Quantity("Multiply-accumulates", "billions", 1e-9),
    "activations": Quantity("Activations", "millions of elements", 1e-6),
    "peak_memory_mb": Quantity("Peak memory of one forward pass", "MB", timed=True),
    "latency_ms": Quantity("Latency of one forward pass", "milliseconds", timed=True),
}


@dataclass(frozen=True)
class Group:
    """All curves of one task and head that may stand in one plot."""

    task: str
    head: str
    curves: Mapping[str, list[Curve]]  # by quantity
    looks: Mapping[str, Look]
    suffix: str = ""  # of the files' names, where there are several groups

    @property
    def subtitle(self) -> str:
        head = "backbones without a head" if self.head == "bare" else f"{self.head} head" if self.head else ""
        return ", ".join(filter(None, [self.task if self.head != "bare" else "", head]))

    def way(self, quantity: str) -> str:
        """Where and how a quantity was measured, as text."""
        hardware, precision, batch = self.curves[quantity][0].way or ("", "", 1)
        images = f"{batch} images" if batch != 1 else ""
        return ", ".join(filter(None, [hardware, precision, images]))

    @property
    def models(self) -> list[tuple[str, str]]:
        """(family, model) of all curves: the suite's own families first, each family's cheapest model first."""
        found = dict.fromkeys((curve.family, curve.model) for curves in self.curves.values() for curve in curves)
        return sorted(found, key=lambda item: list(self.looks).index(item[0]))


def sketches(curves: Sequence[Curve], families: Sequence[str]) -> Iterator[Sketch]:
    """Per task and head: one model of each family in all quantities, every model per quantity, and the exponents."""
    keys = list(dict.fromkeys(curve.group for curve in curves))
    for task, head in keys:
        own = [curve for curve in curves if curve.group == (task, head)]
        suffix = f"_{slug(f'{task} {head}')}" if len(keys) > 1 else ""
        by_quantity = {name: _comparable([c for c in own if c.quantity == name]) for name in QUANTITIES}
        group = Group(task, head, {n: c for n, c in by_quantity.items() if c}, looks_of(families), suffix)
        chosen = _smallest(group)
        title = "Cost against resolution"
        name = f"cost_growth{suffix}"
        yield Sketch(name, title, "cost", _describe(group, title, chosen), _overview(group, chosen))
        for quantity, found in group.curves.items():
            if any((curve.family, curve.model) not in chosen for curve in found):
                title = f"{SHOWN[quantity].title} against resolution, all models"
                alt = _describe(group, title, group.models, [quantity])
                yield Sketch(f"{name}_{_short(quantity)}", title, "cost", alt, _families(group, quantity))
        title = "Exponents of growth"
        yield Sketch(f"{name}_exponents", title, "cost", _describe(group, title, group.models), _exponents(group))


def _comparable(curves: Sequence[Curve]) -> list[Curve]:
    """The curves of the hardware, precision and batch size with most of them; timings of others are left out."""
    ways = [curve.way for curve in curves]
    most = max(dict.fromkeys(ways), key=ways.count, default=None)
    return [curve for curve in curves if curve.way == most]


def _smallest(group: Group) -> list[tuple[str, str]]:
    """(family, model), one of each family: with the most quantities and sizes, and of these the cheapest."""
    chosen: dict[str, tuple[tuple[int, int], str]] = {}
    for family, model in group.models:
        own = [c for curves in group.curves.values() for c in curves if (c.family, c.model) == (family, model)]
        worth = len(own), sum(len(curve.points) for curve in own)
        if family not in chosen or worth > chosen[family][0]:
            chosen[family] = worth, model
    return [(family, model) for family, (_, model) in chosen.items()]


def _overview(group: Group, chosen: Sequence[tuple[str, str]]) -> Figure:
    """One panel per quantity with the chosen models."""
    curves = {name: [c for c in found if (c.family, c.model) in chosen] for name, found in group.curves.items()}
    panels = [(name, found) for name, found in curves.items() if found]
    left = [c for found in group.curves.values() for c in found if (c.family, c.model) not in chosen]
    remark = "One model of each family, the cheapest; the other plots have all." if left else ""
    titles = [SHOWN[name].title for name, _ in panels]
    ways = [group.way(name) if SHOWN[name].timed else "" for name, _ in panels]
    units = [" on ".join(filter(None, [SHOWN[name].unit, way])) for (name, _), way in zip(panels, ways, strict=True)]
    return _figure(group, "Cost against resolution", remark, [c for _, c in panels], titles, units)


def _families(group: Group, quantity: str) -> Figure:
    """One panel per family with all its models, common axes, all others in grey behind them."""
    found = group.curves[quantity]
    families = list(dict.fromkeys(family for family, _ in group.models))
    own = {family: [c for c in found if c.family == family] for family in families}
    alone = [family for family in families if family not in FAMILIES and len(own[family]) == 1]
    panels = {family: own[family] for family in families if own[family] and family not in alone}
    if alone:
        panels[alone[0] if len(alone) == 1 else "Others"] = [c for family in alone for c in own[family]]
    shown = SHOWN[quantity]
    remark = f"Measured on {group.way(quantity)}." if shown.timed and group.way(quantity) else ""
    if len(panels) > 1:
        remark = f"Grey: the models of the other panels. {remark}".strip()
    heading = f"{shown.title} ({shown.unit}) against resolution"
    return _figure(group, heading, remark, list(panels.values()), list(panels), behind=found)


def _figure(
    group: Group,
    heading: str,
    remark: str,
    panels: Sequence[Sequence[Curve]],
    titles: Sequence[str],
    units: Sequence[str] = (),
    behind: Sequence[Curve] = (),
) -> Figure:
    """Panels with their curves in two columns; with `behind` they have common axes and these curves in grey."""
    with themed():
        figure, unlabelled = _compose(group, heading, remark, panels, titles, units, behind)
        if unlabelled:
            remark = f"{remark} Without a label for lack of room: {listed(unlabelled)}."
            figure, _ = _compose(group, heading, remark, panels, titles, units, behind)
    return figure


def _compose(
    group: Group,
    heading: str,
    remark: str,
    panels: Sequence[Sequence[Curve]],
    titles: Sequence[str],
    units: Sequence[str],
    behind: Sequence[Curve],
) -> tuple[Figure, list[str]]:
    """The figure, and the names of lines that found no place for a label."""
    size = 8.5
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = blank(1.5 + 2.75 * lines)
    handles = [
        handle("counted or measured", marker="o", markersize=size * 0.5, linewidth=1.4),
        handle("fitted power of the pixels", linewidth=1.2, linestyle=DOTTED),
    ]
    if any(curves[0].quantity == "peak_memory_mb" for curves in panels):
        remark = f"{remark} Memory includes the weights, which do not grow.".strip()
    caption = [READING, remark, _lacking([curve for curves in panels for curve in curves])]
    bottom = add_footer(figure, handles, " ".join(filter(None, caption)), size - 1)
    share = "all" if behind else False
    grid = figure.subplots(lines, columns, squeeze=False, sharex=share, sharey=share).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for index, (axes, curves, title) in enumerate(zip(grid, panels, titles, strict=False)):
        _draw_lines(axes, curves, group, size, behind)
        if units:
            add_titles(axes, title, units[index], size)
        else:
            axes.set_title(title, loc="left", fontsize=size + 0.5, fontweight="bold")
        axes.tick_params(labelbottom=True, labelleft=not behind or index % columns == 0)
        if index + columns >= len(panels):
            axes.set_xlabel("Side of the image (pixels)", fontsize=size)
    about = ": ".join(filter(None, [heading, group.subtitle]))
    figure.suptitle(about, x=0.015, ha="left", fontsize=size + 1.5, fontweight="bold")
    lay_out(figure, bottom)
    sizes = (size - 1, size - 1.75, 6.0)
    labels = [[_label(curve, group) for curve in curves] for curves in panels]
    for axes, own in zip(grid, labels, strict=False):
        widen(axes, own, sizes=sizes)
    left_out: list[str] = []
    for axes, own, curves in zip(grid, labels, panels, strict=False):
        left_out += place_ends(axes, own, sizes=sizes)
        _set_sizes(axes, [point.side for curve in [*curves, *behind] for point in curve.points])
    return figure, list(dict.fromkeys(left_out))


def _draw_lines(axes: Axes, curves: Sequence[Curve], group: Group, size: float, behind: Sequence[Curve]) -> None:
    scale = SHOWN[curves[0].quantity].scale
    for curve in [c for c in behind if c not in curves]:
        x, y = zip(*((point.side, point.cell.value * scale) for point in curve.points), strict=True)
        axes.plot(x, y, color="0.86", linewidth=1, zorder=1.5)
    for curve in curves:
        colour, marker = group.looks[curve.family]
        x, y = zip(*((point.side, point.cell.value * scale) for point in curve.points), strict=True)
        fitted = [curve.fitted(point.pixels) * scale for point in curve.points]
        axes.plot(x, fitted, color=colour, linewidth=1.2, linestyle=DOTTED, alpha=0.7, zorder=2)
        style = {"marker": marker, "markersize": diameter(size) * 0.6, "markeredgecolor": "white"}
        axes.plot(x, y, color=colour, linewidth=1.4, markeredgewidth=0.4, zorder=3, **style)
        for point in curve.points:
            if point.cell.low is not None and point.cell.high is not None:
                ends = [point.cell.low * scale, point.cell.high * scale]
                axes.plot([point.side] * 2, ends, color=colour, linewidth=2.2, alpha=0.35, zorder=2.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    set_log_ticks(axes.yaxis, high / low)
    axes.tick_params(labelsize=size - 1, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    sides = [point.side for curve in [*curves, *behind] for point in curve.points]
    axes.set_xlim(min(sides) / 1.08, max(sides) * 1.08)
    _set_sizes(axes, sides)


def _set_sizes(axes: Axes, sides: Sequence[float]) -> None:
    """Ticks at the measured sizes; the ends are written, and between them those that have room, round ones first."""
    places = sorted({round(side) for side in sides})
    left, right = np.log(axes.get_xlim())
    written: list[int] = []
    for place in dict.fromkeys([places[0], places[-1], *sorted(places, key=lambda place: -(place & -place))]):
        if all(abs(np.log(place / other)) > TICK_GAP * (right - left) for other in written):
            written.append(place)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{p}" if p in written else "" for p in places]))
    axes.xaxis.set_minor_locator(NullLocator())


def _label(curve: Curve, group: Group) -> Label:
    last = curve.points[-1]
    value = last.cell.value * SHOWN[curve.quantity].scale
    return Label(f"{shorten(curve.model, 20)}  {_growth(curve)}", last.side, value, group.looks[curve.family][0])


def _growth(curve: Curve) -> str:
    """Both exponents, or one where they are the same."""
    whole, last = f"{curve.exponent:.2f}", f"{curve.exponent_last:.2f}"
    return whole if abs(curve.exponent - curve.exponent_last) < 0.015 else f"{whole} → {last}"


def _exponents(group: Group) -> Figure:
    """Every model's exponents, one column per quantity."""
    size = 8.5
    models = group.models
    with themed():
        figure = blank(2.0 + 0.19 * len(models))
        handles = [
            handle("over all sizes", marker="o", markerfacecolor="white", linestyle="", markersize=5),
            handle("between the two largest sizes", marker="o", linestyle="", markersize=5),
            handle("in proportion to the pixels", linewidth=1, linestyle=(0, (4, 2))),
        ]
        ways = dict.fromkeys(group.way(name) for name in group.curves if SHOWN[name].timed)
        caption = "Exponent k of cost ~ pixels^k." + "".join(f" Memory and latency on {way}." for way in ways if way)
        caption += f" {_lacking([curve for curves in group.curves.values() for curve in curves])}"
        bottom = add_footer(figure, handles, caption, size - 1)
        columns = figure.subplots(1, len(group.curves), squeeze=False, sharey=True, sharex=True)[0]
        about = ": ".join(filter(None, ["Exponents of growth", group.subtitle]))
        figure.suptitle(about, x=0.015, ha="left", fontsize=size + 1.5, fontweight="bold")
        for axes, (name, curves) in zip(columns, group.curves.items(), strict=True):
            axes.axvline(1, color="0.45", linewidth=1, linestyle=(0, (4, 2)), zorder=1.5)
            for curve in curves:
                height = models.index((curve.family, curve.model))
                colour, marker = group.looks[curve.family]
                style = {"color": colour, "marker": marker, "markersize": diameter(size) * 0.7}
                axes.plot([curve.exponent, curve.exponent_last], [height] * 2, color=colour, linewidth=1, zorder=2)
                axes.plot(curve.exponent_last, height, markeredgecolor=colour, zorder=3, **style)
                axes.plot(curve.exponent, height, markerfacecolor="white", zorder=4, **style)
            title = SHOWN[name].title.removesuffix(" of one forward pass")
            axes.set_title(title, loc="left", fontsize=size, fontweight="bold")
            axes.set_xlabel("k", fontsize=size)
            axes.tick_params(labelsize=size - 1, length=0)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        columns[0].set_yticks(range(len(models)), [shorten(model, 28) for _, model in models])
        columns[0].set_ylim(len(models) - 0.4, -0.6)
        for text, (family, _) in zip(columns[0].get_yticklabels(), models, strict=True):
            text.set_color(group.looks[family][0])
        lay_out(figure, bottom)
    return figure


def _lacking(curves: Sequence[Curve]) -> str:
    """The sizes that have no number, as a sentence."""
    sizes: dict[str, list[str]] = {}
    for curve in curves:
        kind = "cost" if QUANTITIES[curve.quantity] == "cost" else "speed"
        for size in curve.lacking:
            sizes.setdefault(f"{kind} of {curve.model}", []).append(size)
    parts = [f"{name} at {', '.join(dict.fromkeys(found))}" for name, found in sizes.items()]
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    return f"No number: {'; '.join(parts[:6])}{more}." if parts else ""


def _describe(
    group: Group, title: str, models: Sequence[tuple[str, str]], quantities: Sequence[str] | None = None
) -> str:
    """A figure in words, for those who do not see it."""
    parts = []
    for name in quantities or group.curves:
        found = [c for c in group.curves[name] if (c.family, c.model) in models]
        named = ", ".join(f"{shorten(c.model)} {_growth(c)}" for c in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        parts.append(f"{SHOWN[name].title}: {named}{more}.")
    about = f" ({group.subtitle})" if group.subtitle else ""
    meaning = "Exponents of the number of pixels, over all sizes → between the two largest."
    return f"{title}{about}. {meaning} {' '.join(parts)}"


def _short(quantity: str) -> str:
    return {"peak_memory_mb": "memory", "latency_ms": "latency"}.get(quantity, quantity)
