"""Accuracy against cost: what is drawn, and that no label is clipped or overlaps."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from plots_support import assert_clean, box_of, texts_of

from results import scatter
from results.labels import Label, place, shorten


def panels_of(records):
    """The panels of the records, in the order of the axes for each task."""
    return scatter.panels(records)[0]


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
        figure = scatter.figure([panel])
        assert_clean(figure)
        shown = {name for name, _ in texts_of(figure.axes[0])}
        assert {shorten(name, 26 if len(panel.names) > 12 else 34) for name in panel.names} <= shown


def test_a_crowd_names_the_front_and_the_suites_own_families(suite):
    rows = [*models(60, "other_{}"), *(("own", "HiViT", 5, 40.0, 40.0, 31.0, 31.0),)]
    panel = panels_of(suite(rows, tasks=("classification",)))[0]
    front = {panel.names[i] for i in scatter.pareto_front(panel.points)}
    drawn = scatter.figure([panel])
    assert_clean(drawn)
    assert {name for name, _ in texts_of(drawn.axes[0]) if "trivial" not in name} == front | {"own"}
    assert "Named are the models on the Pareto front" in drawn.texts[0].get_text()


@pytest.mark.parametrize("case", ["one", "eight", "thirty long names of many families", "thirty coincident"])
def test_the_overview_is_clean(case, suite):
    hardware = "A rather long name of a processor at 2.70 GHz, 64 threads, on some machine or other"
    panels = [replace(panel, hardware=hardware) for panel in panels_of(suite(CASES[case]))]
    assert_clean(scatter.figure(panels))


def test_what_is_left_off_is_named(ragged_suite):
    panel = panels_of(ragged_suite)[6]
    assert sorted(panel.omitted) == ["hrvit_b1", "mit_b0", "swin_tiny_patch4_window7"]
    (caption,) = scatter.figure([panel]).texts
    for name in panel.omitted:
        assert name in caption.get_text()


def test_a_trivial_baseline_is_drawn_or_said_to_be_far(suite):
    near, far = (
        panels_of(suite([("m", "F", 5, 1, 10, score, 40)], tasks=("classification",)))[0] for score in (20, 95)
    )
    axes = scatter.figure([near]).axes[0]
    assert any(line.is_dashed() and set(line.get_ydata()) == {10.4} for line in axes.lines)
    assert any(name == "trivial (most frequent class): 10.4 %" for name, _ in texts_of(axes))
    assert any("10.4 %, far below" in name for name, _ in texts_of(scatter.figure([far]).axes[0]))


def test_pareto_front():
    points = [(3, 70), (1, 50), (2, 50), (2, 60), (4, 70), (5, 80), (1, 50)]
    assert [points[i] for i in scatter.pareto_front(points)] == [(1, 50), (2, 60), (3, 70), (5, 80)]
    assert scatter.pareto_front([]) == []


def test_latency_of_different_machines_is_not_compared(suite, record):
    other = record("speed", key="o", model="fast", metrics={"latency_ms": 1.0}, provenance={"hardware": "H200"})
    score = record("evaluate", key="e", model="fast", metrics={"top1": 99.0})
    panel = panels_of([*suite(tasks=("classification",)), other, score])[2]
    assert panel.hardware == "AMD EPYC 7763, 2 cores"
    assert panel.omitted == ["fast"]


def test_labels_without_room_are_left_out_not_squeezed_in(suite):
    figure = scatter.figure(panels_of(suite(CASES["one"], tasks=("classification",)))[:1])
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


def test_what_depends_on_the_hardware_is_compared_on_one_machine_only(suite, record):
    speed = {"latency_ms": 1.0, "peak_memory_mb": 2.0}
    other = record("speed", key="o", model="fast", metrics=speed, provenance={"hardware": "H200"})
    cost = record("cost", key="c", model="fast", metrics={"macs": 1e9, "params": 1e6})
    score = record("evaluate", key="e", model="fast", metrics={"top1": 99.0})
    panels = panels_of([*suite(tasks=("classification",)), other, cost, score])
    assert [panel.axis.name for panel in panels] == ["macs", "params", "latency", "memory"]
    assert [("fast" in panel.names, panel.omitted) for panel in panels] == [(True, [])] * 2 + [(False, ["fast"])] * 2
    assert [round(max(x for x, _ in panel.points), 1) for panel in panels] == [4.6, 34.8, 121.0, 428.4]
