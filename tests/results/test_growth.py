"""Cost against resolution: the fitted exponents, what may stand in one plot, and that the plots are clean."""

import csv

import pytest
from plots_support import assert_clean, texts_of

from results import growth, growth_plots
from results.style import looks_of

SIDES = (224, 384, 512, 768, 1024, 1536, 2048)


@pytest.fixture
def grown(record):
    """Cost and speed records of a model whose costs are given functions of the number of pixels."""

    def make(model="m", cost=lambda n: 100.0 * n, ms=None, sides=SIDES, family="HiViT", hardware="CPU", **job):
        records = []
        for side in sides:
            common = {"model": model, "family": family, "input_size": [side, side], "head": "bare"}
            n = side * side
            content = {"key": f"c-{model}-{side}-{len(str(job))}", "metrics": {"macs": cost(n), "activations": 7.0 * n}}
            records.append(record("cost", "segmentation", job={"model": model, **job}, **content, **common))
            if ms:
                metrics = {"latency_ms": ms(n), "latency_ms_low": ms(n) * 0.9, "latency_ms_high": ms(n) * 1.2}
                content = {"key": f"s-{model}-{side}-{hardware}", "metrics": metrics | {"peak_memory_mb": 90 + n / 1e4}}
                content |= {"job": {"model": model, **job}, "provenance": {"hardware": hardware}}
                records.append(record("speed", "segmentation", **content, **common))
        return records

    return make


def fits(records):
    return {(curve.model, curve.quantity): curve for curve in growth.curves(records)}


def test_exponents_of_powers_and_of_a_curve_that_bends(grown):
    records = [*grown("linear"), *grown("square", cost=lambda n: 3.0 * n**2)]
    records += grown("bent", cost=lambda n: 1e4 * n + n**2)
    found = fits(records)
    for name, exponent in (("linear", 1), ("square", 2)):
        curve = found[name, "macs"]
        assert (curve.exponent, curve.exponent_last) == pytest.approx((exponent, exponent))
        assert curve.residual == pytest.approx(0, abs=1e-9)
    bent = found["bent", "macs"]
    assert 1.85 < bent.exponent < bent.exponent_last < 2
    assert bent.residual > 0.02
    assert bent.fitted(1024**2) == pytest.approx(1024**4, rel=0.2)


def test_two_sizes_are_no_curve_and_numbers_that_are_none_are_left_out(grown):
    assert growth.curves(grown(sides=(224, 512))) == []
    assert growth.curves(grown(sides=(224, 512, 1024), cost=lambda n: 0.0 if n == 224 * 224 else 1.0 * n))[0].quantity
    quantities = {c.quantity for c in growth.curves(grown(sides=(224, 384, 512), cost=lambda n: max(0.0, n - 6e4)))}
    assert quantities == {"activations"}


def test_what_failed_is_told_and_is_no_point(grown, record):
    records = grown(ms=lambda n: n / 1e4, sides=(224, 512, 1024))
    failed = {"status": "failed", "reason": "out of memory", "input_size": [2048, 2048], "head": "bare"}
    records.append(record("speed", "segmentation", "m", key="f", job={"model": "m"}, **failed))
    latency = fits(records)["m", "latency_ms"]
    assert [point.name for point in latency.points] == ["224x224", "512x512", "1024x1024"]
    assert latency.lacking == ("2048x2048 failed",)
    (overview, _) = growth_plots.sketches(growth.curves(records), ["HiViT"])
    assert any("No number: speed of m at 2048x2048 failed" in t.get_text().replace("\n", " ") for t in texts(overview))


def texts(sketch):
    return sketch.figure.texts


def test_timings_of_other_hardware_are_apart_and_not_in_one_plot(grown):
    records = [*grown("a", ms=lambda n: n / 1e3), *grown("b", ms=lambda n: n / 1e3)]
    records += grown("a", ms=lambda n: n / 1e6, hardware="GPU")[1::2]
    latencies = [c for c in growth.curves(records) if c.quantity == "latency_ms"]
    assert [(c.model, c.way[0]) for c in latencies] == [("a", "CPU"), ("a", "GPU"), ("b", "CPU")]
    shown = growth_plots._comparable(latencies)
    assert [(c.model, c.way[0]) for c in shown] == [("a", "CPU"), ("b", "CPU")]


def test_networks_of_one_name_are_not_joined(grown):
    records = [*grown("m", num_classes=19), *grown("m", num_classes=150, cost=lambda n: 200.0 * n)]
    curves = [c for c in growth.curves(records) if c.quantity == "macs"]
    assert [c.model for c in curves] == ["m #1", "m #2"]
    assert [c.exponent for c in curves] == pytest.approx([1, 1])
    # The size is no part of the network.
    same = [r for side in SIDES for r in grown("m", sides=(side,), model_config={"img_size": side})]
    assert [c.model for c in growth.curves(same) if c.quantity == "macs"] == ["m"]


def test_the_table_of_exponents(grown, tmp_path):
    (path,) = growth.write(grown(ms=lambda n: n**1.5), tmp_path)
    with path.open(newline="") as file:
        lines = {line["quantity"]: line for line in csv.DictReader(file)}
    assert tuple(lines["macs"]) == growth.SCHEMA
    assert lines["macs"] | {"sizes": ""} == {
        **{"task": "segmentation", "model": "m", "family": "HiViT", "head": "bare", "quantity": "macs", "sizes": ""},
        **{"exponent": "1.0000", "exponent_last": "1.0000", "residual": "0.0000"},
        **{"precision": "", "batch_size": "", "hardware": ""},
    }
    assert lines["macs"]["sizes"].split()[::6] == ["224x224", "2048x2048"]
    assert [lines["latency_ms"][name] for name in ("exponent", "hardware", "batch_size")] == ["1.5000", "CPU", "1"]
    assert growth.write([], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def families(grown, count):
    """Records of four families with two models each, and of as many others with one each."""
    own = ("HiViT", "HRViT", "HRFormer", "HIRI-ViT")
    records = []
    for i, family in enumerate(own):
        for j in range(2):
            power = 1 + 0.1 * i
            name = f"{family.lower()}_{('tiny', 'small')[j]}"
            records += grown(name, lambda n, j=j, p=power: 50 * (j + 1) * n**p, lambda n: n / 3e3 + 20, family=family)
    for i in range(count):
        records += grown(f"a_baseline_with_a_long_name_{i}", family=f"Baseline {i}", sides=SIDES[: 7 - i])
    return records


def points_of(figure):
    return [[tuple(p) for line in axes.lines for p in line.get_xydata()] for axes in figure.axes]


def test_which_plots_there_are_and_that_they_are_clean(grown):
    records = families(grown, 4)
    curves = growth.curves(records)
    sketches = list(growth_plots.sketches(curves, sorted({r.family for r in records})))
    quantities = ("macs", "activations", "memory", "latency")
    names = ["cost_growth", *(f"cost_growth_{q}" for q in quantities), "cost_growth_exponents"]
    assert [sketch.name for sketch in sketches] == names
    assert {sketch.section for sketch in sketches} == {"cost"}
    for sketch in sketches[:-1]:
        assert_clean(sketch.figure, [[(1, 1)]] * len(sketch.figure.axes))
    overview, macs = sketches[0].figure, sketches[1].figure
    assert [len(texts_of(axes)) for axes in overview.axes] == [8, 8, 4, 4]
    assert [axes.get_title(loc="left") for axes in macs.axes][-1] == "Others"
    assert len({axes.get_ylim() for axes in macs.axes}) == 1
    assert len(sketches[-1].figure.axes[0].get_yticklabels()) == 12
    assert "hivit_tiny 1.00" in sketches[1].alt


def test_a_single_model_needs_no_second_plot_of_all(grown):
    names = [sketch.name for sketch in growth_plots.sketches(growth.curves(grown()), ["HiViT"])]
    assert names == ["cost_growth", "cost_growth_exponents"]


def test_heads_and_tasks_have_plots_of_their_own(grown, record):
    other = [record("cost", key=f"o{side}", input_size=[side, side], metrics={"macs": 5.0 * side**2}) for side in SIDES]
    names = [sketch.name for sketch in growth_plots.sketches(growth.curves([*grown(), *other]), ["HiViT"])]
    assert "cost_growth_segmentation_bare" in names
    assert "cost_growth_classification" in names


def test_crowded_ends_do_not_meet(grown):
    """Thirty lines that end at the same cost, of names that are too long."""
    records = [r for i in range(30) for r in grown(f"a_model_with_a_rather_long_name_{i}", family=f"F{i % 9}")]
    group = growth_plots.Group("segmentation", "bare", {}, looks_of([f"F{i}" for i in range(9)]))
    curves = [curve for curve in growth.curves(records) if curve.quantity == "macs"]
    figure = growth_plots._figure(group, "All of them", "", [curves], ["All"], ["billions"])
    assert_clean(figure, [[(1, 1)]])
    (axes,) = figure.axes
    shown = len(texts_of(axes))
    assert 10 < shown <= 30
    assert shown == 30 or any("Without a label" in text.get_text() for text in figure.texts)
