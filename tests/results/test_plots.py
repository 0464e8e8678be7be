"""Plots: what is drawn, that no label is clipped or overlaps, and that the files are reproducible."""

import itertools
import random
import struct
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from results import plots
from results.labels import Label, place, shorten


def panels_of(records):
    """The panels that `draw` would make of the records."""
    from results.rows import METRIC, join

    return [
        plots._panel(task, rows[0].data, axis, rows)
        for task in METRIC
        if (rows := join(records, task))
        for axis in plots.AXES
    ]


def box_of(text):
    return Text.get_window_extent(text)  # An annotation's own extent would include its line.


def texts_of(axes):
    """The labels of points, and of the trivial baseline, with their boxes in pixels."""
    return [(text.get_text(), box_of(text)) for text in axes.texts if text.get_zorder() == 4]


def contains(outer, inner):
    return (outer.extents[:2] <= inner.extents[:2]).all() and (inner.extents[2:] <= outer.extents[2:]).all()


def assert_clean(figure):
    """No label overlaps another or a point or leaves its axes; no text leaves the figure or meets another panel's."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        boxes = texts_of(axes)
        points = axes.transData.transform(axes.collections[0].get_offsets())
        for name, box in boxes:
            assert contains(axes.get_window_extent().padded(0.5), box), f"{name} leaves the axes"
            assert not any(box.contains(*point) for point in points), f"{name} lies on a point"
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), f"{one} overlaps {other}"
    whole = figure.bbox.padded(0.5)
    texts = [*figure.texts, *figure.legends]
    for axes in figure.axes:
        left_title, subtitle = axes._left_title, axes.texts[0]
        texts += [axes.title, left_title, subtitle, axes.xaxis.label, axes.yaxis.label]
        assert not left_title.get_window_extent().overlaps(subtitle.get_window_extent())
    for text in texts:
        assert contains(whole, text.get_window_extent(renderer)), text
    for one, other in itertools.combinations(figure.axes, 2):
        assert not one.get_tightbbox(renderer).overlaps(other.get_tightbbox(renderer))
        titles = [axes._left_title.get_window_extent() for axes in (one, other)]
        assert not titles[0].overlaps(titles[1])
    legend = figure.legends[0].get_window_extent(renderer)
    assert not any(legend.overlaps(axes.get_tightbbox(renderer)) for axes in figure.axes)
    assert not any(legend.overlaps(text.get_window_extent()) for text in figure.texts)


def models(count, name="model_{}", families=5, seed=0):
    chance = random.Random(seed)
    rows = []
    for i in range(count):
        macs, latency, score = chance.uniform(1, 50), chance.uniform(1, 50), chance.uniform(30, 80)
        rows.append((name.format(i), f"Family {i % families}", 5, macs, latency, score, score))
    return rows


CASES = {
    "one": models(1),
    "two": models(2),
    "eight": models(8),
    "thirty": models(30),
    "thirty long names of many families": models(30, "a_rather_long_model_name_patch4_window7_{}_224", families=14),
    "thirty coincident": [(f"coincident_model_{i}", f"Family {i % 3}", 5, 1, 10, 80, 40) for i in range(30)],
    "as good as the trivial baseline": [(f"model_{i}", "F", 5, 1 + i, 10 + i, 10.4, 8.2) for i in range(6)],
    "in a row": [(f"model_number_{i}", "F", 5, 10 + 0.01 * i, 10 + 0.01 * i, 90 + 0.01 * i, 50) for i in range(12)],
    "orders of magnitude": [(f"model_{i}", "F", 5, 10.0**i, 10.0**i, 99.9 - i, 99.9 - i) for i in range(6)],
}


@pytest.mark.parametrize("case", CASES)
def test_single_plots_are_clean_and_name_every_point(case, suite):
    for panel in panels_of(suite(CASES[case], tasks=("classification",))):
        figure = plots.figure([panel])
        assert_clean(figure)
        shown = {name for name, _ in texts_of(figure.axes[0])}
        assert {shorten(name, 26 if len(panel.names) > 12 else 34) for name in panel.names} <= shown


@pytest.mark.parametrize("case", ["one", "eight", "thirty long names of many families", "thirty coincident"])
def test_the_overview_is_clean(case, suite):
    hardware = "A rather long name of a processor at 2.70 GHz, 64 threads, on some machine or other"
    panels = [replace(panel, hardware=hardware) for panel in panels_of(suite(CASES[case]))]
    assert_clean(plots.figure(panels))


def test_files_sizes_and_words(ragged_suite, tmp_path):
    drawn = plots.draw(ragged_suite, tmp_path)
    tasks = ("classification_top1", "segmentation_miou")
    names = [*(f"{task}_vs_{axis}" for task in tasks for axis in ("macs", "latency")), "overview"]
    assert [plot.name for plot in drawn.plots] == names
    files = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == files
    for plot in drawn.plots:
        width, height = struct.unpack(">II", plot.path.read_bytes()[16:24])
        assert width == 1600
        assert 900 < height < 1600
        assert plot.path.with_suffix(".svg").read_text().startswith("<?xml")
    assert "Highest: hiri_vit_s with 59.4 % at 105 ms." in drawn.plots[3].alt
    assert drawn.notes == []


def test_what_is_left_off_is_named(ragged_suite):
    panel = panels_of(ragged_suite)[3]
    assert sorted(panel.omitted) == ["hrvit_b1", "mit_b0", "swin_tiny_patch4_window7"]
    (caption,) = plots.figure([panel]).texts
    for name in panel.omitted:
        assert name in caption.get_text()


def test_no_records_no_plot(record, tmp_path):
    drawn = plots.draw([], tmp_path)
    assert drawn.plots == []
    assert drawn.notes == ["No plots: there is no record of a model yet."]
    drawn = plots.draw([record("cost", metrics={"macs": 1})], tmp_path)
    assert drawn.plots == []
    assert drawn.notes[0] == "No plot of classification against compute: no model has both numbers yet."
    assert list(tmp_path.iterdir()) == []


def test_a_trivial_baseline_is_drawn_or_said_to_be_far(suite):
    near, far = (
        panels_of(suite([("m", "F", 5, 1, 10, score, 40)], tasks=("classification",)))[0] for score in (20, 95)
    )
    axes = plots.figure([near]).axes[0]
    assert any(line.is_dashed() and set(line.get_ydata()) == {10.4} for line in axes.lines)
    assert any(name == "trivial (most frequent class): 10.4 %" for name, _ in texts_of(axes))
    assert any("10.4 %, far below" in name for name, _ in texts_of(plots.figure([far]).axes[0]))


def test_pareto_front():
    points = [(3, 70), (1, 50), (2, 50), (2, 60), (4, 70), (5, 80), (1, 50)]
    assert [points[i] for i in plots.pareto_front(points)] == [(1, 50), (2, 60), (3, 70), (5, 80)]
    assert plots.pareto_front([]) == []


def test_latency_of_different_machines_is_not_compared(suite, record):
    other = record("speed", key="o", model="fast", metrics={"latency_ms": 1.0}, provenance={"hardware": "H200"})
    score = record("evaluate", key="e", model="fast", metrics={"top1": 99.0})
    panel = panels_of([*suite(tasks=("classification",)), other, score])[1]
    assert panel.hardware == "AMD EPYC 7763, 2 cores"
    assert panel.omitted == ["fast"]


def test_several_data_sets_get_plots_of_their_own(suite, tmp_path):
    records = suite(CASES["one"], tasks=("classification",))
    others = [replace(r, key=r.key + "x", data="ImageNet-1K@1") for r in records if r.stage == "evaluate"]
    names = [plot.name for plot in plots.draw([*records, *others], tmp_path).plots]
    assert "classification_top1_vs_macs_imagenet_1k_1" in names
    assert "classification_top1_vs_macs_digit_scenes_classification_1" in names


def test_the_same_records_give_the_same_files_and_nothing_global_changes(suite, tmp_path):
    before = dict(matplotlib.rcParams)
    contents = []
    for name in ("a", "b"):
        drawn = plots.draw(suite(CASES["two"], tasks=("classification",)), tmp_path / name)
        contents.append([path.read_bytes() for plot in drawn.plots for path in plot.files])
    assert contents[0] == contents[1]
    assert dict(matplotlib.rcParams) == before


def test_families_look_different_and_keep_their_look():
    families = [*plots.FAMILIES, *(f"family {i}" for i in range(40))]
    looks = plots._looks(families)
    assert len(set(looks.values())) == len(families)
    assert plots._looks(["DeiT", "HiViT"])["HiViT"] == looks["HiViT"]


def test_labels_without_room_are_left_out_not_squeezed_in(suite):
    figure = plots.figure(panels_of(suite(CASES["one"], tasks=("classification",)))[:1])
    axes = figure.axes[0]
    middle = (sum(axes.get_xlim()) / 2, sum(axes.get_ylim()) / 2)
    many = [Label(f"a label that takes much room, number {i}", *middle, "black") for i in range(70)]
    placed, left_out = place(axes, many, sizes=(12,))
    figure.draw_without_rendering()
    assert len(placed) + len(left_out) == 70
    assert left_out
    boxes = np.array([box_of(text).extents for text in placed])
    for one, other in itertools.combinations(boxes, 2):
        assert (one[:2] >= other[2:]).any() or (one[2:] <= other[:2]).any()
    assert place(axes, []) == ([], [])


def test_shorten():
    assert shorten("hivit_tiny") == "hivit_tiny"
    assert len(shorten("x" * 50, 20)) == 20
    assert shorten("begin" + "x" * 50 + "end", 12) == "beginx…xxend"
