"""What all plots share: the families' colours and markers, the footer, and how a figure becomes files.

Figures are made without pyplot, and styles are set for the time of drawing only: nothing global changes, and the same
records give the same files.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import seaborn
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .files import write_atomic
from .labels import shorten

WIDTH = 8.0  # inches
DPI = 200  # 1600 pixels
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that labels have the same size on every machine
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "svg.hashsalt": "results",
    "svg.fonttype": "path",
    "axes.edgecolor": "0.6",
    "grid.color": "0.91",
    "text.color": "0.15",
    "axes.labelcolor": "0.15",
    "xtick.color": "0.3",
    "ytick.color": "0.3",
}
# Colours that people with colour-blindness can tell apart, dark enough for text on white, each with its own marker. The
# suite's own families have four of them for themselves, and usual baselines always the same.
FAMILIES = ("HiViT", "HRViT", "HRFormer", "HIRI-ViT")
BASELINES = ("Swin", "ConvNeXt", "SegFormer (MiT)", "HRNet", "DeiT", "CSWin")
BASELINES += ("ResNet", "PVTv2", "Twins", "DaViT", "MaxViT", "ViT")
COLOURS = ("#0060a8", "#c44e00", "#00795a", "#a3317f", "#6b4c9a", "#8a6100", "#4d4d4d", "#1f7f9c", "#9e2a2b", "#5b7a1f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "*", "<", ">")
Look = tuple[str, str]  # colour, marker


@dataclass(frozen=True)
class Sketch:
    """A figure that is not written yet. `alt` says in words what it shows."""

    name: str
    title: str
    section: str  # of the report: classification, segmentation, cost or papers; empty where it repeats other plots
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Plot:
    """A written figure: `path` is the PNG, the SVG lies beside it; the rest as in `Sketch`."""

    name: str
    title: str
    section: str
    path: Path
    alt: str

    @property
    def files(self) -> list[Path]:
        return [self.path, self.path.with_suffix(".svg")]


@contextmanager
def themed() -> Iterator[None]:
    """Within it, figures have the plots' style."""
    with matplotlib.rc_context(rc={**seaborn.axes_style("whitegrid"), **STYLE}):
        yield


def write(sketch: Sketch, folder: Path) -> Plot:
    """Write a figure as PNG and SVG. Raises `OSError` with the path when a file cannot be written."""
    path = folder / f"{sketch.name}.png"
    with matplotlib.rc_context(rc=STYLE):
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            sketch.figure.savefig(buffer, format=suffix[1:], metadata=metadata | {"Title": sketch.title})
            write_atomic(path.with_suffix(suffix), buffer.getvalue())
    return Plot(sketch.name, sketch.title, sketch.section, path, sketch.alt)


def blank(height: float) -> Figure:
    """An empty figure of `height` inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def lay_out(figure: Figure, bottom: float) -> None:
    """Arrange the axes above `bottom` (a fraction of the height), and then let nothing move any more."""
    # Once and not at every drawing: labels are placed in pixels, and it takes as long as a drawing.
    ConstrainedLayoutEngine(rect=(0, bottom, 1, 1 - bottom), w_pad=0.08, h_pad=0.08).execute(figure)


def looks_of(families: Iterable[str], more: Sequence[str] = ()) -> dict[str, Look]:
    """The look of each family, and of `more` beside them, which change no other look."""
    wanted = {*families, *more}
    others = list(dict.fromkeys([*BASELINES, *sorted(set(families) - set(FAMILIES)), *more]))
    found = {family: (COLOURS[i], MARKERS[i]) for i, family in enumerate(FAMILIES)}
    rest = COLOURS[len(FAMILIES) :]
    for i, family in enumerate(name for name in others if name not in found):
        turn, colour = divmod(i, len(rest))
        # A colour that comes again has another marker each time: seventy-two pairs.
        found[family] = rest[colour], MARKERS[(len(FAMILIES) + colour + 7 * turn) % len(MARKERS)]
    return {name: look for name, look in found.items() if name in wanted}


def diameter(size: float) -> float:
    """The diameter of a marker beside text of `size` points."""
    return size * 0.85


def handle(label: str, colour: str = "0.45", **style) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=colour, label=label, **style)


def family_handles(shown: dict[str, Look], size: float) -> list[Line2D]:
    return [
        handle(shorten(name, 20), colour, marker=marker, linestyle="", markersize=size * 0.75)
        for name, (colour, marker) in shown.items()
    ]


def set_log_ticks(axis: Axis, ratio: float) -> None:
    """Ticks of a logarithmic axis whose largest value is `ratio` times the smallest, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1,) if ratio > 300 else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def add_titles(axes: Axes, title: str, subtitle: str, size: float, single: bool = False) -> None:
    """A title, and below it in grey what all of the axes has in common."""
    axes.set_title(title, loc="left", fontsize=size + (1.5 if single else 0.5), fontweight="bold", pad=size * 1.9)
    above = {"xytext": (0, size * 0.6), "textcoords": "offset points", "xycoords": "axes fraction"}
    text = axes.annotate(shorten(subtitle, 100 if single else 54), (0, 1), fontsize=size - 1, color="0.4", **above)
    text.set_in_layout(False)  # The title's padding is its room; a long one must not narrow the axes.


def add_footer(figure: Figure, handles: Sequence[Line2D], caption: str, size: float) -> float:
    """The legend, and the caption below it; returns their height as a fraction of the figure's."""
    width, height = figure.get_size_inches()
    wrapped = textwrap.wrap(caption, int(width * 72 / (size * 0.56)))
    text_height = len(wrapped) * size * 1.35 / 72 / height
    if wrapped:
        figure.text(0.015, 0.012, "\n".join(wrapped), fontsize=size, color="0.35", va="bottom", linespacing=1.2)
    for rows in range(1, len(handles) + 1):
        columns = -(-len(handles) // rows)
        legend = figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, text_height + 0.008),
            ncols=columns,
            frameon=False,
            fontsize=size,
            handletextpad=0.4,
            columnspacing=1.4,
        )
        extent = legend.get_window_extent()
        if extent.width < 0.98 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    return extent.y1 / figure.bbox.height


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Names in a sentence, the first `limit` of them."""
    shown = ", ".join(map(shorten, names[:limit]))
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()
