"""Figures of the papers: only printed numbers as reported, counted ones beside them, and none without a measurement."""

from dataclasses import replace

import pytest
from plots_support import assert_clean, texts_of

from results import paper_figures, papers
from results.rebuilt import rebuild

FAMILIES = ("HIRI-ViT", "HRViT", "MiT", "Swin")


@pytest.fixture(scope="module")
def printed():
    return papers.load()


@pytest.fixture
def counted(record):
    """The cost record of a row's network."""

    def make(model, params, macs, side=224, head=None, classes=1000, **job):
        task = "segmentation" if head else "classification"
        job = {"model": model, "num_classes": classes, "model_config": {}, "head_config": {}} | job
        metrics = {"params": params, "macs": macs, "activations": 1}
        common = {"metrics": metrics, "input_size": [side, side], "head": head, "job": job}
        return record("cost", task, model, key=f"{model}-{side}-{head}", **common)

    return make


@pytest.fixture
def records(counted):
    return [
        counted("hrvit_b1", 8.2e6, 14.2e9, 512, "segformer", 150),
        counted("mit_b0", 3.75e6, 8.39e9, 512, "segformer", 150),
        counted("hiri_vit_base", 54.4e6, 9.6e9, 448),
        counted("swin_base_patch4_window7_224", 87.8e6, 15.5e9),
    ]


@pytest.fixture
def figures(printed, records):
    return {figure.name: figure for figure in paper_figures.figures(rebuild(printed, records))}


def points(figure, series, axis):
    (found,) = (s for s in figure.series if s.name == series)
    return paper_figures._points(found, axis, figure.score)


def test_no_figure_without_a_measurement_of_its_rows(printed, counted):
    assert paper_figures.figures(rebuild(printed, [])) == []
    other = counted("resnet18", 1e6, 1e9)
    assert paper_figures.figures(rebuild(printed, [other])) == []
    upernet = counted("hrvit_b1", 35.9e6, 219e9, 512, "upernet", 150)  # of the same table, but not of the figure
    assert paper_figures.figures(rebuild(printed, [upernet])) == []
    swin = paper_figures.figures(rebuild(printed, [counted("swin_tiny_patch4_window7_224", 28e6, 4.5e9)]))
    assert [figure.name for figure in swin] == ["papers_hiri_vit_figure_6"]


def test_hrvit_5_has_the_rows_with_the_segformer_head(figures):
    figure = figures["papers_hrvit_figure_5"]
    assert {s.name: len(s.rows) for s in figure.series} == {"MiT": 4, "CSWin": 3, "HRViT": 3}
    first, *others = points(figure, "HRViT", paper_figures.FLOPS)
    assert (first.label, first.printed, first.counted, first.reported) == ("HRViT-b1", 14.6, 14.2, 45.88)
    assert [point.counted for point in others] == [None, None]


def test_hiri_vit_1_draws_only_what_tables_and_sentences_print(figures):
    figure = figures["papers_hiri_vit_figure_1"]
    swin = points(figure, "Swin-B", paper_figures.FLOPS)
    assert [(p.label, p.printed, p.reported) for p in swin] == [
        ("Swin-B at 224", 15.4, 83.5),
        ("Swin-B at 384", 47.1, 84.5),
        ("Swin-B at 448", 61.9, 84.9),
    ]
    # One second / the throughput is what the introduction prints: 1.17, 0.84 and 1.04 ms. It prints 3.95 ms, too.
    times = [(p.label, round(p.printed, 2)) for p in points(figure, "Swin-B", paper_figures.TIME)]
    assert times == [("Swin-B at 224", 1.18), ("Swin-B at 384", 3.95)]
    times = [round(p.printed, 3) for p in points(figure, "HIRI-ViT-B", paper_figures.TIME)]
    assert times == [0.842, 1.045, 1.136]
    assert "Swin-B at 448" in figure.caption


def test_hiri_vit_6_has_lines_for_families_with_three_rows_and_for_the_suites_own(figures):
    figure = figures["papers_hiri_vit_figure_6"]
    lines = {series.name: len(series.rows) for series in figure.series}
    assert {name: lines[name] for name in ("Swin", "PVTv2", "MaxViT", "HRFormer", "HRViT")} == {
        **{"Swin": 3, "PVTv2": 4, "MaxViT": 4, "HRFormer": 2, "HRViT": 1}
    }
    assert [lines[f"HIRI-ViT at {side}"] for side in (224, 384, 448)] == [3, 3, 3]
    assert "DeiT" not in lines
    assert f"{76 - sum(lines.values())} of 76 rows are not drawn" in figure.caption


def test_all_are_clean_and_tell_reported_from_counted(figures):
    for figure in figures.values():
        sketch = paper_figures.sketch(figure, FAMILIES)
        assert sketch.section == "papers"
        drawn = sketch.figure
        spots = [
            [(p.printed or p.counted, p.reported) for s in figure.series for p in points(figure, s.name, axis)]
            for axis in figure.axes
        ]
        assert_clean(drawn, spots)
        for axes, axis in zip(drawn.axes, figure.axes, strict=True):
            marks = [line for line in axes.lines if line.get_linestyle() == "None"]
            hollow = [line for line in marks if line.get_markerfacecolor() == "white"]
            found = [p for s in figure.series for p in points(figure, s.name, axis)]
            assert len(hollow) == sum(p.printed is not None for p in found)
            assert len(marks) - len(hollow) == sum(p.counted is not None for p in found)
            assert texts_of(axes)
        legend = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert legend == ["as the paper reports it", "reported accuracy at the cost counted here"]
        assert figure.title in sketch.alt


def test_a_training_of_our_own_is_marked(printed, records, record):
    trained = record(
        "evaluate",
        "segmentation",
        "hrvit_b1",
        data="ade20k@1",
        input_size=[512, 512],
        metrics={"mIoU": 41.0},
        job={"model": "hrvit_b1", "num_classes": 150},
    )
    figure = paper_figures.figures(rebuild(printed, [*records, trained]))[0]
    assert points(figure, "HRViT", paper_figures.FLOPS)[0].trained == 41.0
    drawn = paper_figures.sketch(figure, FAMILIES).figure
    assert [text.get_text() for text in drawn.legends[0].get_texts()][-1] == "trained here"


def test_a_row_without_a_size_is_one_line_and_the_rest_is_drawn(printed, records):
    rows = [
        replace(row, input_size=None) if (row.paper, row.table, row.row) == ("hiri_vit", "2", 47) else row
        for row in printed.rows
    ]
    figures = paper_figures.figures(rebuild(replace(printed, rows=rows), records))
    notes = [note for figure in figures for note in figure.notes]
    where = "hiri_vit, Table 2, row 47 (HIRI-ViT-B)"
    line = f"{where}: no input_size, so the paper's figures leave it out; write it into the file."
    assert notes == [line, line]  # of two figures; a report says it once
    assert len(figures) == 3
    assert len(points(figures[1], "HIRI-ViT-B", paper_figures.FLOPS)) == 2


def test_rows_of_a_paper_that_is_not_there_are_no_matter(printed, records):
    rows = [row for row in printed.rows if row.paper != "hiri_vit"]
    figures = paper_figures.figures(rebuild(replace(printed, rows=rows), records))
    assert [figure.name for figure in figures] == ["papers_hrvit_figure_5"]
