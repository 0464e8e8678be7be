"""How cost grows with the size of the image: a power of the number of pixels, fitted to what was measured.

One exponent hides a curve that bends (global attention grows slowly while the image is small, and with the square of
the pixels when it is large): so there are two, of all sizes and of the two largest ones.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, linear_regression

from .files import csv_text, write_atomic
from .record import Record
from .rows import NOT_RUN, Cell, Row, join_cost

LEAST = 3  # sizes of a curve: through two goes any power
QUANTITIES = {"macs": "cost", "activations": "cost", "peak_memory_mb": "speed", "latency_ms": "speed"}  # -> stage

# Columns of growth.csv: `exponent` is k in cost ~ pixels^k by least squares of the logarithms over all `sizes`
# (HEIGHTxWIDTH), `exponent_last` the same between the two largest, `residual` the root mean square of
# ln(measured / fitted). The last three columns are empty for what is counted, not timed.
SCHEMA = ("task", "model", "family", "head", "quantity", "sizes", "exponent", "exponent_last", "residual")
SCHEMA += ("precision", "batch_size", "hardware")


@dataclass(frozen=True)
class Point:
    """What was measured at one size."""

    size: tuple[int, int]  # height, width
    cell: Cell

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def side(self) -> float:
        """Of the square with as many pixels."""
        return math.sqrt(self.pixels)

    @property
    def name(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"


@dataclass(frozen=True)
class Curve:
    """One quantity of one network at `LEAST` sizes or more."""

    task: str
    model: str
    family: str
    head: str | None
    quantity: str  # of QUANTITIES
    points: tuple[Point, ...]  # smallest first
    way: tuple[str, str, int] | None = None  # hardware, precision and batch size of what is timed
    lacking: tuple[str, ...] = ()  # sizes without a number that have one for others: size and status

    @property
    def group(self) -> tuple[str, str]:
        """What can be compared."""
        return self.task, self.head or ""

    @cached_property
    def _fit(self) -> tuple[float, float]:
        logs = [(math.log(point.pixels), math.log(point.cell.value)) for point in self.points]
        return tuple(linear_regression(*zip(*logs, strict=True)))

    @property
    def exponent(self) -> float:
        """k in cost ~ pixels^k, by least squares of the logarithms."""
        return self._fit[0]

    @property
    def exponent_last(self) -> float:
        """The same between the two largest sizes."""
        a, b = self.points[-2:]
        return math.log(b.cell.value / a.cell.value) / math.log(b.pixels / a.pixels)

    @property
    def residual(self) -> float:
        """How far the points lie from the fit: root mean square of ln(measured / fitted)."""
        return math.sqrt(fmean(math.log(p.cell.value / self.fitted(p.pixels)) ** 2 for p in self.points))

    def fitted(self, pixels: float) -> float:
        """The fitted cost of an image of so many pixels."""
        slope, intercept = self._fit
        return math.exp(intercept + slope * math.log(pixels))


def curves(records: Iterable[Record]) -> list[Curve]:
    """All curves in the order of the models' costs; timings of different hardware, precision or batch are apart."""
    networks: dict[tuple, list[Row]] = {}
    for row in join_cost(records):
        networks.setdefault(_network(row), []).append(row)
    labels = [key[:3] for key in networks]
    found = []
    for number, (key, rows) in enumerate(networks.items()):
        if len({row.size for row in rows}) < LEAST:
            continue
        twins = [i for i, label in enumerate(labels) if label == key[:3]]  # same name, other classes or configuration
        name = f"{key[1]} #{twins.index(number) + 1}" if len(twins) > 1 else key[1]
        for quantity, stage in QUANTITIES.items():
            ways = dict.fromkeys(map(_way, rows)) if stage == "speed" else [None]
            for way in ways:
                if curve := _curve(rows, name, quantity, stage, way):
                    found.append(curve)
    return found


def write(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write `growth.csv` with the columns of `SCHEMA` into `folder`, if there is any curve. Returns the paths."""
    lines = [_line(curve) for curve in curves(records)]
    if not lines:
        return []
    write_atomic(folder / "growth.csv", csv_text(SCHEMA, lines))
    return [folder / "growth.csv"]


def _curve(rows: Sequence[Row], name: str, quantity: str, stage: str, way: tuple | None) -> Curve | None:
    cells: dict[tuple[int, int], Cell] = {}
    for row in rows:
        cell = row.cells[quantity]
        if (cell.value or 0) > 0 and way in (None, _way(row)):
            cells.setdefault(row.input_size, cell)
    # Of two shapes with as many pixels the squarer one stands for both.
    by_pixels: dict[int, Point] = {}
    for size in sorted(cells, key=lambda size: (size[0] * size[1], abs(size[0] - size[1]))):
        by_pixels.setdefault(size[0] * size[1], Point(size, cells[size]))
    if len(by_pixels) < LEAST:
        return None
    lacking = {
        row.input_size: f"{row.size} {row.stages[stage].status}"
        for row in rows
        if row.input_size not in cells and row.stages[stage].status not in ("done", NOT_RUN)
    }
    first = rows[0]
    points = tuple(by_pixels.values())
    return Curve(first.task, name, first.family, first.head, quantity, points, way, tuple(lacking.values()))


def _network(row: Row) -> tuple:
    """What makes a row's network, whatever the size of the image."""
    job = row.records[0].job
    config = {name: value for name, value in (job.get("model_config") or {}).items() if name != "img_size"}
    rest = [job.get("model"), config, job.get("head_config"), job.get("num_classes")]
    return row.task, row.model, row.head, row.family, json.dumps(rest, sort_keys=True)


def _way(row: Row) -> tuple[str, str, int]:
    speed = next((record for record in row.records if record.stage == "speed"), None)
    settings = (speed.job.get("speed") or {}) if speed else {}
    return row.hardware, speed.precision if speed else "", settings.get("batch_size", 1)


def _line(curve: Curve) -> dict[str, object]:
    hardware, precision, batch_size = curve.way or ("", "", "")
    return {
        "task": curve.task,
        "model": curve.model,
        "family": curve.family,
        "head": curve.head,
        "quantity": curve.quantity,
        "sizes": " ".join(point.name for point in curve.points),
        "exponent": f"{curve.exponent:.4f}",
        "exponent_last": f"{curve.exponent_last:.4f}",
        "residual": f"{curve.residual:.4f}",
        "precision": precision,
        "batch_size": batch_size,
        "hardware": hardware,
    }
