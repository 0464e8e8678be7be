"""All plots that records allow, as PNG and SVG: accuracy against cost, growth with resolution, the papers' figures and
ablations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from . import ablation_plots, growth_plots, paper_figures, scatter
from .growth import curves
from .rebuilt import RebuiltTable
from .record import Record
from .style import Plot, write


@dataclass(frozen=True)
class Drawn:
    """What `draw` made, and in `notes` one line for each plot that it could not make, with the reason."""

    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw(records: Sequence[Record], folder: Path, tables: Sequence[RebuiltTable] = ()) -> Drawn:
    """Write all plots that the records and the papers' rebuilt `tables` allow into `folder`.

    Raises `OSError` with the path when a file cannot be written.
    """
    if not records:
        return Drawn(notes=["No plots: there is no record of a model yet."])
    families = sorted({record.family for record in records})
    panels, notes = scatter.panels(records)
    figures = paper_figures.figures(tables)
    sketches = chain(
        scatter.sketches(panels),
        growth_plots.sketches(curves(records), families),
        (paper_figures.sketch(figure, families) for figure in figures),
        ablation_plots.sketches(tables, families),
    )
    plots = [write(sketch, folder) for sketch in sketches]  # one after the other: a figure takes much memory
    # Where nobody tried to train, it is no news that there is no accuracy; but a report without a plot says why.
    tried = any(record.stage in ("train", "evaluate") for record in records)
    notes = notes if tried or not plots else []
    left_out = dict.fromkeys(note for figure in figures for note in figure.notes)
    return Drawn(plots, [*notes, *left_out])
