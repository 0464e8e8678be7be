"""Direct labels on points that touch neither each other, nor the points, nor the edge of the plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

# Where to try a label, as (distance in points, directions in degrees): beside and above the point first.
RINGS = (
    (4, (0, 180, 90, 270, 45, 315, 135, 225)),
    (6, range(0, 360, 15)),
    (12, range(0, 360, 30)),
    (22, range(0, 360, 20)),
)
GRID = (48, 64)  # columns and rows of the search over the whole plot, when no place near the point is free
PADDING = 1.5  # points between a label and anything else
CROWD = 14  # labels
FOREIGN = 25.0  # points of distance that it costs to stand nearer to another label's point
COLUMN_GAP, COLUMN_ROOM = 10.0, 0.62  # before a column of names behind lines: points; its width: part of the axes'
LEADER = 9.0  # points from which on a line ties the label to its point


@dataclass(frozen=True)
class Label:
    """A text for the point (x, y) in data coordinates. The more important ones (lower `rank`) choose first."""

    text: str
    x: float
    y: float
    colour: str
    rank: int = 0


def shorten(text: str, length: int = 34) -> str:
    """A text of at most `length` characters, cut in the middle: the ends of model names tell them apart."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def place(
    axes: "Axes",
    labels: Sequence[Label],
    *,
    obstacles: Sequence[np.ndarray] = (),
    lines: Sequence[np.ndarray] = (),
    marker_size: float = 8.0,
    sizes: Sequence[float] = (8.5, 7.5, 6.5),
    own: bool = False,
) -> tuple[list["Annotation"], list[str]]:
    """Annotate the points of `axes`, whose layout and limits must be final.

    `obstacles` are boxes (x0, y0, x1, y1) in pixels that stay free. `lines` are sequences of points (n, 2) in pixels
    that a label should rather not cover. `marker_size` is the diameter of a point, `sizes` are the font sizes to try;
    both in points. With `own` a label rather stands farther from its point than nearer to another's. Returns the
    annotations, and the texts that found no place at the smallest size and were left out.
    """
    figure = axes.figure
    scale = figure.dpi / 72  # pixels per point
    points = axes.transData.transform([(label.x, label.y) for label in labels]) if labels else np.empty((0, 2))
    half = marker_size * scale / 2
    fixed = np.array([*np.hstack([points - half, points + half]), *obstacles]).reshape(-1, 4)
    soft = np.concatenate([_dense(line, 3 * scale) for line in lines]) if lines else np.empty((0, 2))
    inside = axes.get_window_extent().padded(-PADDING * scale)
    bounds = np.array([inside.x0, inside.y0, inside.x1, inside.y1])
    # Labels choose one after another, so the order matters: a few are tried, and the cheapest outcome is kept. In a
    # crowd no order is good, and trying more takes long.
    ways = ((-points[:, 1], points[:, 0]), (points[:, 0], points[:, 1]), (-points[:, 0], points[:, 1]))
    ways = ways[:1] if len(labels) > CROWD else ways
    orders = [sorted(range(len(labels)), key=lambda i: (labels[i].rank, a[i], b[i])) for a, b in ways]
    placed: dict[int, np.ndarray] = {}
    for size in sizes:
        extents = _extents(axes, labels, size) + 2 * PADDING * scale
        outcomes = [_place_all(order, points, extents, fixed, soft, bounds, half, scale, own) for order in orders]
        placed, _ = min(outcomes, key=lambda outcome: (-len(outcome[0]), outcome[1]))
        if len(placed) == len(labels):
            break
    annotations = [_annotate(axes, labels[i], points[i], placed[i], size, half, scale) for i in sorted(placed)]
    for annotation in annotations if lines else ():  # A line that could not be avoided goes behind the text.
        annotation.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5})
    return annotations, [labels[i].text for i in range(len(labels)) if i not in placed]


def place_ends(axes: "Axes", labels: Sequence[Label], *, sizes: Sequence[float] = (8.0, 7.0, 6.0)) -> list[str]:
    """Write the names of lines in one column behind their last points (x, y), in the order of their heights.

    The horizontal axis grows to the right until the column has its place; the layout must be final. Axes that share it
    are all given to `widen` before. Returns the texts that found no place at the smallest of `sizes` (points).
    """
    if not labels:
        return []
    widen(axes, labels, sizes=sizes)
    size, height, fitting, _ = _column(axes, labels, sizes)
    scale = axes.figure.dpi / 72  # pixels per point
    box = axes.get_window_extent()
    ranked = sorted(labels, key=lambda label: (label.rank, -label.y))
    shown = sorted(ranked[:fitting], key=lambda label: label.y)
    ends = axes.transData.transform([(label.x, label.y) for label in shown])
    heights = _spread(ends[:, 1], height, box.y0 + height / 2, box.y1 - height / 2)
    start = ends[:, 0].max() + COLUMN_GAP * scale
    for label, end, y in zip(shown, ends, heights, strict=True):
        leader = {"arrowstyle": "-", "color": label.colour, "alpha": 0.5, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=((start - end[0]) / scale, (y - end[1]) / scale),
            textcoords="offset points",
            fontsize=size,
            color=label.colour,
            va="center",
            ha="left",
            arrowprops=leader | {"relpos": (0, 0.5)},
            zorder=4,
        )
    return [label.text for label in ranked[fitting:]]


def widen(axes: "Axes", labels: Sequence[Label], *, sizes: Sequence[float]) -> None:
    """Move the right limit of the axes, if need be, so that the names of lines have room behind them."""
    *_, column = _column(axes, labels, sizes)
    transform = axes.xaxis.get_transform()
    left, right, end = transform.transform([*axes.get_xlim(), max(label.x for label in labels)])
    width = axes.get_window_extent().width
    right = max(right, left + (end - left) * width / (width - column))
    axes.set_xlim(right=float(transform.inverted().transform([right])[0]))


def _column(axes: "Axes", labels: Sequence[Label], sizes: Sequence[float]) -> tuple[float, float, int, float]:
    """The largest size with which a column holds all labels (else the last), a line's height, how many, its width."""
    scale = axes.figure.dpi / 72
    box = axes.get_window_extent()
    for size in sizes:
        extents = _extents(axes, labels, size)
        height = extents[:, 1].max() + PADDING / 2 * scale
        fitting = int(box.height // height)
        column = extents[:, 0].max() + 2 * COLUMN_GAP * scale
        if fitting >= len(labels) and column <= COLUMN_ROOM * box.width:
            break
    return size, height, fitting, min(column, COLUMN_ROOM * box.width)


def _spread(wanted: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Increasing heights at least `gap` apart, as near to the wanted (increasing) ones as least squares allow."""
    steps = gap * np.arange(len(wanted))
    blocks: list[list[float]] = []  # pooled neighbours that would come too near: sum and count
    for value in wanted - steps:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    levels = np.concatenate([np.full(count, total / count) for total, count in blocks])
    return np.clip(levels, low, high - steps[-1]) + steps


def _extents(axes: "Axes", labels: Sequence[Label], size: float) -> np.ndarray:
    """Width and height of each label in pixels."""
    texts = [axes.text(0.5, 0.5, label.text, fontsize=size, transform=axes.transAxes) for label in labels]
    boxes = [text.get_window_extent() for text in texts]
    for text in texts:
        text.remove()
    return np.array([(box.width, box.height) for box in boxes]).reshape(-1, 2)


def _place_all(
    order: Sequence[int],
    points: np.ndarray,
    extents: np.ndarray,
    fixed: np.ndarray,
    soft: np.ndarray,
    bounds: np.ndarray,
    half: float,
    scale: float,
    own: bool,
) -> tuple[dict[int, np.ndarray], float]:
    """The boxes of all labels that find a place, choosing in this order, and what their places cost together."""
    placed: dict[int, np.ndarray] = {}
    total = 0.0
    for i in order:
        taken = np.array([*fixed, *placed.values()])
        others = np.delete(points, i, axis=0) if own else np.empty((0, 2))
        box, cost = _free_box(points[i], extents[i], taken, soft, bounds, half, scale, others)
        if box is not None:
            placed[i] = box
            total += cost
    return placed, total


def _free_box(
    point: np.ndarray,
    extent: np.ndarray,
    taken: np.ndarray,
    soft: np.ndarray,
    bounds: np.ndarray,
    half: float,
    scale: float,
    others: np.ndarray,
) -> tuple[np.ndarray | None, float]:
    """The best free box of `extent` pixels, and its cost: near the point, off the lines; None if the plot is full."""
    boxes, distances = [], []
    for distance, directions in RINGS:
        for angle in np.radians(list(directions)):
            direction = np.array([np.cos(angle), np.sin(angle)])
            # The side of the box that faces the point lies at the distance, so that long labels are not pushed off.
            centre = point + direction * (half + distance * scale) + np.sign(direction.round(6)) * extent / 2
            boxes.append(np.concatenate([centre - extent / 2, centre + extent / 2]))
            distances.append(distance)
    boxes = np.array(boxes)
    near = _best(boxes, np.array(distances) + _foreign(boxes, point, others), taken, soft, bounds)
    if near[0] is not None:
        return near
    columns, rows = GRID
    x = np.linspace(bounds[0], bounds[2] - extent[0], columns)
    y = np.linspace(bounds[1], bounds[3] - extent[1], rows)
    corners = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    boxes = np.hstack([corners, corners + extent])
    distances = _gaps(boxes, point) / scale + _foreign(boxes, point, others)
    return _best(boxes, distances, taken, soft, bounds)


def _gaps(boxes: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The distance of each box from a point."""
    return np.linalg.norm(np.clip(point, boxes[:, :2], boxes[:, 2:]) - point, axis=1)


def _foreign(boxes: np.ndarray, point: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What it costs each box that it stands nearer to one of the `others` than to its own point."""
    nearest = np.min([_gaps(boxes, other) for other in others], axis=0, initial=np.inf)
    return FOREIGN * (nearest < _gaps(boxes, point))


def _best(
    boxes: np.ndarray, distances: np.ndarray, taken: np.ndarray, soft: np.ndarray, bounds: np.ndarray
) -> tuple[np.ndarray | None, float]:
    free = (boxes[:, :2] >= bounds[:2]).all(1) & (boxes[:, 2:] <= bounds[2:]).all(1)
    apart = (boxes[:, None, :2] >= taken[None, :, 2:]) | (boxes[:, None, 2:] <= taken[None, :, :2])
    free &= apart.any(2).all(1)
    if not free.any():
        return None, 0.0
    covered = (soft[None] > boxes[:, None, :2]) & (soft[None] < boxes[:, None, 2:])
    cost = np.where(free, distances + 2.0 * covered.all(2).sum(1), np.inf)
    return boxes[cost.argmin()], float(cost.min())


def _annotate(
    axes: "Axes", label: Label, point: np.ndarray, box: np.ndarray, size: float, half: float, scale: float
) -> "Annotation":
    corner = (box[:2] - point) / scale + PADDING
    gap = np.linalg.norm(np.clip(point, box[:2], box[2:]) - point) - half
    leader = {
        "arrowstyle": "-",
        "color": label.colour,
        "alpha": 0.5,
        "linewidth": 0.6,
        "shrinkA": 0,
        "shrinkB": half / scale,
    }
    return axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=tuple(corner),
        textcoords="offset points",
        fontsize=size,
        color=label.colour,
        va="bottom",
        ha="left",
        arrowprops=leader if gap > LEADER * scale else None,
        zorder=4,
    )


def _dense(line: np.ndarray, step: float) -> np.ndarray:
    """The points of a polyline, `step` pixels apart."""
    pieces = [line[:1]]
    for start, end in pairwise(line):
        count = max(2, int(np.linalg.norm(end - start) / step))
        pieces.append(np.linspace(start, end, count))
    return np.concatenate(pieces)
